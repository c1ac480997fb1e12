"""A model in another format or another number of files, and its verification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llama.files import json_text
from llama.formats.gguf import llama_to_gguf, to_meta
from llama.formats.gguf_read import GGUFParts
from llama.formats.hf import meta_to_hf
from llama.parallel import choose_dtype
from llama.sources import Source, find_source, is_gguf, resolve
from short_gpt.checkpoints.gguf import Stack, write_gguf
from short_gpt.checkpoints.hf import save_hf
from short_gpt.checkpoints.provenance import NAME, PROVENANCE, RECORD, Provenance
from short_gpt.checkpoints.prune import kept_tensors
from short_gpt.checkpoints.target import Target, check_format
from short_gpt.checkpoints.verify import (
    ROUNDING,
    Fingerprint,
    check_same,
    fingerprint_aligned,
    one_by_one,
)
from short_gpt.jobs.saving import Running, Saving, interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.wrappers.opening import open_model, open_trainable
from short_gpt.wrappers.options import OpenOptions


@interruptible()
def convert(
    model: str,
    out: str,
    to: str | None,
    type: str | None,
    shards: int | None,
    verify: bool | None,
    opening: OpenOptions,
    running: Running,
    saving: Saving,
) -> Path:
    """What `jobs.convert` does."""
    check_format(out, to)
    source, dtype = find_source(model), opening.dtype
    to = to or _format(source, out, shards)
    _check_options(source, to, type, dtype, shards)
    proofs: list[str | None] = []

    def check(directory: Path) -> None:
        proofs.append(prove(directory, source, out, opening, verify))

    names = () if (source.kind, to) == ("gguf", "hf") else kept_tensors(source)
    total = len({*names}) or None
    with bar("converting", total=total, unit="tensor") as shown:
        writing: dict[str, Any] = {"progress": lambda _: shown.update(), "verify": check}
        writing |= {"overwrite": saving.overwrite}
        if to == "gguf":
            _to_gguf(source, out, type, {**writing, "exact": bool(verify)})
        elif to == "hf" and source.kind == "gguf":  # as transformers reads it
            short = open_trainable(source, OpenOptions(device="cpu", dtype=dtype or "float32"))
            target = Target(out, saving.overwrite, None if verify is False else short.check_saved)
            record = Provenance.of_checkpoint(source)
            how: dict[str, Any] = {"tokenizer": short.tokenizer, "record": record}
            save_hf(short.trainable(), target, **how, source=source)
        elif source.kind == "meta" and shards is None:
            meta_to_hf(source, out, **writing)
        else:
            writing |= {"dtype": dtype, "shards": 1 if shards is None else shards}
            also = [PROVENANCE] if source.kind == "meta" else []  # the history stays the same
            to_meta(source, out, also=also, **writing)
    if proofs and proofs[0] is not None:
        running.tell(proofs[0])
    return Path(out)


def _to_gguf(source: Source, out: str, type: str | None, writing: dict[str, Any]) -> None:
    """Writes GGUF: of its own tensors as they are, or a Llama."""
    if source.kind == "gguf":
        stack = Stack(source)
        target = Target(out, writing["overwrite"], writing["verify"])
        write_gguf(stack, target, range(stack.blocks), progress=writing["progress"])
        return
    # the same model in another format has the same history
    before = Provenance.of_checkpoint(resolve(source))
    also = {} if before is None else {RECORD: json_text(before.to_dict())}
    if before is not None and before.all_removed and before.first_source is not None:
        also[NAME] = before.named(Path(before.first_source).name)
    llama_to_gguf(source, out, kind=type, also=also, **writing)


def _format(source: Source, out: str, shards: int | None) -> str:
    if is_gguf(out):
        return "gguf"
    if source.kind == "gguf":
        arch = GGUFParts(source.path).fields.get("general.architecture")
        return "meta" if arch == "llama" or shards is not None else "hf"
    return "hf" if source.kind == "meta" and shards is None else "meta"


def _check_options(
    source: Source, to: str, type: str | None, dtype: str | None, shards: int | None
) -> None:
    kind = "hf" if source.kind == "hub" else source.kind
    into_gguf, into_meta = to == "gguf" and kind != "gguf", to == "meta"
    allowed = into_meta or (to == "hf" and kind == "gguf")
    for name, value, has_effect, what in (
        ("type", type, into_gguf, "is for writing GGUF from another format"),
        ("dtype", dtype, allowed, "is for Meta's format, or one read from GGUF; GGUF has `type`"),
        ("shards", shards, into_meta, f"writes Meta's format, not {to}"),
    ):
        if value is not None and not has_effect:
            raise ShortGPTError(f"`{name}` {value} {what}")
    if to == kind and to != "gguf" and not (into_meta and shards is not None):
        raise ShortGPTError(f"{source} is in the format {to} already; give `to` another one")


def prove(
    directory: Path,
    source: Source,
    out: str,
    opening: OpenOptions,
    verify: bool | None,
    *,
    drop: Sequence[int] = (),
) -> str | None:
    """Compares a new directory, which will be called ``out``, with its source without ``drop``.

    Without a ``verify``, where Hugging Face's format is read or written, or GGUF is read. Weights
    were rounded to the dtype of the opening, if it has one.
    Returns what was proved, or why nothing was; None if no proof was asked for.
    """
    written = find_source(directory)
    if written.kind == "gguf" and not verify:
        what = "that remains is the source's" if source.kind == "gguf" else "is what was written"
        return f"verified: read again, every tensor {what}, byte for byte"
    if not (verify or (verify is None and not source.kind == written.kind == "meta")):
        return None
    options = OpenOptions(device="cpu", trust_remote_code=opening.trust_remote_code)
    dtype = None if opening.dtype is None else choose_dtype(opening.dtype, torch.device("cpu"))

    def of_original() -> Fingerprint:
        short = open_model(source, options)
        if drop:
            short.remove_layers(drop)
        return fingerprint_aligned(short, dtype=dtype)

    exact = check_same(
        *one_by_one(of_original, lambda: fingerprint_aligned(open_model(written, options))),
        rounding=ROUNDING if (source.kind == "meta") != (written.kind == "meta") else 0.0,
        names=(f"{source} without {[*drop]}" if drop else str(source), out),
    )
    which = " without these layers" if drop else ""
    which += "" if opening.dtype is None else f" in {opening.dtype}"
    return (
        f"verified: the logits are those of the source{which}, {exact}, and generation "
        "with the cache is that without it"
    )
