"""Healed models on disk: ordinary checkpoints, with what was done beside the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint.meta import CONVERSION, Checkpoint, copy_tokenizer
from llama.checkpoint.pth import Shard, write_shard
from llama.formats.convert import hf_to_meta
from llama.io.files import new_directory, read_marker
from llama.io.json_files import write_json
from llama.parallel import model_parallel_size
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.card import changes, sublayers_gone
from short_gpt.checkpoints.meta import PROVENANCE, prune_meta
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import versions
from short_gpt.short_hf import ShortHFModel
from short_gpt.short_llama import ShortLlama

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, depth-pruning, healed, short-gpt]
---

# {name} with {kept} of its {total} layers, healed

Layers that stayed, in the original model's numbering from 0:

    {layers}

Their weights were changed by {how}. {sublayers}{measured}
Made with ShortGPT ({versions}). `pruning.json` holds this in numbers.
"""


def provenance(short: Any, source: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a healed model, ready for JSON.

    ``kept_layers`` numbers the layers of the source; ``original_layers`` goes through all earlier
    removals that the source's own ``pruning.json`` names, back to the first model.

    Args:
        short: the model.
        source: where it was opened; a directory's ``pruning.json`` is taken over.
        facts: ``{"healing": ...}`` and what else is to be kept.
    """
    path = Path(source) / PROVENANCE
    earlier = read_marker(path) if path.is_file() else None
    record: dict[str, Any] = {"removed_layers": short.removed, "kept_layers": short.kept}
    if earlier is not None and not short.removed:
        record = dict(earlier)
    elif earlier is not None:
        record["source_pruning"] = earlier
    record |= {"source": source, "original_layers": original_layers(record), **changes(short)}
    return {**record, **facts, "versions": versions()}


def original_layers(record: Mapping[str, Any]) -> list[int]:
    """For every layer of a pruned model its number in the first model, by its ``pruning.json``."""
    kept = record["kept_layers"]
    if "source_pruning" not in record:
        return list(kept)
    before = original_layers(record["source_pruning"])
    return [before[layer] for layer in kept]


def save_healed(
    short: Any,
    out_dir: str | os.PathLike[str],
    facts: Mapping[str, Any],
    *,
    source: str,
    as_meta: bool = False,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a healed model so that plain ``from_pretrained``, or ``Llama.build``, loads it.

    Args:
        short: a `ShortHFModel`, or a `ShortLlama`.
        out_dir: the new directory; appears whole or not at all.
        facts: kept in ``pruning.json`` and on the model card, see `provenance`.
        source: the checkpoint that the model came from.
        as_meta: whether a `ShortHFModel` of a Llama is written in Meta's format, as the source is.
        tokenizer_path: of a Meta source; None looks beside it.
        overwrite: whether an earlier pruned model is replaced; nothing else ever is.

    Raises:
        ShortGPTError: a Meta checkpoint of several shards, or of another model.
        FileExistsError: ``out_dir`` exists.
        RuntimeError: what was saved is not the model in memory.
    """
    out = Path(str(out_dir))
    record = provenance(short, source, facts)
    with new_directory(out, marker=PROVENANCE, overwrite=overwrite) as partial:
        inner = partial / "inner"
        if isinstance(short, ShortHFModel):
            if as_meta:
                _save_as_meta(short, inner, tokenizer_path or find_tokenizer(source))
            else:
                short.save_pretrained(inner)
        else:
            _save_meta(short, inner, source)
        for file in sorted(inner.iterdir()):
            file.rename(partial / file.name)
        inner.rmdir()
        write_json(partial / PROVENANCE, record)
        if not (partial / "params.json").is_file():
            (partial / "README.md").write_text(healed_card(record), encoding="utf-8")
    return out


def healed_card(record: Mapping[str, Any]) -> str:
    """The text of a healed model's ``README.md``, from its `provenance`."""
    layers = record["original_layers"]
    root = record
    while "source_pruning" in root:
        root = root["source_pruning"]
    total = len(root["kept_layers"]) + len(root["removed_layers"])
    found = record.get("perplexity", {})
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in found.items())
    measured = f"\n\n| on text not seen | perplexity |\n| --- | --- |\n{rows}\n" if rows else ""
    return CARD.format(
        name=Path(str(record["source"])).name,
        kept=len(layers),
        total=total,
        layers=layers,
        how=record["healing"]["method"],
        sublayers=sublayers_gone(record),
        measured=measured or "Its quality was not measured.\n",
        versions=", ".join(f"{k} {v}" for k, v in record["versions"].items()),
    )


def _save_as_meta(short: ShortHFModel, out: Path, tokenizer: str | Path) -> None:
    """Saved, which compares it with the model in memory, and converted.

    The tokenizer is the source's own: saving it in between may add tokens.
    """

    middle = out.with_name("hugging_face")
    short.save_pretrained(middle)
    hf_to_meta(middle, out)
    shutil.rmtree(middle)
    for path in out.glob("tokenizer*"):
        path.unlink()
    copy_tokenizer(Path(tokenizer), out)


def _save_meta(short: ShortLlama, out: Path, source: str) -> None:
    """Prunes the source's files, and writes the changed weights in place of the former."""
    changed, files = check_source(short, source), Path(source)
    if short.removed:
        path = getattr(short.llama, "tokenizer_path", None)
        files = prune_meta(source, out.with_name("pruned"), short.removed, tokenizer_path=path)
    replaced = _replaced(short)
    out.mkdir()
    shard = Shard(files / changed)

    def read(name: str) -> Tensor:
        return replaced[name] if name in replaced else shard.read(name)

    write_shard(out / changed, shard.infos, read)
    if short.removed:
        for file in sorted(files.iterdir()):
            if file.name != changed:
                file.rename(out / file.name)
        shutil.rmtree(files)
        return
    for name in ("params.json", CONVERSION):
        if (files / name).is_file():
            shutil.copyfile(files / name, out / name)
    path = getattr(short.llama, "tokenizer_path", None) or find_tokenizer(source)
    copy_tokenizer(Path(path), out)


def _replaced(short: ShortLlama) -> dict[str, Tensor]:
    """The weights that differ from the source's, by their names without the removed layers."""
    found: dict[str, Tensor] = {}
    for number, name in sorted(short.changed):
        place = short.kept.index(number)
        weight = short.decoder.layers[place].get_parameter(name)
        found[f"layers.{place}.{name}"] = weight
    return found


def check_source(short: ShortLlama, source: str) -> str:
    """The name of the one file of weights; for a check before long work.

    Raises:
        ShortGPTError: the source has several shards, or not this model's layers; or several
            model-parallel ranks share the model.
    """

    checkpoint = Checkpoint(source)
    if len(checkpoint.shards) > 1:
        raise ShortGPTError(
            f"{source} has {len(checkpoint.shards)} shards; changed weights are written to one: "
            f"short-gpt convert {source} DIRECTORY --shards 1, and change that"
        )
    if model_parallel_size() > 1:
        raise ShortGPTError(
            f"changed weights are written by one rank that holds them whole, got "
            f"{model_parallel_size()} model-parallel ranks; start it without torchrun"
        )
    if checkpoint.args.n_layers != short.n_layers:
        raise ShortGPTError(
            f"{source} has {checkpoint.args.n_layers} layers, this model began with "
            f"{short.n_layers}: it is not where the model came from"
        )
    return checkpoint.shards[0].path.name
