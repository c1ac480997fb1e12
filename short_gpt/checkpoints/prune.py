"""A checkpoint without some layers: from either format, in either format, never loaded."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from llama.checkpoint.meta import CONVERSION
from llama.formats.convert import check_llama, gguf_to_meta, hf_to_meta, meta_to_hf
from llama.formats.gguf import GGUFFile
from llama.formats.gguf_from import MADE, llama_to_gguf
from llama.io.files import check_new, new_directory, read_marker
from llama.io.json_files import json_text, write_json
from llama.io.outputs import new_file
from llama.io.sources import is_gguf, is_meta
from short_gpt.checkpoints.card import write_provenance
from short_gpt.checkpoints.gguf import check_new_gguf, is_pruned_gguf, prune_gguf, verified
from short_gpt.checkpoints.hf import prune_hf
from short_gpt.checkpoints.meta import prune_meta
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.checkpoints.records import RECORD
from short_gpt.runtime.errors import ShortGPTError

FORMATS = ("meta", "hf", "gguf")


def prune_checkpoint(
    source: str | PathLike[str],
    out_dir: str | PathLike[str],
    layers: Sequence[int],
    *,
    to: str | None = None,
    tokenizer_path: str | PathLike[str] | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a checkpoint without some layers, tensor by tensor.

    The other format is reached by way of the source's own: for as long as that takes, the pruned
    weights lie twice beside ``out_dir``.

    Args:
        source: Meta checkpoint directory, Hugging Face directory or hub id (safetensors), or GGUF
            file.
        out_dir: the new directory, or GGUF file; appears whole or not at all.
        layers: numbers of the layers to leave out.
        to: the format to write, as for `format_of`.
        tokenizer_path, provenance, overwrite, progress, verify: as for `prune_meta`.

    Returns:
        ``out_dir``.

    Raises:
        ShortGPTError: an unknown format, a layer that does not exist, or a model that is no Llama
            and cannot be written in Meta's format; the message names what differs.
        FileNotFoundError, FileExistsError, MissingPackageError: as for `prune_hf`.

    Example:
        >>> facts = Provenance.of_scores(importance, facts={"data": "PG-19"})  # doctest: +SKIP
        >>> prune_checkpoint("7b", "5b", [21, 22], provenance=facts)  # doctest: +SKIP
    """
    to = format_of(source, out_dir, to)
    if is_gguf(source):
        return _from_gguf(
            source,
            out_dir,
            layers,
            to,
            provenance,
            overwrite=overwrite,
            progress=progress,
            verify=verify,
        )
    meta = is_meta(str(source))
    cut = _Cut(source, list(layers), provenance, tokenizer_path if meta else None, progress)
    if to == "gguf":
        return cut.write_gguf(out_dir, meta=meta, overwrite=overwrite, verify=verify)
    if (to == "meta") == meta:
        return cut.write(out_dir, meta=meta, overwrite=overwrite, verify=verify)
    return cut.write_converted(out_dir, meta=meta, overwrite=overwrite, verify=verify)


class _Cut:
    """What a cut takes in either format."""

    def __init__(
        self,
        source: str | PathLike[str],
        layers: list[int],
        provenance: Provenance | None,
        tokenizer_path: str | PathLike[str] | None,
        progress: Callable[[str], object],
    ) -> None:
        self.source, self.layers, self.provenance = source, layers, provenance
        self.tokenizer_path, self.progress = tokenizer_path, progress

    def write(
        self,
        out_dir: str | PathLike[str],
        *,
        meta: bool,
        overwrite: bool = False,
        verify: Callable[[Path], object] | None = None,
    ) -> Path:
        write: Callable[..., Path] = prune_hf
        if meta:
            write = functools.partial(prune_meta, tokenizer_path=self.tokenizer_path)
        return write(
            self.source,
            out_dir,
            self.layers,
            provenance=self.provenance,
            overwrite=overwrite,
            progress=self.progress,
            verify=verify,
        )

    def write_gguf(
        self,
        out: str | PathLike[str],
        *,
        meta: bool,
        overwrite: bool,
        verify: Callable[[Path], object] | None,
    ) -> Path:
        """Writes a Llama of either format as GGUF, by way of the source's own."""
        path = Path(str(out))
        check_new_gguf(path, overwrite=overwrite)
        if not meta:
            check_llama(self.source)
        with new_file(path, overwrite=overwrite, ours=is_pruned_gguf) as partial:
            pruned = partial.with_name("pruned")
            self.write(pruned, meta=meta)
            also = {RECORD: json_text(Provenance.read(pruned / PROVENANCE).to_dict())}
            also |= {MADE: str(self.source), "general.name": Path(str(self.source)).name}
            llama_to_gguf(pruned, partial, also=also, progress=self.progress)
            if verify is not None:
                verified(partial, verify)
        return path

    def write_converted(
        self,
        out_dir: str | PathLike[str],
        *,
        meta: bool,
        overwrite: bool,
        verify: Callable[[Path], object] | None,
    ) -> Path:
        """Writes Meta's format from Hugging Face's, or the reverse."""
        out = Path(str(out_dir))
        check_new(out, marker=PROVENANCE, overwrite=overwrite, source=Path(str(self.source)))
        if not meta:
            check_llama(self.source)  # now rather than after the layers are cut
        with new_directory(out, marker=PROVENANCE, overwrite=overwrite) as partial:
            pruned, converted = partial.with_name("pruned"), partial.with_name("converted")
            self.write(pruned, meta=meta)
            convert: Callable[..., Path] = meta_to_hf if meta else hf_to_meta
            convert(pruned, converted, progress=self.progress)
            _put_in_place(converted, partial, pruned, self.source, card=meta)
            (verify or str)(partial)
        return out


def _from_gguf(
    source: str | PathLike[str],
    out: str | PathLike[str],
    layers: Sequence[int],
    to: str,
    provenance: Provenance | None,
    **how: Any,
) -> Path:
    if to == "hf":
        raise ShortGPTError(
            f"{source} is a GGUF file, which goes to Hugging Face's format by way of the model in "
            "memory: open it, remove the layers and save it, as short-gpt prune does"
        )
    write = prune_gguf if to == "gguf" else _gguf_as_meta
    return write(source, out, layers, provenance=provenance, **how)


def _gguf_as_meta(
    source: str | PathLike[str],
    out_dir: str | PathLike[str],
    layers: Sequence[int],
    *,
    provenance: Provenance | None,
    overwrite: bool,
    progress: Callable[[str], object],
    verify: Callable[[Path], object] | None,
) -> Path:
    """Writes a Llama in Meta's format, in float32, by way of a cut GGUF file."""
    out = Path(str(out_dir))
    check_new(out, marker=PROVENANCE, overwrite=overwrite)
    GGUFFile(Path(str(source))).args()  # refuses what is no Llama now rather than after the cut
    with new_directory(out, marker=PROVENANCE, overwrite=overwrite) as partial:
        pruned, converted = partial.with_name("pruned.gguf"), partial.with_name("converted")
        prune_gguf(source, pruned, layers, provenance=provenance)
        gguf_to_meta(pruned, converted, progress=progress)
        _put_in_place(converted, partial, pruned, source, card=False)
        (verify or str)(partial)
    return out


def _put_in_place(
    converted: Path, partial: Path, pruned: Path, source: str | PathLike[str], *, card: bool
) -> None:
    """Makes a conversion the new directory, with the record of the cut one that it was made from.

    Args:
        converted: the conversion.
        partial: the new directory.
        pruned: the cut model in the source's format.
        source: the model to name as what this was made from.
        card: as for `write_provenance`.
    """
    record = Provenance.beside(pruned)
    assert record is not None  # a cut has one
    shutil.rmtree(partial)
    converted.rename(partial)
    write_provenance(partial, record, card=card)
    made = read_marker(partial / CONVERSION)
    write_json(partial / CONVERSION, {**made, "source": str(source)})


def format_of(source: str | PathLike[str], out: str | PathLike[str], to: str | None = None) -> str:
    """The format to write a model in.

    Args:
        source: the model.
        out: where it goes.
        to: "meta", "hf" or "gguf"; None goes by ``out``, which is GGUF if it ends so, else by the
            source, of which GGUF becomes Hugging Face's.

    Raises:
        ShortGPTError: another format, or ``out`` is named otherwise.

    Example:
        >>> format_of("model.gguf", "pruned.gguf")
        'gguf'
    """
    if to not in (None, *FORMATS):
        raise ShortGPTError(f"expected a format of {' or '.join(FORMATS)}, got {to!r}")
    if to is None and not is_gguf(out):
        return "meta" if not is_gguf(source) and is_meta(str(source)) else "hf"
    if to is not None and is_gguf(out) != (to == "gguf"):
        expected = "a name that ends with .gguf" if to == "gguf" else "the name of a directory"
        raise ShortGPTError(f"expected {expected} to write {to} to, got {out}")
    return to or "gguf"
