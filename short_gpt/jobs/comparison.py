"""All methods x numbers of layers x healing on one checkpoint, nothing measured twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llama.io.files import check_writable
from llama.parallel import several_ranks
from short_gpt.data import demo
from short_gpt.healing.recipe import Recipe
from short_gpt.jobs.cases import CaseNames, LoraNames, Shares, Windows
from short_gpt.jobs.comparing import Cases, Compared, compare
from short_gpt.jobs.comparison_lora import DistillHealing, LoraHealing
from short_gpt.jobs.evaluation import Tasks
from short_gpt.jobs.inputs import Opening, TextSource, check_model, source_of
from short_gpt.jobs.rows import DISTILL, LORA, TRAINED
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.opening import OpenOptions
from short_gpt.wrappers.short_model import ShortModel


def compare_checkpoint(
    model: str | None,
    data: str | TextSource = "pg19",
    *,
    cases: CaseNames | None = None,
    shares: Shares | None = None,
    lora: LoraNames | None = None,
    tasks: Tasks | None = None,
    opening: Opening | None = None,
    saving: Saving | None = None,
) -> Compared:
    """What `experiments.compare` does, for a checkpoint and texts by their names.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; None
            compares on the demo's small model and book.
        data: texts to choose layers and to heal by.
        cases, shares, lora, tasks, opening: what is compared, on what, and how.
        saving: where the run is saved, to be continued.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> compare_checkpoint("llama-2-7b", cases=CaseNames("bi", 9)).rows[1].n  # doctest: +SKIP
        9
    """
    cases, shares, opening = cases or CaseNames(), shares or Shares(), opening or Opening()
    if several_ranks():
        raise ShortGPTError("compare runs on one rank; start it alone")
    tasks = tasks or Tasks()
    tasks.check()
    plan, state = cases.cases(shares.search_windows), (saving or Saving()).state
    if state is not None:
        check_writable(Path(state))
    lora = lora or LoraNames()
    lora.settings().check()
    shares.check()
    if model is not None:
        check_model(model, max(plan.counts), name="`counts`")
    source, calibration, evaluation = _material(model, source_of(data), shares)
    check_model(source, max(plan.counts), name="`counts`")
    short = opening.whole(source, size=_longest(plan, shares, lora))
    held = shares.cut(short, evaluation, shares.eval_windows)
    chosen = shares.cut(short, calibration, shares.max_windows)
    bos = shares.bos or short.bos
    how = (lora.settings(), OpenOptions(**vars(opening)), shares.seed, bos)
    train = partial(LoraHealing, source, calibration, short.encode, held, *how)
    heals = _trained(plan.healings, train, short, chosen)
    with interruptible():
        found = compare(
            short,
            chosen,
            held,
            cases=plan,
            lora=heals.get(LORA),
            distill=heals.get(DISTILL),
            tasks=tasks.suite(),
            state=state,
        )
    return replace(found, bos=bos)


def _longest(plan: Cases, shares: Shares, lora: LoraNames) -> int:
    """Tokens that the model must take at once: as a teacher, also those of windows to train on."""
    learned = lora.lora_size or Recipe.size
    return max(shares.size, learned) if DISTILL in plan.healings else shares.size


def _trained(
    healings: Sequence[str],
    train: Callable[[], LoraHealing],
    short: ShortModel,
    fitted_on: Windows,
) -> dict[str, LoraHealing]:
    """What heals by training; refuses at once what would go wrong after all else is measured.

    Args:
        healings: of the comparison.
        train: makes what heals by LoRA.
        short: the whole model, from which distillation learns.
        fitted_on: windows of the refit in front of it.
    """
    if not {*TRAINED} & {*healings}:
        return {}
    heals = {LORA: train()}
    if DISTILL in healings:
        heals[DISTILL] = DistillHealing(**vars(heals[LORA]), teacher=short, fitted_on=fitted_on)
    return {name: heal for name, heal in heals.items() if name in healings}


def _material(
    model: str | None, texts: TextSource, shares: Shares
) -> tuple[str, list[str], list[str]]:
    """The model, texts to choose and heal by, and texts to evaluate on."""
    if model is None:
        return str(demo.checkpoint()), demo.bible("calibration"), demo.bible("held_out")
    return model, *texts.read_apart(shares.eval_data, seed=shares.seed)
