"""From a model to a smaller one that works, in one call: choose, refit, train, evaluate, write."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llama.files import new_directory, new_file
from llama.sources import is_gguf
from short_gpt.checkpoints.gguf import (
    about_kinds,
    check_architecture,
)
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.target import is_pruned_gguf
from short_gpt.data.disjoint import without_overlap
from short_gpt.evaluation.perplexity import combined, difference, window_perplexities
from short_gpt.healing import HealingEvidence, HealingJob
from short_gpt.healing.choosing import (
    MAX_WINDOWS,
    MIN_WINDOWS,
    TRIAL_WINDOWS,
    pruned_losses,
)
from short_gpt.healing.lora import seconds_a_step
from short_gpt.healing.sets import LayerSets
from short_gpt.healing.settings import OUTPUTS, Recipe, recipe_for
from short_gpt.jobs.conversion import convert
from short_gpt.jobs.costs import CLOSED_WINDOWS
from short_gpt.jobs.inputs import Notify, Tasks, Windows, about_own, ignore
from short_gpt.jobs.page import is_page, shrunk_page, without_folders
from short_gpt.jobs.saving import Hub, interruptible
from short_gpt.jobs.shrink_models import (
    TURNS,
    InMemory,
    file_bytes,
)
from short_gpt.jobs.shrink_run import WINDOW, Model, Shrink
from short_gpt.jobs.shrink_settings import Shrinking
from short_gpt.jobs.shrunk import REPORT, ShrinkResult, StateReport, next_steps, report_of
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError
from short_gpt.runtime.progress import check_alone
from short_gpt.runtime.state import StateFile, hold
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import RunState
from short_gpt.scoring.stopping import unsure
from short_gpt.selection.methods import AUTO, METHODS, SEARCHED, WITHOUT_TEXT, choose
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import OpenOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKS = 8  # evaluations during a training


@interruptible()
def shrink(
    model: Model,
    out: Path,
    settings: Shrinking,
    reading: Windows,
    tasks: Tasks,
    opening: OpenOptions,
    hub: Hub = Hub(),
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    notify: Notify = ignore,
    dry_run: bool = False,
) -> ShrinkResult:
    """What `jobs.shrink` does."""
    check_alone("shrink")
    run = Shrink(model, out, settings, reading, tasks, opening, overwrite, notify)
    folder = run.folder
    if folder.is_placed(run.command) and not dry_run:
        return _completed(run, hub)
    run.check()
    hub.check(run.out, run.to)
    lock = None if dry_run else hold(folder.path)
    try:
        run.open(tokenizer)
        plan = run.plan()
        if dry_run:
            if not reading.own:
                run.read()  # raises for too little text
            return ShrinkResult(run.out, plan)
        notify(plan)
        result = _work(run, plan)
        folder.clear()
    except KeyboardInterrupt:
        folder.tidy()
        if folder.path.exists():
            notify(f"what was done is kept in {folder.path}: the same command continues")
        raise
    finally:
        if lock is not None:  # else the folder may be another run's
            folder.tidy()
        del lock
    return replace(result, address=hub.push(run.out, result))


def _completed(run: Shrink, hub: Hub) -> ShrinkResult:
    """Ends a run that was killed after its output was in place."""
    with hold(run.folder.path):
        run.folder.clear()
    plan = f"{run.out} is complete: the run that wrote it was killed at its end"
    if run.source is None:
        raise FileExistsError(f"{plan}; open that, this model still has all of its layers")
    result = ShrinkResult(run.out, plan)
    return replace(result, address=hub.push(run.out, result))


# What is chosen


def _choose(run: Shrink) -> tuple[list[int], Mapping[str, Any]]:
    """The layers to remove, and how `auto` chose them."""
    short, method, seed, n, sets = run.short, run.method, run.seed, run.n, run.sets
    if sets is None:  # of a streamed model, which says how many
        assert n is not None

        def score(part: StateFile | None) -> dict[str, object]:
            state = None if part is None else RunState(part)
            return short.measure(run.calibration, state=state).to_dict()

        short.importance = Importance.from_dict(run.cells.resumed("importance", score))
        return choose(short.importance, n, method=method, seed=seed), {}
    short.importance = sets.importance
    # the greedy search that found how many went further; it is not repeated
    most = run.count - 2 if n is None and method == "sleb" else None
    n = n or run.cells.value("how many", partial(_most_within, run, sets))
    layers = sets.layers(method, n, seed, most=most)
    return layers, sets.choice(n).to_dict() if method == AUTO else {}


def _most_within(run: Shrink, sets: LayerSets) -> int:
    """The most layers, of a greedy search's, whose refitted model keeps the ratio."""
    windows, short, count, name = run.calibration, run.in_memory, run.count, run.settings.size_flag
    if len(windows) < MIN_WINDOWS:
        raise ShortGPTError(
            f"{name}: expected at least {MIN_WINDOWS} windows, of which a quarter says how many "
            f"layers may go, got {len(windows)}; give more text"
        )
    held, ratio = max(2, len(windows) // 4), run.settings.max_perplexity_ratio or 1.0
    fit_on = windows[:-held]
    judging, _ = without_overlap(windows[-held:], fit_on)
    if not judging:
        raise ShortGPTError(
            f"{name}: all {held} windows that say how many layers may go share text with the "
            f"{len(fit_on)} others: give more text"
        )
    order = sets.layers("sleb", count - 2)
    read = partial(window_perplexities, short.decoder, judging)
    original = combined(run.cells.perplexities("original", read))

    def rise(n: int) -> float:
        pruned = partial(pruned_losses, short, order[:n], judging, fit_on=fit_on)
        try:
            measured = combined(run.cells.perplexities(f"without {n}", pruned))
        except NotRemovableError:  # such as all layers with attention of a hybrid
            if n == 1:
                raise
            return math.inf
        return measured.value / original.value

    low, high = 0, count - 2  # the ratio holds at the first
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if rise(middle) <= ratio else (low, middle - 1)
    if not low:
        raise ShortGPTError(
            f"{name}: removing layer {order[0]} alone multiplies the refitted perplexity by "
            f"{rise(1):.3f}; raise the limit"
        )
    return low


def _steps(run: Shrink) -> dict[str, Recipe | None]:
    """The refit, and a distillation of as many steps as the minutes allow."""
    if (minutes := run.settings.minutes) is None:
        return {"refit": None}
    modules = {"modules": OUTPUTS} if run.opened.in_few_bits else {}
    recipe = recipe_for(run.in_memory.model.config, "small", seed=run.seed, **modules)
    steps = run.cells.value("steps", partial(_steps_in, run, 60 * minutes, recipe))
    warmup = min(recipe.warmup_steps, steps // 8)
    recipe = replace(recipe, steps=steps, warmup=warmup, eval_every=-(-steps // CHECKS))
    return {"refit": None, "distill": recipe}


def _steps_in(run: Shrink, seconds: float, recipe: Recipe) -> int:
    """Training steps that fit, by one that is timed; the teacher reads each window before."""
    a_step = seconds_a_step(run.in_memory, run.probe, recipe) + recipe.batch_size * run.a_pass
    # the validation windows are also read once before it, and once by the teacher
    checking = (CHECKS + 2) * len(run.windows.validation) * run.a_pass
    return max(1, int((seconds - checking) / a_step))


# What is measured


def _measure(run: Shrink, state: str) -> StateReport:
    """Completion, sizes and tasks of the present model, measured once."""
    opened, suite = run.opened, run.tasks.suite()
    ids = opened.encode(run.prompt) if isinstance(opened, InMemory) else []
    # by tokenizer, chat template and tasks, which may be others when a run goes on
    digest = json_digest([ids, suite and suite.identity()])

    def measure() -> list[Any]:
        present = opened.short.present
        parameters, size = (
            rest + sum(each[i] for i in present) for each, rest in (run.parameters, run.stored)
        )
        memory = size + sum(run.caches[i] for i in present)
        if not isinstance(opened, InMemory):  # it does not generate
            return ["", None, parameters, size, memory, {}]
        tasks = vars(run.tasks.run(opened.short))
        return [opened.answer(run.prompt), None, parameters, size, memory, tasks]

    return StateReport(*run.cells.value(f"state {state} {digest}", measure))


def _turns(run: Shrink, layers: Sequence[int]) -> list[dict[str, float]]:
    """Tokens a second, of the original model and without the layers, which is the healed one's.

    Measured in turns, because the speed of a shared machine varies.
    """
    opened, window = run.opened, run.windows.evaluation[0]
    if not isinstance(opened, InMemory):
        return []

    def measure() -> list[dict[str, float]]:
        turns, states = list[dict[str, float]](), [("original", []), ("healed", layers)]
        for turn in range(1 + TURNS):  # the models take turns at being the first
            turns.append({})
            for state, removed in states[:: 1 if turn % 2 else -1]:
                with opened.short.without_layers(removed):
                    turns[-1][state] = opened.speed(window)
        return turns[1:]

    return run.cells.value("turns", measure)


# What a reader of the numbers must know


def _about_layers(run: Shrink, n: int, choice: Mapping[str, Any]) -> list[str]:
    """Why other text might choose other layers, if it might."""
    method = run.method
    if method in WITHOUT_TEXT:
        return []
    if method in ("bi", "angular"):
        why = unsure(run.short.importance, n, angular=method == "angular")
        if why is not None:
            return [why]
    count = TRIAL_WINDOWS if method in SEARCHED else MAX_WINDOWS
    count = choice["fitted"] + choice["judged"] if choice else count
    tokens, few = sum(map(len, run.calibration[:count])), TRIAL_WINDOWS * WINDOW
    if tokens >= few:
        return []
    more = "`size`" if method in SEARCHED else "`max_windows`, `size`"
    return [
        f"{tokens:,} tokens chose the layers, fewer than {few:,}: other text may give other "
        f"layers; read more ({more})"
    ]


def _remarks(run: Shrink, evidence: HealingEvidence) -> list[str]:
    remarks = [about_own(run.reading.name, run.reading.eval_name), run.windows.left_out]
    remarks += evidence.unchanged
    for kind, states in evidence.by_kind.items():
        error = next(iter(states.values())).error
        if error is not None and (why := error.no_interval):
            remarks.append(
                f"{kind}: 95% unknown, because {why}; evaluate on more text (`eval_data`)"
            )
    if evidence.worse:
        remarks.append(f"WORSE: healing changes the loss by {evidence.change}; give more text")
    evaluated, written = run.short.runs_in()[0], run.opened.dtype
    if evaluated != written and not run.opened.in_place:
        remarks.append(f"evaluated in {evaluated}, written in {written}")
    return [remark for remark in remarks if remark]


def _rounding(run: Shrink, evidence: HealingEvidence) -> list[str]:
    """The cost of rounding the changed tensors to the types of a GGUF file."""
    built, precision = run.folder.built, run.short.precision  # a pair is read in one
    again = open_trainable(str(built), replace(run.opening, precision=precision))
    written = combined(window_perplexities(again.decoder, run.windows.evaluation))
    change = difference([evidence.perplexity["healed"]], [written])
    return [f"writing it in the file's own types changes the loss by {change}"]


# All of it


def _work(run: Shrink, plan: str) -> ShrinkResult:
    """Does everything; continues what the folder holds."""
    run.folder.begin()
    run.read()
    opened, short, windows, kinds = run.opened, run.short, run.windows, None
    layers, choice = _choose(run)
    if opened.in_place:
        check_architecture(str(run.source)).kept(layers)
        kinds = about_kinds(str(run.source), layers)
    chosen_by = {
        "method": METHODS[run.method],
        "eval_data": run.reading.eval_name,
        "size": run.size,
    }
    short.evidence |= chosen_by
    run.notify(f"layers to remove: {sorted(layers)}")
    states = {"original": _measure(run, "original")}
    with short.without_layers(layers):
        states["pruned"] = _measure(run, "pruned")
        steps = _steps(run)
    turns = _turns(run, layers)
    kept: dict[str, Any] = {"work_dir": run.folder.healing, "max_windows": CLOSED_WINDOWS}
    job = HealingJob(short, windows, layers, steps=steps, notify=run.notify, **kept)
    about = _about_layers(run, len(layers), choice)
    result = ShrinkResult(
        out=run.out,
        plan=plan,
        total=run.count,
        layers=layers,
        method=run.method,
        prompt=run.prompt,
        choice=choice,
        importance=short.importance,
        next_steps=next_steps(run.out, run.to, is_llama=opened.is_llama, misread=bool(kinds)),
        source=None if run.source is None else str(run.source),
        windows=(len(windows.training), len(windows.evaluation), run.size),
        command=run.command,
        seed=run.seed,
        turns=turns,
    )
    with ExitStack() as undos:
        # a loaded model is the caller's: after an error it is complete, and the same call continues
        evidence = job.run(undos if run.source is None else None)
        states["healed"] = _measure(run, "healed")
        for state in turns[0] if turns else ():
            speed = median(turn[state] for turn in turns)
            states[state] = states[state]._replace(tokens_per_second=speed)
        about += _remarks(run, evidence)
        result = replace(result, states=states, remarks=about, healing=evidence.steps)
        result = _written(run, result, evidence, kinds)
        undos.pop_all()
    return result


def _written(
    run: Shrink, result: ShrinkResult, evidence: HealingEvidence, kinds: str | None
) -> ShrinkResult:
    """Writes the model, completes the result by it, and puts both into place."""
    built, states = run.folder.built, result.states  # OUT may have the name of a file of the run
    run.folder.clear_built()
    built.parent.mkdir(exist_ok=True)
    _write(run, facts={"data": run.reading.name}, measured=evidence.perplexity)
    remarks = [*result.remarks]
    if is_gguf(built):
        # of another format tensors alone were counted: all states lack the vocabulary
        estimated = ["healed"] if run.opened.in_place else [*states]
        more = file_bytes(built) - states["healed"].size
        states = dict(states)
        for name in estimated:
            size, memory = states[name].size + more, states[name].memory + more
            states[name] = states[name]._replace(size=size, memory=memory)
    if run.opened.in_place:
        remarks += _rounding(run, evidence) + ([] if kinds is None else [kinds])
    quality = {  # by names as in "original, 30 layers"
        kind: {name.partition(",")[0]: perplexity for name, perplexity in each.items()}
        for kind, each in evidence.by_kind.items()
    }
    result = replace(result, states=states, remarks=remarks, quality=quality)
    run.folder.note_built(run.command)
    _move_into_place(run, result)
    return result


def _write(run: Shrink, **how: Any) -> None:
    """Writes the model, reads it again and compares it; only a loaded one stays in memory.

    So there is never a second copy of the weights in memory.
    """
    opened, built, scratch = run.opened, run.folder.built, run.folder.scratch
    if not isinstance(opened, InMemory):
        opened.short.save(built, **how)
        return
    short, release = opened.short, run.source is not None
    if opened.in_place:
        short.save(built, **how, overwrite=True)
        short.release()
        return
    for weight in short.model.parameters():  # not buffers, which loading leaves in float32
        weight.data = weight.data.to(opened.dtype)
    if run.to == "hf":
        short.save_pretrained(built, **how, release=release)
        return
    short.save_pretrained(scratch, **how, release=release)
    how = {"to": "gguf", "overwrite": True, "notify": run.notify}
    convert(str(scratch), str(built), OpenOptions(), **how)


def _move_into_place(run: Shrink, result: ShrinkResult) -> None:
    """Puts model and page where they belong, whole or not at all."""
    out, built = run.out, run.folder.built
    page = without_folders(shrunk_page(result), run.names)
    if run.to == "gguf":
        # raises if a file has appeared there
        with new_file(out, overwrite=run.overwrite, replaces=is_pruned_gguf) as model:
            with new_file(report_of(out), overwrite=True, replaces=is_page) as report:
                report.write_text(page, encoding="utf-8")
            try:  # a refusal at the end of this block leaves the model where it was built
                os.link(built, model)
            except OSError:  # another file system
                shutil.copyfile(built, model)
        return
    with new_directory(out, marker=PROVENANCE, overwrite=run.overwrite) as partial_out:
        for path in built.iterdir():
            shutil.move(path, partial_out / path.name)  # OUT may be a link to another file system
        (partial_out / REPORT).write_text(page, encoding="utf-8")
