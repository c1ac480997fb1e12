"""Whether two models are the same, by their logits and by what they generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder, damaged_weight, full_float32, in_own_dtype
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.progress import bar

ROUNDING = 1e-4  # between implementations in float32, relative to the largest logit
HALF_ROUNDING = 0.05  # of a token computed alone or among others, in 16 bits, likewise
NAMES = ("the model in memory", "the saved model")


class Generator(Protocol):
    """A model that is compared: its logits, and its likeliest tokens."""

    kept: list[int]

    @property
    def decoder(self) -> Decoder: ...

    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]: ...


class Fingerprint(NamedTuple):
    """What two models must share to be the same.

    ``logits`` are (1, S, V) float32 on the CPU, of S tokens over the vocabulary; ``tokens`` are
    generated greedily with the cache. ``consistent``: without it they are the same, or both are as
    likely, except for rounding, where they first differ. ``damaged`` is a tensor with NaN or
    infinite values, which attention can hide from the logits.
    """

    logits: Tensor
    tokens: list[int]
    consistent: bool = True
    damaged: str | None = None


@full_float32()
def fingerprint(short: Generator, count: int = 8) -> Fingerprint:
    """The `Fingerprint` of a model as it is now; it reads and generates ``count`` tokens."""
    read = [i % short.decoder.vocab_size for i in range(count)]
    tokens = torch.tensor([read], device=short.decoder.device)  # (1, S)
    with in_own_dtype(short.decoder):
        logits = short.decoder.logits(tokens).cpu()  # (1, S, V)
    if not logits.isfinite().all():  # nothing can be generated; `check_same_logits` raises for it
        return Fingerprint(logits, [])
    cached, uncached = (short.greedy(read, count, use_cache=c) for c in (True, False))
    same = cached == uncached or _near_tie(short, read, cached, uncached)
    return Fingerprint(logits, cached, same)


def _near_tie(short: Generator, ids: list[int], cached: list[int], uncached: list[int]) -> bool:
    """Whether two texts that begin with ``ids`` first differ in tokens that are as likely."""
    at = next(i for i, (a, b) in enumerate(zip(cached, uncached, strict=False)) if a != b)
    types = {weight.dtype for weight in short.decoder.module.parameters()}
    rounding = HALF_ROUNDING if types & {torch.float16, torch.bfloat16} else ROUNDING
    tokens = torch.tensor([ids + uncached[:at]], device=short.decoder.device)  # (1, S)
    with in_own_dtype(short.decoder):
        logits = short.decoder.logits(tokens)[0, -1]  # (V,)
    gap = logits[uncached[at]] - logits[cached[at]]
    return bool(gap.abs() <= rounding * logits.abs().max())


def fingerprint_aligned(
    short: Generator, count: int = 8, *, dtype: torch.dtype | None = None
) -> Fingerprint:
    """`fingerprint` with all weights checked, and copied, so that none is unaligned in a file.

    ``dtype`` is what the weights are rounded to first; None leaves them exact.
    """
    copy_weights(short.decoder.module)
    damaged = damaged_weight(short.decoder, short.kept)
    if dtype is not None:
        for weight in short.decoder.module.parameters():
            weight.data.copy_(weight.data.to(dtype))
    return fingerprint(short, count)._replace(damaged=damaged)


def one_by_one(*models: Callable[[], Fingerprint]) -> list[Fingerprint]:
    """The results of functions that each open a model and keep nothing else of it, with a bar."""
    fingerprints = []
    with bar("verifying", total=len(models), unit="model", delay=0.0) as shown:
        for model in models:
            fingerprints.append(model())
            shown.update()
    return fingerprints


def check_same(
    ours: Fingerprint, theirs: Fingerprint, *, rounding: float = 0.0, names: tuple[str, str] = NAMES
) -> str:
    """Checks that two models are the same; returns "bit for bit" or "except for the last digits".

    ``rounding`` is how far logits may differ, relative to the largest (`ROUNDING` for two
    implementations); 0 asks for the same bits and the same tokens generated. ``names`` are those
    of the two models in messages. NotFiniteError if a weight or logits are NaN or infinite,
    RuntimeError if the models differ, or the second one's tokens with its cache and without.
    """
    for name, model in zip(names, (ours, theirs), strict=True):
        if model.damaged is not None:
            raise _not_finite(name, f"weights, {model.damaged}")
    check_same_logits(ours.logits, theirs.logits, rounding, names)
    if not theirs.consistent:
        raise RuntimeError(f"{names[1]} generates otherwise with its cache than without")
    # two implementations may pick another token where two are all but equal
    if not rounding and theirs.tokens != ours.tokens:
        raise RuntimeError(f"{names[1]} generates otherwise than {names[0]}")
    return "except for the last digits" if rounding else "bit for bit"


def check_same_logits(
    expected: Tensor, actual: Tensor, rounding: float = 0.0, names: tuple[str, str] = NAMES
) -> None:
    """Raises where two models' logits differ; arguments and errors as in `check_same`."""
    difference = (actual - expected).abs().max()
    same = torch.equal(actual, expected)
    if rounding and actual.shape == expected.shape:
        same = bool(difference <= rounding * expected.abs().max())
    if not same and not expected.isfinite().all():
        raise _not_finite(names[0], "logits")
    if not same:
        raise RuntimeError(f"{names[1]} is not {names[0]}: logits differ by up to {difference:.3g}")


def _not_finite(name: str, what: str) -> NotFiniteError:
    return NotFiniteError(
        f"{name} has NaN or infinite {what}, and cannot verify the copy; fetch the weights again "
        "(or take a dtype that holds them), or skip verification (`verify` no)"
    )


def copy_weights(model: nn.Module) -> None:
    """Copies all weights in place: mapped from a file they may be unaligned and round otherwise.

    Weights that share memory still do.
    """
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for weight in model.parameters():
        if pointer := weight.data_ptr():  # none: on the meta device, or without an entry
            key = (pointer, weight.shape)
            if key not in copies:
                copies[key] = weight.data.clone()
            weight.data = copies[key]
