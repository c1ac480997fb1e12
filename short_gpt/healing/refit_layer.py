"""One layer of a refit: what the whole model makes of it, and its matrices solved for what is left.

Shapes: B windows, S tokens, N = B S, D width of the stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from short_gpt.healing.half import HalfSolver, Tokens, equations_of
from short_gpt.healing.known_attention import KnownAttention
from short_gpt.healing.normal_equations import NormalEquations
from short_gpt.healing.refit_state import Fit, RefitState
from short_gpt.healing.solving import PARTS, Solving
from short_gpt.healing.states import States
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.summands import Summand, Summands, behind_attention
from short_gpt.models.weight_changes import Parameter, keep_values, parameters_of
from short_gpt.runtime.errors import NotFiniteError

TokensOf = Callable[[int, Tensor], Tokens]


@dataclass(frozen=True)
class Windows:
    """Windows on their way through both models.

    Attributes:
        calls: of the decoder.
        state: holds their states.
        shapes: B and S of every batch.
        held: of every batch, whether it chooses ridges instead of being fitted on.
        room: bytes of memory for what one layer alone needs of them; more goes into a file.
        step: called with B behind every layer of either model.
    """

    calls: LayerCalls
    state: RefitState
    shapes: Sequence[tuple[int, int]]
    held: Sequence[bool]
    room: int
    step: Callable[[int], object]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.shapes)))

    def of(self, *, held: bool) -> list[int]:
        """The batches that choose ridges, or those that are fitted on."""
        return [batch for batch in self if self.held[batch] == held]

    def run(self, place: int, state: Tensor) -> Tensor:
        """The state behind a layer, where its weights are."""
        return self.calls.run(place, state.to(self.device(place)))

    def device(self, place: int) -> torch.device:
        """Where a layer's weights are."""
        parameters = self.calls.layer(place).parameters()
        return next(p.device for p in parameters if not p.is_meta)

    def put(self, states: States, batch: int, state: Tensor, place: int) -> None:
        """Keeps the state behind a layer; NotFiniteError where it is none to go on with."""
        if not state.isfinite().all():
            raise NotFiniteError(
                f"the state behind the {place + 1}. layer is NaN or infinite; check the weights, "
                "or try another dtype"
            )
        states[batch] = state
        self.step(self.shapes[batch][0])

    def states(self, width: int, dtype: torch.dtype, name: str) -> States:
        """States that one layer alone needs: in memory where there is room for them."""
        size = sum(B * S for B, S in self.shapes) * width * dtype.itemsize
        path = self.state.path(name) if size > self.room // 3 else None  # there are three at most
        return States(self.shapes, width, dtype, path)


class LayerRefit:
    """Solves the matrices of a layer that stays, while its weights are in memory.

    Args:
        windows: in front of the layer.
        place: of the layer.
        number: its original one.
        solving: how they are solved.

    Attributes:
        ends: by half, what is solved.
        refused: why halves are not, in words.
    """

    def __init__(
        self,
        windows: Windows,
        place: int,
        number: int,
        solving: Solving,
    ) -> None:
        self._windows, self._place, self._number, self._solving = windows, place, number, solving
        state = windows.state
        self._left, self._behind = state.before("left"), state.behind("left")
        self._whole = state.behind("whole")  # from `teach` on, and behind a gap where there is one
        sample = self._left[0][:1, :32].to(windows.device(place))
        halves = Summands.of(windows.calls, place, sample, windows.calls.family)
        self._halves = halves
        # the attention first, in whatever order they are named: the MLP mends what it leaves
        found = [part for part in PARTS if part in solving.parts and part in halves.ends]
        self.ends = {part: halves.ends[part] for part in found}
        self.refused = "; ".join(dict.fromkeys(halves.refused.values()))
        self._between = States([], 0, sample.dtype)
        self._inputs = self._context = self._between
        self._known: KnownAttention | None = None
        if len(self.ends) > 1:  # else the attention runs once anyway
            calls = windows.calls
            known = KnownAttention(calls, place, self.ends["attention"], calls.family, sample)
            self._known = known if known.proved else None

    def teach(self) -> None:
        """The whole model's states behind the layer, and between its halves where that is a target.

        Where no MLP is solved, what a gap behind the layer adds is the attention's to restore.
        """
        windows, before = self._windows, self._windows.state.before("whole")
        sample = before[0]
        self._between = windows.states(sample.shape[-1], sample.dtype, "between")
        for batch in windows:
            run = partial(windows.run, self._place, before[batch])
            if self._halves.mlp is None or "attention" not in self.ends:
                whole = run()
            else:
                between, whole = behind_attention(run, self._halves.mlp)
                self._between[batch] = between if "mlp" in self.ends else between - whole
            windows.put(self._whole, batch, whole, self._place)

    def learn(self) -> tuple[list[Fit], dict[Parameter, Tensor]]:
        """Solves the matrices, and takes what is left through the layer.

        Returns:
            How each was solved, and new values of parameters, which have their own again.
        """
        windows, layer = self._windows, self._windows.calls.layer(self._place)
        fits: list[Fit] = []
        values: dict[Parameter, Tensor] = {}
        with ExitStack() as own:
            for part, end in self.ends.items():
                fits.append(self._solved(part, end, own))
                if fits[-1].changed:
                    values |= _values(self._number, layer, end)
            for batch in windows:
                if "mlp" in self.ends:
                    behind = self._added(batch, self.ends["mlp"])
                else:
                    behind = windows.run(self._place, self._left[batch])
                windows.put(self._behind, batch, behind, self._place)
        return fits, values

    def _attention(self, end: Summand) -> tuple[NormalEquations, TokensOf]:
        """The equations of the attention's matrix, and what makes tokens of a batch's inputs."""
        windows, kept = self._windows, set(self._windows.of(held=True))
        if end.norm is not None or self._known is not None:
            kept = set(windows)  # is asked for again

        def target(batch: int) -> Tensor:
            between = self._between[batch]
            return between if "mlp" in self.ends else between + self._whole[batch]

        square = self._square(target)

        def tokens(batch: int, inputs: Tensor) -> Tokens:
            return _tokens(inputs, self._left[batch], target(batch), square)

        def fitted() -> Iterator[Tokens]:
            for batch in windows:
                state = self._left[batch].to(windows.device(self._place))
                inputs = windows.calls.until(self._place, state, end.matrix)
                self._keep("attention", batch, inputs, kept)
                if not windows.held[batch]:
                    yield tokens(batch, inputs)

        sums = equations_of(end, fitted())
        self._context = self._inputs
        return sums, tokens

    def _mlp(self, end: Summand) -> tuple[NormalEquations, TokensOf]:
        """The same of the MLP's; of a streamed layer the last matrices alone are left.

        What its half adds to stands in the place of the states behind, from here on.
        """
        windows, layer = self._windows, self._windows.calls.layer(self._place)
        last = [module for end in self.ends.values() for module in end.modules]
        if self._known is not None:  # nothing else of the attention is needed any more
            rest = [part for part in layer.children() if part is not self._known.attention]
            windows.calls.keep_only(self._place, [*last, *rest])
        square = self._square(self._whole.__getitem__)

        def tokens(batch: int, inputs: Tensor) -> Tokens:
            return _tokens(inputs, self._behind[batch], self._whole[batch], square)

        def fitted() -> Iterator[Tokens]:
            for batch in windows:
                with seen_at(end.matrix) as seen, self._attended(batch):
                    state = windows.run(self._place, self._left[batch])
                inputs, given = seen[-1]
                given = given.reshape(-1, given.shape[-1]).float()
                out = end.factor * end.normed(given)
                self._behind[batch] = state - out.view_as(state)
                self._keep("mlp", batch, inputs, set(windows))
                if not windows.held[batch]:
                    yield replace(tokens(batch, inputs), given=given)

        sums = equations_of(end, fitted())
        windows.calls.keep_only(self._place, last)
        return sums, tokens

    def _square(self, target: Callable[[int], Tensor]) -> float | None:
        """The mean of ||target||^2 that equal weights are relative to; None where they differ."""
        if self._solving.weights == "inverse":
            return None
        fitted = [target(batch).float().pow(2).sum(-1) for batch in self._windows.of(held=False)]
        return float(torch.cat([squares.flatten() for squares in fitted]).mean())

    def _attended(self, batch: int) -> AbstractContextManager[None]:
        """What the attention's matrix was given is not computed again where that is proved."""
        if self._known is None:
            return nullcontext()
        return self._known.takes(self._context[batch].to(self._windows.device(self._place)))

    def _keep(self, part: str, batch: int, inputs: Tensor, kept: set[int]) -> None:
        """Keeps what a matrix is given of some batches."""
        inputs = inputs.reshape(*self._windows.shapes[batch], -1)
        if batch == 0:
            width, dtype = inputs.shape[-1], inputs.dtype
            self._inputs = self._windows.states(width, dtype, f"inputs of {part}")
        if batch in kept:
            self._inputs[batch] = inputs

    def _solved(self, part: str, end: Summand, own: ExitStack) -> Fit:
        """Solves a matrix, and leaves what it became in place until the end of a block."""
        sums, tokens = (self._attention if part == "attention" else self._mlp)(end)
        own.callback(keep_values(p for module in end.modules for p in module.parameters()))

        def again(held: bool) -> Callable[[], Iterable[Tokens]]:
            batches = self._windows.of(held=held)
            return lambda: (tokens(b, self._inputs[b].to(end.device)) for b in batches)

        aimed = self._solving
        solver = HalfSolver(end, aimed.ridges, again(False), again(True), aim=aimed.aim)
        # tokens weigh 1 / ||T||^2: their mean square is relative to the stream's own
        found = solver.solve(sums, noise=16 * torch.finfo(self._left[0].dtype).eps)
        return Fit(self._number, part, **vars(found))

    def _added(self, batch: int, end: Summand) -> Tensor:
        """The stream behind the layer, whose MLP ends so."""
        stream, inputs = self._behind[batch], self._inputs[batch]
        inputs = inputs.to(end.device).flatten(0, 1).float()
        out = end.factor * end.normed(end.given(inputs)).cpu()
        return (stream + out.view_as(stream)).to(stream.dtype)


@contextmanager
def seen_at(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a module is given and what it gives inside the block, copies."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((args[0].clone(), output.clone()))

    handle = module.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _tokens(inputs: Tensor, stream: Tensor, target: Tensor, square: float | None) -> Tokens:
    """Those of a batch, from states (B, S, ...), where the inputs are."""
    h, wanted = (state.to(inputs.device).flatten(0, 1).float() for state in (stream, target))
    return Tokens(inputs.reshape(len(h), -1).float(), h, wanted, square=square)


def _values(number: int, layer: nn.Module, end: Summand) -> Mapping[Parameter, Tensor]:
    """Copies of the end's parameters, by the layer's number and their names in it."""
    named = dict(layer.named_parameters())
    return {
        key: named[key[1]].detach().to("cpu", copy=True)
        for key in parameters_of(number, layer, end.modules)
    }
