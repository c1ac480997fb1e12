"""A variant of the refit that the library does not have, tried on the real model by `refits.py`.

A token weighs by the squared gradient of the whole model's loss in its state behind the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from short_gpt import ShortHFModel, ShortLlama
from short_gpt.data import demo
from short_gpt.healing import refit, refit_layer
from short_gpt.healing.refit_layer import LayerRefit
from short_gpt.healing.solver import SublayerSolver, Tokens

Windows = Sequence[Sequence[int]]
Fit = Callable[[ShortLlama, Sequence[int], Windows], refit.Refit]


def by_gradient(short: ShortLlama, layers: Sequence[int], windows: Windows) -> refit.Refit:
    fitted, held = refit.split_held_out(list(windows))
    squares = gradients([*fitted, *held])
    solve, equations = LayerRefit.solve, refit_layer.equations_of
    at: list[int] = []

    def weighted(batches: Iterable[Tokens], first: int) -> Iterator[Tokens]:
        for batch, tokens in enumerate(batches, start=first):
            yield tokens._replace(weights=squares[batch][at[-1]])

    def noted(self: LayerRefit) -> object:
        at.append(self._index)
        return solve(self)

    def solver(end: object, fit: Callable, keep: Callable, **solving: Any) -> SublayerSolver:
        parts = (lambda: weighted(fit(), 0), lambda: weighted(keep(), len(fitted)))
        return SublayerSolver(end, *parts, **solving)

    with (
        patch.object(LayerRefit, "solve", noted),
        patch.object(refit_layer, "SublayerSolver", solver),
        patch.object(
            refit_layer,
            "equations_of",
            lambda end, batches, team: equations(end, weighted(batches, 0), team),
        ),
    ):
        return refit.fit(short, layers, fitted, held=held)


def gradients(windows: Windows) -> list[list[Tensor]]:
    """By window and layer, the squared gradient of the loss in the state behind, (S,), mean 1."""
    model = ShortHFModel.from_meta(str(demo.checkpoint()), device="cpu", dtype="float32").model
    found = []
    for window in windows:
        tokens, states = torch.tensor([list(window)]), []
        with states_of(model, states):
            model(tokens, labels=tokens).loss.backward()
        model.zero_grad(set_to_none=True)
        every = [state.grad[0].pow(2).sum(-1) for state in states]
        found.append([square / square.mean() for square in every])
    return found


@contextmanager
def states_of(model: torch.nn.Module, states: list[Tensor]) -> Iterator[None]:
    """Keeps the states behind all layers, with their gradients, of a pass inside the block."""

    def note(_: object, __: object, output: object) -> None:
        state = output if isinstance(output, Tensor) else output[0]
        state.retain_grad()
        states.append(state)

    hooks = [layer.register_forward_hook(note) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


VARIANTS: dict[str, Fit] = {
    "weights of the gradient": by_gradient,
}
