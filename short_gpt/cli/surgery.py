"""Commands that write checkpoints: prune, convert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.checkpoint import Checkpoint
from llama.parallel import several_ranks
from short_gpt.cli.shared import importance_of, say
from short_gpt.models import is_meta, layers_of, same_model
from short_gpt.progress import bar
from short_gpt.record import read_record, refuse_existing, versions


def prune(
    ckpt_dir: str,
    out_dir: str,
    *,
    layers: Any = None,
    scores: str | None = None,
    n_prune_layers: int | None = None,
    angular: bool = False,
    recipe: str | None = None,
    verify: bool | None = None,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint without some layers, tensor by tensor, in the format of the source.

    The model is not loaded for that: memory is bounded by the largest tensor. With --verify yes,
    source and result are then loaded, one after the other, and compared.

    Example: short-gpt prune llama-2-7b llama-2-5b --scores ranking.json --n_prune_layers 9

    Args:
        ckpt_dir: Meta checkpoint directory, or Hugging Face directory or hub id (safetensors).
        out_dir: new directory; must not exist.
        layers: numbers of the layers to remove, as in 21,22,23; or choose them by --scores.
        scores: JSON file that rank wrote.
        n_prune_layers: how many layers to remove by the scores.
        angular: remove the best block of consecutive layers, not the lowest Block Influence.
        recipe: also write a mergekit passthrough recipe to this file.
        verify: whether to prove the result: the same logits as the source without the layers in
            memory, and the same greedy generation with and without the cache. If not given, yes
            for Hugging Face's format, where a config can fail to say which layers are left, and
            no for Meta's.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        overwrite: replace an earlier pruned checkpoint.
    """
    from llama.checkpoint import prune as prune_meta
    from short_gpt.hf_checkpoint import mergekit_recipe, prune_hf

    drop, facts = _chosen(ckpt_dir, layers, scores, n_prune_layers, angular=angular)
    meta = is_meta(ckpt_dir)
    if recipe is not None:
        refuse_existing(Path(recipe), overwrite=overwrite)
    common: dict[str, Any] = {"provenance": facts, "overwrite": overwrite}
    with bar("writing", total=None, unit="tensor") as shown:
        common["progress"] = lambda _: shown.update()
        if meta:
            prune_meta(ckpt_dir, out_dir, drop, tokenizer_path=tokenizer_path, **common)
        else:
            prune_hf(ckpt_dir, out_dir, drop, **common)
    say(f"removed layers {drop}\nwritten: {out_dir}")
    if recipe is not None:
        keep = read_record(f"{out_dir}/pruning.json")["kept_layers"]
        Path(recipe).write_text(mergekit_recipe(ckpt_dir, keep), encoding="utf-8")
        say(f"written: {recipe}")
    verify = not meta if verify is None else verify
    shards = len(Checkpoint(ckpt_dir).shards) if meta and verify else 1
    if verify and (shards > 1 or several_ranks()):
        say(f"not verified: that loads the model, whose {shards} shard(s) need ranks of their own")
    elif verify:
        say(same_model(ckpt_dir, out_dir, drop, tokenizer_path=tokenizer_path))


def _chosen(
    ckpt_dir: str, layers: Any, scores: str | None, n: int | None, *, angular: bool
) -> tuple[list[int], dict[str, Any]]:
    """The layers that `prune` is to remove, and what is to be kept of how they were chosen."""
    if (layers is None) == (scores is None):
        raise ValueError("prune needs either --layers 21,22,23 or --scores FILE --n_prune_layers N")
    if layers is not None and (angular or n is not None):
        raise ValueError("--n_prune_layers and --angular choose from --scores, not from --layers")
    facts: dict[str, Any] = {"source": ckpt_dir, "versions": versions()}
    if scores is None:
        return _layer_list(layers), facts
    record = read_record(scores)
    importance, found = importance_of(record, scores), layers_of(ckpt_dir)
    if found is not None and importance.layers != list(range(found)):
        raise ValueError(
            f"{scores} scores {len(importance.layers)} layers, {ckpt_dir} has {found}; they "
            "do not belong together"
        )
    if n is None:
        raise ValueError("with --scores, say how many layers to remove: --n_prune_layers N")
    facts |= {"method": "angular" if angular else "block influence"}
    facts |= {"block_influence": importance.block_influence.tolist()}
    return importance.least_important(n, angular=angular), facts | {
        "scored_by": record.get("arguments")
    }


def _layer_list(layers: Any) -> list[int]:
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, list | tuple) or not all(type(i) is int for i in numbers):
        raise ValueError(f"expected layer numbers as in --layers 21,22,23, got {layers!r}")
    return list(numbers)


def convert(
    source: str,
    out_dir: str,
    *,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a Llama in the other format: GGUF or Hugging Face to Meta, Meta to Hugging Face.

    Example: short-gpt convert model.gguf model-meta

    Args:
        source: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out_dir: new directory; must not exist.
        dtype: of the weights written for Meta; the source's if not given, float32 from GGUF, which
            keeps what quantized weights stand for exactly.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        overwrite: replace an earlier conversion.
    """
    with bar("converting", total=None, unit="tensor") as shown:
        _convert(source, out_dir, dtype, tokenizer_path, overwrite, lambda _: shown.update())
    say(f"written: {out_dir}")


def _convert(
    source: str,
    out_dir: str,
    dtype: str | None,
    tokenizer_path: str | None,
    overwrite: bool,
    progress: Callable[[str], object],
) -> None:
    from llama.convert import gguf_to_meta, hf_to_meta, meta_to_hf

    if source.endswith(".gguf"):
        kind = dtype or "float32"
        gguf_to_meta(source, out_dir, dtype=kind, overwrite=overwrite, progress=progress)
    elif not is_meta(source):
        hf_to_meta(source, out_dir, dtype=dtype, overwrite=overwrite, progress=progress)
    elif dtype is not None:
        raise ValueError("--dtype is for writing Meta's format; Hugging Face's keeps the source's")
    else:
        meta_to_hf(
            source, out_dir, tokenizer_path=tokenizer_path, overwrite=overwrite, progress=progress
        )
