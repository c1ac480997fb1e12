"""Healing by LoRA: low-rank changes of the kept layers, trained and merged; as steps, too.

After Gromov et al. (arXiv:2403.17887, appendix A), through peft and the Trainer of transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from short_gpt.data.disjoint import check_disjoint
from short_gpt.data.windows import TokenIds, learned
from short_gpt.healing.context import Heal, HealingContext
from short_gpt.healing.distillation import Distillation
from short_gpt.healing.settings import ALL, OUTPUTS, Recipe, check_installed, recipe_for
from short_gpt.healing.trainer import TrainingRun, of_lora, quiet, train
from short_gpt.models.decoder import (
    WeightChange,
    mixed_precision,
    parameters_of,
    restored_on_error,
    wait,
)
from short_gpt.models.families import ANY, family_of
from short_gpt.models.hf import find_layers
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.wrappers.scored_model import ScoredModel

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoraResult:
    """What `heal` did."""

    recipe: Recipe  # as used
    trainable: int  # number of parameters trained
    parameters: int  # of the model
    steps: int  # optimizer steps done; fewer than the recipe's after an early stop
    kept_step: int  # the best step by the validation windows; 0 leaves the model as it was
    losses: dict[int, float]  # training loss in nats by step
    validation: dict[int, float]  # perplexity on the validation windows by step; 0 is before
    windows: int  # different ones trained on
    tokens: int  # read, with repetitions
    counted_tokens: int  # of these, which the loss counts: in dialogs of its own the answers'
    divergence: dict[int, float] | None = None  # from the teacher in validation by step, nats
    distillation: dict[str, object] | None = None  # its settings; None where text was learned

    def to_dict(self) -> dict[str, object]:
        content = {**asdict(self), "recipe": of_lora(self.recipe)}
        if self.distillation is not None:
            return {"method": "distillation", **content}
        del content["divergence"], content["distillation"]
        return {"method": "LoRA", **content}


Merged = tuple[LoraResult, Callable[[], None]]  # and what undoes it
TEACHER = "teacher"  # the folder of its predictions
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def heal(
    short: ScoredModel,
    training: Sequence[TokenIds],
    validation: Sequence[TokenIds],
    evaluation: Sequence[TokenIds] = (),
    *,
    recipe: Recipe | None = None,
    work_dir: str | Path | None = None,
    progress: bool = True,
    distillation: Distillation | None = None,
) -> LoraResult:
    """Trains low-rank changes on windows of text and merges them into the model, in place.

    After any error the model is as before. Under torchrun processes share every batch, by the
    Trainer's data parallelism; each holds the whole model, and all get the same.

    Args:
        short: A `ShortHFModel`, its layers removed.
        training: Windows of token ids to learn from.
        validation: Windows by which the best checkpoint is kept and training may stop.
        evaluation: Windows for the results; never read, but no other may share text with them.
        recipe: Settings. Default: the paper's, see `recipe_for`.
        work_dir: Folder of checkpoints; the same call continues from the last, and gives what an
            uninterrupted run gives. Default: none is kept.
        distillation: Predictions to learn instead of the text alone. Default: the text.

    Raises:
        ShortGPTError: the model is not one of transformers; texts overlap; no linear map has the
            recipe's names; no windows; ``work_dir`` is of another run.
        NotFiniteError: a loss is NaN or infinite.

    Example:
        >>> heal_lora(short, training, validation).kept_step  # doctest: +SKIP
    """
    recipe = recipe or recipe_for(short.trainable().config)
    run = TrainingRun(training, validation, recipe, work_dir, progress, distillation)
    return heal_run(short, run, evaluation)[0]


def heal_run(short: ScoredModel, run: TrainingRun, evaluation: Sequence[TokenIds] = ()) -> Merged:
    """As `heal`; also returns what undoes the change, which holds a copy."""
    model = check_trainable(short.trainable())
    _check(run, evaluation, replicas.current(short.decoder.device).count)
    path = getattr(short.decoder, "layers_path", None)
    run = run._replace(mixed=short.decoder.mixed, layers_path=path)
    targets = [model.get_submodule(n) for n in target_modules(model, run.recipe.modules, path)]
    adapted = {id(module) for module in targets}
    ends = [
        parameters_of(number, layer, [m for m in layer.modules() if id(m) in adapted])
        for number, layer in zip(short.present, short.decoder.layers, strict=True)
    ]
    with adapters(model, run.recipe, path) as trained:
        healed = _train(trained, run)
        restore = _merge(trained, healed)
    change = WeightChange(healed.to_dict(), frozenset().union(*ends))
    if healed.kept_step:  # else no evaluation was better than before, and nothing was merged
        short.note_change(change)

    def undo() -> None:
        restore()
        short.forget_change(change)

    return healed, undo


def _merge(adapted: PeftModel, healed: LoraResult) -> Callable[[], None]:
    """Merges what was learned if an evaluation was better than before; returns the undo."""
    base = [p for name, p in adapted.named_parameters() if ".base_layer." in name]
    # which a merge changes one by one
    with restored_on_error(base if healed.kept_step else ()) as restore:
        if healed.kept_step:
            adapted.merge_and_unload()
    return restore


def _train(adapted: PeftModel, run: TrainingRun) -> LoraResult:
    trainable, parameters = adapted.get_nb_trainable_parameters()
    state, before = train(adapted, run)
    logs = state.log_history
    measured = {0: before} | {int(e["step"]): e for e in logs if "eval_loss" in e}
    losses = {step: metrics["eval_loss"] for step, metrics in measured.items()}
    distilled, apart = run.distillation, None
    if distilled is not None:
        apart = {step: metrics["eval_divergence"] for step, metrics in measured.items()}
    return LoraResult(
        recipe=run.recipe,
        trainable=trainable,
        parameters=parameters - trainable,
        steps=state.global_step,
        kept_step=min(losses, key=lambda step: losses[step]),  # the earliest of equals
        losses={int(entry["step"]): entry["loss"] for entry in logs if "loss" in entry},
        validation={step: metrics["eval_perplexity"] for step, metrics in measured.items()},
        windows=round(min(1.0, state.epoch) * len(run.training)),
        tokens=round(state.epoch * sum(map(len, run.training))),
        counted_tokens=round(state.epoch * sum(sum(learned(w)) for w in run.training)),
        divergence=apart,
        distillation=None if distilled is None else distilled.identity(),
    )


def seconds_a_step(short: ScoredModel, window: TokenIds, recipe: Recipe) -> float:
    """Seconds of an optimizer step on such windows, measured on one; leaves the model unchanged."""
    model = check_trainable(short.trainable())
    path = getattr(short.decoder, "layers_path", None)
    tokens = torch.tensor([list(window)], device=model.device)
    with adapters(model, recipe, path) as adapted:
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            with mixed_precision(short.decoder.mixed, tokens.device):
                loss = adapted(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            wait(model)
        seconds = recipe.batch_size * (time.perf_counter() - started)
    return seconds


@contextmanager
def adapters(
    model: PreTrainedModel, recipe: Recipe, layers_path: str | None
) -> Iterator[PeftModel]:
    """The model with low-rank changes inside the block; what is not merged there is dropped.

    All else that training changes of a model is undone after the block.
    """
    unfrozen, config = [p for p in model.parameters() if p.requires_grad], vars(model.config)
    before = dict(config)
    adapted: PeftModel | None = None
    try:
        adapted = adapt(model, recipe, layers_path)
        yield adapted
    finally:
        if adapted is not None:
            adapted.unload()  # keeps the model's own weights, merged ones too
        model.eval()
        if recipe.gradient_checkpointing:
            with quiet():
                model.gradient_checkpointing_disable()
        for parameter in unfrozen:
            parameter.requires_grad_(True)
            parameter.grad = None
        vars(model).pop("peft_config", None)
        config.clear()  # in which the Trainer turns the cache off
        config.update(before)


def _check(run: TrainingRun, evaluation: Sequence[TokenIds], processes: int) -> None:
    replicas.require_whole_model("training")
    at_once = run.recipe.micro_batch * processes
    multiple = f"a multiple of {at_once}, the windows that {processes} processes read at once"
    check(run.recipe.batch_size % at_once == 0, "batch_size", run.recipe.batch_size, multiple)
    for name, windows in (("training", run.training), ("validation", run.validation)):
        fewest = min((sum(learned(window)) for window in windows), default=0)
        check(fewest, f"{name} windows", len(windows), "some of at least 2 tokens, one that counts")
        check_disjoint(windows, evaluation)
    check_disjoint(run.training, run.validation)
    check_installed(run.recipe)


def check_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """The model; ShortGPTError for weights that cannot be trained as they are."""
    parameters = [*model.parameters()]
    small = not all(p.is_floating_point() for p in parameters)
    if small or getattr(model, "is_quantized", False):
        raise ShortGPTError(
            "training merges into weights that are not quantized, and this model's are: open it "
            "without a quantization"
        )
    device = parameters[0].device.type
    if parameters[0].dtype == torch.float16 and device != "cuda":
        raise ShortGPTError(
            f"training in float16 loses small gradients on {device}: open the model with the "
            "`dtype` float32 or bfloat16"
        )
    return model


def adapt(model: PreTrainedModel, recipe: Recipe, layers_path: str | None = None) -> PeftModel:
    from peft import LoraConfig, TaskType, get_peft_model

    targets = target_modules(model, recipe.modules, layers_path)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=recipe.rank,
        lora_alpha=recipe.rank if recipe.alpha is None else recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=type(model.get_submodule(targets[0])).__name__ == "Conv1D",
    )
    torch.manual_seed(recipe.seed)
    with quiet():
        return get_peft_model(model, config)


def target_modules(
    model: PreTrainedModel, names: Sequence[str] | None = None, layers_path: str | None = None
) -> list[str]:
    """Full names of the linear maps in the layers with these last names; see `Recipe.modules`.

    ``layers_path`` is where the layers are; None finds them.
    """
    family = family_of(model.config.get_text_config(decoder=True).model_type)
    if names is None or tuple(names) == ALL:
        names = (*family.lora, *(ATTENTION if names else ()))
    elif tuple(names) == OUTPUTS:
        names = (*family.attention_output, *family.mlp_output)
    ends = tuple(f".{name}" for name in names)
    inside = f"{layers_path or find_layers(model)}."
    targets = [
        name
        for name, module in model.named_modules()
        if name.startswith(inside)
        and f".{name}".endswith(ends)
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    if not targets:
        raise ShortGPTError(
            f"{type(model).__name__} has no linear maps named {', '.join(names or ANY.lora)}; "
            "name its own"
        )
    return targets


def prepare_training(name: str, context: HealingContext, recipe: Recipe | None) -> Heal:
    """LoRA as a step: "lora" on text, "distill" on what the original model predicts.

    Without a recipe, by the paper's for the model.
    """
    model = check_trainable(context.short.trainable())
    recipe = recipe or recipe_for(model.config)
    read = len(context.calibration)  # windows that a closed form reads, which come last
    unread_first = [*context.windows.training[read:], *context.windows.training[:read]]
    # a prompt may fill a window, and leave nothing that counts
    every, validation = (
        [window for window in windows if any(learned(window))]
        for windows in (unread_first, context.windows.validation)
    )
    training, distillation = every[: recipe.steps * recipe.batch_size], None
    if name == "distill":
        distillation = _distillation(context, recipe, [*training, *validation])
    folder = None if context.folder is None else context.folder / name
    run = TrainingRun(training, validation, recipe, folder, context.progress, distillation)

    def train_and_merge() -> tuple[dict[str, object], Callable[[], object]]:
        healed, undo = heal_run(context.short, run, context.windows.evaluation)
        return healed.to_dict(), undo

    return train_and_merge


def _distillation(
    context: HealingContext, recipe: Recipe, windows: Sequence[TokenIds]
) -> Distillation:
    if context.teacher is None and not context.layers:
        raise ShortGPTError(
            "distillation learns from the model with all its layers: name the layers to "
            "remove, or a teacher that still has them"
        )
    model = context.short if context.teacher is None else context.teacher()
    ours, theirs = context.short.decoder.vocab_size, model.decoder.vocab_size
    if ours != theirs:
        raise ShortGPTError(
            f"the teacher knows {theirs} tokens, the model {ours}: give the model that it was "
            "pruned from"
        )
    assert context.folder is not None
    learned = Distillation(context.folder / TEACHER, model, windows, recipe)
    learned.fill(batch_size=recipe.micro_batch, progress=context.progress)
    return learned
