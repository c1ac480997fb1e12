"""Sizes of a model: of its layers, of what is left without some, and as it is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from llama.checkpoint.meta import Checkpoint
from llama.files import read_json
from llama.formats.gguf_read import GGUFParts, part_paths
from llama.parallel import config_dtype
from llama.sources import Source as Weights
from llama.sources import resolve
from short_gpt.checkpoints.gguf import LAYER, changes, in_few_bits
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_model import ShortModel

Sizes = tuple[list[int], int]  # of every layer, and of the rest


def size_without(short: ShortModel, layers: Sequence[int]) -> tuple[int, int]:
    """Parameters and bytes of the model without some layers; tied ones count once."""
    removed = [short.decoder.layers[short.kept.index(number)] for number in layers]
    excluded = {id(p) for layer in removed for p in layer.parameters()}
    kept = {id(p): p for p in short.decoder.module.parameters() if id(p) not in excluded}.values()
    return sum(p.numel() for p in kept), sum(p.numel() * p.element_size() for p in kept)


def file_bytes(path: Path) -> int:
    """Bytes on disk of a GGUF model, in one file or several."""
    return sum(part.stat().st_size for part in part_paths(path))


@dataclass
class Opened:
    """A model of transformers, and how it is written."""

    short: ShortHFModel
    source: Weights | None  # None of a loaded model
    to: str  # hf or gguf
    opening: OpenOptions

    def __post_init__(self) -> None:
        if self.to == "gguf" and not self.is_llama and not self.in_place:
            kind = self.short.model.config.model_type
            raise ShortGPTError(f"only a Llama becomes a GGUF file, and this is a {kind}")

    @property
    def is_llama(self) -> bool:
        """Whether `convert` knows its architecture."""
        return self.short.model.config.model_type == "llama"

    @property
    def in_place(self) -> bool:
        """Whether tensors keep the types of a GGUF file."""
        return self.source is not None and self.source.kind == self.to == "gguf"

    @cached_property
    def in_few_bits(self) -> bool:
        """Whether what changes is rounded to a type of less than 8 bits a weight."""
        return self.in_place and in_few_bits(str(self.source))

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are written: the source's, unless the caller set one."""
        loaded = self.short.model.dtype
        if self.source is None or self.opening.dtype is not None or self.source.kind == "gguf":
            return loaded
        if self.source.kind == "meta":
            infos = Checkpoint(self.source).infos.values()
            stored = max(infos, key=lambda info: math.prod(info.shape)).dtype
        else:
            folder = resolve(self.source)
            stored = config_dtype(read_json(folder / "config.json"), folder) or loaded
        return min(stored, loaded, key=lambda dtype: dtype.itemsize)

    def sizes(self, kind: str | None = None) -> tuple[Sizes, Sizes]:
        """Parameters, and bytes as they are written, requantized in a type of GGUF files."""
        total, count = size_without(self.short, ())[0], len(self.short.kept)
        layers = [total - size_without(self.short, [i])[0] for i in self.short.kept]
        parameters = layers, total - sum(layers)
        if not self.in_place:
            width = self.dtype.itemsize
            return parameters, ([width * size for size in layers], width * parameters[1])
        path, sizes = Path(str(self.source)), [0] * count  # each tensor in its own type
        parts, rest = GGUFParts(path), file_bytes(path)
        new = changes(parts, kind) if kind else {}
        for name, entry in parts.tensors.items():
            if (match := LAYER.fullmatch(name)) and int(match[1]) < count:
                sizes[int(match[1])] += new.get(name, entry).nbytes
                rest -= entry.nbytes
        return parameters, (sizes, rest)
