"""Checkpoints of either format by their path: which it is, and opened as a `ShortModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llama import Llama
from llama.args import ModelArgs
from llama.checkpoint.meta import read_params
from llama.io.sources import is_meta
from llama.parallel import choose_device, choose_dtype, initialize, several_ranks
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.verify import fingerprint
from short_gpt.models.loading import explained
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.short_hf import ShortHFModel
from short_gpt.short_llama import ShortLlama
from short_gpt.short_model import ShortModel

ROUNDING = 1e-4  # between implementations in float32, relative to the largest logit


def open_model(
    source: str,
    *,
    n_prune_layers: int | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 2048,
    max_batch_size: int = 1,
    seed: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    model_parallel_size: int | None = None,
) -> Any:
    """Opens a Meta directory as `ShortLlama`, anything else as `ShortHFModel`.

    Args:
        source: Meta directory, Hugging Face directory, hub id or GGUF file.
        n_prune_layers, device, dtype: as usual.
        tokenizer_path, max_seq_len, max_batch_size, seed: for Meta's format only.
        model_parallel_size: ranks that share one model under torchrun; None is all of them for
            Meta's format and 1 for others, which cannot be shared.

    Raises:
        OSError, ShortGPTError: as those of ``Llama.build`` or ``from_pretrained``; or the size
            does not fit.

    Example:
        >>> short = open_model("llama-2-7b", n_prune_layers=9)  # doctest: +SKIP
    """
    if is_meta(source):
        tokenizer = tokenizer_path or find_tokenizer(source)
        llama = Llama.build(
            source,
            tokenizer,
            max_seq_len,
            max_batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            model_parallel_size=model_parallel_size,
        )
        return ShortLlama(llama, n_prune_layers)

    if model_parallel_size not in (None, 1):
        raise ShortGPTError(
            f"model_parallel_size {model_parallel_size}: only Meta's format is split over ranks; "
            "convert the model, or leave it out, so that every rank reads its share of the windows"
        )
    place = choose_device(device)
    if several_ranks():
        initialize(1, device=place)
    torch.manual_seed(seed)
    kind = choose_dtype(dtype, place)
    return ShortHFModel(source, None, n_prune_layers, device=place, dtype=kind)


def layers_of(source: str) -> int | None:
    """How many layers a checkpoint has, by its params.json or config.json; None if not local.

    Raises:
        FileNotFoundError, ShortGPTError: as those of `is_meta` and ``ModelArgs.from_params``.
    """
    if is_meta(source):
        return ModelArgs.from_params(read_params(Path(source))).n_layers
    if not (Path(source) / "config.json").is_file():
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    return config.get_text_config(decoder=True).num_hidden_layers


def same_model(
    source: str, pruned: str, drop: list[int], *, tokenizer_path: str | None = None
) -> str:
    """Proves that a pruned checkpoint is the source without some layers; one is loaded at a time.

    Returns:
        A sentence that says what was compared.

    Raises:
        RuntimeError: the logits or the generation with the cache differ.
    """
    whole = open_model(source, tokenizer_path=tokenizer_path, device="cpu")
    whole.remove_layers(drop)
    expected = _aligned(whole)
    del whole
    found, cached, uncached = _aligned(open_model(pruned, device="cpu"))
    off = (found - expected[0]).abs().max()
    if is_meta(source) != is_meta(pruned):  # two implementations, each with roundings of its own
        same = bool(off <= ROUNDING * expected[0].abs().max())
        exact = "but for the last digits"
    else:
        same = torch.equal(found, expected[0]) and cached == expected[1]
        exact = "bit for bit"
    if not same:
        raise RuntimeError(f"{pruned} is not {source} without {drop}: logits differ by {off:.3g}")
    if cached != uncached:
        raise RuntimeError(f"{pruned} generates otherwise with its cache than without")
    return (
        f"verified: the logits are those of the source without these layers, {exact}, and "
        "generation with the cache is that without it"
    )


def _aligned(short: ShortModel) -> tuple[torch.Tensor, list[int], list[int]]:
    """`fingerprint` with all weights copied: mapped ones may lie unaligned and round otherwise."""
    model = short.decoder.model  # type: ignore[attr-defined]
    shared: dict[int, torch.Tensor] = {}
    for weight in model.parameters():
        weight.data = shared.setdefault(weight.data_ptr(), weight.data.clone())
    return fingerprint(short)
