"""The weights of a Llama's checkpoint directory, one tensor at a time, in Meta's names and order.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.meta import Checkpoint
from llama.checkpoint.pth import TensorInfo
from llama.checkpoint.sharding import LAYER_SPLITS, split_dim
from llama.formats.hf import args_of, meta_infos
from llama.formats.names import HF, META, name_in, permute
from llama.formats.safetensors import DTYPES, open_weights
from llama.io.json_files import read_json
from llama.io.sources import is_hub_id, kind_of, resolve

LAYER_NAMES = tuple(LAYER_SPLITS)


class MetaSource:
    """A directory in Meta's format, of any number of shards.

    Attributes:
        directory: the directory.
        args: the model's `ModelArgs`.
        infos: shape and stored dtype of every tensor, by name.
        files: the files of weights.
    """

    def __init__(self, ckpt_dir: str | os.PathLike[str], *, max_seq_len: int) -> None:
        self._checkpoint = Checkpoint(ckpt_dir, max_seq_len=max_seq_len)
        self.directory = self._checkpoint.directory
        self.args = self._checkpoint.args
        self.infos = self._checkpoint.infos
        self.files = [shard.path for shard in self._checkpoint.shards]

    def read(self, name: str) -> Tensor:
        """A whole tensor, mapped from its file where one file holds it."""
        return self._checkpoint.read(name)

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files."""
        return name

    def as_stored(self, name: str, weight: Tensor) -> Tensor:
        """A tensor in the order of rows that the files have."""
        return weight

    def blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """The rows of a (V, D) tensor, so many at a time: the first one's number, and they."""
        for start in range(0, self.infos[name].shape[0], rows):
            yield start, self._rows(name, start, rows)

    def _rows(self, name: str, start: int, rows: int) -> Tensor:
        shards = self._checkpoint.shards
        if split_dim(name, vocab_parallel=self._checkpoint.vocab_parallel) == 1:
            # cut by width: each file has a part of every row
            return _joined([shard.read(name)[start : start + rows] for shard in shards], 1)
        share = self.infos[name].shape[0] // len(shards)
        end, parts = min(start + rows, share * len(shards)), []
        while start < end:  # cut by rows: a block may begin in one file and end in the next
            rank, at = divmod(start, share)
            parts.append(shards[rank].read(name)[at : at + end - start])
            start += len(parts[-1])
        return _joined(parts, 0)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class HFSource:
    """A Llama's Hugging Face directory in safetensors, with the surface of `MetaSource`."""

    def __init__(self, ckpt_dir: str | os.PathLike[str], *, max_seq_len: int) -> None:
        self.directory = Path(str(ckpt_dir))
        config = read_json(self.directory / "config.json")
        self.args = args_of(config, self.directory)
        self.args.max_seq_len = max_seq_len
        self.args.check()
        self._files = open_weights(self.directory)
        self.files = sorted({file.path for file in self._files.values()})
        tied = bool(config.get("tie_word_embeddings", False))
        self.infos: dict[str, TensorInfo] = meta_infos(
            self.args, self._files, None, tied=tied, directory=self.directory
        )

    def read(self, name: str) -> Tensor:
        """A whole tensor, in memory of its own."""
        hf_name = name_in(HF, name)
        return permute(name, self._files[hf_name].read(hf_name), self.args, to=META)

    def stored_name(self, name: str) -> str:
        """What a tensor is called in the files."""
        return name_in(HF, name)

    def as_stored(self, name: str, weight: Tensor) -> Tensor:
        """A tensor in the order of rows that the files have."""
        return permute(name, weight, self.args, to=HF)

    def blocks(self, name: str, rows: int) -> Iterator[tuple[int, Tensor]]:
        """The rows of a (V, D) tensor, so many at a time: the first one's number, and they."""
        hf_name = str(self.infos[name].storage)  # tied weights are stored once
        entry, held = self._files[hf_name].entries[hf_name], bytearray()
        height, width = entry.shape
        size, start = rows * entry.nbytes // height, 0
        # pieces end where the file's reader likes, blocks at whole rows: bytes wait in between
        for piece in self._files[hf_name].chunks(hf_name):
            held += piece
            # full blocks, and the last one, which is shorter where rows do not divide the height
            while len(held) >= size or start + len(held) * rows // size == height > start:
                yield (
                    start,
                    torch.frombuffer(held[:size], dtype=DTYPES[entry.dtype]).view(-1, width),
                )
                start += rows
                del held[:size]


def open_source(ckpt_dir: str | os.PathLike[str], *, max_seq_len: int) -> MetaSource | HFSource:
    """Opens and checks a checkpoint directory of either format; no weight is read.

    Args:
        ckpt_dir: the directory: ``params.json`` tells Meta's format, ``config.json`` the other; or
            a hub id with its owner, which is fetched.
        max_seq_len: longest window to come, in tokens.

    Raises:
        FileNotFoundError: the directory or a file of it is missing.
        ShortGPTError: a file is damaged, or the model is not a Llama.
    """
    path, name = Path(str(ckpt_dir)), str(ckpt_dir)
    if not path.is_dir() and "/" in name and is_hub_id(name):
        path = resolve(name)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is no local directory; to be streamed, a Llama must be one in Meta's format "
            "or Hugging Face's with safetensors"
        )
    source = HFSource if kind_of(path) == "hf" else MetaSource
    return source(path, max_seq_len=max_seq_len)
