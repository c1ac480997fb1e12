"""Baselines of others: linear maps in place of removed layers, and layers trained one by one.

With x the hidden state entering a gap and y that leaving it, of the original model and as rows:

- LinearPatch (Chen et al. 2025, arXiv:2505.24680) takes W = H diag(d) H^T, H a Hadamard matrix,
  which spreads what single tokens and channels have in excess, and d the mean over windows of
  mean |y H| / mean |x H| by channel, the means over the tokens of a window;
- Ghosted Layers (Yun et al. 2026, arXiv:2605.15491) takes W = 1 + M, where M = argmin ||X M - (Y -
  X)||^2 by least squares;
- ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819), with M the MLP's outputs in the layer before
  the gap, takes T = argmin ||X - M + M T - Y||^2. T goes into down_proj, and so adds no parameter.
  The library's patch solves down_proj itself, which has more columns, and weighs tokens.

Their authors' code has one map for a block, or one for every removed layer where they lie apart;
here every run of removed layers has one. A map is one more matrix in the model, for which a plain
checkpoint has no place: it is applied to a model in memory and measured (`kept.py`).

Layer-wise gradient compensation (`layerwise`) is after the idea of "LaCo Layer-wise Compensation"
(ACL 2026, long 1342), of which the abstract was read, so that rate, loss and length are ours. Every
kept layer from the one before the first gap on learns by Adam, with all its parameters, to give
what the original model has there: the state leaving that layer, and for a layer before a gap the
state after the gap. Its inputs are those of the model as pruned and trained before it. The loss is
that of the refit, so that both can be compared: the mean over tokens of ||h - T||^2 / ||T||^2 (but
lost attention sinks weigh no more).

Shapes: B windows, S tokens, N tokens in all, D width of the stream.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from short_gpt.models.decoder import pad
from short_gpt.models.layer_calls import LayerCalls, Output, first, mlp_output, replaced_output
from short_gpt.models.numbering import runs
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.wrappers.short_model import ShortModel

LINEARPATCH, GHOSTED = "linearpatch", "ghosted"
RIDGE = 1e-9  # of the mean eigenvalue: no penalty, except where tokens are fewer than inputs
# of Adam in the beginning; it falls to 0 over a layer's time. The best of 1e-4, 3e-4, 1e-3 and 3e-3
# on windows that nothing is fitted on or judged by
RATE = 1e-3
Gap = tuple[int, int]  # places of the first and the last of removed layers that follow each other


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
        self._gram, self._cross = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, before: Tensor, behind: Tensor) -> None:
        x, added = before.double(), (behind.float() - before.float()).double()  # (S, D) each
        self._gram += x.T @ x
        self._cross += x.T @ added

    def map(self) -> Tensor:
        change = least_squares(self._gram, self._cross)
        return torch.eye(len(self._gram), dtype=torch.float64) + change


KINDS: dict[str, type[_LinearPatch] | type[_Ghosted]] = {
    LINEARPATCH: _LinearPatch,
    GHOSTED: _Ghosted,
}


Maps = dict[int, Tensor]  # W: (D, D) float64 after a layer, by its original number; x becomes x W


@torch.no_grad()
def fit(
    short: ShortModel, kind: str, layers: Sequence[int], windows: Sequence[Sequence[int]]
) -> Maps:
    """Maps for the layers before gaps, from one pass over calibration windows.

    Args:
        short: the original model, which is only read.
        kind: "linearpatch" or "ghosted".
        layers: removed, original numbers, not 0.
        windows: token ids.

    Raises:
        ShortGPTError: no Hadamard matrix of the stream's width is known.
        NotFiniteError: a hidden state is NaN or infinite.
    """
    gaps = runs(layers, short.kept)
    sums: dict[Gap, _LinearPatch | _Ghosted] = {}
    for window in windows:
        _read(short, kind, gaps, window, sums)
    return {short.kept[start - 1]: sums[start, end].map() for start, end in gaps}


def _read(
    short: ShortModel,
    kind: str,
    gaps: Sequence[Gap],
    window: Sequence[int],
    sums: dict[Gap, _LinearPatch | _Ghosted],
) -> None:
    """Adds a window's hidden states before and after gaps."""
    tokens, _ = pad([window], short.decoder)
    places = {p for start, end in gaps for p in (start - 1, end)}
    leaving: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for place in places:

            def keep(_: object, __: object, output: Output, place: int = place) -> None:
                leaving[place] = first(output).clone()  # layers may write over it later

            hooks.callback(short.decoder.layers[place].register_forward_hook(keep).remove)
        short.decoder.run(tokens)
    for gap in gaps:
        before, behind = (leaving[place][0].cpu() for place in (gap[0] - 1, gap[1]))  # (S, D)
        if not (before.isfinite().all() and behind.isfinite().all()):
            raise NotFiniteError(f"a state around layers {gap[0]} to {gap[1]} is NaN or infinite")
        if gap not in sums:
            sums[gap] = KINDS[kind](before.shape[-1])
        sums[gap].add(before, behind)


def apply(short: ShortModel, maps: Maps) -> Callable[[], None]:
    """Applies maps to a pruned model; returns what takes them away again."""
    present, hooks = short.present, ExitStack()
    for front, linear_map in maps.items():
        layer = short.decoder.layers[present.index(front)]
        hooks.enter_context(replaced_output(layer, _mapped_by(linear_map)))
    return hooks.close


def _mapped_by(linear_map: Tensor) -> Callable[[Tensor], Tensor]:
    def mapped(state: Tensor) -> Tensor:
        # in float32 whatever the model runs in, as their authors do
        return (state.float() @ linear_map.to(state.device, torch.float32)).to(state.dtype)

    return mapped


@torch.no_grad()
def replaceme(short: ShortModel, layers: Sequence[int], windows: Sequence[Sequence[int]]) -> None:
    """ReplaceMe: removes layers of a Llama-like model, and puts T into the layer before each gap.

    Raises:
        ShortGPTError: the first layer is to go, or as in `layer_hooks.mlp_output`.
    """
    gaps = runs(layers, short.kept)
    if any(start == 0 for start, _ in gaps):
        raise ShortGPTError("expected sets without the first layer")
    places = short.decoder.layers
    ends = {start: mlp_output(places[start - 1], short.decoder.family) for start, _ in gaps}
    modules = {*ends.values(), *(places[p] for gap in gaps for p in (gap[0] - 1, gap[1]))}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    seen: dict[object, Tensor] = {}

    def keep(module: object, _: object, output: Output) -> None:
        seen[module] = first(output)[0].double()  # (S, D)

    hooks = [module.register_forward_hook(keep) for module in modules]
    for window in windows:
        short.decoder.run(pad([window], short.decoder)[0])
        for start, end in gaps:
            m, h, later = (seen[x] for x in (ends[start], places[start - 1], places[end]))
            gram, cross = sums.get(start, (0, 0))
            sums[start] = gram + m.T @ m, cross + m.T @ (later - h + m)
    for hook in hooks:
        hook.remove()
    for start, (gram, cross) in sums.items():
        solved = least_squares(gram, cross)  # T, (D, D)
        for parameter in ends[start].parameters():  # weight (D, F) and, if there is one, bias (D,)
            parameter.copy_(solved.T @ parameter.double())
    short.remove_layers(list(layers))


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """The solution (F, D) from X^T X (F, F) and X^T Y (F, D)."""
    ridged = gram + RIDGE * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(ridged))


def hadamard(order: int) -> Tensor:
    """An orthogonal matrix (order, order) float64 whose entries are all of one size.

    Made by doubling (Sylvester 1867) from one of order 1, or of Paley's (1933): q + 1 for a prime
    q of the form 4 k + 3, and 2 (q + 1) for a prime q of the form 4 k + 1. Those are the widths of
    most models: 576 is 8 times 72.

    Raises:
        ShortGPTError: none of these gives the order.

    Example:
        >>> hadamard(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    signs = _signs(order)
    if signs is None:
        raise ShortGPTError(
            f"no Hadamard matrix of order {order} is known here: a rotation by one suits other "
            "widths alone"
        )
    return signs / order**0.5


def _signs(order: int) -> Tensor | None:
    """The same with entries 1 and -1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _prime(order - 1) and order % 4 == 0:
        core = _residues(order - 1)
        core[0, 1:], core[1:, 0] = 1, -1
        return core + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and _prime(order // 2 - 1) and order // 2 % 4 == 2:
        core = _residues(order // 2 - 1)
        core[0, 1:], core[1:, 0] = 1, 1
        one, other = (
            torch.tensor(m, dtype=torch.float64) for m in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]])
        )
        return torch.kron(core, one) + torch.kron(torch.eye(order // 2).double(), other)
    half = _signs(order // 2) if order % 2 == 0 else None
    if half is None:
        return None
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _residues(q: int) -> Tensor:
    """(q + 1, q + 1): zeros, and behind the first row and column whether i - j is a square."""
    character = torch.full((q,), -1, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    places = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[1:, 1:] = character[(places[:, None] - places) % q]
    return core


def _prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


class Trained(NamedTuple):
    """What became of a layer."""

    layer: int  # original number
    steps: int  # each of a window
    before: float  # mean loss of all windows
    after: float


def layerwise(
    short: ShortModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    seconds: float,
    *,
    rate: float = RATE,
    clock: Callable[[], float] = time.process_time,
) -> list[Trained]:
    """Removes layers and trains the kept ones in turn, with equal shares of the seconds.

    Forward passes between trainings are not timed; a refit's are.

    Raises:
        ShortGPTError: the first layer is to go.
    """
    calls, removed = LayerCalls(short.decoder), [short.kept.index(i) for i in layers]
    kept = [i for i in range(calls.count) if i not in removed]
    if kept[0] != 0:
        raise ShortGPTError("expected sets without the first layer")
    start = min(removed) - 1
    share = seconds / sum(index >= start for index in kept)
    device = short.decoder.device
    targets = [calls.embed(torch.tensor([w], device=device)) for w in windows]  # (1, S, D) each
    states, trained = targets, []
    for index, following in zip(kept, [*kept[1:], calls.count], strict=True):
        for place in range(index, following):
            targets = [calls.run(place, state) for state in targets]
        if index < start:  # both models are one up to here
            states = targets
            continue
        before = mean_loss([calls.run(index, state) for state in states], targets)
        steps = _train_layer(calls, index, states, targets, clock() + share, rate, clock)
        states = [calls.run(index, state) for state in states]
        trained.append(Trained(short.kept[index], steps, before, mean_loss(states, targets)))
    short.remove_layers(list(layers))
    return trained


def loss(state: Tensor, target: Tensor) -> Tensor:
    return ((state - target).square().sum(-1) / target.square().sum(-1)).mean()


def mean_loss(states: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    pairs = zip(states, targets, strict=True)
    return sum(float(loss(state, target)) for state, target in pairs) / len(targets)


def _train_layer(
    calls: LayerCalls,
    index: int,
    states: Sequence[Tensor],
    targets: Sequence[Tensor],
    until: float,
    rate: float,
    clock: Callable[[], float],
) -> int:
    """Steps of Adam on one layer until the clock is there; returns how many."""
    layer, draw, steps = calls.layer(index), random.Random(index), 0
    layer.requires_grad_(True)
    adam = torch.optim.Adam(layer.parameters(), lr=rate)
    began = clock()
    while (now := clock()) < until:
        if steps % len(states) == 0:
            order = draw.sample(range(len(states)), len(states))
        window = order[steps % len(states)]
        for group in adam.param_groups:
            group["lr"] = rate * (until - now) / (until - began)
        args, kwargs = calls.call(index, states[window].clone())  # a layer may write over it
        adam.zero_grad()
        loss(first(layer(*args, **kwargs)), targets[window]).backward()
        adam.step()
        steps += 1
    layer.requires_grad_(False)
    return steps
