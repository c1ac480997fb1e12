"""A Meta checkpoint directory with some layers removed or changed, written tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llama.checkpoint.meta import (
    CONVERSION,
    Checkpoint,
    check_vocabulary,
    copy_records,
    copy_tokenizer,
    part_of,
)
from llama.checkpoint.pth import write_shard
from llama.files import write_json
from llama.parallel import model_parallel_size
from llama.tokenizer import Tokenizer, find_tokenizer
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import Replaced, StrPath, Target, stored_names
from short_gpt.runtime.errors import ShortGPTError, check


def save_meta(
    short: ModelRecord,
    target: Target,
    *,
    source: StrPath,
    record: Provenance,
    tokenizer_path: StrPath | None = None,
) -> Path:
    """Writes a model that came from a Meta directory, tensor by tensor from the files there.

    The bytes of the source are copied, so that its dtype and sharding stay; only the parameters
    that the model's record names as changed come from memory, in the source's dtype. The
    directory is verified only if there are such; those in memory are rounded as on disk meanwhile.
    ShortGPTError if nothing was removed or changed, or if changed weights are in several files.
    """
    if not short.removed and not short.changed:
        raise ShortGPTError("nothing was removed yet; call remove_layers first")
    checkpoint = Checkpoint(source)
    short.check_source(checkpoint.directory, checkpoint.args.n_layers)
    parts = model_parallel_size(), len(checkpoint.shards)
    expected = "(1, 1) where weights changed, as short-gpt convert IN OUT --shards 1 writes it"
    ok = parts == (1, 1) or not short.changed
    check(ok, "model-parallel ranks and files", parts, expected)
    layer_of = dict(zip(short.kept, short.decoder.layers, strict=True))
    changed = {f"layers.{i}.{n}": layer_of[i].get_parameter(n) for i, n in sorted(short.changed)}
    infos = checkpoint.shards[0].infos

    def verify(partial: Path) -> None:
        exact = {name: weight.data for name, weight in changed.items()}
        for name, weight in changed.items():  # rounded as they are on disk
            weight.data = weight.data.to(infos[name].dtype).to(weight.dtype)
        try:
            target.prove(partial)
        finally:
            for name, weight in changed.items():
                weight.data = exact[name]

    checked = replace(target, verify=verify if target.verify and changed else None)
    if not changed:  # changed weights may also replace their own source
        checked.check(source=checkpoint.directory)
    new, path = {name: weight.detach for name, weight in changed.items()}, tokenizer_path
    return write_meta(checkpoint, checked, short.kept, record, tokenizer_path=path, replaced=new)


def write_meta(
    source: Checkpoint,
    target: Target,
    keep: Sequence[int],
    record: Provenance,
    *,
    tokenizer_path: StrPath | None = None,
    replaced: Replaced | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes the layers ``keep`` of a Meta checkpoint, with the same sharding.

    Memory is bounded by the largest tensor. ``replaced`` are full tensors, by name, that are
    written in place of the source's.
    """
    tokenizer = Path(str(tokenizer_path or find_tokenizer(source.directory)))
    ids = source.args.vocab_size
    check_vocabulary(Tokenizer(tokenizer), tokenizer, ids, source.directory)

    def read(rank: int, stored: Mapping[str, str], name: str) -> Tensor:
        progress(name)
        shard, old = source.shards[rank], stored[name]
        if replaced is None or old not in replaced:
            return shard.read(old)
        ranks, parallel = len(source.shards), source.vocab_parallel
        return part_of(source.args, old, replaced[old](), rank, ranks, vocab_parallel=parallel)

    with target.new_directory(record, card=False) as partial:
        for rank, shard in enumerate(source.shards):
            stored = stored_names(shard.infos, "layers", keep)
            infos = {new: shard.infos[old] for new, old in stored.items()}
            write_shard(partial / shard.path.name, infos, functools.partial(read, rank, stored))
        params = source.params.get("model", source.params)
        write_json(partial / "params.json", {**params, "n_layers": len(keep)})
        copy_tokenizer(tokenizer, partial)
        copy_records(source.directory, partial, [CONVERSION])
    return target.path
