"""A checkpoint with some layers removed: from any format, in any format, never loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama.checkpoint.meta import CONVERSION
from llama.formats.convert import gguf_to_meta, hf_to_meta, meta_to_hf
from llama.formats.gguf import SOURCE_KEY, GGUFFile, llama_to_gguf
from llama.formats.hf import check_llama
from llama.io.files import read_marker
from llama.io.json_files import json_text, write_json
from llama.io.sources import Source, find_source
from short_gpt.checkpoints.card import write_provenance
from short_gpt.checkpoints.gguf import prune_gguf
from short_gpt.checkpoints.hf import prune_hf
from short_gpt.checkpoints.meta import prune_meta
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.checkpoints.records import RECORD
from short_gpt.checkpoints.target import StrPath, Target, takes_target
from short_gpt.runtime.errors import ShortGPTError


@takes_target
def prune_checkpoint(
    source: StrPath | Source,
    target: Target,
    layers: Sequence[int],
    *,
    tokenizer_path: StrPath | None = None,
    provenance: Provenance | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a checkpoint with some layers removed, tensor by tensor.

    Another format is reached by way of the source's own: while that takes place, the pruned
    weights lie twice beside the target.

    Args:
        source: Meta checkpoint directory, Hugging Face directory or hub id (safetensors), or GGUF
            file.
        target: where and in which format; a path is enough.
        layers: numbers of the layers to remove.
        tokenizer_path: as for `prune_meta`.
        provenance: as for `prune_meta`.
        progress: as for `prune_meta`.

    Returns:
        The target's path.

    Raises:
        ShortGPTError: an unknown format, a layer that does not exist, or a model that is no Llama
            and cannot be written in Meta's format; the message names what differs.
        FileNotFoundError, FileExistsError, MissingPackageError: as for `prune_hf`.

    Example:
        >>> facts = Provenance.of_scores(importance, facts={"data": "PG-19"})  # doctest: +SKIP
        >>> prune_checkpoint("7b", "5b", [21, 22], provenance=facts)  # doctest: +SKIP
    """
    target = target.resolved(source)
    cut = _Cut(find_source(source), list(layers), tokenizer_path, provenance, progress)
    kind = {"hub": "hf"}.get(cut.source.kind, cut.source.kind)
    if kind == target.format:
        return cut.write(target)
    if target.format == "gguf":
        return cut.write_gguf(target)
    if kind == "gguf" and target.format == "hf":
        raise ShortGPTError(
            f"{source} is a GGUF file, which goes to Hugging Face's format by way of the model in "
            "memory: open it, remove the layers and save it, as short-gpt prune does"
        )
    return cut.write_converted(target)


@dataclass(frozen=True)
class _Cut:
    """The arguments of `prune_checkpoint`, whatever the target."""

    source: Source
    layers: list[int]
    tokenizer_path: StrPath | None
    provenance: Provenance | None
    progress: Callable[[str], object]

    def write(self, target: Target) -> Path:
        """Writes the source's own format."""
        prune: Callable[..., Path] = prune_gguf if self.source.kind == "gguf" else prune_hf
        if self.source.kind == "meta":
            prune = partial(prune_meta, tokenizer_path=self.tokenizer_path)
        facts, shown = self.provenance, self.progress
        return prune(self.source, target, self.layers, provenance=facts, progress=shown)

    def write_gguf(self, target: Target) -> Path:
        """Writes a Llama of either format as one GGUF file."""
        target.check()
        if self.source.kind != "meta":
            check_llama(self.source)  # now rather than after the layers are cut
        with target.new_file() as file:
            pruned = file.with_name("pruned")
            self.write(Target(pruned))
            also = {RECORD: json_text(Provenance.read(pruned / PROVENANCE).to_dict())}
            also |= {SOURCE_KEY: str(self.source), "general.name": self.source.path.name}
            llama_to_gguf(pruned, file, also=also, progress=self.progress)
        return target.path

    def write_converted(self, target: Target) -> Path:
        """Writes Meta's format from another one, or Hugging Face's from Meta's."""
        kind, source = self.source.kind, self.source
        target.check(source=source.path)
        convert: Callable[..., Path] = meta_to_hf if kind == "meta" else hf_to_meta
        if kind == "gguf":
            convert = gguf_to_meta
            GGUFFile(source.path).args()  # refuses what is no Llama now rather than after the cut
        elif kind != "meta":
            check_llama(source)
        with target.new_directory() as folder:
            converted = folder.with_name("converted")
            pruned = folder.with_name("pruned.gguf" if kind == "gguf" else "pruned")
            self.write(Target(pruned))
            convert(pruned, converted, progress=self.progress)
            record = Provenance.beside(pruned)
            assert record is not None  # a cut has one
            shutil.rmtree(folder)
            converted.rename(folder)
            write_provenance(folder, record, card=kind == "meta")
            made = read_marker(folder / CONVERSION)  # names the pruned model, gone by now
            write_json(folder / CONVERSION, {**made, "source": str(source)})
            target.prove(folder)
        return target.path
