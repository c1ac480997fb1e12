"""Realigned inputs, a variant of the refit that the library does not have, for `refit_choices.py`.

After a gap a norm gives x' where it gives x in the original model. One map for all tokens, C,
minimises

    sum over tokens ||x' + C^T x' - x||^2 + ridge (tr(X'^T X') / D) ||C||^2,

and each matrix W that reads the norm (q, k, v, gate, up) becomes W + step W C^T before the output
projections of the layer are solved. No parameter is added.

Shapes: B windows, S tokens, N = B S, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from short_gpt.healing.refit_layer import LayerRefit
from short_gpt.healing.refit_state import ORIGINAL, PRUNED
from short_gpt.healing.solver import NormalEquations
from short_gpt.models.decoder import keep_values, parameters_of
from short_gpt.models.layer_calls import replaced_output


class ReadNorm:
    """A norm, all matrices that read it, and the sums from which its map is solved."""

    def __init__(self, norm: nn.Module, entering: Tensor) -> None:
        self.norm, self.entering = norm, entering  # what it read in the run that found it
        self.readers: list[nn.Module] = []
        self._equations = NormalEquations()

    def add(self, pruned: Tensor, original: Tensor) -> None:
        """Adds the states (B, S, D) that the norm reads in both models."""
        ours, theirs = (self.norm(s).flatten(0, 1) for s in (pruned, original))  # (N, D)
        self._equations.add(ours, theirs - ours, ours.new_ones(len(ours)))

    def fold(self, step: float, ridge: float) -> None:
        """Folds the map into the readers; nothing where both models give the norm the same."""
        width = self.entering.shape[-1]
        change = torch.zeros(width, width, dtype=torch.float64)  # step C, (D, D)
        if self._equations.solvable:
            self._equations.solve(ridge, partial(_put, change), step=step)
            fold(self.readers, change)


def _put(change: Tensor, columns: slice, part: Tensor) -> None:
    change[:, columns] = part


@torch.no_grad()
def fold(readers: Sequence[nn.Module], change: Tensor) -> None:
    """Lets matrices read x + C^T x, with C (D, D), where they read x."""
    for matrix in readers:
        weight: Any = matrix.weight  # (out, D)
        weight.add_(weight @ change.T.to(weight))


def read_norms(layer: LayerRefit, sample: Tensor) -> list[ReadNorm]:
    """The norms of a layer that matrices alone read, proved by a random map in place of C."""
    calls, found = layer._batches.calls, {}
    run = partial(calls.run, layer._index, sample)

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dim = getattr(module, "weight", torch.ones(())).dim()
        if dim == 1:
            found[id(output)] = ReadNorm(module, args[0].clone())
            alive.append(output)  # or another tensor could have its id
        elif dim == 2 and args and id(args[0]) in found:
            found[id(args[0])].readers.append(module)

    alive: list[Tensor] = []
    with ExitStack() as stack:
        for module in calls.layer(layer._index).modules():
            stack.enter_context(module.register_forward_hook(note))
        run()
    return [norm for norm in found.values() if norm.readers and _proved(run, norm)]


def _proved(run: Any, norm: ReadNorm) -> bool:
    width = norm.entering.shape[-1]
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width  # (D, D)
    with replaced_output(norm.norm, lambda x: x + x @ noise):
        expected = run()  # (B, S, D)
    restore = keep_values([p for matrix in norm.readers for p in matrix.parameters()])
    fold(norm.readers, noise)
    off = (run() - expected).abs().max()
    restore()
    return bool(off <= 64 * torch.finfo(expected.dtype).eps * expected.abs().max())


@contextmanager
def realigned(step: float, ridge: float) -> Iterator[None]:
    """Inside the block refits in memory realign inputs, too, where both sublayers are solved."""
    solve, solve_part, run_original = (
        LayerRefit.solve,
        LayerRefit._solve_part,
        LayerRefit.run_original,
    )
    norms: dict[str, list[ReadNorm]] = {}
    values: dict[Any, Tensor] = {}

    def read(self: LayerRefit) -> None:
        state = self._batches.state
        sample = self._entering[0][:1, :32]  # (1, 32, D)
        found = read_norms(self, sample) if len(self.projections) > 1 else []
        first = [norm for norm in found if torch.equal(norm.entering, sample)]
        norms["attention"], norms["mlp"] = first, [norm for norm in found if norm not in first]
        for batch in self._batches.fitted:
            for norm in first:
                norm.add(state.entering(PRUNED)[batch], state.entering(ORIGINAL)[batch])
        values.clear()
        run_original(self)

    def part_of(self: LayerRefit, part: str, projection: Any) -> Any:
        calls, index = self._batches.calls, self._index
        for batch in self._batches.fitted if part == "mlp" and norms[part] else ():
            with ExitStack() as stack:
                if self._known is not None:
                    stack.enter_context(self._known.reads(self._inputs["attention"][batch]))
                for norm in norms[part]:
                    state = calls.until(index, self._entering[batch], norm.norm)  # (B, S, D)
                    norm.add(state, self._between[batch])
        module = calls.layer(index)
        for norm in norms[part]:
            parameters = [p for matrix in norm.readers for p in matrix.parameters()]
            self.restored.callback(keep_values(parameters))
            norm.fold(step, ridge)
            named = dict(module.named_parameters())
            for key in parameters_of(self._layer, module, norm.readers):
                values[key] = named[key[1]].detach().clone()
        return solve_part(self, part, projection)

    def all_parts(self: LayerRefit) -> Any:
        fits, solved = solve(self)
        return fits, {**values, **solved}

    with ExitStack() as stack:
        for name, own in (("run_original", read), ("_solve_part", part_of), ("solve", all_parts)):
            stack.enter_context(patch.object(LayerRefit, name, own))
        yield
