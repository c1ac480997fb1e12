"""short-gpt prune: writes a checkpoint without some layers."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import results
from short_gpt.cli.options import say
from short_gpt.jobs import Choice, OpenOptions, PerplexityLimit, Written


def prune(
    model: str,
    out: str,
    *,
    choice: Choice = Choice(),
    limit: PerplexityLimit = PerplexityLimit(),
    opening: OpenOptions = OpenOptions(),
    written: Written = Written(),
) -> None:
    """Writes a checkpoint without some layers, in any format.

    The model is not loaded for that, but read tensor by tensor: memory is bounded by the largest
    one. From GGUF to GGUF every tensor stays in its quantization. With --verify yes, source and
    result are then loaded, one after the other, and compared. From GGUF to a directory the model
    is loaded.

    Example: short-gpt prune llama-2-7b llama-2-5b --scores ranking.json --n 9

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id (safetensors), or GGUF
            file.
        out: new directory, or GGUF file if it ends with .gguf; must not exist.
    """
    result = jobs.prune_by(model, out, choice, limit=limit, opening=opening, written=written)
    say(results.pruned(result))
