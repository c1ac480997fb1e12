"""A Meta checkpoint directory as data: validate, read, and write it tensor by tensor.

A directory holds ``params.json``, ``consolidated.00.pth`` and on (one file for each
model-parallel rank) and a tokenizer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive
from llama.checkpoint.pth import Shard, TensorInfo
from llama.checkpoint.sharding import (
    EMBEDDING,
    by_vocabulary,
    full_shapes,
    held,
    shapes_of_rank,
    split_dim,
)
from llama.errors import InputError
from llama.io.files import read_marker
from llama.io.json_files import JsonObject, read_json, write_json
from llama.tokenizer import Tokenizer, holds_json

LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
CONVERSION = "conversion.json"  # what a converted checkpoint was made from


class Checkpoint:
    """A checkpoint directory, opened and checked; weights are read later.

    Args:
        ckpt_dir: the directory.
        limits: ``max_seq_len`` and ``max_batch_size`` of the run.

    Attributes:
        params: content of ``params.json``.
        args: its `ModelArgs`, with ``vocab_size`` taken from the weights where it is -1.
        shards: the files, in the order of their names, which is the order of ranks.
        vocab_parallel: whether ranks share the embedding by vocabulary (Llama 3) or by width.
            Several shards tell by their shapes, for one see `sharding.by_vocabulary`.
        infos: shape (of the whole tensor), dtype and storage of every tensor, by name.

    Raises:
        FileNotFoundError: the directory, ``params.json`` or the ``.pth`` files are missing.
        InputError: a file cannot be read, or names or shapes are not what ``params.json`` says.
    """

    ignored = frozenset({"rope.freqs"})  # computed from params.json; Llama 2's files carry it

    def __init__(self, ckpt_dir: str | os.PathLike[str], **limits: int) -> None:
        self.directory = Path(str(ckpt_dir))
        self.params = read_params(self.directory)
        args = args_of_params(self.directory, self.params, **limits)
        paths = sorted(self.directory.glob("consolidated.*.pth"))
        if not paths:
            raise FileNotFoundError(f"no consolidated.*.pth in {self.directory}")
        self.shards = [Shard(path) for path in paths]
        if args.vocab_size == -1:
            args.vocab_size = self._vocab_size()
        self.args = args
        self.vocab_parallel = self._check()
        self.infos = self._whole()

    def _vocab_size(self) -> int:
        info = self.shards[0].infos.get("output.weight")
        if info is None:
            raise InputError(f"{self.shards[0].path} lacks output.weight")
        return info.shape[0] * len(self.shards)

    def _check(self) -> bool:
        """Compares names and shapes with params.json; returns ``vocab_parallel``."""
        count = len(self.shards[0].infos)
        if self.args.n_layers > count:
            raise InputError(
                f"n_layers {self.args.n_layers} in {self.directory / 'params.json'}; the file has "
                f"{count} tensors"
            )
        ranks = len(self.shards)
        width_cut, vocabulary_cut = (
            shapes_of_rank(self.args, ranks, vocab_parallel=v) for v in (False, True)
        )
        first = self.shards[0].infos
        if ranks == 1:
            vocab_parallel = by_vocabulary(self.args, first)
        else:
            embedding = first.get(EMBEDDING)
            vocab_parallel = embedding is not None and embedding.shape == vocabulary_cut[EMBEDDING]
        for shard in self.shards:
            _compare(shard, vocabulary_cut if vocab_parallel else width_cut, ranks)
        return vocab_parallel

    def _whole(self) -> dict[str, TensorInfo]:
        shapes, infos = full_shapes(self.args), {}
        for name, info in self.shards[0].infos.items():
            storage = tuple(shard.infos[name].storage for shard in self.shards)
            infos[name] = TensorInfo(shapes.get(name, info.shape), info.dtype, storage)
        return infos

    def read(self, name: str, *, rank: int = 0, ranks: int = 1) -> Tensor:
        """The part of a tensor that one of several model-parallel ranks holds.

        From any number of shards to any number of ranks that divides the heads. What lies in one
        shard is mapped from its file, not copied; what several hold is joined, and of each only
        the bytes needed are touched.

        Args:
            name: of the tensor.
            rank: 0 to ``ranks`` - 1.
            ranks: how many share the model; 1 reads the whole tensor.
        """
        if ranks == len(self.shards):
            return self.shards[rank].read(name)
        dim = split_dim(name, vocab_parallel=self.vocab_parallel)
        if dim is None:
            return self.shards[0].read(name)
        pieces = [
            self.shards[shard].read(name).narrow(dim, start, length)
            for shard, start, length in self._pieces(name, dim, rank, ranks)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """`Shard.mapped` for all files, for several calls of `read` in a row."""
        with ExitStack() as stack:
            for shard in self.shards:
                stack.enter_context(shard.mapped())
            yield

    def _pieces(self, name: str, dim: int, rank: int, ranks: int) -> list[tuple[int, int, int]]:
        """Where a rank's part lies: shard, start and length in it, in order."""
        size, count = self.infos[name].shape[dim], len(self.shards)
        pieces: list[tuple[int, int, int]] = []
        for at, end in held(self.args, name, size, rank, ranks):
            for shard in range(count):
                offset = 0  # in the shard, of the range looked at
                for start, stop in held(self.args, name, size, shard, count):
                    if start <= at < min(stop, end):
                        length = min(stop, end) - at
                        _append(pieces, (shard, offset + at - start, length))
                        at += length
                    offset += stop - start
        return pieces


def _append(pieces: list[tuple[int, int, int]], piece: tuple[int, int, int]) -> None:
    """Adds a piece, to the last one if it follows it in the same shard."""
    if pieces and (pieces[-1][0], sum(pieces[-1][1:])) == piece[:2]:
        piece = (*pieces[-1][:2], pieces[-1][2] + piece[2])
        pieces.pop()
    pieces.append(piece)


def _compare(shard: Shard, expected: Mapping[str, tuple[int, ...]], ranks: int) -> None:
    shapes = {n: info.shape for n, info in shard.infos.items() if n not in Checkpoint.ignored}
    for problem, names in (
        ("lacks", sorted(expected.keys() - shapes.keys())),
        ("has, unknown to params.json,", sorted(shapes.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{shard.path} {problem} {', '.join(names[:3])}{more}")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise InputError(
                f"{name} in {shard.path} has shape {list(shape)}; params.json and {ranks} "
                f"shard(s) give {list(expected[name])}"
            )


def args_of_params(directory: Path, params: JsonObject, **limits: int) -> ModelArgs:
    """``ModelArgs.from_params`` of a directory's ``params.json``, which errors name by its path."""
    check_positive("a positive integer", **limits)  # which are the caller's, not the file's
    try:
        return ModelArgs.from_params(params, **limits)
    except InputError as error:
        path, reason = directory / "params.json", str(error).replace("params.json", "it")
        raise InputError(f"{path} cannot be read: {reason}; correct or fetch it anew") from None


def read_params(directory: Path) -> JsonObject:
    """Content of the directory's ``params.json``."""
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint directory {directory} does not exist")
    path = directory / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no params.json; is it a Meta checkpoint?")
    params = read_json(path)
    if not isinstance(params.get("model", {}), dict):
        raise InputError(f"{path} must hold one JSON object")
    return params


def check_vocabulary(
    checkpoint: Checkpoint, tokenizer: Tokenizer, path: str | os.PathLike[str]
) -> None:
    """Raises InputError unless a tokenizer has as many words as the checkpoint.

    Args:
        checkpoint: the checkpoint.
        tokenizer: the tokenizer.
        path: its file, for the message.
    """
    if tokenizer.n_words != checkpoint.args.vocab_size:
        raise InputError(
            f"the tokenizer {path} has {tokenizer.n_words} words, the checkpoint "
            f"{checkpoint.directory} {checkpoint.args.vocab_size}; they do not belong together"
        )


def read_conversion(directory: Path) -> JsonObject:
    """What a directory's ``conversion.json`` says it was made from; empty where there is none."""
    path = directory / CONVERSION
    return read_marker(path) if path.is_file() else {}


def copy_records(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies those JSON files that are there, without a list of files, true of the source alone."""
    for name in names:
        if (source / name).is_file():
            write_json(target / name, read_marker(source / name))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer file, under its usual name, and its configuration beside it.

    Raises:
        InputError: it is damaged, or its configuration does not fit it.
    """
    Tokenizer(source)
    kind = "json" if holds_json(source) else "model"
    shutil.copyfile(source, target / f"tokenizer.{kind}")
    config = source.with_name("tokenizer_config.json")
    if config.is_file():
        shutil.copyfile(config, target / config.name)
