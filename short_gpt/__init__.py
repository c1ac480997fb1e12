"""Find the redundant layers of a large language model, remove them, use the rest."""

from short_gpt.data import batches, pg19, texts, windows
from short_gpt.importance import Importance, measure
from short_gpt.short_hf import ShortHFModel
from short_gpt.short_llama import ShortLlama
from short_gpt.short_model import ShortModel

__all__ = [
    "Importance",
    "ShortHFModel",
    "ShortLlama",
    "ShortModel",
    "batches",
    "measure",
    "pg19",
    "texts",
    "windows",
]
