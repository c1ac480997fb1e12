"""Whether two models are the same: by their logits, and by what they generate.

Shapes: S tokens read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from llama.formats.safetensors import DTYPES
from short_gpt.models.decoder import Decoder
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.progress import bar

ROUNDING = 1e-4  # between implementations in float32, relative to the largest logit


class Generator(Protocol):
    """A model that is proved: its logits, and the tokens that it finds likeliest."""

    decoder: Decoder
    kept: list[int]

    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Fingerprint:
    """What two models must share to be the same.

    Attributes:
        logits: (1, S, V) float32 on the CPU.
        cached, uncached: tokens generated greedily, with the cache and without it.
        damaged: a tensor that is NaN or infinite somewhere, in words, such as attention can hide
            from the logits; None if there is none, or nobody looked.
    """

    logits: torch.Tensor
    cached: list[int]
    uncached: list[int]
    damaged: str | None = None


def fingerprint(
    short: Generator, count: int = 8, *, ids: Sequence[int] | None = None
) -> Fingerprint:
    """The `Fingerprint` of a model as it is now.

    Args:
        short: the model.
        count: tokens generated, and read where no ``ids`` are given.
        ids: tokens to read; None takes the first of the vocabulary.
    """
    read = [i % short.decoder.vocab_size for i in range(count)] if ids is None else list(ids)
    logits = short.decoder.logits(torch.tensor([read], device=short.decoder.device)).cpu()
    if not logits.isfinite().all():  # nothing can be generated; `check_logits` says so
        return Fingerprint(logits, [], [])
    cached, uncached = (short.greedy(read, count, use_cache=c) for c in (True, False))
    return Fingerprint(logits, cached, uncached)


def fingerprint_aligned(
    short: Generator, count: int = 8, *, dtype: torch.dtype | None = None
) -> Fingerprint:
    """`fingerprint` with all weights copied, so that none lies unaligned in a file, and looked at.

    Args:
        short, count: as there.
        dtype: that the weights are rounded to first; None leaves them exact.
    """
    damaged = copy_weights(short.decoder.module)
    if dtype is not None:
        for weight in short.decoder.module.parameters():
            weight.data.copy_(weight.data.to(dtype))
    if damaged is not None:
        for number, layer in zip(short.kept, short.decoder.layers, strict=True):
            own = [name for name, weight in layer.named_parameters() if weight is damaged[1]]
            damaged = (f"layer {number} in {own[0]}", damaged[1]) if own else damaged
    return replace(fingerprint(short, count), damaged=damaged and damaged[0])


def one_by_one(*models: Callable[[], Fingerprint]) -> list[Fingerprint]:
    """What `fingerprint` gives of models that are opened one after the other, with a bar.

    Args:
        models: each opens one, and keeps nothing of it but that.
    """
    found = []
    with bar("verifying", total=len(models), unit="model", delay=0.0) as shown:
        for model in models:
            found.append(model())
            shown.update()
    return found


def check_same(
    ours: Fingerprint,
    theirs: Fingerprint,
    *,
    rounding: float = 0.0,
    names: tuple[str, str] = ("the model in memory", "the saved model"),
) -> str:
    """Proves that two models are the same.

    Args:
        ours, theirs: both from `fingerprint` on the same tokens.
        rounding: how far logits may differ, relative to the largest; 0 asks for the same bits,
            and for the same tokens generated. `ROUNDING` is for two implementations.
        names: of the two in what is raised.

    Returns:
        How the logits agree, in words: "bit for bit" or "but for the last digits".

    Raises:
        NotFiniteError: a weight, or the first one's logits, are NaN or infinite.
        RuntimeError: the logits differ, or what is generated, or the second generates otherwise
            with its cache than without.
    """
    for name, found in zip(names, (ours, theirs), strict=True):
        if found.damaged is not None:
            raise NotFiniteError(
                f"{name} has NaN or infinite weights, {found.damaged}, and its logits prove "
                "nothing of a copy; fetch the weights anew (or take a dtype that holds them), or "
                "leave the proof out (`verify` no)"
            )
    check_logits(ours.logits, theirs.logits, rounding, names)
    _check_generated(ours, theirs, rounding, names)
    return "but for the last digits" if rounding else "bit for bit"


def check_logits(
    expected: Tensor,
    found: Tensor,
    rounding: float = 0.0,
    names: tuple[str, str] = ("the model in memory", "the saved model"),
) -> None:
    """Raises where two models' logits differ; arguments as in `check_same`.

    Raises:
        NotFiniteError: those expected are NaN or infinite.
        RuntimeError: they differ.
    """
    if expected.shape != found.shape:
        raise RuntimeError(
            f"{names[1]} gives logits of shape {list(found.shape)}, {names[0]} "
            f"{list(expected.shape)}"
        )
    off = (found - expected).abs().max()
    if rounding:
        same = bool(off <= rounding * expected.abs().max())
    else:
        same = torch.equal(found, expected)
    if not same and not expected.isfinite().all():
        raise NotFiniteError(
            f"{names[0]} gives NaN or infinite logits, which prove nothing of a copy: a weight is "
            "damaged; fetch the weights anew, or leave the proof out (`verify` no)"
        )
    if not same:
        raise RuntimeError(f"{names[1]} is not {names[0]}: logits differ by up to {off:.3g}")


def _check_generated(
    ours: Fingerprint, theirs: Fingerprint, rounding: float, names: tuple[str, str]
) -> None:
    if theirs.cached != theirs.uncached:
        raise RuntimeError(f"{names[1]} generates otherwise with its cache than without")
    # two implementations may pick another token where two are all but equal
    if not rounding and theirs.cached != ours.cached:
        raise RuntimeError(f"{names[1]} generates otherwise than {names[0]}")


def copy_weights(model: nn.Module) -> tuple[str, nn.Parameter] | None:
    """Copies all weights in place: mapped from a file they may lie unaligned and round otherwise.

    Weights that share memory still do.

    Returns:
        The first that is NaN or infinite somewhere, with its name; None if none is.
    """
    damaged: tuple[str, nn.Parameter] | None = None
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name, weight in model.named_parameters():
        if pointer := weight.data_ptr():  # none: on the meta device, or without an entry
            place = (pointer, weight.shape)
            if place not in copies:
                copies[place] = weight.data.clone()
                if damaged is None and not _is_finite(copies[place]):
                    damaged = name, weight
            weight.data = copies[place]
    return damaged


def _is_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite; quantized ones are none of these."""
    return weight.dtype not in DTYPES.values() or bool(weight.isfinite().all())
