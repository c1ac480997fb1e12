"""How the tensors of a model are cut among model-parallel ranks, in files and in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama.args import ModelArgs, kv_heads_of_rank
from llama.checkpoint.pth import TensorInfo

LLAMA_3_VOCABULARY = 128256
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# Along which dimension the shards of a tensor are cut; None: every shard holds all of it.
# `tok_embeddings.weight` is cut along 1 in Llama 2 and along 0 in Llama 3: its shape tells.
LAYER_SPLITS: dict[str, int | None] = {
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
}
KV_NAMES = ("attention.wk.weight", "attention.wv.weight")


def full_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Shape of every full tensor of the model, by name."""
    d, f = args.dim, args.ffn_dim
    q, kv = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
    layer = [(q, d), (kv, d), (kv, d), (d, q), (f, d), (d, f), (f, d), (d,), (d,)]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (args.vocab_size, d)}
    for i in range(args.n_layers):
        names = (f"layers.{i}.{name}" for name in LAYER_SPLITS)
        shapes |= zip(names, layer, strict=True)
    return shapes | {"norm.weight": (d,), OUTPUT: (args.vocab_size, d)}


def split_dim(name: str, *, vocab_parallel: bool = False) -> int | None:
    """Along which dimension shards of this tensor are cut; None: every shard holds all of it."""
    if name.startswith("layers."):
        return LAYER_SPLITS[name.split(".", 2)[2]]
    return {EMBEDDING: 0 if vocab_parallel else 1, OUTPUT: 0}.get(name)


def ranges_of_rank(
    args: ModelArgs, name: str, size: int, rank: int, ranks: int
) -> list[tuple[int, int]]:
    """What a rank holds of a tensor of this size along the dimension that is cut.

    Ranges (start, stop) in the order in which the rank holds them: one, or one a key/value head.
    """
    if name.endswith(KV_NAMES):
        # by heads: with fewer of them than ranks, neighbouring ranks hold the same rows
        heads = kv_heads_of_rank(args, rank, ranks)
        return [(head * args.head_dim, (head + 1) * args.head_dim) for head in heads]
    share = size // ranks
    return [(rank * share, (rank + 1) * share)]


def shapes_of_rank(
    args: ModelArgs, ranks: int, *, vocab_parallel: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that one of several ranks holds, by name."""
    shapes = full_shapes(args)
    for name, shape in shapes.items():
        dim = split_dim(name, vocab_parallel=vocab_parallel)
        if dim is not None:
            ranges = ranges_of_rank(args, name, shape[dim], 0, ranks)
            size = sum(stop - start for start, stop in ranges)
            shapes[name] = (*shape[:dim], size, *shape[dim + 1 :])
    return shapes


def part_of(
    args: ModelArgs, name: str, full: Tensor, rank: int, ranks: int, *, vocab_parallel: bool
) -> Tensor:
    """What a rank holds of a full tensor; a view where that is in one piece."""
    dim = split_dim(name, vocab_parallel=vocab_parallel)
    if dim is None or ranks == 1:
        return full
    ranges = ranges_of_rank(args, name, full.shape[dim], rank, ranks)
    pieces = [full.narrow(dim, start, stop - start) for start, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def by_vocabulary(args: ModelArgs, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the embedding of a model in one file is to be cut by vocabulary.

    Yes for Llama 3's vocabulary, whose reference code reads it so, and where the output head is
    tied to the embedding, and so stays tied; else by width, as Llama 2's.
    """
    tied = {EMBEDDING, OUTPUT} <= infos.keys() and infos[EMBEDDING].storage == infos[OUTPUT].storage
    return tied or args.vocab_size == LLAMA_3_VOCABULARY
