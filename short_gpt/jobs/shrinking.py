"""From a model to a smaller one that works, in one call: choose, refit, train, evaluate, write."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from llama.files import new_directory, new_file
from llama.sources import is_gguf
from short_gpt.checkpoints.gguf import about_kinds, about_types, check_writable_gguf
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.target import is_pruned_gguf
from short_gpt.data.disjoint import without_overlap
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.perplexity import Perplexity, combined, difference, window_perplexities
from short_gpt.healing import HealingEvidence, HealingJob
from short_gpt.healing.choosing import MAX_WINDOWS, MIN_WINDOWS, TRIAL_WINDOWS, pruned_losses
from short_gpt.healing.context import Learning
from short_gpt.healing.lora import seconds_a_step
from short_gpt.healing.sets import LayerSets
from short_gpt.healing.settings import OUTPUTS, Recipe, RefitSettings, recipe_for
from short_gpt.jobs.dial import Dial, Shrinking
from short_gpt.jobs.former import HealingWindows, Running, TextSource, source_of
from short_gpt.jobs.healing import CLOSED_WINDOWS
from short_gpt.jobs.inputs import Notify, Tasks, about_own, ignore
from short_gpt.jobs.page import is_page, shrunk_page, without_folders
from short_gpt.jobs.saving import Hub, as_begun, interruptible
from short_gpt.jobs.shrink_models import TURNS, InMemory, Opened, Streamed, file_bytes
from short_gpt.jobs.shrink_plan import (
    COMMAND,
    HEALING,
    STATE,
    WINDOW,
    WRITTEN,
    Model,
    ShrinkContext,
    ShrinkRequest,
    plan,
)
from short_gpt.jobs.shrunk import REPORT, ShrinkResult, StateReport, next_steps, report_of
from short_gpt.runtime.digest import json_digest, windows_digest
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError
from short_gpt.runtime.progress import check_alone
from short_gpt.runtime.state import StateFile, hold, joined
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import RunState
from short_gpt.scoring.stopping import unsure
from short_gpt.selection.methods import AUTO, METHODS, SEARCHED, WITHOUT_TEXT, choose
from short_gpt.wrappers.opening import of_source, open_loaded, open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.streamed_llama import StreamedLlama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKS = 8  # evaluations during a training


@interruptible()
def shrink(
    model: Model,
    out: str | PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dial: Dial = Dial(),
    data: TextSource = TextSource("self"),
    windows: HealingWindows = HealingWindows(),
    settings: Shrinking = Shrinking(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    streaming: Running = Running(),
    hub: Hub = Hub(),
    overwrite: bool = False,
    notify: Notify = ignore,
) -> ShrinkResult:
    """Writes a smaller model that works: layers chosen and removed, the rest healed and evaluated.

    If interrupted or killed, repeat the call: it continues from the folder ``OUT.shrinking``, which
    is deleted once ``out`` is complete. ``out`` gets a page with all of this; a GGUF file has it
    beside it.

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
        notify: called with what will be done and how long it takes, before it starts.

    Raises:
        ShortGPTError: a setting, the model or the texts are refused.
        FileExistsError: ``out`` exists.

    Example:
        >>> print(shrink("llama-2-7b", "llama-2-5b", ratio=0.25))  # doctest: +SKIP
    """
    check_alone("shrink")
    how = (dial, settings, source_of(data), windows, tasks, opening, streaming)
    asked = ShrinkRequest(model, Path(out), *how, overwrite, notify)
    if asked.is_placed() and not settings.dry_run:
        hub.check(asked.out, asked.to)
        return _completed(asked, hub)
    asked.check()
    hub.check(asked.out, asked.to)
    lock = None if settings.dry_run else hold(asked.folder)
    try:
        begun = as_begun(opening, asked.folder / STATE)
        known = ShrinkContext.of(asked, _opened(replace(asked, opening=begun), tokenizer))
        words = plan(asked, known)
        if settings.dry_run:
            if not asked.texts.own:
                _windows(asked, known)  # raises for too little text
            return ShrinkResult(asked.out, words)
        notify(words)
        result = _shrunk(asked, known, words)
        asked.clear()
    except KeyboardInterrupt:
        if next(asked.folder.glob("[!.]*"), None) is not None:
            notify(f"what was done is kept in {asked.folder}: the same command continues")
        raise
    finally:
        with suppress(OSError):  # files to continue from stay
            asked.folder.rmdir()
        del lock
    return replace(result, address=hub.push(asked.out, result))


def _completed(asked: ShrinkRequest, hub: Hub) -> ShrinkResult:
    """Ends a run that was killed after its output was in place."""
    with hold(asked.folder):
        if asked.is_placed():  # else the run that placed it has just ended by itself
            asked.clear()
    words = f"{asked.out} is complete: the run that wrote it was killed at its end"
    if asked.source is None:
        raise FileExistsError(f"{words}; open that, this model still has all of its layers")
    result = ShrinkResult(asked.out, words)
    return replace(result, address=hub.push(asked.out, result))


def _opened(asked: ShrinkRequest, tokenizer: PreTrainedTokenizerBase | None) -> Opened:
    source, opening = asked.source, asked.opening
    if source is None:
        short = open_loaded(cast("PreTrainedModel", asked.model), opening, tokenizer)
        return InMemory(short, None, asked.to, opening)
    if not asked.streaming.stream:
        return InMemory(open_trainable(source, opening), source, asked.to, opening)
    own = of_source(opening, source, stream=True)
    streamed = asked.streaming.open(str(source), own, asked.cut.size or WINDOW)
    assert isinstance(streamed, StreamedLlama)
    return Streamed(streamed, asked.to)


def _shrunk(asked: ShrinkRequest, known: ShrinkContext, words: str) -> ShrinkResult:
    """Does everything; continues what the folder holds."""
    opened, short, cut, kinds = known.opened, known.opened.short, asked.cut, None
    asked.folder.mkdir(parents=True, exist_ok=True)
    run = _Run(asked, known)
    (layers, choice), windows = run.chosen(), run.windows
    if opened.in_place:
        check_writable_gguf(str(asked.source), layers)
        kinds = about_kinds(str(asked.source), layers)
    chosen_by = {"method": METHODS[asked.method], "eval_data": cut.eval_data, "size": known.size}
    short.evidence |= chosen_by
    asked.notify(f"layers to remove: {sorted(layers)}")
    looks = {"original": run.look("original")}
    with short.without_layers(layers):
        looks["pruned"] = run.look("pruned")
        steps = run.steps()
    turns = run.turns(layers)
    work = asked.folder / HEALING
    kept: Any = {"work_dir": work, "max_windows": CLOSED_WINDOWS}
    job = HealingJob(short, windows, layers, steps=steps, notify=asked.notify, **kept)
    importance, about = short.importance, run.about_layers(layers, choice)
    with ExitStack() as undos:
        # a loaded model is the caller's: after an error it is complete, and the same call continues
        evidence = job.run(undos if asked.source is None else None)
        looks["healed"] = run.look("healed")
        for state in turns[0] if turns else ():
            speed = median(turn[state] for turn in turns)
            looks[state] = looks[state]._replace(tokens_per_second=speed)
        remarks = about + run.remarks(evidence)
        built = asked.built  # in a folder of its own: OUT may have the name of a file of the run
        asked.clear(below=WRITTEN)
        built.parent.mkdir(exist_ok=True)
        (asked.folder / COMMAND).write_text(asked.command, encoding="utf-8")
        facts = {"facts": {"data": asked.texts.data}, "measured": evidence.perplexity}
        opened.write(built, facts, asked.notify)  # afterwards only the written model remains
        if is_gguf(built):
            # of another format tensors alone were counted: all states lack the vocabulary
            looks |= _by_file({"healed": looks["healed"]} if opened.in_place else looks, built)
        if opened.in_place:
            remarks += run.rounded(built, evidence) + ([] if kinds is None else [kinds])
        quality: dict[str, dict[str, Perplexity]] = {}
        for kind, states in evidence.by_kind.items():  # by names as in "original, 30 layers"
            quality[kind] = {name.partition(",")[0]: own for name, own in states.items()}
        result = ShrinkResult(
            asked.out,
            words,
            known.count,
            layers,
            asked.method,
            quality,
            looks,
            known.prompt,
            remarks,
            evidence.steps,
            choice,
            importance,
            next_steps(asked.out, asked.to, is_llama=opened.is_llama, misread=bool(kinds)),
            source=None if asked.source is None else str(asked.source),
            windows=(len(windows.training), len(windows.evaluation), known.size),
            command=asked.command,
            seed=cut.seed,
            turns=turns,
        )
        _move_into_place(asked, built, result)
        undos.pop_all()
    return result


def _by_file(looks: Mapping[str, StateReport], built: Path) -> dict[str, StateReport]:
    """Reports whose sizes, the last of which is that of a written file, are corrected by it."""
    more = file_bytes(built) - looks["healed"].size
    return {
        state: look._replace(size=look.size + more, memory=look.memory + more)
        for state, look in looks.items()
    }


def _windows(asked: ShrinkRequest, known: ShrinkContext) -> Learning:
    validate, beside = asked.settings.minutes is not None, asked.folder / REPORT
    given = (asked.texts, known.opened.short, known.size, known.limit)
    return asked.cut.read(*given, validate=validate, beside=beside)


class _Run:
    """The windows, and what is measured and chosen on them, each once: a state file keeps it."""

    def __init__(self, asked: ShrinkRequest, known: ShrinkContext) -> None:
        self.asked, self.known, short, settings = asked, known, known.opened.short, asked.settings
        self.windows = windows = _windows(asked, known)
        self.calibration = windows.training[:MAX_WINDOWS]  # that choose the layers
        # the prompt and the tasks choose no layers, and may be others when a run goes on
        chosen_by = {**asdict(asked.dial), **asdict(replace(settings, prompt=None))}
        read = {"training": windows.training, "evaluation": windows.evaluation}
        digests = {name: windows_digest(own) for name, own in read.items()}
        refit = {"refit": vars(RefitSettings())}  # with which the choice and the healing begin
        identity = joined(short.identity(), digests, chosen_by, refit)
        saved = StateFile(asked.folder / STATE, identity, folder=asked.folder)
        self.sets: LayerSets | None = None  # of a streamed model
        if not short.streamed:
            self.sets = LayerSets(
                known.in_memory, self.calibration, windows.evaluation, state=saved
            )
        self.cells = Cells(saved) if self.sets is None else self.sets.cells

    def chosen(self) -> tuple[list[int], Mapping[str, Any]]:
        """The layers to remove, and how `auto` chose them."""
        short, method, seed = self.known.opened.short, self.asked.method, self.asked.cut.seed
        if self.sets is None:
            scores = self.cells.resumed("importance", self._scored)
            short.importance = Importance.from_dict(scores)
            assert self.known.n is not None
            return choose(short.importance, self.known.n, method=method, seed=seed), {}
        short.importance = self.sets.importance
        n = self.known.n or self.cells.value("how many", partial(self._within, self.sets))
        # the greedy search that found how many went further; it is not repeated
        most = self.known.count - 2 if self.known.n is None and method == "sleb" else None
        layers = self.sets.layers(method, n, seed, most=most)
        return layers, self.sets.choice(n).to_dict() if method == AUTO else {}

    def _scored(self, part: StateFile | None) -> dict[str, object]:
        state = None if part is None else RunState(part)
        return self.known.opened.short.measure(self.calibration, state=state).to_dict()

    def _within(self, sets: LayerSets) -> int:
        """The most layers, of a greedy search's, whose refitted model keeps the ratio."""
        every, short, count = self.calibration, self.known.in_memory, self.known.count
        if len(every) < MIN_WINDOWS:
            raise ShortGPTError(
                f"{self.asked.dial.name}: expected at least {MIN_WINDOWS} windows, of which a "
                f"quarter says how many layers may go, got {len(every)}; give more text"
            )
        held, ratio = max(2, len(every) // 4), self.asked.dial.max_perplexity_ratio or 1.0
        fit = every[:-held]
        judging, _ = without_overlap(every[-held:], fit)
        if not judging:
            raise ShortGPTError(
                f"{self.asked.dial.name}: all {held} windows that say how many layers may go share "
                f"text with the {len(fit)} others: give more text"
            )
        order = sets.layers("sleb", count - 2)
        original = combined(
            self.cells.perplexities("original", lambda: window_perplexities(short.decoder, judging))
        )

        def rise(n: int) -> float:
            run = partial(pruned_losses, short, order[:n], judging, fit_on=fit)
            try:
                return combined(self.cells.perplexities(f"without {n}", run)).value / original.value
            except NotRemovableError:  # such as all layers with attention of a hybrid
                if n == 1:
                    raise
                return math.inf

        low, high = 0, count - 2  # the ratio holds at the first
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if rise(middle) <= ratio else (low, middle - 1)
        if not low:
            raise ShortGPTError(
                f"{self.asked.dial.name}: without layer {order[0]} alone, refitted, the perplexity "
                f"rises by {rise(1):.3f} already; allow more"
            )
        return low

    def steps(self) -> dict[str, Recipe | None]:
        """The refit, and a distillation of as many steps as the minutes allow."""
        if (minutes := self.asked.settings.minutes) is None:
            return {"refit": None}
        config, seed = self.known.in_memory.model.config, self.asked.cut.seed
        own = {"modules": OUTPUTS} if self.known.opened.in_few_bits else {}
        recipe = recipe_for(config, "small", seed=seed, **own)
        steps = self.cells.value("steps", partial(self._steps_in, 60 * minutes, recipe))
        every = -(-steps // CHECKS)
        warmup = min(recipe.warmup_steps, steps // 8)
        recipe = replace(recipe, steps=steps, warmup=warmup, eval_every=every)
        return {"refit": None, "distill": recipe}

    def _steps_in(self, seconds: float, recipe: Recipe) -> int:
        """Training steps that fit, by one that is timed; the teacher reads each window before."""
        known = self.known
        a_step = seconds_a_step(known.in_memory, known.probe, recipe)
        a_step += recipe.batch_size * known.a_pass
        # the validation windows are also read once before it, and once by the teacher
        checking = (CHECKS + 2) * len(self.windows.validation) * known.a_pass
        return max(1, int((seconds - checking) / a_step))

    def look(self, state: str) -> StateReport:
        """Measured once; the completion is that of the present model."""
        opened, suite = self.known.opened, self.asked.tasks.suite()
        ids = opened.asked(self.known.prompt) if isinstance(opened, InMemory) else []
        asked = json_digest([ids, suite and suite.identity()])  # by tokenizer and chat template
        return StateReport(*self.cells.value(f"look {state} {asked}", self._measured))

    def _measured(self) -> list[Any]:
        known, opened = self.known, self.known.opened
        present = opened.short.present
        numbers, size = (
            rest + sum(each[i] for i in present) for each, rest in (known.parameters, known.stored)
        )
        memory = size + sum(known.caches[i] for i in present)
        if not isinstance(opened, InMemory):  # it does not generate
            return ["", None, numbers, size, memory, {}]
        tasks = vars(self.asked.tasks.run(opened.short))
        return [opened.answer(known.prompt), None, numbers, size, memory, tasks]

    def turns(self, layers: Sequence[int]) -> list[dict[str, float]]:
        """Tokens a second, of the original model and without the layers, which is the healed one's.

        Measured in turns, because the speed of a shared machine varies.
        """
        opened, window = self.known.opened, self.windows.evaluation[0]
        if not isinstance(opened, InMemory):
            return []

        def measure() -> list[dict[str, float]]:
            turns, states = list[dict[str, float]](), [("original", []), ("healed", layers)]
            for turn in range(1 + TURNS):  # the models take turns at being the first
                turns.append({})
                for state, gone in states[:: 1 if turn % 2 else -1]:
                    with opened.short.without_layers(gone):
                        turns[-1][state] = opened.speed(window)
            return turns[1:]

        return self.cells.value("turns", measure)

    def about_layers(self, layers: Sequence[int], choice: Mapping[str, Any]) -> list[str]:
        """Why other text might choose other layers, if it might."""
        method, short = self.asked.method, self.known.opened.short
        if method in WITHOUT_TEXT:
            return []
        if method in ("bi", "angular"):
            why = unsure(short.importance, len(layers), angular=method == "angular")
            if why is not None:
                return [why]
        count = TRIAL_WINDOWS if method in SEARCHED else MAX_WINDOWS
        count = choice["fitted"] + choice["judged"] if choice else count
        if (tokens := sum(map(len, self.calibration[:count]))) < TRIAL_WINDOWS * WINDOW:
            more = "`size`" if method in SEARCHED else "`max_windows`, `size`"
            return [
                f"{tokens:,} tokens chose the layers, fewer than {TRIAL_WINDOWS * WINDOW:,}: other "
                f"text may give other layers; read more ({more})"
            ]
        return []

    def remarks(self, evidence: HealingEvidence) -> list[str]:
        """What a reader of the numbers must know."""
        asked, opened = self.asked, self.known.opened
        said = [about_own(asked.texts.data, asked.cut.eval_data), self.windows.left_out]
        said += evidence.unchanged
        for kind, states in evidence.by_kind.items():
            error = next(iter(states.values())).error
            if error is not None and (why := error.no_interval):
                said.append(
                    f"{kind}: 95% unknown, because {why}; evaluate on more text (`eval_data`)"
                )
        if evidence.worse:
            said.append(f"WORSE: healing changes the loss by {evidence.change}; give more text")
        judged, dtype = opened.short.runs_in()[0], opened.dtype
        if judged != dtype and not opened.in_place:
            said.append(f"evaluated in {judged}, written in {dtype}")
        return [remark for remark in said if remark]

    def rounded(self, built: Path, evidence: HealingEvidence) -> list[str]:
        """The cost of rounding the changed tensors to the types of a GGUF file."""
        precision = self.known.opened.short.precision  # a pair is read in one
        again = open_trainable(str(built), replace(self.asked.opening, precision=precision))
        written = combined(window_perplexities(again.decoder, self.windows.evaluation))
        change = difference([evidence.perplexity["healed"]], [written])
        said = [f"writing it in the file's own types changes the loss by {change}"]
        return [*said, *filter(None, [about_types(str(self.asked.source), built)])]


def _move_into_place(asked: ShrinkRequest, built: Path, result: ShrinkResult) -> None:
    """Puts model and page where they belong, whole or not at all."""
    out = asked.out

    def text() -> str:
        return without_folders(shrunk_page(result), asked.names)

    if asked.to == "gguf":
        how: Any = {"overwrite": asked.overwrite, "replaces": is_pruned_gguf}
        with new_file(out, **how) as model:  # raises if a file has appeared there
            with new_file(report_of(out), overwrite=True, replaces=is_page) as page:
                page.write_text(text(), encoding="utf-8")
            try:  # a refusal at the end of this block leaves the model where it was built
                os.link(built, model)
            except OSError:  # another file system
                shutil.copyfile(built, model)
        return
    with new_directory(out, marker=PROVENANCE, overwrite=asked.overwrite) as partial:
        for path in [path for path in built.iterdir() if path.name != PROVENANCE]:
            shutil.move(path, partial / path.name)  # OUT may be a link to another file system
        shutil.copyfile(built / PROVENANCE, partial / PROVENANCE)  # by it `is_placed` knows OUT
        (partial / REPORT).write_text(text(), encoding="utf-8")
