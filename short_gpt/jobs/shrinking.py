"""From a model to a smaller one that works, in one call: choose, refit, train, judge, write."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from llama.io.files import check_new, check_output, new_directory
from llama.io.sources import Source as Weights
from llama.io.sources import find_source, is_gguf
from short_gpt.checkpoints.gguf import about_types, check_saved
from short_gpt.checkpoints.records import PROVENANCE
from short_gpt.checkpoints.target import check_format, check_new_gguf, out_paths
from short_gpt.data.disjoint import without_overlap
from short_gpt.data.texts import OWN, source_names, texts
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.paired import difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import (
    DistillSettings,
    HealingEvidence,
    HealingJob,
    RefitSettings,
    Source,
    Step,
    choosing,
)
from short_gpt.healing.choosing import FEW, FIRST, MOST, REFIT, pruned_losses
from short_gpt.healing.lora import require_packages, seconds_a_step
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.texts import Learning
from short_gpt.jobs.comparing import Comparison, windows_digest
from short_gpt.jobs.dial import Dial, Shrinking
from short_gpt.jobs.healing import CLOSED_WINDOWS
from short_gpt.jobs.inputs import (
    Data,
    Notify,
    Running,
    Tasks,
    TextSource,
    about_own,
    ignore,
    source_of,
)
from short_gpt.jobs.page import is_page, shrunk_page
from short_gpt.jobs.saving import Hub, interruptible
from short_gpt.jobs.settings import HealingWindows, takes_fields
from short_gpt.jobs.shrink_models import ANSWER, InMemory, Opened, Streamed, tensor_bytes
from short_gpt.jobs.shrunk import REPORT, Look, Shrunk, next_steps, report_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import duration
from short_gpt.runtime.state import StateFile, hold, joined
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import AUTO, BY_LOSS, METHODS, SEARCHED, choose
from short_gpt.selection.search import most_layers_run
from short_gpt.wrappers.opening import of_source, open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import AT_ONCE, COUNT, STREAMED, TIMED, writes
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.streamed_llama import StreamedLlama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model: TypeAlias = "str | PathLike[str] | PreTrainedModel"
WINDOW = 512  # tokens
LONG = 1800  # seconds after which a plan says what takes less
CHECKS, HELD = 8, 16  # evaluations of a training, each on at most so many windows


@takes_fields("shrink")
@interruptible()
def shrink(
    model: Model,
    out: str | PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dial: Dial = Dial(),
    data: Data = TextSource("self"),
    windows: HealingWindows = HealingWindows(),
    settings: Shrinking = Shrinking(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    streaming: Running = Running(),
    hub: Hub = Hub(),
    overwrite: bool = False,
    notify: Notify = ignore,
    **fields: Any,
) -> Shrunk:
    """Writes a smaller model that works: layers chosen and removed, the rest healed and judged.

    Interrupted or killed, the same call continues from the folder ``OUT.shrinking``, which is gone
    once ``out`` is whole. ``out`` gets a page with all of this, or a GGUF file has it beside it.

    Args:
        model: Hugging Face directory or hub id, Meta directory or GGUF file; or a loaded model of
            transformers, which is shrunk in place too.
        out: new directory, or GGUF file if it ends with .gguf.
        tokenizer: of a loaded model.
        dial: how small.
        data: texts that choose the layers and heal; "self" is what the model itself writes.
        windows: how texts are cut, and which evaluate.
        settings: method, minutes of training, format and so on.
        tasks: also run on the original, the pruned and the healed model.
        opening: how the model is opened.
        streaming: whether one layer at a time is in memory: for a Llama, which Block Influence or
            another score chooses layers of, and which is written in its own format.
        hub: where the result is uploaded.
        overwrite: replace an earlier output.
        notify: called with what will be done and how long it takes, before it is.
        fields: single settings by their names, in place of objects: ``ratio=0.5``,
            ``method="bi"``, ``size=256``, ``dry_run=True``.

    Raises:
        ShortGPTError: a setting, the model or the texts are refused.
        FileExistsError: ``out`` exists.

    Example:
        >>> print(shrink("llama-2-7b", "llama-2-5b", ratio=0.25))  # doctest: +SKIP
    """
    how = (dial, settings, source_of(data), windows, tasks, opening, streaming)
    run = _Run(Path(out), *how, overwrite, notify)
    run.check(model)
    hub.check(run.out, run.to)
    # where nothing is there yet, nobody works either
    lock = hold(run.folder) if run.out.parent.is_dir() and not settings.dry_run else None
    run.derive(run.opened_model(model, tokenizer))
    if settings.dry_run:
        return Shrunk(run.out, run.plan)
    notify(run.plan)
    try:
        result = run.done()
        shutil.rmtree(run.folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # what is kept to continue from stays
            run.folder.rmdir()
        del lock
    return replace(result, address=hub.push(run.out))  # a refusal leaves the result alone


@dataclass
class _Run:
    """One shrinking: what it reads and writes, and what was measured so far."""

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

    def check(self, model: Model) -> None:
        """Raises what can be known before a model is loaded: the cheapest first."""
        for group in (self.dial, self.settings, self.cut, self.tasks):
            group.check()
        self.streaming.check_bounds()
        self.method = self.settings.method or ("bi" if self.streaming.stream else AUTO)
        self.to = self.settings.to or ("gguf" if is_gguf(self.out) else "hf")
        if self.settings.minutes is not None:
            require_packages()
        replacing: Any = {"marker": PROVENANCE, "overwrite": self.overwrite}
        if is_gguf(self.out):
            check_new_gguf(self.out, overwrite=self.overwrite)
            check_output(report_of(self.out), overwrite=True, ours=is_page)
        else:
            check_new(self.out, **replacing)
        self.source: Weights | None = None  # of a loaded model
        if isinstance(model, str | PathLike):
            self.source = find_source(model)
            if not is_gguf(self.out):
                check_new(self.out, **replacing, source=self.source.path)
        if self.streaming.stream:
            self._check_streamed()
        check_format(self.out, self.to)
        self.texts.kinds()  # reads the first text of each
        judges = self.cut.eval_data
        for name in [] if judges is None else source_names(judges):
            texts(name, column=self.texts.column)
        self.folder = Path(f"{self.out}.shrinking")  # what a killed run continues from

    def _check_streamed(self) -> None:
        """Raises for all that needs the model in memory."""
        if self.source is None:
            raise ShortGPTError("`stream` reads a checkpoint: give its name, not a loaded model")
        if {*source_names(self.texts.data)} & {*OWN}:
            raise ShortGPTError(STREAMED)
        asked: dict[str, object] = {
            "method": self.method in (AUTO, *BY_LOSS),
            "tasks": self.tasks.tasks,
        }
        asked |= {"max_perplexity_ratio": self.dial.max_perplexity_ratio}
        asked |= {"minutes": self.settings.minutes, "prompt": self.settings.prompt}
        if names := [name for name, value in asked.items() if value]:
            raise ShortGPTError(
                f"`{names[0]}` needs the model in memory, and `stream` holds one layer: leave one "
                "of them out"
            )
        own = "meta" if self.source.kind == "meta" else "hf"
        if (self.settings.to or own) != own or is_gguf(self.out):
            raise ShortGPTError(
                f"a streamed model is written in its own format, {own}: leave out `to`, and name "
                "a directory; `short-gpt convert` makes another format of it"
            )
        self.to = own

    def opened_model(self, model: Model, tokenizer: PreTrainedTokenizerBase | None) -> Opened:
        """The original model."""
        if self.source is None:
            short = ShortHFModel(model, tokenizer=tokenizer)
        elif not self.streaming.stream:
            short = open_trainable(str(self.source), self.opening)
        else:
            size = self.cut.size or WINDOW
            own = of_source(self.opening, self.source, stream=True)
            streamed = self.streaming.open(str(self.source), own, size)
            assert isinstance(streamed, StreamedLlama)
            return Streamed(streamed, self.to)
        return InMemory(short, self.source, self.to, self.opening)

    def derive(self, opened: Opened) -> None:
        """Derives the rest of the settings from the original model."""
        self.opened, self.short = opened, opened.short
        self.judged, _ = self.short.runs_in()
        self.size = self.cut.size or min(WINDOW, self.short.decoder.max_seq_len)
        self.count, self.prompt = len(self.short.kept), opened.prompt(self.settings.prompt)
        self.own = [name for name in source_names(self.texts.data) if name in OWN]
        minutes, many = self.settings.minutes, 3 * CLOSED_WINDOWS
        limit = CLOSED_WINDOWS if minutes is None else many if self.own else None
        self.limit = self.cut.max_windows or limit  # windows to learn from
        self.fitted = min(self.limit or CLOSED_WINDOWS, CLOSED_WINDOWS)  # of the refit, at most
        self.refit = RefitSettings(max_windows=CLOSED_WINDOWS)
        self.probe = [i % self.short.decoder.vocab_size for i in range(self.size)]
        self.parameters, self.stored = opened.sizes()
        itemsize = 2 if opened.to == "gguf" else opened.dtype.itemsize  # llama.cpp's is float16
        self.cache = opened.cache_width() * self.dial.context * self.dial.batch * itemsize
        sizes, rest = self.parameters
        if self.dial.memory is not None:
            sizes, rest = [size + self.cache for size in self.stored[0]], self.stored[1]
        open_ended = self.dial.max_perplexity_ratio is not None
        self.n = None if open_ended else self.dial.count(sizes, rest)

    @property
    def in_memory(self) -> ShortHFModel:
        assert isinstance(self.short, ShortHFModel)  # what needs it refuses a streamed one before
        return self.short

    @cached_property
    def plan(self) -> str:
        """What will be done, and about how long each part takes."""
        a_pass, count = self.short.seconds_a_window(self.probe), self.count
        method = self.method
        few, rounds = FEW * a_pass / count, 1 if method == "perplexity" else self.n or count // 2
        search = few * most_layers_run(count, rounds)
        auto = (self.settings.budget or choosing.BUDGET) * FIRST * a_pass
        scored = min(self.limit or MOST, MOST) * a_pass
        chosen = auto if method == AUTO else search if method in SEARCHED else scored
        parts = {"writing its own text": self._seconds_of_own_text()} if self.own else {}
        if self.n is None:
            tries = math.ceil(math.log2(count)) * (REFIT * 3 + 1) * MOST / 4 * a_pass
            parts["finding how many layers"] = few * most_layers_run(count, count - 2) + tries
        parts["choosing them, at most" if method == AUTO else "choosing them"] = chosen
        parts["the refit"] = REFIT * self.fitted * a_pass
        parts["training"] = 60 * (self.settings.minutes or 0)
        parts["judging"] = 3 * self.cut.eval_windows * a_pass
        if self.prompt:
            parts["three completions"] = 3 * 2 * ANSWER * self._seconds_a_token(1)
        times = [f"{name} {duration(time)}" for name, time in parts.items() if time]
        read = Learning([self.probe] * self.fitted, [], [])
        memory = self.refit.plan(self.short, read, None).describe()
        sizes, rest = self.parameters
        before, n = sum(sizes) + rest, self.n or "some"
        after = before - sum(sorted(sizes)[: self.n or 0])
        kept = f": {before / 1e6:.1f} M parameters become {after / 1e6:.1f} M" if self.n else ""
        lines = [f"{n} of {count} layers go ({self.dial.name}){kept}"]
        lines += [f"a window of {self.size} tokens takes {duration(a_pass)}: {', '.join(times)}"]
        lines += [f"in all about {duration(sum(parts.values()))}; {memory}"]
        if sum(parts.values()) > LONG:
            others = "" if method == "bi" else "method bi, "
            quick = (16 * (1 + REFIT) + 3 * 8) * a_pass * min(1.0, 128 / self.size)
            lines += [
                f"a first try in about {duration(quick)}, without what is written: {others}size "
                "128, max_windows 16, eval_windows 8"
            ]
        return "\n".join(lines)

    def _seconds_of_own_text(self) -> float:
        share = -(-(self.limit or COUNT) // len(source_names(self.texts.data)))
        texts = len(self.own) * share
        step = self._seconds_a_token(min(AT_ONCE, texts))
        return step * self.size * math.ceil(texts / AT_ONCE)

    def _seconds_a_token(self, texts: int) -> float:
        """For so many texts at once, timed on a few."""
        times = list[float]()

        def likeliest(logits: torch.Tensor) -> torch.Tensor:  # (B, V) to (B,)
            times.append(perf_counter())
            return logits.argmax(-1)

        self.in_memory.continued([[0]] * texts, TIMED, likeliest)
        return (times[-1] - times[0]) / (TIMED - 1)

    def done(self) -> Shrunk:
        """Does all of it; continues what the folder holds."""
        short, windows = self.short, self._read()
        digests = {"training": windows.training, "evaluation": windows.evaluation}
        settings = {**asdict(self.dial), **asdict(self.settings), **asdict(self.tasks)}
        texts = {name: windows_digest(own) for name, own in digests.items()}
        identity = joined(short.identity(), texts, settings)
        file, calibration = self.folder / "state.json", windows.training[:MOST]
        layers, choice = self._chosen(calibration, StateFile(file, identity, folder=self.folder))
        if self.opened.in_place:
            check_saved(str(self.source), layers, short.importance.block_influence.tolist())
        how = {"method": METHODS[self.method], "eval_data": self.cut.eval_data}
        short.evidence |= {**how, "size": self.size}
        looks = {"original": self._look("original")}
        with short.without_layers(layers):
            looks["pruned"] = self._look("pruned")
            steps = self._steps()
        work = self.folder / "healing"
        kept: Any = {"work_dir": work, "resume": work.is_dir() and any(work.iterdir())}
        job = HealingJob(short, windows, layers, settings=steps, notify=self.notify, **kept)
        importance, evidence = short.importance, job.run()
        looks["healed"] = self._look("healed")
        built, in_place = self._write(evidence.perplexity), self.opened.in_place
        remarks, is_llama = self._remarks(evidence), self.opened.is_llama
        if in_place:  # some of the changed tensors may have another type
            look, size = looks["healed"], tensor_bytes(built)
            looks["healed"] = look._replace(size=size, memory=look.memory - look.size + size)
        del short, job, self.short, self.opened  # which makes room for what is read again
        result = Shrunk(
            self.out,
            self.plan,
            self.count,
            layers,
            self.method,
            {
                kind: {state: p for name, p in own.items() if (state := _state(name)) in looks}
                for kind, own in evidence.by_kind.items()
            },
            looks,
            self.prompt,
            remarks + (self._rounded(built, evidence) if in_place else []),
            evidence.steps,
            choice,
            importance,
            next_steps(self.out, self.to, is_llama=is_llama),
            source=None if self.source is None else str(self.source),
            windows=(len(windows.training), len(windows.evaluation), self.size),
        )
        self._place(built, result)
        return result

    def _chosen(
        self, calibration: Sequence[Sequence[int]], saved: StateFile
    ) -> tuple[list[int], Mapping[str, Any]]:
        """The layers to remove, and how `auto` chose them."""
        if self.short.streamed:
            self.cells = Cells(saved)
            measured = partial(self.short.measure, calibration)
            scores = self.cells.value("importance", lambda: measured().to_dict())
            self.short.importance = Importance.from_dict(scores)
            assert self.n is not None
            chosen = choose(self.short.importance, self.n, method=self.method, seed=self.cut.seed)
            return chosen, {}
        how: Any = {"few": FEW, "state": saved, "budget": self.settings.budget}
        sets = Comparison(self.in_memory, calibration, self.windows.evaluation, **how)
        self.cells, self.short.importance = sets.cells, sets.importance
        n = self.n or self.cells.value("how many", partial(self._within, sets, calibration))
        layers = sets.layers(self.method, n, self.cut.seed)
        return layers, sets.choice(n) if self.method == AUTO else {}

    def _read(self) -> Learning:
        """The windows; what the model writes is kept in the folder."""
        short, cut, texts = self.short, self.cut, self.texts
        self.folder.mkdir(parents=True, exist_ok=True)
        place = (texts.split, texts.column, texts.max_texts, cut.seed)
        self.windows = Source(texts.data, cut.eval_data, *place).windows(
            short.encode,
            self.size,
            bos=cut.bos or short.bos,
            limit=self.limit,
            eval_windows=cut.eval_windows,
            drop_overlap=cut.drop_overlap,
            validate=self.settings.minutes is not None,
            write=writes(short, self.size, seed=cut.seed, beside=self.folder / REPORT),
        )
        return self.windows

    def _remarks(self, evidence: HealingEvidence) -> list[str]:
        """What must be known of the numbers."""
        said = [about_own(self.texts.data, self.cut.eval_data), self.windows.left_out]
        if evidence.worse:
            said.append(f"WORSE: healing changes the loss by {evidence.change}; give more text")
        dtype = self.opened.dtype
        if self.judged != dtype and not self.opened.in_place:
            said.append(f"judged in {self.judged}, written in {dtype}")
        return [remark for remark in said if remark]

    def _rounded(self, built: Path, evidence: HealingEvidence) -> list[str]:
        """What the types of a GGUF file, in which the changed tensors are rounded, cost."""
        again = open_trainable(str(built), self.opening)
        written = together(losses(again.decoder, self.windows.evaluation))
        change = difference([evidence.perplexity["healed"]], [written])
        said = [f"writing it in the file's own types changes the loss by {change}"]
        return [*said, *filter(None, [about_types(str(self.source), built)])]

    def _within(self, sets: Comparison, every: Sequence[Sequence[int]]) -> int:
        """The most layers, of a greedy search's, whose refitted model keeps the ratio."""
        short, held = self.in_memory, max(2, len(every) // 4)
        fit, ratio = every[:-held], self.dial.max_perplexity_ratio or 1.0
        judging, _ = without_overlap(every[-held:], fit)
        order = sets.layers("sleb", self.count - 2)
        original = together(self.cells.losses("original", lambda: losses(short.decoder, judging)))

        def rise(n: int) -> float:
            run = partial(pruned_losses, short, order[:n], judging, fit_on=fit)
            return together(self.cells.losses(f"without {n}", run)).value / original.value

        low, high = 0, self.count - 2  # the ratio holds at the first
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if rise(middle) <= ratio else (low, middle - 1)
        if not low:
            raise ShortGPTError(
                f"{self.dial.name}: without layer {order[0]} alone, refitted, the perplexity rises "
                f"by {rise(1):.3f} already; allow more"
            )
        return low

    def _steps(self) -> list[Step]:
        """The refit, and a distillation of so many steps as take the minutes."""
        if self.settings.minutes is None:
            return [self.refit]
        recipe = recipe_for(self.in_memory.model.config, "small", seed=self.cut.seed)
        steps = self.cells.value(
            "steps", partial(self._steps_in, 60 * self.settings.minutes, recipe)
        )
        every = max(1, steps // CHECKS)
        own = replace(recipe, steps=steps, warmup=min(recipe.warmup, steps // 8), eval_every=every)
        return [self.refit, DistillSettings(own)]

    def _steps_in(self, seconds: float, recipe: Recipe) -> int:
        """Training steps that fit, by one that is timed; the teacher reads each window before."""
        a_pass = self.short.seconds_a_window(self.probe)
        step = seconds_a_step(self.in_memory, self.probe, recipe) + recipe.batch * a_pass
        return max(1, int((seconds - (CHECKS + 1) * HELD * a_pass) / step))

    def _look(self, state: str) -> Look:
        """Measured once; the text is that of the model as it is now."""
        return Look(*self.cells.value(f"look {state}", partial(self._measured, state)))

    def _measured(self, state: str) -> list[Any]:
        short, opened = self.short, self.opened
        numbers, size = (
            rest + sum(each[i] for i in short.present)
            for each, rest in (self.parameters, self.stored)
        )
        memory = size + self.cache * len(short.present)
        speed = None if state == "pruned" else opened.speed(self.windows.evaluation[0])
        tasks = {} if short.streamed else vars(self.tasks.run(self.in_memory))
        return [opened.answer(self.prompt), speed, numbers, size, memory, tasks]

    def _write(self, measured: Mapping[str, Perplexity]) -> Path:
        """The model in the folder, in its format, read again and compared."""
        built = self.folder / self.out.name
        shutil.rmtree(built, ignore_errors=True)
        how = {"facts": {"data": self.texts.data}, "measured": measured}
        return self.opened.write(built, how, self.notify)

    def _place(self, built: Path, result: Shrunk) -> None:
        """Puts model and page where they belong, whole or not at all."""
        if self.to == "gguf":
            report_of(self.out).write_text(shrunk_page(result), encoding="utf-8")
            for here, there in reversed([*zip(out_paths(built), out_paths(self.out), strict=True)]):
                here.replace(there)
            return
        with new_directory(self.out, marker=PROVENANCE, overwrite=self.overwrite) as partial:
            for path in built.iterdir():
                path.rename(partial / path.name)
            (partial / REPORT).write_text(shrunk_page(result), encoding="utf-8")


def _state(name: str) -> str:
    """The short name of a state: ``"original, 30 layers"`` is ``"original"``."""
    return name.partition(",")[0]
