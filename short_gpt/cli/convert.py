"""short-gpt convert: writes a model in another format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from short_gpt import jobs
from short_gpt.cli.options import say
from short_gpt.runtime.settings import WRITE, setting
from short_gpt.wrappers.options import TOKENIZER


@dataclass(frozen=True)
class Conversion:
    """How a converted model is written.

    Args:
        to: the format to write: meta, hf or gguf. If not given, gguf where OUT ends with .gguf,
            else Meta's; Hugging Face's from Meta's and from a GGUF file that is no Llama.
        type: of matrices in GGUF, from another format: f32, f16, bf16 or q8_0; the source's if not
            given.
        dtype: of the weights written for Meta, or read from GGUF; the source's if not given,
            float32 from GGUF, which keeps what quantized weights stand for exactly.
        shards: write Meta's format in so many files. The embedding stays cut as it is; that of
            one file is cut by vocabulary if that is Llama 3's or tied to the output head, else by
            width, as Llama 2's. Any number of files runs on any number of ranks all the same.
        tokenizer_path: tokenizer of a Meta checkpoint; looked for beside it if not given.
        trust_remote_code: run the Python files that come with a Hugging Face model, to prove the
            result; look at them first.
        verify: prove the result by loading source and result, one after the other; yes if not
            given, but no where both are Meta's.
        overwrite: replace an earlier conversion.
    """

    HEADING: ClassVar = WRITE

    to: str | None = None
    type: str | None = None
    dtype: str | None = None
    shards: int | None = None
    tokenizer_path: str | None = setting(None, value="FILE", needs=TOKENIZER)
    trust_remote_code: bool = False
    verify: bool | None = None
    overwrite: bool = False


def convert(model: str, out: str, *, conversion: Conversion = Conversion()) -> None:
    """Writes a model in another format: Meta's, Hugging Face's or GGUF.

    GGUF and Hugging Face go to Meta's format, Meta's to Hugging Face's, and both to GGUF where OUT
    ends with .gguf. With --shards, Meta's format in any case: so many files, for so many
    model-parallel ranks. Files of one GGUF model (-00001-of-0000N) are joined by naming one.

    Example: short-gpt convert llama-3-8b llama-3-8b.gguf --type q8_0

    Args:
        model: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out: new directory, or GGUF file if it ends with .gguf; must not exist.
    """
    jobs.convert(model, out, notify=say, **vars(conversion))
    say(f"written: {out}")
