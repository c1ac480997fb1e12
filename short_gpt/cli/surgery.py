"""Commands that write checkpoints: prune, convert."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llama.checkpoint.reshard import reshard
from llama.formats.convert import gguf_to_meta, hf_to_meta, meta_to_hf
from llama.io.files import check_new, check_writable
from llama.io.sources import is_meta, kind_of
from llama.parallel import several_ranks
from short_gpt.checkpoints.mergekit import mergekit_recipe, recipe_dtype
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.prune import prune_checkpoint, refuse_gguf
from short_gpt.cli.choice import Choice, method_of
from short_gpt.cli.shared import say
from short_gpt.opening import same_model
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.results import read_record, refuse_existing


def prune(
    ckpt_dir: str,
    out_dir: str,
    *,
    layers: Any = None,
    scores: str | None = None,
    n_prune_layers: int | None = None,
    method: str | None = None,
    angular: bool = False,
    max_perplexity_ratio: float | None = None,
    eval_data: str | None = None,
    eval_windows: int = 32,
    size: int = 1024,
    device: str | None = None,
    recipe: str | None = None,
    to: str | None = None,
    verify: bool | None = None,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint without some layers, tensor by tensor, in either format.

    The model is not loaded for that: memory is bounded by the largest tensor. With --verify yes,
    source and result are then loaded, one after the other, and compared.

    Example: short-gpt prune llama-2-7b llama-2-5b --scores ranking.json --n_prune_layers 9

    Args:
        ckpt_dir: Meta checkpoint directory, or Hugging Face directory or hub id (safetensors).
        out_dir: new directory; must not exist.
        layers: numbers of the layers to remove, as in 21,22,23; or choose them by --scores.
        scores: JSON file that rank wrote.
        n_prune_layers: how many layers to remove by the scores.
        method: by which method of rank; the one that the scores were ranked by if not given.
        angular: short for --method angular, the best block of consecutive layers.
        max_perplexity_ratio: remove as many layers as the perplexity on --eval_data allows, which
            may rise by this factor, as in 1.1; the model is loaded for that.
        eval_data: text for that, which the scores were not measured on: a file or folder.
        eval_windows: windows of it to read at most.
        size: tokens in such a window.
        device: cpu, cuda or mps for that; the best there is if not given.
        recipe: also write a mergekit passthrough recipe to this file.
        to: the format to write, meta or hf (a Llama only); the source's if not given.
        verify: whether to prove the result: the same logits as the source without the layers in
            memory, and the same greedy generation with and without the cache. If not given, yes
            where Hugging Face's format is read or written, whose config can fail to say which
            layers are left, and no from Meta's to Meta's.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        overwrite: replace an earlier pruned checkpoint.
    """
    refuse_gguf(ckpt_dir)
    choice = Choice(ckpt_dir, layers, scores, method_of(angular, method))
    check_new(Path(out_dir), marker=PROVENANCE, overwrite=overwrite)
    if max_perplexity_ratio is None:
        drop = choice.layers(n_prune_layers)
    elif eval_data is None or n_prune_layers is not None:
        raise ShortGPTError("--max_perplexity_ratio needs --eval_data, and no --n_prune_layers")
    else:
        ratio, text = max_perplexity_ratio, eval_data
        options: dict[str, Any] = {"size": size, "limit": eval_windows, "device": device}
        drop = choice.most(ratio, text, **options, tokenizer_path=tokenizer_path)
    dtype = None if recipe is None else _recipe_dtype(ckpt_dir, recipe, overwrite=overwrite)
    with bar("writing", total=None, unit="tensor") as shown:
        prune_checkpoint(
            ckpt_dir,
            out_dir,
            drop,
            to=to,
            tokenizer_path=tokenizer_path,
            provenance=choice.provenance,
            overwrite=overwrite,
            progress=lambda _: shown.update(),
        )
    proof = _proof(ckpt_dir, out_dir, drop, tokenizer_path, verify)
    say(f"removed layers {drop}\nwritten: {out_dir}")
    if recipe is not None and dtype is not None:
        keep = read_record(f"{out_dir}/pruning.json")["kept_layers"]
        Path(recipe).parent.mkdir(parents=True, exist_ok=True)
        Path(recipe).write_text(mergekit_recipe(ckpt_dir, keep, dtype), encoding="utf-8")
        say(f"written: {recipe}")
    if proof is not None:
        say(proof)


def _proof(
    source: str, out: str, drop: list[int], tokenizer_path: str | None, verify: bool | None
) -> str | None:
    """What `same_model` says, if it is to be asked; a result that fails is deleted."""
    meta = is_meta(source)
    if not (verify or (verify is None and not (meta and is_meta(out)))):
        return None
    if several_ranks():
        return "not verified: that loads the model on one rank; run it without torchrun"
    try:
        return same_model(source, out, drop, tokenizer_path=tokenizer_path)
    except BaseException:  # also what kept it from being proved: no memory, an interruption
        shutil.rmtree(out)
        raise


def _recipe_dtype(source: str, recipe: str, *, overwrite: bool) -> str:
    """The dtype of a model that mergekit is to read; checks that it can."""
    dtype = recipe_dtype(source)
    refuse_existing(Path(recipe), overwrite=overwrite)
    check_writable(Path(recipe))
    return dtype


def convert(
    source: str,
    out_dir: str,
    *,
    dtype: str | None = None,
    shards: int | None = None,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a Llama in the other format: GGUF or Hugging Face to Meta, Meta to Hugging Face.

    With --shards, Meta's format in any case: so many files, for so many model-parallel ranks.

    Example: short-gpt convert model.gguf model-meta

    Args:
        source: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out_dir: new directory; must not exist.
        dtype: of the weights written for Meta; the source's if not given, float32 from GGUF, which
            keeps what quantized weights stand for exactly.
        shards: write Meta's format in so many files. The embedding stays cut as it is; that of
            one file is cut by vocabulary if that is Llama 3's or tied to the output head, else by
            width, as Llama 2's. Any number of files runs on any number of ranks all the same.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        overwrite: replace an earlier conversion.
    """
    with bar("converting", total=None, unit="tensor") as shown:
        common = {"overwrite": overwrite, "progress": lambda _: shown.update()}
        _convert(source, out_dir, dtype, shards, tokenizer_path, common)
    say(f"written: {out_dir}")


def _convert(
    source: str,
    out_dir: str,
    dtype: str | None,
    shards: int | None,
    tokenizer_path: str | None,
    common: dict[str, Any],
) -> None:

    files = 1 if shards is None else shards
    kind = kind_of(source)
    if kind == "gguf":
        gguf_to_meta(source, out_dir, dtype=dtype or "float32", shards=files, **common)
    elif kind != "meta":
        hf_to_meta(source, out_dir, dtype=dtype, shards=files, **common)
    elif shards is not None:
        common["tokenizer_path"] = tokenizer_path
        reshard(source, out_dir, shards=shards, dtype=dtype, also=[PROVENANCE], **common)
    elif dtype is not None:
        raise ShortGPTError(
            "--dtype is for writing Meta's format; Hugging Face's keeps the source's"
        )
    else:
        meta_to_hf(source, out_dir, tokenizer_path=tokenizer_path, **common)
