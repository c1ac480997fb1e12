"""Layer-wise gradient compensation, as a baseline: kept layers are trained one after the other.

After the idea of "LaCo Layer-wise Compensation" (ACL 2026, long 1342), of which the abstract was
read, so that rate, loss and length are ours. Every kept layer from the one before the first gap on
learns by Adam, with all its parameters, to give what the original model has there: the state
leaving that layer, and for a layer before a gap the state after the gap. Its inputs are those of
the model as pruned and trained before it. The loss is that of the refit, so that both can be
compared: the mean over tokens of ||h - T||^2 / ||T||^2 (but lost attention sinks weigh no more).

Shapes: S tokens, D width of the stream.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from short_gpt.models.layer_calls import LayerCalls, first
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel

# of Adam in the beginning; it falls to 0 over a layer's time. The best of 1e-4, 3e-4, 1e-3 and 3e-3
# on windows that nothing is fitted on or judged by
RATE = 1e-3


class Trained(NamedTuple):
    """What became of a layer."""

    layer: int  # original number
    steps: int  # each of a window
    before: float  # mean loss of all windows
    after: float


def heal(
    short: ShortModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    seconds: float,
    *,
    rate: float = RATE,
    clock: Callable[[], float] = time.process_time,
) -> list[Trained]:
    """Removes layers and trains the kept ones, each for the same share of the seconds.

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
        steps = _train(calls, index, states, targets, clock() + share, rate, clock)
        states = [calls.run(index, state) for state in states]
        trained.append(Trained(short.kept[index], steps, before, mean_loss(states, targets)))
    short.remove_layers(list(layers))
    return trained


def loss(state: Tensor, target: Tensor) -> Tensor:
    return ((state - target).square().sum(-1) / target.square().sum(-1)).mean()


def mean_loss(states: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    pairs = zip(states, targets, strict=True)
    return sum(float(loss(state, target)) for state, target in pairs) / len(targets)


def _train(
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
