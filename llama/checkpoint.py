"""A Meta checkpoint directory as data: validate, read, and write it tensor by tensor.

A directory holds ``params.json``, ``consolidated.00.pth`` and on (one file for each
model-parallel rank) and a tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.archive import Shard, write_shard
from llama.args import ModelArgs
from llama.files import check_new, new_directory, write_json

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
LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")
PROVENANCE = "pruning.json"
CONVERSION = "conversion.json"  # what a converted checkpoint was made from


def full_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the whole model, by name."""
    d, f = args.dim, args.ffn_dim
    q, kv = args.n_heads * args.head_dim, args.kv_heads * args.head_dim
    layer = {
        "attention.wq.weight": (q, d),
        "attention.wk.weight": (kv, d),
        "attention.wv.weight": (kv, d),
        "attention.wo.weight": (d, q),
        "feed_forward.w1.weight": (f, d),
        "feed_forward.w2.weight": (d, f),
        "feed_forward.w3.weight": (f, d),
        "attention_norm.weight": (d,),
        "ffn_norm.weight": (d,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, d)}
    for i in range(args.n_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (d,), "output.weight": (args.vocab_size, d)}


def split_dim(name: str) -> int | None:
    """Along which dimension shards of this tensor are cut (not for ``tok_embeddings``)."""
    match = LAYER_NAME.fullmatch(name)
    return LAYER_SPLITS[match[2]] if match else {"output.weight": 0}.get(name)


def _cut(shape: tuple[int, ...], dim: int | None, shards: int) -> tuple[int, ...]:
    return tuple(n // shards if i == dim else n for i, n in enumerate(shape))


class Checkpoint:
    """A checkpoint directory, opened and checked; weights are read later.

    Args:
        ckpt_dir: the directory.
        limits: ``max_seq_len`` and ``max_batch_size`` of the run.

    Attributes:
        params: content of ``params.json``.
        args: its `ModelArgs`, with ``vocab_size`` taken from the weights where it is -1.
        shards: the files, in the order of their names, which is the order of ranks.
        vocab_parallel: whether the shards cut the embedding by vocabulary (Llama 3) or not.

    Raises:
        FileNotFoundError: the directory, ``params.json`` or the ``.pth`` files are missing.
        ValueError: a file cannot be read, or names or shapes are not what ``params.json`` says.
    """

    ignored = frozenset({"rope.freqs"})  # computed from params.json; Llama 2's files carry it

    def __init__(self, ckpt_dir: str | os.PathLike[str], **limits: int) -> None:
        self.directory = Path(str(ckpt_dir))
        self.params = read_params(self.directory)
        args = ModelArgs.from_params(self.params, **limits)
        paths = sorted(self.directory.glob("consolidated.*.pth"))
        if not paths:
            raise FileNotFoundError(f"no consolidated.*.pth in {self.directory}")
        self.shards = [Shard(path) for path in paths]
        if args.vocab_size == -1:
            args.vocab_size = self._vocab_size()
        self.args = args
        self.vocab_parallel = self._check()

    def _vocab_size(self) -> int:
        info = self.shards[0].infos.get("output.weight")
        if info is None:
            raise ValueError(f"{self.shards[0].path} lacks output.weight")
        return info.shape[0] * len(self.shards)

    def _check(self) -> bool:
        """Compares names and shapes with params.json; returns ``vocab_parallel``."""
        count = len(self.shards[0].infos)
        if self.args.n_layers > count:
            raise ValueError(
                f"n_layers {self.args.n_layers} in {self.directory / 'params.json'}; the file has "
                f"{count} tensors"
            )
        shapes = full_shapes(self.args)
        ranks = len(self.shards)
        vocabulary, dim = shapes["tok_embeddings.weight"]
        by_dim, by_vocabulary = (vocabulary, dim // ranks), (vocabulary // ranks, dim)
        found = self.shards[0].infos.get("tok_embeddings.weight")
        vocab_parallel = ranks > 1 and found is not None and found.shape == by_vocabulary
        expected = {n: _cut(shape, split_dim(n), ranks) for n, shape in shapes.items()}
        expected["tok_embeddings.weight"] = by_vocabulary if vocab_parallel else by_dim
        for shard in self.shards:
            _compare(shard, expected, ranks)
        return vocab_parallel


def _compare(shard: Shard, expected: Mapping[str, tuple[int, ...]], ranks: int) -> None:
    found = {n: info.shape for n, info in shard.infos.items() if n not in Checkpoint.ignored}
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has, unknown to params.json,", sorted(found.keys() - expected.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{shard.path} {problem} {', '.join(names[:3])}{more}")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ValueError(
                f"{name} in {shard.path} has shape {list(shape)}; params.json and {ranks} "
                f"shard(s) give {list(expected[name])}"
            )


def read_params(directory: Path) -> dict[str, Any]:
    """Content of the directory's ``params.json``."""
    if not directory.is_dir():
        raise FileNotFoundError(f"checkpoint directory {directory} does not exist")
    path = directory / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has no params.json; is it a Meta checkpoint?")
    params = read_json(path)
    if not isinstance(params.get("model", {}), dict):
        raise ValueError(f"{path} must hold one JSON object")
    return params


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return content


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer file, under its usual name, and its configuration beside it."""
    with open(source, "rb") as file:
        kind = "json" if file.read(64).lstrip().startswith(b"{") else "model"
    shutil.copyfile(source, target / f"tokenizer.{kind}")
    config = source.with_name("tokenizer_config.json")
    if config.is_file():
        shutil.copyfile(config, target / config.name)


def prune(
    ckpt_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    layers: list[int],
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes the checkpoint without some layers, tensor by tensor, with the same sharding.

    The tensors' bytes are copied, so the result equals the model pruned in memory bit for bit.
    Memory is bounded by the largest tensor.

    Args:
        ckpt_dir: the source.
        out_dir: the new directory; appears whole or not at all.
        layers: numbers of the layers to leave out.
        tokenizer_path: copied along; None looks beside the source.
        provenance: written as ``pruning.json``, after what was removed and kept.
        overwrite: whether an existing pruned checkpoint is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: a layer does not exist, or none or all would go.
        FileExistsError: ``out_dir`` exists, or with ``overwrite`` holds the source or other files.
        FileNotFoundError: there is no tokenizer.
    """
    from llama.tokenizer import Tokenizer, find_tokenizer

    source, out = Checkpoint(ckpt_dir), Path(str(out_dir))
    keep = kept_layers(layers, source.args.n_layers)
    tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(source.directory)
    words = Tokenizer(tokenizer).n_words
    if words != source.args.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer} has {words} words, the checkpoint {source.directory} "
            f"{source.args.vocab_size}; they do not belong together"
        )
    record = {"removed_layers": list(layers), "kept_layers": keep, **(provenance or {})}
    if (source.directory / PROVENANCE).is_file():
        record["source_pruning"] = read_json(source.directory / PROVENANCE)
    replaces = PROVENANCE if overwrite else None
    check_new(out, replaces=replaces, source=source.directory)
    new_number = {str(old): new for new, old in enumerate(keep)}
    with new_directory(out, replaces=replaces) as partial:
        for shard in source.shards:
            _prune_shard(shard, partial / shard.path.name, new_number, progress)
        params = {**source.params.get("model", source.params), "n_layers": len(keep)}
        write_json(partial / "params.json", params)
        copy_tokenizer(tokenizer, partial)
        if (source.directory / CONVERSION).is_file():
            shutil.copyfile(source.directory / CONVERSION, partial / CONVERSION)
        write_json(partial / PROVENANCE, record)
    return out


def kept_layers(drop: list[int], n_layers: int) -> list[int]:
    """The layers that stay, ascending; ValueError unless ``drop`` names some but not all."""
    unknown = sorted(set(drop) - set(range(n_layers)))
    if unknown:
        raise ValueError(f"layers {unknown} do not exist; the model has 0..{n_layers - 1}")
    keep = [i for i in range(n_layers) if i not in set(drop)]
    if not drop or not keep or len(set(drop)) != len(drop):
        raise ValueError(f"expected 1 to {n_layers - 1} different layers to remove, got {drop}")
    return keep


def _prune_shard(
    shard: Shard, path: Path, new_number: Mapping[str, int], progress: Callable[[str], object]
) -> None:
    old_name: dict[str, str] = {}
    for name in shard.infos:
        match = LAYER_NAME.fullmatch(name)
        if match is None:
            old_name[name] = name
        elif match[1] in new_number:
            old_name[f"layers.{new_number[match[1]]}.{match[2]}"] = name

    def read(name: str) -> Tensor:
        progress(name)
        return shard.read(old_name[name])

    write_shard(path, {new: shard.infos[old] for new, old in old_name.items()}, read)
