"""Healing by LoRA: low-rank changes of the layers that stayed, trained and merged.

After Gromov et al. (arXiv:2403.17887, appendix A), through peft and the Trainer of transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llama.parallel import several_ranks
from short_gpt.data.disjoint import check_disjoint
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.trainer import quiet, train
from short_gpt.models.hf import find_layers
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError
from short_gpt.surgery.changes import WeightChange, parameters_of

Window = Sequence[int]

# The MLP's projections by their usual names: llama, mistral, qwen2; phi3; phi, opt; Qwen of 2023;
# gpt2, starcoder2; gpt_neox, falcon, bloom.
MLP = (
    *("gate_proj", "up_proj", "down_proj"),
    *("gate_up_proj", "fc1", "fc2", "w1", "w2", "mlp.c_fc", "mlp.c_proj"),
    *("dense_h_to_4h", "dense_4h_to_h"),
)


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
    """

    recipe: Recipe
    trainable: int
    parameters: int
    steps: int
    kept_step: int
    losses: dict[int, float]
    validation: dict[int, float]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {"method": "LoRA", **asdict(self)}


def heal(
    short: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    evaluation: Sequence[Window] = (),
    *,
    recipe: Recipe | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
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

    Raises:
        MissingPackageError: peft, or for 4 bits bitsandbytes, is missing.
        ShortGPTError: the texts overlap; no linear map has the recipe's names; no windows; nothing
            or something else to resume; for 4 bits, no CUDA.
        NotFiniteError: a loss is NaN or infinite. The model is as before after any error.

    Example:
        >>> heal(short, training, validation).kept_step  # doctest: +SKIP
        5000
    """
    recipe = recipe or recipe_for(short.model.config)
    _check(short, training, validation, evaluation, recipe)
    run = (training, validation, recipe, work_dir)
    if recipe.four_bit:
        healed = _heal_four_bit(short, *run, resume=resume, show=progress)
    else:
        healed = _heal(short, *run, resume=resume, show=progress)
    if healed.kept_step:
        layers = zip(short.kept, short.decoder.layers, strict=True)
        adapted = {
            id(short.model.get_submodule(n)) for n in target_modules(short.model, recipe.modules)
        }
        ends = [
            parameters_of(number, layer, [m for m in layer.modules() if id(m) in adapted])
            for number, layer in layers
        ]
        short.note_change(WeightChange(healed.to_dict(), frozenset().union(*ends)))
    return healed


def _heal(
    short: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    recipe: Recipe,
    work_dir: str | Path | None,
    *,
    resume: bool,
    show: bool,
) -> Healed:
    """Trains over the model's own weights and merges."""
    adapted = adapt(short.model, recipe)
    try:
        healed = _train(adapted, training, validation, recipe, work_dir, resume=resume, show=show)
    except BaseException:
        adapted.unload()
        raise
    finally:
        _clean(short.model, recipe)
    _merge(adapted, healed)
    return healed


def _merge(adapted: Any, healed: Healed) -> None:
    """Merges what was learned, unless no evaluation was better than before."""
    if healed.kept_step:
        adapted.merge_and_unload()
    else:
        adapted.unload()
    _clean(adapted.get_base_model(), healed.recipe)


def _train(
    adapted: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    recipe: Recipe,
    work_dir: str | Path | None,
    *,
    resume: bool,
    show: bool,
) -> Healed:

    trainable, parameters = adapted.get_nb_trainable_parameters()
    run = (training, validation, recipe, work_dir)
    state, before = train(adapted, *run, resume=resume, show=show)
    logs = state.log_history
    measured = {e["step"]: e["eval_perplexity"] for e in logs if "eval_perplexity" in e}
    best = min(measured, key=lambda step: measured[step])
    return Healed(
        recipe=recipe,
        trainable=trainable,
        parameters=parameters - trainable,
        steps=state.global_step,
        kept_step=best if measured[best] < before else 0,
        losses={entry["step"]: entry["loss"] for entry in logs if "loss" in entry},
        validation={0: before, **measured},
        tokens=round(state.epoch * sum(map(len, training))),
    )


def _heal_four_bit(
    short: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    recipe: Recipe,
    work_dir: str | Path | None,
    *,
    resume: bool,
    show: bool,
) -> Healed:
    """Trains over a copy in 4 bits (NF4, as QLoRA), and merges into the model as it is."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    place = short.decoder.device
    try:
        small = _quantized(short.model, place, recipe)
        adapted = adapt(small, recipe)
        healed = _train(adapted, training, validation, recipe, work_dir, resume=resume, show=show)
        trained = get_peft_model_state_dict(adapted)
        del small, adapted
        whole = adapt(short.model, recipe)
        set_peft_model_state_dict(whole, trained)
        _merge(whole, healed)
    finally:
        short.model.to(place)
        _clean(short.model, recipe)
    return healed


def _quantized(model: Any, place: torch.device, recipe: Recipe) -> Any:
    """A copy of a model in 4 bits at ``place``; the model itself goes to the CPU meanwhile."""
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.to("cpu")  # both would not fit the card
        small = type(model).from_pretrained(
            folder, quantization_config=settings, dtype=model.dtype, device_map={"": place}
        )
    return prepare_model_for_kbit_training(
        small, use_gradient_checkpointing=recipe.gradient_checkpointing
    )


def _clean(model: Any, recipe: Recipe) -> None:
    """Undoes what training leaves on a model beside its weights."""

    model.eval()
    if recipe.gradient_checkpointing:
        with quiet():
            model.gradient_checkpointing_disable()
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = None
    vars(model).pop("peft_config", None)


def adapt(model: Any, recipe: Recipe) -> Any:
    """The model with untrained changes of its layers: a ``PeftModel`` around the same weights.

    Raises:
        MissingPackageError: peft is missing.
        ShortGPTError: no linear map has the recipe's names.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = target_modules(model, recipe.modules)
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


def target_modules(model: Any, names: Sequence[str] | None = None) -> list[str]:
    """The full names of the linear maps inside the layers that LoRA changes.

    Args:
        model: a causal language model of transformers.
        names: ends of their names; None takes the MLP's projections.

    Raises:
        ShortGPTError: there is none.
    """

    wanted = MLP if names is None else names
    inside = find_layers(model) + "."
    found = [
        name
        for name, module in model.named_modules()
        if name.startswith(inside)
        and isinstance(getattr(module, "weight", None), torch.Tensor)
        and any(f".{name}".endswith(f".{end}") for end in wanted)
    ]
    if not found:
        raise ShortGPTError(
            f"{type(model).__name__} has no linear maps named {', '.join(wanted)}; name its own"
        )
    return found


def _check(
    short: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    evaluation: Sequence[Window],
    recipe: Recipe,
) -> None:

    require_packages()
    if several_ranks():
        raise ShortGPTError("LoRA healing runs in one process; start it without torchrun")
    if not hasattr(short, "model"):
        raise ShortGPTError(
            f"LoRA heals a ShortHFModel, got {type(short).__name__}: convert the checkpoint first"
        )
    for name, windows in (("training", training), ("validation", validation)):
        if not len(windows) or min(map(len, windows)) < 2:
            raise ShortGPTError(f"expected {name} windows of at least 2 tokens, got {len(windows)}")
        check_disjoint(windows, evaluation)
    check_disjoint(training, validation)
    if recipe.four_bit:
        require_four_bit()
    target_modules(short.model, recipe.modules)


def require_packages() -> None:
    """Raises MissingPackageError where the extra is missing."""
    for package in ("peft", "transformers", "accelerate"):
        try:
            __import__(package)
        except ImportError:
            raise MissingPackageError(
                f'healing needs {package}: pip install "short-gpt[heal]"'
            ) from None


def require_four_bit() -> None:
    """Raises MissingPackageError or ShortGPTError, naming what QLoRA lacks here."""
    try:
        import bitsandbytes  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    except ImportError:
        raise MissingPackageError("training in 4 bits needs: pip install bitsandbytes") from None
    if not torch.cuda.is_available():
        raise ShortGPTError("training in 4 bits needs CUDA, which torch does not find here")
