"""Whether two models are the same: by their logits, and by what they generate.

Shapes: S tokens read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.progress import bar

ROUNDING = 1e-4  # between implementations in float32, relative to the largest logit


class Generator(Protocol):
    """A model that is proved: its logits, and its likeliest tokens."""

    decoder: Decoder

    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Fingerprint:
    """What two models must share to be the same.

    Attributes:
        logits: (1, S, V) float32 on the CPU.
        cached: tokens generated greedily with the cache.
        uncached: the same without it.
    """

    logits: torch.Tensor
    cached: list[int]
    uncached: list[int]


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
    cached, uncached = (short.greedy(read, count, use_cache=c) for c in (True, False))
    return Fingerprint(logits, cached, uncached)


def fingerprint_aligned(
    short: Generator, count: int = 8, *, dtype: torch.dtype | None = None
) -> Fingerprint:
    """`fingerprint` with all weights copied, so that none lies unaligned in a file.

    Args:
        short: the model.
        count: as for `fingerprint`.
        dtype: that the weights are rounded to first; None leaves them exact.
    """
    copy_weights(short.decoder.module)
    if dtype is not None:
        for weight in short.decoder.module.parameters():
            weight.data.copy_(weight.data.to(dtype))
    return fingerprint(short, count)


def one_by_one(*models: Callable[[], Fingerprint]) -> list[Fingerprint]:
    """Fingerprints of models that are opened one after the other, with a bar.

    Args:
        models: each function opens a model, and keeps nothing of it except the fingerprint.
    """
    fingerprints = []
    with bar("verifying", total=len(models), unit="model", delay=0.0) as shown:
        for model in models:
            fingerprints.append(model())
            shown.update()
    return fingerprints


def check_same(
    ours: Fingerprint,
    theirs: Fingerprint,
    *,
    rounding: float = 0.0,
    names: tuple[str, str] = ("the model in memory", "the saved model"),
) -> str:
    """Proves that two models are the same.

    Args:
        ours: from `fingerprint`.
        theirs: from `fingerprint` on the same tokens.
        rounding: how far logits may differ, relative to the largest; 0 asks for the same bits,
            and for the same tokens generated. `ROUNDING` is for two implementations.
        names: of the two models in error messages.

    Returns:
        How the logits agree, in words: "bit for bit" or "except for the last digits".

    Raises:
        NotFiniteError: the first one's logits are NaN or infinite.
        RuntimeError: the logits differ, or what is generated, or the second generates otherwise
            with its cache than without.
    """
    check_logits(ours.logits, theirs.logits, rounding, names)
    _check_generated(ours, theirs, rounding, names)
    return "except for the last digits" if rounding else "bit for bit"


def check_logits(
    expected: Tensor,
    actual: Tensor,
    rounding: float = 0.0,
    names: tuple[str, str] = ("the model in memory", "the saved model"),
) -> None:
    """Raises where two models' logits differ; arguments as in `check_same`.

    Raises:
        NotFiniteError: those expected are NaN or infinite.
        RuntimeError: they differ.
    """
    if expected.shape != actual.shape:
        raise RuntimeError(
            f"{names[1]} gives logits of shape {list(actual.shape)}, {names[0]} "
            f"{list(expected.shape)}"
        )
    difference = (actual - expected).abs().max()
    if rounding:
        same = bool(difference <= rounding * expected.abs().max())
    else:
        same = torch.equal(actual, expected)
    if not same and not expected.isfinite().all():
        raise NotFiniteError(
            f"{names[0]} gives NaN or infinite logits, which prove nothing of a copy: a weight is "
            "damaged; fetch the weights anew, or leave the proof out (`verify` no)"
        )
    if not same:
        raise RuntimeError(f"{names[1]} is not {names[0]}: logits differ by up to {difference:.3g}")


def _check_generated(
    ours: Fingerprint, theirs: Fingerprint, rounding: float, names: tuple[str, str]
) -> None:
    if theirs.cached != theirs.uncached:
        raise RuntimeError(f"{names[1]} generates otherwise with its cache than without")
    # two implementations may pick another token where two are all but equal
    if not rounding and theirs.cached != ours.cached:
        raise RuntimeError(f"{names[1]} generates otherwise than {names[0]}")


def copy_weights(model: nn.Module) -> None:
    """Copies all weights in place: mapped from a file they may lie unaligned and round otherwise.

    Weights that share memory still do.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for weight in model.parameters():
        if pointer := weight.data_ptr():  # none: on the meta device, or without an entry
            key = (pointer, weight.shape)
            if key not in copies:
                copies[key] = weight.data.clone()
            weight.data = copies[key]
