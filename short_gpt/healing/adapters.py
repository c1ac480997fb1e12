"""Untrained low-rank changes put beside the linear maps of a model, by peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from short_gpt.healing.quiet import quiet
from short_gpt.healing.recipe import Recipe
from short_gpt.models.families import ANY, family_of
from short_gpt.models.hf import find_layers
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def adapt(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
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


def target_modules(model: PreTrainedModel, names: Sequence[str] | None = None) -> list[str]:
    """The full names of the linear maps inside the layers that LoRA changes.

    Args:
        model: a causal language model of transformers.
        names: ends of their names; None takes the MLP's of the model's family.

    Raises:
        ShortGPTError: there is none.
    """
    model_type = model.config.get_text_config(decoder=True).model_type
    wanted = family_of(model_type).lora if names is None else names
    ends = tuple(f".{name}" for name in wanted)
    found = [name for name in _with_weight(model, find_layers(model)) if f".{name}".endswith(ends)]
    if not found:
        raise ShortGPTError(
            f"{type(model).__name__} has no linear maps named {', '.join(wanted or ANY.lora)}; "
            "name its own"
        )
    return found


def _with_weight(model: PreTrainedModel, layers_path: str) -> list[str]:
    """The full names of the modules inside the layers that have a weight of their own."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{layers_path}.")
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
