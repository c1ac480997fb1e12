"""short-gpt convert: writes a Llama in another format."""

from __future__ import annotations

from dataclasses import dataclass

from short_gpt import jobs
from short_gpt.cli.options import say


@dataclass(frozen=True)
class Conversion:
    """How a converted model is written.

    Args:
        dtype: of the weights written for Meta; the source's if not given, float32 from GGUF, which
            keeps what quantized weights stand for exactly.
        shards: write Meta's format in so many files. The embedding stays cut as it is; that of
            one file is cut by vocabulary if that is Llama 3's or tied to the output head, else by
            width, as Llama 2's. Any number of files runs on any number of ranks all the same.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        verify: prove the result by loading source and result, one after the other; yes if not
            given, but no where both are Meta's.
        overwrite: replace an earlier conversion.
    """

    dtype: str | None = None
    shards: int | None = None
    tokenizer_path: str | None = None
    verify: bool | None = None
    overwrite: bool = False


def convert(model: str, out: str, *, conversion: Conversion = Conversion()) -> None:
    """Writes a Llama in the other format, GGUF's included.

    GGUF and Hugging Face go to Meta's format, Meta's to Hugging Face's. With --shards, Meta's
    format in any case: so many files, for so many model-parallel ranks.

    Example: short-gpt convert model.gguf model-meta

    Args:
        model: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out: new directory; must not exist.
    """
    jobs.convert(model, out, notify=say, **vars(conversion))
    say(f"written: {out}")
