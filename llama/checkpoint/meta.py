"""A Meta checkpoint directory as data: checked, read, and written, tensor by tensor.

It holds ``params.json``, ``consolidated.00.pth`` and on (one a rank) and a tokenizer. Its tensors
are cut among model-parallel ranks, in files and in memory.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive, check_split, kv_heads_of_rank, some
from llama.checkpoint.pth import Shard, TensorInfo, write_shards
from llama.errors import InputError, check_file, damaged
from llama.files import JsonObject, StrPath, read_json, read_marker, write_json
from llama.sources import TEMPLATES, check_inside
from llama.tokenizer import Tokenizer, holds_json

LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
CONVERSION = "conversion.json"  # what a converted checkpoint was made from
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


class Checkpoint:
    """A checkpoint directory, opened and checked (else InputError); weights are read later.

    ``limits`` are ``max_seq_len`` and ``max_batch_size`` of the run.

    Attributes:
        params: content of ``params.json``.
        args: its `ModelArgs`, with ``vocab_size`` taken from the weights where it is -1.
        shards: the files, in the order of ranks.
        vocab_parallel: whether ranks share the embedding by vocabulary (Llama 3) or by width.
            Several shards tell by their shapes, for one see `by_vocabulary`.
        infos: shape (of the full tensor), dtype and storage of every tensor, by name.
    """

    ignored = frozenset({"rope.freqs"})  # computed from params.json; Llama 2's files carry it

    def __init__(self, ckpt_dir: StrPath, **limits: int) -> None:
        self.directory = Path(str(ckpt_dir))
        self.params = read_params(self.directory)
        args = self.args = args_of_params(self.directory, self.params, **limits)
        paths = sorted(self.directory.glob("consolidated.*.pth"))
        if not paths:
            raise FileNotFoundError(f"no consolidated.*.pth in {self.directory}")
        self.shards = [Shard(path) for path in paths]
        first = self.shards[0].infos
        if args.vocab_size == -1:
            check_file(OUTPUT in first, self.shards[0].path, f"it lacks {OUTPUT}")
            args.vocab_size = first[OUTPUT].shape[0] * len(self.shards)
        self.vocab_parallel = self._check()
        shapes = full_shapes(args)
        self.infos: dict[str, TensorInfo] = {}
        for name, info in first.items():
            if name in self.ignored and any(name not in shard.infos for shard in self.shards):
                continue
            storages = tuple(shard.infos[name].storage for shard in self.shards)
            self.infos[name] = TensorInfo(shapes.get(name, info.shape), info.dtype, storages)

    def _check(self) -> bool:
        """Compares names and shapes with params.json; returns ``vocab_parallel``."""
        first, ranks = self.shards[0].infos, len(self.shards)
        check_split(self.args, ranks)  # else rows that no shard holds would not be missed
        expected = {v: shapes_of_rank(self.args, ranks, vocab_parallel=v) for v in (False, True)}
        if ranks == 1:
            vocab_parallel = by_vocabulary(self.args, first)
        else:
            embedding = first.get(EMBEDDING)
            vocab_parallel = embedding is not None and embedding.shape == expected[True][EMBEDDING]
        for shard in self.shards:
            _check_shapes(shard, expected[vocab_parallel], ranks)
        return vocab_parallel

    def read(self, name: str, *, rank: int = 0, ranks: int = 1) -> Tensor:
        """The part of a tensor that one of several model-parallel ranks holds; all of it for one.

        From any number of shards to any number of ranks that divides the heads. What lies in one
        piece is mapped from its file; several pieces are joined.
        """
        count = len(self.shards)
        dim = split_dim(name, vocab_parallel=self.vocab_parallel)
        if ranks == count or dim is None:
            return self.shards[rank if ranks == count else 0].read(name)
        size, pieces = self.infos[name].shape[dim], list[Tensor]()
        for at, end in ranges_of_rank(self.args, name, size, rank, ranks):
            for number, shard in enumerate(self.shards):
                offset = 0  # in the shard, of the range (start, stop)
                for start, stop in ranges_of_rank(self.args, name, size, number, count):
                    # neighbouring shards may hold one key/value head: it is read from the first
                    if start <= at < (last := min(stop, end)):
                        pieces.append(shard.read(name).narrow(dim, offset + at - start, last - at))
                        at = last
                    offset += stop - start
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """`Shard.mapped` for all files, for several calls of `read` in a row."""
        with ExitStack() as stack:
            for shard in self.shards:
                stack.enter_context(shard.mapped())
            yield

    def is_tied(self) -> bool:
        """Whether output head and embedding are equal, bit for bit."""
        if self.infos[OUTPUT].dtype != self.infos[EMBEDDING].dtype:
            return False
        rows = self.read(EMBEDDING).split(self.shards[0].infos[OUTPUT].shape[0])
        # the head is always cut by vocabulary, and read one shard after the other
        return all(map(torch.equal, (shard.read(OUTPUT) for shard in self.shards), rows))


def _check_shapes(shard: Shard, expected: Mapping[str, tuple[int, ...]], ranks: int) -> None:
    shapes = {n: info.shape for n, info in shard.infos.items() if n not in Checkpoint.ignored}
    missing, unknown = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    check_file(not missing, shard.path, f"it lacks {some(missing)}")
    check_file(not unknown, shard.path, f"it has {some(unknown)}, unknown to params.json")
    for name, shape in shapes.items():
        problem = f"{name} has shape {list(shape)}; params.json and {ranks} shard(s) give "
        check_file(shape == expected[name], shard.path, f"{problem}{list(expected[name])}")


def args_of_params(directory: Path, params: JsonObject, **limits: int) -> ModelArgs:
    """``ModelArgs.from_params`` of a directory's ``params.json``, which errors name by its path."""
    check_positive("a positive integer", **limits)  # which are the caller's, not the file's
    try:
        return ModelArgs.from_params(params, **limits)
    except InputError as error:
        raise damaged(directory / "params.json", error) from None


def read_params(directory: Path) -> JsonObject:
    """Content of the directory's ``params.json``."""
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint directory {directory} does not exist")
    params = read_json(directory / "params.json")
    ok = isinstance(params.get("model", {}), dict)
    check_file(ok, directory / "params.json", "its model is no JSON object")
    return params


def check_vocabulary(
    tokenizer: Tokenizer,
    path: StrPath,
    ids: int,
    model: StrPath,
    *,
    spare: bool = False,
    advice: str = "give the model's own tokenizer",
) -> None:
    """Raises InputError unless a tokenizer has a token for each of a model's ids.

    ``path`` and ``model`` are named; ``spare``: whether the format allows ids without a token, and
    if not, ``advice`` is what to do where there are such.
    """
    if tokenizer.n_words > ids:
        problem = "it belongs to another model; give the model's own tokenizer"
    elif tokenizer.n_words < ids and not spare:
        problem = f"Meta's format needs a token for each id; {advice}"
    else:
        return
    counts = f"the tokenizer {path} has {tokenizer.n_words} tokens, {model} has {ids} ids"
    raise InputError(f"{counts}: {problem}")


def read_conversion(directory: Path) -> JsonObject:
    """What a directory's ``conversion.json`` says it was made from; empty where there is none."""
    path = directory / CONVERSION
    check_inside(directory, [path])
    return read_marker(path) if path.is_file() else {}


def copy_records(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies those JSON files that exist, without their list of files, which is the source's."""
    check_inside(source, [source / name for name in names])
    for name in names:
        if (source / name).is_file():
            write_json(target / name, read_marker(source / name))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer file, under its usual name, with its configuration and chat templates."""
    Tokenizer(source)  # a link to one of another folder, as Llama's, is no other file
    kind, named = "json" if holds_json(source) else "model", source.with_name(TEMPLATES)
    others = [source.with_name(n) for n in ("tokenizer_config.json", "chat_template.jinja")]
    check_inside(source.parent, [*others, named, *named.rglob("*")])
    shutil.copyfile(source, target / f"tokenizer.{kind}")
    for other in others:
        if other.is_file():
            shutil.copyfile(other, target / other.name)
    if named.is_dir():
        shutil.copytree(named, target / TEMPLATES, dirs_exist_ok=True)


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

    Tensors that share a storage do so in every shard if they are cut alike. ``read`` gives a full
    tensor and is called once for each; ``vocab_parallel`` None asks `by_vocabulary`.
    """
    by = by_vocabulary(args, infos) if vocab_parallel is None else vocab_parallel
    shapes = shapes_of_rank(args, shards, vocab_parallel=by)
    parts = {}
    for name, info in infos.items():
        dim = split_dim(name, vocab_parallel=by) if shards > 1 else None
        parts[name] = TensorInfo(shapes.get(name, info.shape), info.dtype, (info.storage, dim))

    def part(name: str, tensor: Tensor, rank: int) -> Tensor:
        return part_of(args, name, tensor, rank, shards, vocab_parallel=by)

    paths = [directory / f"consolidated.{rank:02d}.pth" for rank in range(shards)]
    write_shards(paths, parts, read, part)
