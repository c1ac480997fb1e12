"""The refit of the layers in front of gaps alone: what a set of layers costs once it is healed.

A search cannot refit the whole model for every candidate. Most of what a refit restores it restores
in front of the gap, and that part depends on the gap alone: with the inputs m of the last matrix
of the MLP in front, the state h behind it and the state T behind the gap, all of the whole model,

    C minimises  sum over tokens ||h + C^T m - T||^2 / ||T||^2 + ridge (tr(M^T M) / F) ||C||^2,

which is what `refit` does to the first matrix that it meets. One pass over the windows gives the
changes for all gaps, and a set of layers takes those of its gaps.

Shapes: B windows, S tokens, N tokens in all, D width of the stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from short_gpt.healing.refit_layer import batched as of_one_length
from short_gpt.healing.refit_layer import seen_at
from short_gpt.healing.solver import (
    RIDGES,
    SublayerSolver,
    Tokens,
    equations_of,
)
from short_gpt.models.decoder import Decoder, restored_on_error
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.sublayers import OutputProjection, Sublayers
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError

Gap = tuple[int, int]  # places of the first and the last of removed layers that follow each other


@dataclass
class _Batch:
    """Windows of one length, read by the whole model: their state (B, S, D), on the CPU.

    Attributes:
        held: whether they choose ridges instead of being fitted on.
        fronts: by place, the inputs of an MLP's last matrix and the stream that its output joins.
    """

    state: Tensor
    held: bool
    fronts: dict[int, tuple[Tensor, Tensor]]


class GapRefits:
    """Refits of the layers in front of gaps, for models that are tried out.

    Beside the model it holds the states of all windows, and of layers in front of gaps the inputs
    of their last matrix, (N, F); and a matrix for every gap.

    Args:
        decoder: with all its layers, whose weights are as they were outside `mended`.
        windows: token ids to fit on, other ones than candidates are scored on.
        held: held-out windows, by which ridges are chosen.
        ridges: candidates for every matrix.
        batch_size: windows of one length read at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        *,
        ridges: Sequence[float] = RIDGES,
        batch_size: int = 1,
    ) -> None:
        self._decoder, self._calls, self._ridges = decoder, LayerCalls(decoder), ridges
        self._windows, self._held, self._batch_size = windows, held, batch_size
        self._ends: dict[int, OutputProjection] = {}
        self._values: dict[Gap, dict[str, Tensor]] = {}

    def prepare(self, gaps: Iterable[Gap]) -> None:
        """Fits what is missing for these gaps, in one pass, and forgets others.

        Raises:
            ShortGPTError: a gap begins the model, or the MLP in front ends in no matrix whose
                output is added to the stream.
            NotFiniteError: a state is NaN or infinite.
        """
        wanted = set(gaps)
        if first := [gap for gap in wanted if gap[0] == 0]:
            raise ShortGPTError(
                f"the first {first[0][1] + 1} layers begin the model: there is no layer in front "
                "that could be refitted"
            )
        self._values = {gap: value for gap, value in self._values.items() if gap in wanted}
        new = sorted(wanted - self._values.keys())
        if new:
            self._fit(new)

    @contextmanager
    def mended(self, gaps: Iterable[Gap]) -> Iterator[None]:
        """The model with the refits for gaps that were prepared, inside a ``with`` block."""
        with ExitStack() as stack:
            for gap in gaps:
                module = self._ends[gap[0] - 1].matrix
                stack.enter_context(_with_values(module, self._values[gap]))
            yield

    @torch.no_grad()
    def _fit(self, gaps: Sequence[Gap]) -> None:
        batches = [
            _Batch(self._calls.embed(tokens.to(self._decoder.device)).cpu(), apart, {})
            for part, apart in ((self._windows, False), (self._held, True))
            for tokens in of_one_length(part, self._batch_size)
        ]
        last = {start - 1: end for start, end in gaps}  # ascending: the end of the longest
        for place in range(max(last.values()) + 1):
            for front in [f for f in last if last[f] == place - 1]:
                for batch in batches:
                    del batch.fronts[front]
            self._move(batches, place, front=place in last)
            for gap in gaps:
                if gap[1] == place:
                    self._values[gap] = self._solved(batches, gap)

    def _move(self, batches: Sequence[_Batch], place: int, *, front: bool) -> None:
        """Takes the windows through a layer, and keeps what its last matrix is given."""
        device = next(self._calls.layer(place).parameters()).device
        if front:
            self._find_end(place, batches[0].state[:1, :32].to(device))
        for batch in batches:
            state = batch.state.to(device)
            if not front:
                batch.state = self._calls.run(place, state).cpu()
                continue
            with seen_at(self._ends[place].matrix) as seen:
                batch.state = self._calls.run(place, state).cpu()
            inputs, given = (x.cpu().reshape(*state.shape[:2], -1) for x in seen[-1])
            batch.fronts[place] = inputs, batch.state - self._ends[place].factor * given
        if not all(batch.state.isfinite().all() for batch in batches):
            raise NotFiniteError(
                f"the state behind the {place + 1}. layer is NaN or infinite; check the weights, "
                "or try another dtype"
            )

    def _find_end(self, place: int, state: Tensor) -> None:
        """The last matrix of a layer's MLP, proved to add to the stream."""
        if place in self._ends:
            return
        halves = Sublayers.of(self._calls, place, state, self._decoder.family)
        end = halves.projections.get("mlp")
        if end is None or end.norm is not None:
            why = "a norm stands behind its MLP" if end else halves.refused["mlp"]
            raise ShortGPTError(
                f"a gap behind layer {place} cannot be scored as healed: {why}; search by sleb, "
                "which scores models as cut"
            )
        self._ends[place] = end

    def _solved(self, batches: Sequence[_Batch], gap: Gap) -> dict[str, Tensor]:
        """The parameters of the matrix in front of a gap, refitted."""
        front, noise = gap[0] - 1, 16 * torch.finfo(batches[0].state.dtype).eps
        end = self._ends[front]

        def read(held: bool) -> Iterator[Tokens]:
            return (_tokens(end, b, front) for b in batches if b.held == held)

        with restored_on_error(end.matrix.parameters()) as restore:
            reads = (partial(read, False), partial(read, True))
            solver = SublayerSolver(end, *reads, ridges=self._ridges)
            equations = equations_of(end, read(False))
            solver.solve(equations, layer=front, part="mlp", noise=noise)
            parameters = end.matrix.named_parameters()
            values = {name: value.detach().clone() for name, value in parameters}
            restore()
        return values


def _tokens(end: OutputProjection, batch: _Batch, front: int) -> Tokens:
    """What the end of the layer in front has to know of a batch, whose state is behind the gap."""
    parts = (*batch.fronts[front], batch.state)
    inputs, stream, target = (x.to(end.device).flatten(0, 1).float() for x in parts)
    return Tokens.of(inputs, stream, target)


@contextmanager
def _with_values(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with other parameters inside a ``with`` block."""
    before = dict(module.named_parameters(recurse=False))
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    try:
        yield
    finally:
        for name, parameter in before.items():
            setattr(module, name, parameter)
