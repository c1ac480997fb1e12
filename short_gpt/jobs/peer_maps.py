"""Others' maps of the residual stream at a gap, as baselines: what stands in for removed layers.

With x the state in front of a gap and y that behind it, of the whole model and as rows:

- LinearPatch (Chen et al. 2025, arXiv:2505.24680) takes W = H diag(d) H^T, H a Hadamard matrix,
  which spreads what single tokens and channels have in excess, and d the mean over windows of
  mean |y H| / mean |x H| by channel, the means over the tokens of a window;
- Ghosted Layers (Yun et al. 2026, arXiv:2605.15491) takes W = 1 + M, where M = argmin ||X M - (Y -
  X)||^2 by least squares.

Their authors' code has one map for a block, or one for every removed layer where they lie apart;
here every run of removed layers has one. A map is a matrix more in the model, for which a plain
checkpoint has no place: it is applied to a model in memory, to be measured, and not saved.

Shapes: B windows, S tokens, N tokens in all, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from short_gpt.healing.moments import Moments
from short_gpt.jobs.hadamard import hadamard
from short_gpt.jobs.rows import GHOSTED, LINEARPATCH
from short_gpt.models.decoder import pad
from short_gpt.models.layer_hooks import States, replaced_output
from short_gpt.models.numbering import check_layers, runs
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.selection.mending import Gap
from short_gpt.wrappers.short_model import ShortModel

RIDGE = 1e-9  # least squares without a penalty, but for tokens that are fewer than channels


class _LinearPatch:
    """Sums of ratios by channel, behind a rotation."""

    def __init__(self, width: int) -> None:
        self._rotation = hadamard(width)
        self._ratios, self._windows = torch.zeros(width, dtype=torch.float64), 0

    def add(self, before: Tensor, behind: Tensor) -> None:
        least = torch.finfo(torch.float32).tiny
        sizes = [(x.double() @ self._rotation).abs().mean(0) for x in (before, behind)]  # (D,)
        self._ratios += sizes[1] / sizes[0].clamp_min(least)
        self._windows += 1

    def map(self) -> Tensor:
        scale = self._ratios / self._windows
        return self._rotation * scale @ self._rotation.T


class _Ghosted:
    """Sums of the least squares."""

    def __init__(self, width: int) -> None:
        self._moments, self._width = Moments(), width

    def add(self, before: Tensor, behind: Tensor) -> None:
        self._moments.add(before.float(), behind.float() - before.float())

    def map(self) -> Tensor:
        return torch.eye(self._width, dtype=torch.float64) + self._moments.change(RIDGE)


KINDS: dict[str, type[_LinearPatch] | type[_Ghosted]] = {
    LINEARPATCH: _LinearPatch,
    GHOSTED: _Ghosted,
}


@dataclass(frozen=True)
class StreamMaps:
    """Maps of the residual stream behind layers in front of gaps.

    Attributes:
        layers: removed, original numbers.
        maps: for the layer in front of every run of them, by its original number, W: (D, D)
            float64, by which a state x becomes x W.
    """

    layers: list[int]
    maps: Mapping[int, Tensor]


@torch.no_grad()
def fit_many(
    short: ShortModel,
    kind: str,
    sets: Sequence[Sequence[int]],
    windows: Sequence[Sequence[int]],
    *,
    progress: bool = True,
) -> list[StreamMaps]:
    """Maps for several sets of layers from one pass over calibration windows.

    Args:
        short: the model with all the layers; it is only read.
        kind: "linearpatch" or "ghosted".
        sets: each with original layer numbers, none of them 0, in any order.
        windows: token ids.
        progress: whether to show a bar.

    Raises:
        ShortGPTError: a layer does not exist or begins the model; no window; no Hadamard matrix
            of the stream's width is known.
        NotFiniteError: a state is NaN or infinite.
    """
    short.check_whole()
    for layers in sets:
        check_layers(layers, short.kept)
    every = sorted({gap for layers in sets for gap in runs(layers, short.kept)})
    if not windows or any(start == 0 for start, _ in every):
        raise ShortGPTError("expected windows, and sets without the first layer")
    sums: dict[Gap, _LinearPatch | _Ghosted] = {}
    with bar("fitting", total=len(windows), unit="window", show=progress) as shown:
        for window in windows:
            _read(short, kind, every, window, sums)
            shown.update()
    solved = {gap: found.map() for gap, found in sums.items()}
    return [
        StreamMaps(
            list(layers),
            {short.kept[gap[0] - 1]: solved[gap] for gap in runs(layers, short.kept)},
        )
        for layers in sets
    ]


def _read(
    short: ShortModel,
    kind: str,
    gaps: Sequence[Gap],
    window: Sequence[int],
    sums: dict[Gap, _LinearPatch | _Ghosted],
) -> None:
    """Adds a window's states in front of gaps and behind them."""
    tokens, _ = pad([window], short.decoder)
    seen = States(short.decoder.layers, set(), {p for start, end in gaps for p in (start - 1, end)})
    with seen:
        short.decoder.run(tokens)
    for gap in gaps:
        before, behind = (seen.behind[place][0].cpu() for place in (gap[0] - 1, gap[1]))  # (S, D)
        if not (before.isfinite().all() and behind.isfinite().all()):
            raise NotFiniteError(f"a state around layers {gap[0]} to {gap[1]} is NaN or infinite")
        if gap not in sums:
            sums[gap] = KINDS[kind](before.shape[-1])
        sums[gap].add(before, behind)


def apply(short: ShortModel, maps: StreamMaps) -> Callable[[], None]:
    """Applies maps to a model without their layers; returns what takes them away again."""
    present, hooks = short.present, ExitStack()
    for front, linear_map in maps.maps.items():
        layer = short.decoder.layers[present.index(front)]
        hooks.enter_context(replaced_output(layer, _mapped_by(linear_map)))
    return hooks.close


def _mapped_by(linear_map: Tensor) -> Callable[[Tensor], Tensor]:
    def mapped(state: Tensor) -> Tensor:
        # in float32 whatever the model runs in, as their authors do
        return (state.float() @ linear_map.to(state.device, torch.float32)).to(state.dtype)

    return mapped
