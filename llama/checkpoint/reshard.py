"""Checkpoints of any number of model-parallel shards, written tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs, check_split
from llama.checkpoint.meta import (
    CONVERSION,
    Checkpoint,
    copy_records,
    copy_tokenizer,
    read_conversion,
)
from llama.checkpoint.pth import TensorInfo, write_shards
from llama.checkpoint.sharding import by_vocabulary, part_of, shapes_of_rank, split_dim
from llama.errors import InputError
from llama.io.files import check_new, new_directory
from llama.io.json_files import write_json
from llama.parallel import choose_dtype
from llama.tokenizer import Tokenizer, find_tokenizer


def write_model(
    directory: Path,
    args: ModelArgs,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    shards: int = 1,
    vocab_parallel: bool | None = None,
) -> None:
    """Writes ``consolidated.00.pth`` and on; memory is bounded by the largest tensor.

    Tensors that share a storage do so in every shard if they are cut alike.

    Args:
        directory: exists already.
        args: the model's.
        infos: of the whole tensors.
        read: gives a whole tensor; called once for each.
        shards: number of files: the model-parallel ranks that the checkpoint is made for.
        vocab_parallel: cut the embedding by vocabulary, not by width; None decides by
            `sharding.by_vocabulary`.
    """
    by = by_vocabulary(args, infos) if vocab_parallel is None else vocab_parallel
    shapes = shapes_of_rank(args, shards, vocab_parallel=by)
    parts = {}
    for name, info in infos.items():
        dim = split_dim(name, vocab_parallel=by) if shards > 1 else None
        parts[name] = TensorInfo(shapes.get(name, info.shape), info.dtype, (info.storage, dim))

    def part(name: str, whole: Tensor, rank: int) -> Tensor:
        return part_of(args, name, whole, rank, shards, vocab_parallel=by)

    paths = [directory / f"consolidated.{rank:02d}.pth" for rank in range(shards)]
    write_shards(paths, parts, read, part)


def check_shards(args: ModelArgs, shards: int) -> None:
    """Raises InputError unless the model can be cut into so many shards."""
    if not 1 <= shards <= 100:
        raise InputError(f"expected 1 to 100 shards, got {shards}")
    check_split(args, shards)


def reshard(
    ckpt_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    shards: int,
    dtype: str | torch.dtype | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    also: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] = str,
) -> Path:
    """Writes a Meta checkpoint with another number of shards, tensor by tensor.

    The embedding stays cut the way it is: by width in Llama 2, by vocabulary in Llama 3; for a
    source of one shard see `sharding.by_vocabulary`. There and back gives the same bits.

    Args:
        ckpt_dir: the source, of any number of shards.
        out_dir: the new directory; appears whole or not at all.
        shards: number of files: the model-parallel ranks that the checkpoint is made for.
        dtype: of the weights; None keeps each one's.
        tokenizer_path: copied along; None looks beside the source.
        also: names of the source's JSON files to be taken along, where they are.
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.
        verify: called with the finished directory before it takes its place; may raise.

    Returns:
        ``out_dir``.

    Raises:
        InputError: heads, widths or vocabulary do not divide among the shards, or the checkpoint
            cannot be read.
        FileExistsError: ``out_dir`` exists, or with ``overwrite`` holds the source or other files.
        FileNotFoundError: checkpoint or tokenizer are missing.
    """
    source, out = Checkpoint(ckpt_dir), Path(str(out_dir))
    check_shards(source.args, shards)
    tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(source.directory)
    Tokenizer(tokenizer)
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=source.directory)
    kind = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    infos = {n: TensorInfo(i.shape, kind or i.dtype, i.storage) for n, i in source.infos.items()}

    def read(name: str) -> Tensor:
        progress(name)
        return source.read(name)

    by = source.vocab_parallel
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        write_model(partial, source.args, infos, read, shards=shards, vocab_parallel=by)
        write_json(partial / "params.json", source.params.get("model", source.params))
        copy_tokenizer(tokenizer, partial)
        copy_records(source.directory, partial, also)
        earlier = read_conversion(source.directory)
        write_json(partial / CONVERSION, {**earlier, "source": str(ckpt_dir), "shards": shards})
        verify(partial)
    return out
