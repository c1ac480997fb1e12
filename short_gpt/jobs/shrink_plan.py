"""The request to `shrink`, what follows from the opened model, and the plan in words."""

from __future__ import annotations

import filecmp
import math
import os
import re
import secrets
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from llama.checkpoint.meta import CONVERSION
from llama.files import FILES, check_new, check_output, contents, read_json, read_marker
from llama.sources import FETCHED, Named, find_source, is_gguf
from llama.sources import Source as Weights
from short_gpt.checkpoints.gguf import check_architecture
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.prune import layers_of
from short_gpt.checkpoints.target import check_format, check_new_gguf, check_one_file
from short_gpt.data.texts import source_names
from short_gpt.healing import choosing, require_packages
from short_gpt.healing.choosing import MAX_WINDOWS, REFIT_PASSES, TRIAL_WINDOWS
from short_gpt.healing.job import keeps
from short_gpt.healing.refit_state import plan_of
from short_gpt.jobs.dial import Dial, Shrinking
from short_gpt.jobs.former import HealingWindows, Running, TextSource
from short_gpt.jobs.healing import CLOSED_WINDOWS
from short_gpt.jobs.inputs import Notify, Tasks
from short_gpt.jobs.page import is_page
from short_gpt.jobs.shrink_models import ANSWER, TIMED_TOKENS, TURNS, InMemory, Opened, Sizes
from short_gpt.jobs.shrunk import report_of
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import format_bytes
from short_gpt.runtime.progress import duration
from short_gpt.runtime.state import is_state
from short_gpt.selection.methods import AUTO, BY_LOSS, SEARCHED
from short_gpt.selection.search import most_layers_run
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import AT_ONCE, STREAMED, TIMED, count_of_own
from short_gpt.wrappers.short_hf import ShortHFModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model: TypeAlias = "str | PathLike[str] | PreTrainedModel"
WINDOW = 512  # tokens
LONG_PLAN = 1800  # seconds after which a plan says what takes less
STATE, HEALING, WRITTEN = "state.json", "healing", "written"  # in the folder
COMMAND = f"{WRITTEN}/command.txt"  # by which `is_placed` knows the run
# files of a run in the folder: these, parts of the state, own texts, locks, unfinished files
OWN_TEXTS = r"self-[0-9a-f]+\.json"
LEFT = re.compile(rf"{re.escape(STATE)}(\.[^/]+)?|{OWN_TEXTS}")
HIDDEN = re.compile(r"(.+/)?\.[^/]+\.(lock|writing-[0-9a-f]{8}(/.+)?)")


@dataclass(frozen=True)
class ShrinkRequest:
    """What the caller set."""

    model: Model
    out: Path
    dial: Dial
    settings: Shrinking
    texts: TextSource
    cut: HealingWindows
    tasks: Tasks
    opening: OpenOptions
    streaming: Running
    overwrite: bool
    notify: Notify

    @cached_property
    def source(self) -> Weights | None:
        """Of the model; None of a loaded one."""
        return find_source(self.model) if isinstance(self.model, str | PathLike) else None

    @property
    def method(self) -> str:
        """That chooses the layers."""
        return self.settings.method or ("bi" if self.streaming.stream else AUTO)

    @property
    def to(self) -> str:
        """The format to write: hf, meta or gguf."""
        if self.streaming.stream and self.source is not None:
            return "meta" if self.source.kind == "meta" else "hf"
        return self.settings.to or ("gguf" if is_gguf(self.out) else "hf")

    @property
    def folder(self) -> Path:
        """What a killed run continues from."""
        return Path(f"{self.out}.shrinking")

    @property
    def command(self) -> str:
        """The same as a command line."""
        name = "MODEL" if self.source is None else str(self.model)
        demo = isinstance(self.model, Named)  # whose command names these by default
        words = ["short-gpt", *(["demo"] if demo else ["shrink", name]), str(self.out)]
        groups = (self.dial, self.settings, self.texts, self.cut, self.tasks, self.opening)
        for group in (*groups, self.streaming):
            usual = TextSource("self") if group is self.texts else type(group)()
            for field in group.taken():
                value = getattr(group, field.name)
                if not isinstance(value, Named) and value != getattr(usual, field.name):
                    words += [f"--{field.name}", *([] if value is True else [str(value)])]
        return shlex.join(words)

    def check(self) -> None:
        """Raises errors that are known before a model is loaded, the cheapest first."""
        for group in (self.dial, self.settings, self.cut, self.tasks):
            group.check()
        self.streaming.check_bounds()
        if self.settings.minutes is not None:
            require_packages()
        self._check_folder()
        replacing: Any = {"marker": PROVENANCE, "overwrite": self.overwrite}
        if is_gguf(self.out):
            check_one_file(self.out)
            check_new_gguf(self.out, overwrite=self.overwrite)
            check_output(report_of(self.out), overwrite=True, replaces=is_page)
        else:
            check_new(self.out, **replacing)
        n, source = self.dial.n, self.source  # which may be fetched now
        if source is not None and not is_gguf(self.out):
            check_new(self.out, **replacing, source=source.path)
        elif source is not None and source.kind == "gguf":
            check_new_gguf(self.out, source=source.path, overwrite=self.overwrite)
            check_architecture(str(source)).check()
        if source is not None and n is not None and (count := layers_of(source)) is not None:
            check_count(n, count, most=count - 2)
        if self.streaming.stream:
            self._check_streamed()
        check_format(self.out, self.to)
        self.texts.check(self.cut.eval_data)

    @property
    def names(self) -> list[str]:
        """Of output, source, texts and other files."""
        texts = [source_names(own) for own in (self.texts.data, self.cut.eval_data) if own]
        others = (self.source, self.opening.tokenizer_path)
        return [str(self.out), *chain(*texts), *(str(other) for other in others if other)]

    @property
    def built(self) -> Path:
        """The model while it is written."""
        return self.folder / WRITTEN / self.out.name

    def is_placed(self) -> bool:
        """Whether this run was killed after ``out`` was complete: what it wrote says the same."""
        command = self.folder / COMMAND
        if not command.is_file() or command.read_text(encoding="utf-8") != self.command:
            return False
        if is_gguf(self.out):
            there = self.out.is_file() and self.built.is_file()
            return there and filecmp.cmp(self.out, self.built, shallow=False)
        ours, theirs = self.built / PROVENANCE, self.out / PROVENANCE
        return ours.is_file() and theirs.is_file() and read_marker(ours) == read_marker(theirs)

    def clear(self, below: str = "") -> None:
        """Deletes what runs keep in the folder, or in a folder ``below``, and nothing else."""
        names = [name for name in contents(self.folder) if name.startswith(below)]
        own = [name for name in names if self._is_own(name)]
        if own == names and not below and not self.folder.is_symlink():
            # in one step: a kill leaves what the next writer of ``out`` removes
            hidden = self.folder.with_name(f".{self.out.name}.writing-{secrets.token_hex(4)}")
            with suppress(OSError):  # such as another file system mounted there
                shutil.rmtree(self.folder.rename(hidden), ignore_errors=True)
                return
        for path in [self.folder / name for name in own]:
            if path.is_symlink() or path.is_file():
                path.unlink()
        for folder, _, _ in os.walk(self.folder / below, topdown=False):
            with suppress(OSError):  # it holds a file of the user's
                os.rmdir(folder)

    def _is_own(self, name: str) -> bool:
        """Whether a run wrote what has this name in the folder."""
        first, _, rest = name.partition("/")
        if HIDDEN.fullmatch(name) or name in (HEALING, WRITTEN, COMMAND):
            return True
        if not rest:
            path = self.folder / name
            return bool(LEFT.fullmatch(name)) and path.is_file() and is_state(path)
        if first == HEALING:
            return keeps(rest)
        model, _, inside = rest.partition("/")
        if first != WRITTEN or model not in (self.out.name, f"{self.out.stem}-hf"):
            return False
        if model != self.out.name and any(fnmatch(inside, pattern) for pattern in FETCHED):
            return True  # of a tokenizer alone, which has no marker
        markers = [self.folder / WRITTEN / model / name for name in (PROVENANCE, CONVERSION)]
        known = [read_json(marker).get(FILES, []) for marker in markers if marker.is_file()]
        return not inside or inside in (*chain(*known), PROVENANCE, CONVERSION)

    def _check_folder(self) -> None:
        names = contents(self.folder)
        if others := [name for name in names if not self._is_own(name)]:
            raise ShortGPTError(
                f"{self.folder} holds {others[0]}, which is not from a run of shrink and would be "
                "deleted with the folder: move it away, or choose another output"
            )

    def _check_streamed(self) -> None:
        if self.source is None:
            raise ShortGPTError("`stream` reads a checkpoint: give its name, not a loaded model")
        if self.texts.own:
            raise ShortGPTError(STREAMED)
        asked: dict[str, object] = {"method": self.method in (AUTO, *BY_LOSS, "angular_all")}
        asked |= {"tasks": self.tasks.tasks}
        asked |= {"max_perplexity_ratio": self.dial.max_perplexity_ratio}
        asked |= {"minutes": self.settings.minutes, "prompt": self.settings.prompt}
        if names := [name for name, value in asked.items() if value]:
            raise ShortGPTError(
                f"`{names[0]}` needs the model in memory, and `stream` holds one layer: leave one "
                "of them out"
            )
        if self.settings.to not in (None, self.to) or is_gguf(self.out):
            raise ShortGPTError(
                f"a streamed model is written in its own format, {self.to}: leave out `to`, and "
                "name a directory; `short-gpt convert` makes another format of it"
            )


@dataclass(frozen=True)
class ShrinkContext:
    """What follows from the opened model."""

    opened: Opened
    size: int  # tokens of a window
    n: int | None  # layers to remove; None finds how many the perplexity allows
    limit: int | None  # windows to learn from at most; None is all
    prompt: str  # that every state of the model answers; empty of a streamed one
    parameters: Sizes
    stored: Sizes  # bytes as they are written
    caches: list[int]  # bytes of each layer's KV cache
    a_pass: float  # seconds of a window through the model

    @property
    def count(self) -> int:
        """Layers of the original model."""
        return len(self.parameters[0])

    @property
    def probe(self) -> list[int]:
        """A window of any tokens, which do not change the time."""
        return [i % self.opened.short.decoder.vocab_size for i in range(self.size)]

    @property
    def in_memory(self) -> ShortHFModel:
        short = self.opened.short
        assert isinstance(short, ShortHFModel)  # whatever needs it has refused a streamed one
        return short

    @classmethod
    def of(cls, asked: ShrinkRequest, opened: Opened) -> ShrinkContext:
        short, dial, minutes = opened.short, asked.dial, asked.settings.minutes
        short.check_weights()
        size = asked.cut.size or min(WINDOW, short.decoder.max_seq_len)
        many = 3 * CLOSED_WINDOWS if asked.texts.own else None
        limit = asked.cut.max_windows or (CLOSED_WINDOWS if minutes is None else many)
        parameters, stored = opened.sizes()
        itemsize = 2 if opened.to == "gguf" else opened.dtype.itemsize  # llama.cpp's is float16
        caches = [dial.batch * own.size(dial.context, itemsize) for own in opened.caches()]
        sizes, rest = parameters
        if dial.memory is not None:
            sizes, rest = [a + b for a, b in zip(stored[0], caches, strict=True)], stored[1]
        n = None if dial.max_perplexity_ratio is not None else dial.count(sizes, rest)
        prompt = ""
        if isinstance(opened, InMemory):
            prompt = opened.prompt(asked.settings.prompt)
            opened.asked(prompt)  # raises for one that is too long
        a_pass = short.seconds_a_window([i % short.decoder.vocab_size for i in range(size)])
        return cls(opened, size, n, limit, prompt, parameters, stored, caches, a_pass)


def plan(asked: ShrinkRequest, known: ShrinkContext) -> str:
    """What will be done, roughly how long each part takes, and how much memory."""
    parts = _seconds(asked, known)
    total, (sizes, rest), n = sum(parts.values()), known.parameters, known.n
    fitted = min(known.limit or CLOSED_WINDOWS, CLOSED_WINDOWS)
    windows, folder = [known.probe] * fitted, asked.folder / HEALING
    refit = plan_of(known.opened.short, windows, folder=folder)
    before, gone = sum(sizes) + rest, sum(sorted(sizes)[: n or 0])
    kept = f": {before / 1e6:.1f} M parameters become {(before - gone) / 1e6:.1f} M" if n else ""
    times = ", ".join(f"{name} {duration(time)}" for name, time in parts.items() if time)
    disk = f" and {format_bytes(refit.disk)} on disk" if refit.disk else ""
    tasks = "run the tasks, " if asked.tasks.tasks else ""
    go = "goes" if n == 1 else "go"
    lines = [f"{n or 'some'} of {known.count} layers {go} ({asked.dial.name}){kept}"]
    lines += [f"a window of {known.size} tokens takes {duration(known.a_pass)}: {times}"]
    lines += [
        f"in all about {duration(total)}, and the time to {tasks}write the model and read it again",
        f"the refit takes up to {format_bytes(refit.total)} of the machine's memory{disk}",
    ]
    if total > LONG_PLAN:
        others = "" if asked.method == "bi" else "method bi, "
        quick = (16 * (1 + REFIT_PASSES) + 3 * 8) * known.a_pass * min(1.0, 128 / known.size)
        lines += [
            f"a first try in about {duration(quick)}, without what is written: {others}size "
            "128, max_windows 16, eval_windows 8"
        ]
    return "\n".join(lines)


def _seconds(asked: ShrinkRequest, known: ShrinkContext) -> dict[str, float]:
    a_pass, count, method, n = known.a_pass, known.count, asked.method, known.n
    few, rounds = TRIAL_WINDOWS * a_pass / count, 1 if method == "perplexity" else n or count // 2
    auto = choosing.BUDGET * choosing.BARE_PASS * a_pass
    scored = min(known.limit or MAX_WINDOWS, MAX_WINDOWS) * a_pass
    searched = few * most_layers_run(count, rounds)
    chosen = auto if method == AUTO else searched if method in SEARCHED else scored
    parts: dict[str, float] = {}
    if own := asked.texts.own:
        sources = source_names(asked.texts.data)
        extra = asked.cut.eval_data is None and own == sources
        each = count_of_own(known.limit, len(sources), extra=extra)
        steps = len(own) * math.ceil(each / AT_ONCE) * known.size
        parts["writing its own text"] = steps * _seconds_a_token(known, min(AT_ONCE, each))
    if n is None:
        tries = math.ceil(math.log2(count)) * (REFIT_PASSES * 3 + 1) * MAX_WINDOWS / 4 * a_pass
        parts["finding how many layers"] = few * most_layers_run(count, count - 2) + tries
        chosen = 0.0 if method == "sleb" else chosen  # the same search
    parts["choosing them, at most" if method == AUTO else "choosing them"] = chosen
    parts["the refit"] = REFIT_PASSES * min(known.limit or CLOSED_WINDOWS, CLOSED_WINDOWS) * a_pass
    parts["training"] = 60 * (asked.settings.minutes or 0)
    parts["judging"] = 3 * asked.cut.eval_windows * a_pass
    if known.prompt:
        written = 3 * ANSWER + (1 + TURNS) * 2 * TIMED_TOKENS  # and the speeds
        parts["three completions"] = written * _seconds_a_token(known, 1)
    return parts


def _seconds_a_token(known: ShrinkContext, texts: int) -> float:
    """For so many texts together, timed on a few."""
    times = list[float]()

    def likeliest(logits: torch.Tensor) -> torch.Tensor:  # (B, V) to (B,)
        tokens = logits.argmax(-1)
        tokens[0].item()  # which a device may not have computed until it is read
        times.append(perf_counter())
        return tokens

    known.in_memory.continued([[0]] * texts, TIMED, likeliest)
    return (times[-1] - times[0]) / (TIMED - 1)
