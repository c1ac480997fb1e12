"""QLoRA (Dettmers et al. 2023, arXiv:2305.14314): training over a copy of the model in 4 bits."""

from __future__ import annotations

import tempfile
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from short_gpt.healing.recipe import Recipe
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantized(model: PreTrainedModel, place: torch.device, recipe: Recipe) -> PreTrainedModel:
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
        model.cpu()  # both would not fit the card
        small = type(model).from_pretrained(
            folder, quantization_config=settings, dtype=model.dtype, device_map={"": place}
        )
    return prepare_model_for_kbit_training(
        small, use_gradient_checkpointing=recipe.gradient_checkpointing
    )


def require_four_bit() -> None:
    """Raises MissingPackageError or ShortGPTError, naming what QLoRA lacks here."""
    try:
        import_module("bitsandbytes")
    except ImportError:
        raise MissingPackageError("training in 4 bits needs: pip install bitsandbytes") from None
    if not torch.cuda.is_available():
        raise ShortGPTError("training in 4 bits needs CUDA, which torch does not find here")
