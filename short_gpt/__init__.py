"""Find the redundant layers of a large language model, remove them, use the rest."""

from short_gpt.data.texts import pg19, texts
from short_gpt.data.windows import batches, windows
from short_gpt.scoring.importance import Importance, measure
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
