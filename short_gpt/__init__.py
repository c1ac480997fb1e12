"""Find the redundant layers of a large language model, remove them, use the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama import lazy
from llama.sources import NAMED


def _demo() -> str:
    from short_gpt.data.demo import gguf_file

    return str(gguf_file())


NAMED["demo"] = _demo

if TYPE_CHECKING:
    __version__: str
    from short_gpt.data.texts import pg19, texts
    from short_gpt.data.windows import batches, windows
    from short_gpt.evaluation.tasks import run_tasks
    from short_gpt.healing.choosing import choose_healed
    from short_gpt.healing.lora import heal as heal_lora
    from short_gpt.healing.refit import heal as heal_refit
    from short_gpt.healing.refit import heal_patch
    from short_gpt.healing.settings import Recipe
    from short_gpt.jobs import convert, prune, rank, shrink
    from short_gpt.jobs.comparing import compare
    from short_gpt.runtime.errors import ShortGPTError
    from short_gpt.scoring.importance import Importance
    from short_gpt.scoring.metrics import angular_distances, block_influence
    from short_gpt.scoring.run import measure
    from short_gpt.scoring.stopping import Stop
    from short_gpt.selection.methods import choose
    from short_gpt.wrappers.opening import open_model, perplexity
    from short_gpt.wrappers.own_text import own_samples
    from short_gpt.wrappers.short_hf import ShortHFModel
    from short_gpt.wrappers.short_llama import ShortLlama
    from short_gpt.wrappers.short_model import ShortModel
else:
    _new, _names = lazy(__name__)

    def __dir__():
        return [*_names(), "__version__"]

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("short-gpt")
        return _new(name)


__all__ = ["Importance", "Recipe", "ShortGPTError", "ShortHFModel", "ShortLlama", "ShortModel"]
__all__ += ["Stop", "angular_distances", "batches", "block_influence", "choose", "choose_healed"]
__all__ += ["compare", "convert"]
__all__ += ["heal_lora", "heal_patch", "heal_refit", "measure", "open_model", "own_samples"]
__all__ += ["perplexity", "pg19", "prune", "rank", "run_tasks", "shrink", "texts", "windows"]
