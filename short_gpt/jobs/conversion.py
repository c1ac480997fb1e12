"""A model in another format, or in another number of files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from llama.checkpoint.meta import reshard
from llama.formats.convert import gguf_to_meta, hf_to_meta, meta_to_hf
from llama.formats.gguf import llama_to_gguf
from llama.formats.gguf_read import GGUFParts
from llama.io.json_files import json_text
from llama.io.sources import Source, find_source, is_gguf, resolve
from short_gpt.checkpoints.gguf import write_gguf
from short_gpt.checkpoints.gguf_layers import Stack
from short_gpt.checkpoints.hf import save_hf
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.records import PROVENANCE, RECORD
from short_gpt.checkpoints.target import Target, check_format
from short_gpt.jobs.inputs import Notify, ignore
from short_gpt.jobs.proof import Proof
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.wrappers.opening import check_tokenizer, open_hf
from short_gpt.wrappers.options import OpenOptions


def convert(
    model: str,
    out: str,
    *,
    to: str | None = None,
    type: str | None = None,
    dtype: str | None = None,
    shards: int | None = None,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = False,
    verify: bool | None = None,
    overwrite: bool = False,
    notify: Notify = ignore,
) -> Path:
    """Writes a Llama in another format, or any GGUF file that transformers reads.

    Args:
        model: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out: new directory, or GGUF file if it ends with .gguf.
        to: the format to write, meta, hf or gguf. None is gguf where ``out`` ends so, and else
            Meta's, but Hugging Face's from Meta's and from a GGUF file that is no Llama.
        type: of matrices in GGUF: f32, f16, bf16 or q8_0; None is the source's.
        dtype: of the weights written for Meta, or from GGUF; None is the source's, or float32
            from GGUF.
        shards: writes Meta's format in any case, in so many files.
        tokenizer_path: tokenizer of a Meta checkpoint; None looks beside it.
        trust_remote_code: whether Python files that come with a Hugging Face model are run, to
            prove the result.
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
    check_format(out, to)
    source = find_source(model)
    to = to or _format(source, out, shards)
    _check_options(source, to, type, dtype, shards)
    opening = OpenOptions(tokenizer_path, trust_remote_code=trust_remote_code)
    check_tokenizer(opening.tokenizer_path, model)
    proof = Proof(source, out, opening, verify, dtype=dtype)
    if to == "gguf":
        write = _to_gguf(source, type, tokenizer_path)
    elif to == "hf" and source.kind == "gguf":
        write = partial(_opened, dtype=dtype, verify=verify is not False)
    else:
        write = partial(_writer(source, dtype, shards, tokenizer_path), verify=proof)
    with interruptible(), bar("converting", total=None, unit="tensor") as shown:
        write(source, out, overwrite=overwrite, progress=lambda _: shown.update())
    if proof.said is not None:
        notify(proof.said)
    return Path(out)


def _format(source: Source, out: str, shards: int | None) -> str:
    """The format to write where none is named."""
    if is_gguf(out):
        return "gguf"
    if source.kind == "gguf":
        arch = GGUFParts(source.path).fields.get("general.architecture")
        return "meta" if arch == "llama" or shards is not None else "hf"
    return "hf" if source.kind == "meta" and shards is None else "meta"


def _check_options(
    source: Source, to: str, type: str | None, dtype: str | None, shards: int | None
) -> None:
    """Raises ShortGPTError for options that have no effect on what is written."""
    kind = source.kind
    if type is not None and (to != "gguf" or kind == "gguf"):
        raise ShortGPTError(
            f"`type` {type} is for writing GGUF from another format; tensors of a GGUF file stay "
            "as they are (llama.cpp's llama-quantize changes them)"
        )
    if dtype is not None and (to == "gguf" or (to == "hf" and kind != "gguf")):
        raise ShortGPTError(
            f"`dtype` {dtype} is for writing Meta's format; Hugging Face's keeps the source's, and "
            "GGUF has `type`"
        )
    if shards is not None and to != "meta":
        raise ShortGPTError(f"`shards` {shards} writes Meta's format, not {to}")
    if to == kind and to != "gguf" and not (to == "meta" and shards is not None):
        raise ShortGPTError(f"{source} is in the format {to} already; give `to` another one")


def _to_gguf(source: Source, type: str | None, tokenizer_path: str | None) -> Callable[..., Path]:
    """The writer of a GGUF file: of tensors as they are, or of another format's."""
    if source.kind == "gguf":
        return _joined
    # the same model in another format has the same history
    before = Provenance.of_checkpoint(resolve(source))
    also = {} if before is None else {RECORD: json_text(before.to_dict())}
    return partial(llama_to_gguf, kind=type, tokenizer_path=tokenizer_path, also=also)


def _joined(
    source: Source, out: str, *, overwrite: bool, progress: Callable[[str], object]
) -> Path:
    """Writes a GGUF model as it is, in one file or as many as ``out`` says."""
    stack, target = Stack.open(source), Target(out, "gguf", overwrite)
    return write_gguf(stack.parts, target, range(stack.blocks), progress=progress)


def _opened(
    source: Source,
    out: str,
    *,
    dtype: str | None,
    verify: bool,
    overwrite: bool,
    progress: Callable[[str], object],
) -> Path:
    """Writes a GGUF file as transformers reads it, in Hugging Face's format."""
    short = open_hf(source, OpenOptions(device="cpu", dtype=dtype or "float32"))
    target = Target(out, "hf", overwrite, short.check_saved if verify else None)
    record, tokenizer = Provenance.of_checkpoint(source), short.tokenizer
    return save_hf(short.trainable(), target, tokenizer=tokenizer, record=record, source=source)


def _writer(
    source: Source, dtype: str | None, shards: int | None, tokenizer_path: str | None
) -> Callable[..., Path]:
    """The conversion that fits the source, its settings filled in."""
    files = 1 if shards is None else shards
    if source.kind == "gguf":
        return partial(gguf_to_meta, dtype=dtype or "float32", shards=files)
    if source.kind != "meta":
        return partial(hf_to_meta, dtype=dtype, shards=files)
    if shards is not None:
        also = (PROVENANCE,)  # the same model in other files has the same history
        return partial(
            reshard, shards=shards, dtype=dtype, tokenizer_path=tokenizer_path, also=also
        )
    return partial(meta_to_hf, tokenizer_path=tokenizer_path)
