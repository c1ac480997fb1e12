"""From a model to a smaller one that works, in one call: choose, refit, train, evaluate, write."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llama.files import new_directory, new_file
from llama.sources import is_gguf
from short_gpt.checkpoints.gguf import about_kinds, check_architecture
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.target import is_pruned_gguf
from short_gpt.costs.rivals import (
    ANSWERS_AT_ONCE,
    Rival,
    has_quantizer,
    largest_within,
    of_file,
    quality_of,
    requantized,
    scratch,
)
from short_gpt.costs.sizes import file_bytes
from short_gpt.costs.speeds import Speeds, beyond, of_files
from short_gpt.data.disjoint import without_overlap
from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import Perplexity, combined, difference, perplexity
from short_gpt.healing import HealedChoice, HealingEvidence, HealingJob
from short_gpt.healing.choosing import MIN_WINDOWS, pruned_losses
from short_gpt.healing.lora import seconds_a_step
from short_gpt.healing.settings import CLOSED_WINDOWS, OUTPUTS, Recipe, RefitSettings, recipe_for
from short_gpt.jobs.conversion import convert
from short_gpt.jobs.inputs import about_own
from short_gpt.jobs.page import is_page, shrunk_page
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.jobs.shrink_curve import curve_of, in_pytorch, optional, rivals_in_memory
from short_gpt.jobs.shrink_result import (
    ANSWERS,
    REPORT,
    Answered,
    ShrinkResult,
    StateReport,
    next_steps,
    report_of,
    short_name,
)
from short_gpt.jobs.shrink_run import HEALING, ShrinkRun
from short_gpt.jobs.shrink_settings import DEMO
from short_gpt.models.decoder import in_own_dtype
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError
from short_gpt.runtime.progress import check_alone
from short_gpt.runtime.state import hold
from short_gpt.scoring.stopping import unsure
from short_gpt.selection.methods import AUTO, METHODS
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import FLOAT32, OpenOptions

CHECKS = 8  # evaluations during a training


@interruptible()
def shrink(**asked: Any) -> ShrinkResult:
    """What `jobs.shrink` does; ``asked`` are fields of `ShrinkRun`."""
    check_alone("shrink")
    run = ShrinkRun(**asked)
    run.check()
    run.saving.check(run.out, run.to)
    lock = None if run.dry_run else hold(run.folder)
    run.open()
    plan = run.plan()
    if run.dry_run:
        if not run.windows.own:
            run.read()  # raises for too little text
        return ShrinkResult(run.out, plan)
    run.running.tell(plan)
    try:
        result = _work(run, plan)
    except KeyboardInterrupt:
        if run.folder.exists():
            run.running.tell(f"what was done is kept in {run.folder}: the same command continues")
        raise
    if not result.states:  # a curve, of which none was picked
        run.running.tell(f"kept in {run.folder}: the same call with `pick` writes one of them")
        return result
    shutil.rmtree(run.folder, ignore_errors=True)  # not a link
    del lock
    return replace(result, address=run.saving.push(run.out, result))


def demo(**asked: Any) -> ShrinkResult:
    """What `jobs.demo` does."""
    return shrink(model=DEMO, **asked)


# What is chosen


def _choose(run: ShrinkRun) -> tuple[list[int], HealedChoice | None]:
    """The layers to remove, and how `auto` chose them."""
    n, sets = run.n, run.sets
    run.short.importance = sets.importance
    if run.settings.named is not None:
        return sorted(run.settings.named), None
    if n is None:
        n = _most_within(run, run.settings.most_kld or 0.0)
    layers = sets.layers(run.method, n, run.seed)
    return layers, sets.choice(n) if run.method == AUTO else None


def _most_within(run: ShrinkRun, most_kld: float) -> int:
    """The most layers, of a greedy search's, whose refitted model stays so near to the original."""
    windows, short, name = run.calibration, run.short, run.settings.size_flag
    held = max(2, len(windows) // 4)
    fit_on = windows[:-held]
    judging, _ = without_overlap(windows[-held:], fit_on)
    if len(windows) < MIN_WINDOWS or not judging:
        raise ShortGPTError(
            f"{name}: expected at least {MIN_WINDOWS} windows, a quarter of which shares no text "
            f"with the others and says how many layers may go, got {len(windows)}; give more text"
        )
    every = [*judging, *run.texts[ANSWERS]]
    reference, digest = short.reference(every), windows_digest(every)

    def distance(layers: Sequence[int]) -> float:
        """The larger one of that on the model's text and that on its answers."""
        how: dict[str, Any] = {"heal_by": run.settings.heal_by, "reference": reference}
        pruned = partial(pruned_losses, short, layers, every, fit_on=fit_on, **how)
        try:
            each = run.cells.perplexities(f"without {sorted(layers)} on {digest}", pruned)
        except NotRemovableError:  # such as all layers with attention of a hybrid
            return math.inf
        parts = (each[: len(judging)], each[len(judging) :])
        klds = [combined(part).kld for part in parts if part]
        return max(kld.value for kld in klds if kld is not None)

    low, high = 0, 1  # few layers are tried first: a search for all of them takes long
    while distance(run.sets.layers("greedy_kld", high)) <= most_kld and low < high:
        low, high = high, min(2 * high, run.count - 2)
    order = run.sets.layers("greedy_kld", high)
    if not low:
        raise ShortGPTError(
            f"{name}: without layer {order[0]} alone the refitted model is {distance(order):.3f} "
            "nats a token from the original; raise the limit, or keep all layers in fewer bits"
        )
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if distance(order[:middle]) <= most_kld else (low, middle)
    return low


def _steps(run: ShrinkRun) -> dict[str, Recipe | RefitSettings | None]:
    """The closed form, and a distillation of as many steps as its time allows."""
    heal_by, kind = run.settings.heal_by, run.settings.type
    closed = None if kind is None else RefitSettings(type=kind)
    if not (seconds := run.planned.training):
        return {heal_by: closed}
    modules = {"modules": OUTPUTS} if run.opened.in_few_bits or kind else {}
    recipe = recipe_for(run.short.model.config, "small", seed=run.seed, **modules)
    steps = run.cells.value("steps", partial(_steps_in, run, seconds, recipe))
    warmup = min(recipe.warmup_steps, steps // 8)
    recipe = replace(recipe, steps=steps, warmup=warmup, eval_every=-(-steps // CHECKS))
    return {heal_by: closed, "distill": recipe}


def _steps_in(run: ShrinkRun, seconds: float, recipe: Recipe) -> int:
    """Training steps that fit, by one that is timed; the teacher reads each window before."""
    a_step = seconds_a_step(run.short, run.probe, recipe) + recipe.batch_size * run.a_pass
    # the validation windows are also read once before it, and once by the teacher
    checking = (CHECKS + 2) * len(run.parts.validation) * run.a_pass
    return max(1, int((seconds - checking) / a_step))


# What is measured


def _sizes(run: ShrinkRun) -> StateReport:
    """Sizes of the present model."""
    present = run.short.present
    parameters, size = (
        rest + sum(each[i] for i in present) for each, rest in (run.parameters, run.stored)
    )
    return StateReport(parameters, size, size + sum(run.caches[i] for i in present))


def _answers(run: ShrinkRun, state: str) -> Perplexity:
    """The distance of the present model on the original's answers; it gives its own, too."""
    if state not in run.answers:
        run.answers[state] = Answered.of(run.ask())
    windows, decoder = run.texts[ANSWERS], run.short.decoder
    with in_own_dtype(decoder):
        return perplexity(decoder, batches(windows, ANSWERS_AT_ONCE), reference=run.reference)


def _beside_file(run: ShrinkRun, result: ShrinkResult) -> ShrinkResult:
    """The result with a file's rival, and with their speeds in llama.cpp."""
    source, remarks, most = str(run.source), [*result.remarks], {"healed": run.fastest(run.layers)}
    paths = {"original": Path(source), "healed": run.built}
    rivals, timed = list[Rival](), result.speeds
    with optional(remarks):
        kind = largest_within(source, file_bytes(run.built)) if has_quantizer() else None
        with scratch(run.folder) as folder:
            if kind is not None:
                path = requantized(source, folder / f"{kind}.gguf", kind)
                opening = replace(run.opening, precision=FLOAT32)
                rivals = [of_file(path, run.texts, run.reference, opening)]
                paths[rivals[0].name] = path
            timed = timed or of_files(paths, run.parts.evaluation[0], most=most)
    return replace(result, rivals=rivals, speeds=timed, remarks=remarks)


# What a reader of the numbers must know


def _remarks(run: ShrinkRun, evidence: HealingEvidence) -> list[str]:
    remarks = [about_own(run.windows.name, run.windows.eval_name), run.parts.left_out]
    if run.method in ("bi", "angular"):  # other text might choose other layers
        scores, angular = run.short.importance, run.method == "angular"
        remarks.insert(0, unsure(scores, len(run.layers), angular=angular))
    remarks += evidence.unchanged
    for kind, states in evidence.by_kind.items():
        error = next(iter(states.values())).error
        if error is not None and (why := error.no_interval):
            remarks.append(
                f"{short_name(kind)}: 95% unknown, because {why}; evaluate on more text "
                "(`eval_data`)"
            )
    if run.settings.type:
        remarks.append(f"healed: in {run.settings.type}; pruned: in the types of the original")
    elif evidence.worse:
        change = evidence.kld_change
        assert change is not None
        remarks.append(f"WORSE: healing changes the KLD by {change.nats:+.3f}; give more text")
    if not has_quantizer():
        remarks.append('not compared with fewer bits: pip install "short-gpt[rival]"')
    evaluated, written = run.short.runs_in()[0], run.opened.dtype
    if evaluated != written and not run.opened.in_place:
        remarks.append(f"evaluated in {evaluated}, written in {written}")
    return [remark for remark in remarks if remark]


def _as_written(run: ShrinkRun, result: ShrinkResult) -> ShrinkResult:
    """The result with what the file gives, whose types round the changed tensors."""
    again = open_trainable(str(run.built), replace(run.opening, precision=FLOAT32))
    reference = run.reference.through(again.decoder)
    written, before = quality_of(again, run.texts, reference), result.quality
    quality = {kind: {**before[kind], "healed": own} for kind, own in written.items()}
    answers = {**result.answers, "healed": Answered.of(run.ask(again))}
    read = [kind for kind in run.texts if kind != ANSWERS]
    change = difference([before[k]["healed"] for k in read], [written[k] for k in read])
    about = f"writing it in the file's own types changes the loss by {change}; included in KLD"
    kinds = about_kinds(str(run.source), run.layers)
    remarks = [*result.remarks, about, *([kinds] if kinds else [])]
    return replace(result, quality=quality, answers=answers, remarks=remarks)


# All of it


def _work(run: ShrinkRun, plan: str) -> ShrinkResult:
    """Does everything; continues what the folder holds."""
    run.read()
    opened, short, parts = run.opened, run.short, run.parts
    remarks = list[str]()
    curve = curve_of(run, remarks) if run.settings.curve is not None else []
    known: dict[str, Any] = {"plan": plan, "total": run.count, "method": run.method, "curve": curve}
    known["timed_in"] = "llama.cpp" if run.in_llama_cpp else "PyTorch"
    if curve and run.settings.pick is None:
        return ShrinkResult(run.out, **known, remarks=remarks)
    run.layers, choice = _choose(run)
    if opened.in_place:
        check_architecture(str(run.source)).kept(run.layers)
    eval_data = run.windows.eval_name
    method = METHODS.get(run.method, "named by the caller")
    short.evidence |= {"method": method, "eval_data": eval_data, "size": run.size}
    run.running.tell(f"layers to remove: {sorted(run.layers)}")
    states, answers = {"original": _sizes(run)}, {"original": _answers(run, "original")}
    beside, timed = list[Rival](), Speeds()
    with optional(remarks):
        beside = rivals_in_memory(run)
    with short.without_layers(run.layers):
        states["pruned"], answers["pruned"] = _sizes(run), _answers(run, "pruned")
        steps = _steps(run)
    with optional(remarks):
        if not run.in_llama_cpp:  # which times files
            timed = in_pytorch(run, {"original": [], "healed": run.layers})
    kept: dict[str, Any] = {"work_dir": run.folder / HEALING, "max_windows": CLOSED_WINDOWS}
    job = HealingJob(short, parts, run.layers, steps=steps, notify=run.running.tell, **kept)
    with ExitStack() as undos:
        # a loaded model is the caller's: after an error it is complete, and the same call continues
        evidence = job.run(undos if run.source is None else None)
        states["healed"], answers["healed"] = _sizes(run), _answers(run, "healed")
        result = ShrinkResult(
            out=run.out,
            **known,
            layers=run.layers,
            quality={  # by names as in "original, 30 layers"
                kind: {name.partition(",")[0]: value for name, value in each.items()}
                for kind, each in evidence.by_kind.items()
            }
            | {ANSWERS: answers},
            states=states,
            rivals=beside,
            speeds=timed,
            questions=[question.prompt for question in run.questions],
            answers=run.answers,
            remarks=[*remarks, *_remarks(run, evidence)],
            healing=evidence.steps,
            choice=choice,
            importance=short.importance,
            next_steps=next_steps(run.out, is_llama=opened.is_llama),
            source=None if run.source is None else str(run.source),
            windows=(len(parts.training), len(parts.evaluation), run.size),
            command=run.command,
            seed=run.seed,
        )
        result = _written(run, result, evidence)
        undos.pop_all()
    return result


def _written(run: ShrinkRun, result: ShrinkResult, evidence: HealingEvidence) -> ShrinkResult:
    """Writes the model, completes the result by it, and puts both into place."""
    built, states, in_place = run.built, dict(result.states), run.opened.in_place
    shutil.rmtree(built.parent, ignore_errors=True)
    built.parent.mkdir(parents=True)
    _write(run, facts={"data": run.windows.name}, measured=evidence.perplexity)
    if is_gguf(built):
        # of another format tensors alone were counted: all states lack the vocabulary
        more = file_bytes(built) - states["healed"].size
        for name in ["healed"] if in_place else [*states]:
            size, memory = states[name].size + more, states[name].memory + more
            states[name] = states[name]._replace(size=size, memory=memory)
        beside = [rival._replace(size=rival.size + more) for rival in result.rivals]
        # of a file, sizes of the curve are those of files already
        curve = [p._replace(size=p.size + more * (not in_place)) for p in result.curve]
        result = replace(result, rivals=beside, curve=curve)
    result = replace(result, states=states)
    if in_place:
        result = _beside_file(run, _as_written(run, result))
    disturbed = beyond(result.speeds, {"healed": run.fastest(run.layers)})
    result = replace(result, remarks=[*result.remarks, *disturbed])
    _move_into_place(run, result)
    return result


def _write(run: ShrinkRun, **how: Any) -> None:
    """Writes the model, reads it again and compares it; only a loaded one stays in memory.

    So there is never a second copy of the weights in memory.
    """
    opened, built = run.opened, run.built
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
    scratch = built.parent / f"{built.stem}-hf"
    short.save_pretrained(scratch, **how, release=release)
    usual = (None, None, None)  # type, shards, verify
    options = (OpenOptions(), run.running, Saving(overwrite=True))
    convert(str(scratch), str(built), "gguf", *usual, *options)


def _move_into_place(run: ShrinkRun, result: ShrinkResult) -> None:
    """Puts model and page where they belong, whole or not at all."""
    out, built = run.out, run.built
    steps = next_steps(Path(out.name), is_llama=run.opened.is_llama)
    page = shrunk_page(replace(result, next_steps=steps))
    if run.to == "gguf":
        # raises if a file has appeared there
        with new_file(out, overwrite=run.saving.overwrite, replaces=is_pruned_gguf) as model:
            with new_file(report_of(out), overwrite=True, replaces=is_page) as report:
                report.write_text(page, encoding="utf-8")
            try:  # a refusal at the end of this block leaves the model where it was built
                os.link(built, model)
            except OSError:  # another file system
                shutil.copyfile(built, model)
        return
    with new_directory(out, marker=PROVENANCE, overwrite=run.saving.overwrite) as partial_out:
        for path in built.iterdir():
            shutil.move(path, partial_out / path.name)  # OUT may be a link to another file system
        (partial_out / REPORT).write_text(page, encoding="utf-8")
