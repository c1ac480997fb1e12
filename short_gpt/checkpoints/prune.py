"""A checkpoint without some layers: from either format, in either format, never loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from llama.checkpoint.meta import CONVERSION
from llama.formats.convert import check_llama, hf_to_meta, meta_to_hf
from llama.io.files import check_new, new_directory, read_marker
from llama.io.json_files import write_json
from llama.io.sources import is_gguf, is_meta
from short_gpt.checkpoints.card import model_card
from short_gpt.checkpoints.hf import prune_hf
from short_gpt.checkpoints.meta import PROVENANCE, prune_meta
from short_gpt.runtime.errors import ShortGPTError

FORMATS = ("meta", "hf")


def prune_checkpoint(
    source: str | PathLike[str],
    out_dir: str | PathLike[str],
    layers: Sequence[int],
    *,
    to: str | None = None,
    tokenizer_path: str | PathLike[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a checkpoint without some layers, tensor by tensor.

    The other format is reached by way of the source's own: for as long as that takes, the pruned
    weights lie twice beside ``out_dir``.

    Args:
        source: Meta checkpoint directory, or Hugging Face directory or hub id (safetensors).
        out_dir: the new directory; appears whole or not at all.
        layers: numbers of the layers to leave out.
        to: the format to write, "meta" or "hf"; None keeps the source's.
        tokenizer_path: tokenizer of a Meta checkpoint; None looks beside it.
        provenance, overwrite, progress: as for `short_gpt.checkpoints.hf.prune_hf`.

    Returns:
        ``out_dir``.

    Raises:
        ShortGPTError: an unknown format, a layer that does not exist, or a model that is no Llama
            and cannot be written in Meta's format; the message names what differs.
        FileNotFoundError, FileExistsError, MissingPackageError: as for `prune_hf`.
    """
    if to not in (None, *FORMATS):
        raise ShortGPTError(f"expected a format of {' or '.join(FORMATS)}, got {to!r}")
    refuse_gguf(str(source))
    meta = is_meta(str(source))
    same = to is None or (to == "meta") == meta
    options: dict[str, Any] = {"tokenizer_path": tokenizer_path} if meta else {}
    facts: dict[str, Any] = {"provenance": provenance, "progress": progress}
    prune = prune_meta if meta else _prune_hf
    if same:
        return prune(source, out_dir, list(layers), overwrite=overwrite, **options, **facts)

    out = Path(str(out_dir))
    check_new(out, marker=PROVENANCE, overwrite=overwrite, source=Path(str(source)))
    if not meta:
        check_llama(source)  # now rather than after the layers are cut
    with new_directory(out, marker=PROVENANCE, overwrite=overwrite) as partial:
        pruned, converted = partial.with_name("pruned"), partial.with_name("converted")
        prune(source, pruned, list(layers), **options, **facts)
        _convert(pruned, converted, meta, progress)
        shutil.rmtree(partial)
        converted.rename(partial)
        shutil.copyfile(pruned / PROVENANCE, partial / PROVENANCE)
        if to == "hf":
            card = model_card(read_marker(pruned / PROVENANCE), str(source))
            (partial / "README.md").write_text(card, encoding="utf-8")
        record = read_marker(partial / CONVERSION)
        write_json(partial / CONVERSION, {**record, "source": str(source)})
    return out


def refuse_gguf(source: str) -> None:
    """Raises ShortGPTError for a GGUF file: its weights are cut after a conversion."""
    if is_gguf(source):
        raise ShortGPTError(
            f"{source} is a GGUF file, whose layers are not cut; convert it first: short-gpt "
            f"convert {source} DIRECTORY"
        )


def _prune_hf(*args: Any, **options: Any) -> Path:

    return prune_hf(*args, **options)


def _convert(source: Path, out: Path, meta: bool, progress: Callable[[str], object]) -> None:
    convert: Callable[..., Path] = meta_to_hf if meta else hf_to_meta
    convert(source, out, progress=progress)
