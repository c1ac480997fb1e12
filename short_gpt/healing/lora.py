"""Healing by LoRA: low-rank changes of the layers that stayed, trained and merged.

After Gromov et al. (arXiv:2403.17887, appendix A), through peft and the Trainer of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from llama.ranks import several_ranks
from short_gpt.data.disjoint import check_disjoint
from short_gpt.healing.adapters import adapt, target_modules
from short_gpt.healing.distillation import Distillation
from short_gpt.healing.four_bit import quantized, require_four_bit
from short_gpt.healing.quiet import quiet
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.trainer import TrainingRun, Window, train
from short_gpt.models.weight_changes import WeightChange, parameters_of, restored_on_error
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError
from short_gpt.wrappers.scored_model import ScoredModel

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Healed:
    """What `heal` did.

    Attributes:
        recipe: as used.
        trainable: parameters that were trained.
        parameters: of the model.
        steps: optimizer steps done; fewer than wanted after an early stop.
        kept_step: the step whose weights were kept, the best by the validation windows; 0 if none
            was better than no healing, and the model stayed as it was.
        losses: training loss in nats by step.
        validation: perplexity on the validation windows by step; 0 is before.
        tokens: trained on, with repetitions.
        divergence: of distillation, from the teacher on the validation windows by step, nats a
            token; by it the best step is known, as by the perplexity without distillation.
        distillation: its settings; None where the text alone was learned.
    """

    recipe: Recipe
    trainable: int
    parameters: int
    steps: int
    kept_step: int
    losses: dict[int, float]
    validation: dict[int, float]
    tokens: int
    divergence: dict[int, float] | None = None
    distillation: dict[str, object] | None = None

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        if self.distillation is not None:
            return {"method": "distillation", **asdict(self)}
        own = ("divergence", "distillation")
        return {"method": "LoRA", **{k: v for k, v in asdict(self).items() if k not in own}}


Merged = tuple[Healed, Callable[[], None]]  # and what takes it out again


def heal(
    short: ScoredModel,
    training: Sequence[Window],
    validation: Sequence[Window],
    evaluation: Sequence[Window] = (),
    *,
    recipe: Recipe | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    distillation: Distillation | None = None,
) -> Healed:
    """Trains low-rank changes on windows of text and merges them into the model, in place.

    Args:
        short: a `ShortHFModel`, its layers removed.
        training: windows of token ids to learn from.
        validation: windows by which the best checkpoint is kept and training may stop.
        evaluation: windows on which results will be reported; never read here, only compared: no
            training or validation window may share text with them.
        recipe: None takes the paper's, see `recipe_for`.
        work_dir: keeps checkpoints, to resume from; None keeps none.
        resume: continue from the last checkpoint in ``work_dir``; the same recipe and windows
            give what an uninterrupted run gives.
        progress: whether to show a bar.
        distillation: what is learned in the place of the text alone.

    Raises:
        MissingPackageError: peft, or for 4 bits bitsandbytes, is missing.
        ShortGPTError: the model is not one of transformers; the texts overlap; no linear map has
            the recipe's names; no windows; nothing or something else to resume; for 4 bits, no
            CUDA.
        NotFiniteError: a loss is NaN or infinite. The model is as before after any error.

    Example:
        >>> healed = heal_lora(short, training, validation, evaluation)  # doctest: +SKIP
        >>> healed.validation[healed.kept_step]  # doctest: +SKIP
        27.15
    """
    require_packages()
    recipe = recipe or recipe_for(short.trainable().config)
    run = TrainingRun(
        training,
        validation,
        recipe,
        work_dir,
        resume=resume,
        show=progress,
        distillation=distillation,
    )
    return heal_run(short, run, evaluation)[0]


def heal_run(
    short: ScoredModel, run: TrainingRun, evaluation: Sequence[Window] = ()
) -> tuple[Healed, Callable[[], None]]:
    """The same, and a function that takes out what was merged; until then a copy is held."""
    require_packages()
    if several_ranks():
        raise ShortGPTError("LoRA healing runs in one process; start it without torchrun")
    model = short.trainable()
    _check(run, evaluation)
    targets = [model.get_submodule(name) for name in target_modules(model, run.recipe.modules)]
    adapted = {id(module) for module in targets}
    ends = [
        parameters_of(number, layer, [m for m in layer.modules() if id(m) in adapted])
        for number, layer in zip(short.present, short.decoder.layers, strict=True)
    ]
    train_and_merge = _heal_four_bit if run.recipe.four_bit else _heal
    healed, restore = train_and_merge(model, run, short.decoder.device)
    change = WeightChange(healed.to_dict(), frozenset().union(*ends))
    if healed.kept_step:
        short.note_change(change)

    def undo() -> None:
        restore()
        short.forget_change(change)

    return healed, undo


def _heal(model: PreTrainedModel, run: TrainingRun, _: torch.device) -> Merged:
    """Trains over the model's own weights and merges."""
    adapted = adapt(model, run.recipe)
    try:
        healed = _train(adapted, run)
        return healed, _merge(adapted, healed)
    except BaseException:
        adapted.unload()  # takes the adapters out, and leaves the weights that they stood beside
        raise
    finally:
        _clean(model, run.recipe)


def _merge(adapted: PeftModel, healed: Healed) -> Callable[[], None]:
    """Merges what was learned, unless no evaluation was better than before; returns the undo."""
    base = [p for name, p in adapted.named_parameters() if ".base_layer." in name]
    # which a merge changes one by one
    with restored_on_error(base if healed.kept_step else ()) as restore:
        if healed.kept_step:
            adapted.merge_and_unload()
        else:
            adapted.unload()
        _clean(cast("PreTrainedModel", adapted.get_base_model()), healed.recipe)
    return restore


def _train(adapted: PeftModel, run: TrainingRun) -> Healed:
    trainable, parameters = adapted.get_nb_trainable_parameters()
    state, before = train(adapted, run)
    logs = state.log_history
    measured = {0: before} | {int(e["step"]): e for e in logs if "eval_loss" in e}
    learned = {step: found["eval_loss"] for step, found in measured.items()}
    distilled = run.distillation
    return Healed(
        recipe=run.recipe,
        trainable=trainable,
        parameters=parameters - trainable,
        steps=state.global_step,
        kept_step=min(learned, key=lambda step: learned[step]),  # the earliest of equals
        losses={int(entry["step"]): entry["loss"] for entry in logs if "loss" in entry},
        validation={step: found["eval_perplexity"] for step, found in measured.items()},
        tokens=round(state.epoch * sum(map(len, run.training))),
        divergence=None if distilled is None else learned,
        distillation=None if distilled is None else distilled.identity(),
    )


def _heal_four_bit(model: PreTrainedModel, run: TrainingRun, place: torch.device) -> Merged:
    """Trains over a copy in 4 bits (NF4, as QLoRA), and merges into the model as it is."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    place = model.device
    try:
        small = quantized(model, place, run.recipe)
        adapted = adapt(small, run.recipe)
        healed = _train(adapted, run)
        trained = get_peft_model_state_dict(adapted)
        del small, adapted
        whole = adapt(model, run.recipe)
        try:
            set_peft_model_state_dict(whole, trained)
            return healed, _merge(whole, healed)
        except BaseException:
            whole.unload()
            raise
    finally:
        torch.nn.Module.to(model, place)
        _clean(model, run.recipe)


def _clean(model: PreTrainedModel, recipe: Recipe) -> None:
    """Undoes what training leaves on a model beside its weights."""
    model.eval()
    if recipe.gradient_checkpointing:
        with quiet():
            model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = None
    vars(model).pop("peft_config", None)


def _check(run: TrainingRun, evaluation: Sequence[Window]) -> None:
    """Raises ShortGPTError or MissingPackageError for windows and settings that cannot be."""
    for name, windows in (("training", run.training), ("validation", run.validation)):
        if not len(windows) or min(map(len, windows)) < 2:
            raise ShortGPTError(f"expected {name} windows of at least 2 tokens, got {len(windows)}")
        check_disjoint(windows, evaluation)
    check_disjoint(run.training, run.validation)
    if run.recipe.four_bit:
        require_four_bit()


def require_packages() -> None:
    """Raises MissingPackageError where the extra is missing."""
    for package in ("peft", "transformers", "accelerate"):
        try:
            __import__(package)
        except ImportError:
            raise MissingPackageError(
                f'healing needs {package}: pip install "short-gpt[heal]"'
            ) from None
