"""A Llama in another format, or in another number of files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from llama.checkpoint.reshard import reshard
from llama.formats.convert import gguf_to_meta, hf_to_meta, meta_to_hf
from llama.io.sources import kind_of
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.jobs.inputs import Notify, Opening, ignore
from short_gpt.jobs.proof import Proof
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar


def convert(
    model: str,
    out: str,
    *,
    dtype: str | None = None,
    shards: int | None = None,
    tokenizer_path: str | None = None,
    verify: bool | None = None,
    overwrite: bool = False,
    notify: Notify = ignore,
) -> Path:
    """Writes a Llama in the other format: GGUF or Hugging Face to Meta, Meta to Hugging Face.

    Args:
        model: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out: new directory; appears whole or not at all.
        dtype: of the weights written for Meta; None is the source's, or float32 from GGUF.
        shards: writes Meta's format in any case, in so many files.
        tokenizer_path: tokenizer of a Meta checkpoint; None looks beside it.
        verify: whether to prove the result by loading source and result, one after the other: the
            same logits, and the same greedy generation with and without the cache. None does
            unless both are Meta's.
        overwrite: whether an earlier conversion is replaced.
        notify: called with what was proved, in a sentence.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError, FileExistsError: there is no such source, or ``out`` exists.
        ShortGPTError: the source is damaged, or no plain Llama.
        RuntimeError: the result is not the source. It is deleted, and an earlier one stays.

    Example:
        >>> convert("model.gguf", "model-meta")  # doctest: +SKIP
        PosixPath('model-meta')
    """
    if dtype is not None and shards is None and kind_of(model) == "meta":
        raise ShortGPTError(
            "`dtype` is for writing Meta's format; Hugging Face's keeps the source's"
        )
    write = _writer(model, dtype, shards, tokenizer_path)
    proof = Proof(model, out, Opening(tokenizer_path), verify, dtype=dtype)
    with interruptible(), bar("converting", total=None, unit="tensor") as shown:
        write(model, out, overwrite=overwrite, progress=lambda _: shown.update(), verify=proof)
    if proof.said is not None:
        notify(proof.said)
    return Path(out)


def _writer(
    model: str, dtype: str | None, shards: int | None, tokenizer_path: str | None
) -> Callable[..., Path]:
    """The conversion that fits the source, its settings filled in."""
    files = 1 if shards is None else shards
    kind = kind_of(model)
    if kind == "gguf":
        return partial(gguf_to_meta, dtype=dtype or "float32", shards=files)
    if kind != "meta":
        return partial(hf_to_meta, dtype=dtype, shards=files)
    if shards is not None:
        also = (PROVENANCE,)  # the same model in other files has the same history
        return partial(
            reshard, shards=shards, dtype=dtype, tokenizer_path=tokenizer_path, also=also
        )
    return partial(meta_to_hf, tokenizer_path=tokenizer_path)
