"""A Meta checkpoint directory with some layers removed, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from llama.checkpoint.meta import (
    CONVERSION,
    LAYER_NAME,
    Checkpoint,
    check_vocabulary,
    copy_records,
    copy_tokenizer,
)
from llama.checkpoint.pth import Shard, write_shard
from llama.checkpoint.sharding import part_of
from llama.io.json_files import write_json
from llama.tokenizer import Tokenizer, find_tokenizer
from short_gpt.checkpoints.card import write_provenance
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import Replaced, StrPath, Target, takes_target
from short_gpt.models.numbering import check_layers


@takes_target
def prune_meta(
    ckpt_dir: StrPath,
    target: Target,
    layers: Sequence[int],
    *,
    tokenizer_path: StrPath | None = None,
    provenance: Provenance | None = None,
    replaced: Replaced | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes the checkpoint with some layers removed, tensor by tensor, with the same sharding.

    The tensors' bytes are copied, so the result equals the model pruned in memory bit for bit.
    Memory is bounded by the largest tensor.

    Args:
        ckpt_dir: the source.
        target: the new directory; a path is enough.
        layers: numbers of the layers to remove.
        tokenizer_path: copied along; None looks beside the source.
        provenance: what is known beside what is removed; goes into ``pruning.json`` with that.
        replaced: by name, whole tensors that are written in place of the source's.
        progress: called with every tensor's name before it is written.

    Returns:
        The target's path.

    Raises:
        ShortGPTError: a layer does not exist or is named twice, or none or all would go.
        FileExistsError: the target exists, or with ``overwrite`` holds the source or other files.
        FileNotFoundError: there is no tokenizer.
    """
    source = Checkpoint(ckpt_dir)
    numbers = range(source.args.n_layers)
    check_layers(layers, numbers)
    keep = [i for i in numbers if i not in set(layers)]
    tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(source.directory)
    check_vocabulary(source, Tokenizer(tokenizer), tokenizer)
    record = (provenance or Provenance()).cut(ckpt_dir, removed=layers, kept=keep)
    target.check(source=source.directory)
    with target.new_directory() as partial:
        write_kept(source, partial, keep, replaced or {}, progress)
        write_beside(source, partial, n_layers=len(keep), tokenizer=tokenizer, record=record)
        target.prove(partial)
    return target.path


def write_kept(
    source: Checkpoint,
    out: Path,
    keep: Sequence[int],
    replaced: Replaced,
    progress: Callable[[str], object] = str,
) -> None:
    """Writes each file of a checkpoint with the kept layers only, under its own name.

    Args:
        source: the checkpoint.
        out: an existing directory.
        keep: numbers of the layers that stay, ascending.
        replaced: as for `prune_meta`.
        progress: as for `prune_meta`.
    """
    by = source.vocab_parallel
    for rank, shard in enumerate(source.shards):
        old_name = names_kept(shard, keep)

        def read(
            name: str, shard: Shard = shard, rank: int = rank, names: dict[str, str] = old_name
        ) -> Tensor:
            progress(name)
            old = names[name]
            if old not in replaced:
                return shard.read(old)
            tensor, ranks = replaced[old](), len(source.shards)
            return part_of(source.args, old, tensor, rank, ranks, vocab_parallel=by)

        infos = {new: shard.infos[old] for new, old in old_name.items()}
        write_shard(out / shard.path.name, infos, read)


def names_kept(shard: Shard, keep: Sequence[int]) -> dict[str, str]:
    """The tensors of a file that stay when only some layers do.

    Args:
        shard: one file of a checkpoint.
        keep: numbers of the layers that stay, ascending.

    Returns:
        By each tensor's new name, in which layers count from 0, its name in the file.
    """
    new_number = {str(old): new for new, old in enumerate(keep)}
    old_name: dict[str, str] = {}
    for name in shard.infos:
        match = LAYER_NAME.fullmatch(name)
        if match is None:  # of no layer: embedding, last norm, output head
            old_name[name] = name
        elif match[1] in new_number:
            old_name[f"layers.{new_number[match[1]]}.{match[2]}"] = name
    return old_name


def write_beside(
    source: Checkpoint, out: Path, *, n_layers: int, tokenizer: Path, record: Provenance
) -> None:
    """Writes what stands beside the weights of a checkpoint with fewer layers.

    Args:
        source: where the weights came from; its other parameters and its record of a conversion
            stay.
        out: the directory that holds the weights.
        n_layers: how many layers are left.
        tokenizer: its file, copied as it is.
        record: of what was done.
    """
    params = source.params.get("model", source.params)
    write_json(out / "params.json", {**params, "n_layers": n_layers})
    copy_tokenizer(tokenizer, out)
    copy_records(source.directory, out, [CONVERSION])
    write_provenance(out, record, card=False)
