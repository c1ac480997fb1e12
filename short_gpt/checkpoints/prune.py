"""A checkpoint without some layers: from either format, in either format, never loaded."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from llama.checkpoint.meta import CONVERSION
from llama.formats.convert import check_llama, hf_to_meta, meta_to_hf
from llama.io.files import check_new, new_directory, read_marker
from llama.io.json_files import write_json
from llama.io.sources import is_gguf, is_meta
from short_gpt.checkpoints.card import write_provenance
from short_gpt.checkpoints.hf import prune_hf
from short_gpt.checkpoints.meta import prune_meta
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.runtime.errors import ShortGPTError

FORMATS = ("meta", "hf")


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
        source: Meta checkpoint directory, or Hugging Face directory or hub id (safetensors).
        out_dir: the new directory; appears whole or not at all.
        layers: numbers of the layers to leave out.
        to: the format to write, "meta" or "hf"; None keeps the source's.
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
    if to not in (None, *FORMATS):
        raise ShortGPTError(f"expected a format of {' or '.join(FORMATS)}, got {to!r}")
    refuse_gguf(str(source))
    meta = is_meta(str(source))
    cut = _Cut(source, list(layers), provenance, tokenizer_path if meta else None, progress)
    if to is None or (to == "meta") == meta:
        return cut.write(out_dir, meta=meta, overwrite=overwrite, verify=verify)
    out = Path(str(out_dir))
    check_new(out, marker=PROVENANCE, overwrite=overwrite, source=Path(str(source)))
    if not meta:
        check_llama(source)  # now rather than after the layers are cut
    with new_directory(out, marker=PROVENANCE, overwrite=overwrite) as partial:
        pruned, converted = partial.with_name("pruned"), partial.with_name("converted")
        cut.write(pruned, meta=meta)
        convert: Callable[..., Path] = meta_to_hf if meta else hf_to_meta
        convert(pruned, converted, progress=progress)
        shutil.rmtree(partial)
        converted.rename(partial)
        write_provenance(partial, Provenance.read(pruned / PROVENANCE), card=to == "hf")
        write_json(
            partial / CONVERSION, {**read_marker(partial / CONVERSION), "source": str(source)}
        )
        (verify or str)(partial)
    return out


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


def refuse_gguf(source: str) -> None:
    """Raises ShortGPTError for a GGUF file: its weights are cut after a conversion."""
    if is_gguf(source):
        raise ShortGPTError(
            f"{source} is a GGUF file, whose layers are not cut; convert it first: short-gpt "
            f"convert {source} DIRECTORY"
        )
