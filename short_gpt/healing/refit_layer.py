"""One layer of a refit: its targets from the original model, its projections solved in the pruned.

Shapes: B windows, S tokens, N = B S, D width of the residual stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from short_gpt.healing.refit_state import ORIGINAL, PRUNED, HiddenStates, RefitState
from short_gpt.healing.solver import (
    PARTS,
    Fit,
    NormalEquations,
    SolverSettings,
    SublayerSolver,
    Tokens,
    equations_of,
)
from short_gpt.models.families import part as part_of
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.layer_hooks import Output, first, patched_forward
from short_gpt.models.sublayers import OutputProjection, Sublayers, after_attention
from short_gpt.models.weight_changes import Parameter, keep_values, parameters_of
from short_gpt.runtime.errors import NotFiniteError

TokensOf = Callable[[int, Tensor], Tokens]


@dataclass(frozen=True)
class Batches:
    """Batches of windows that pass the layers of both models together.

    Attributes:
        calls: of the decoder.
        state: holds their hidden states.
        shapes: B and S of every batch.
        held_out: of every batch, whether it chooses ridges instead of being fitted on.
        room: bytes of memory for what one layer alone needs of them; more goes into a file.
        passed: called with B after every layer of either model.
    """

    calls: LayerCalls
    state: RefitState
    shapes: Sequence[tuple[int, int]]
    held_out: Sequence[bool]
    room: int
    passed: Callable[[int], object]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.shapes)))

    def of(self, *, held_out: bool) -> list[int]:
        """The batches that choose ridges, or those that are fitted on."""
        return [batch for batch in self if self.held_out[batch] == held_out]

    def run(self, index: int, state: Tensor) -> Tensor:
        """The state (B, S, D) leaving a layer, where its weights are."""
        return self.calls.run(index, state.to(self.device(index)))

    def run_all(self, index: int, source: HiddenStates, target: HiddenStates) -> None:
        """Runs all batches through a layer."""
        with self.calls.loaded(index):
            for batch in self:
                self.keep(target, batch, self.run(index, source[batch]), index)

    def device(self, index: int) -> torch.device:
        """Where a layer's weights are."""
        parameters = self.calls.layer(index).parameters()
        return next(p.device for p in parameters if not p.is_meta)

    def keep(self, states: HiddenStates, batch: int, state: Tensor, index: int) -> None:
        """Keeps the state leaving a layer; NotFiniteError where it is NaN or infinite."""
        if not state.isfinite().all():
            raise NotFiniteError(
                f"the state leaving the {index + 1}. layer is NaN or infinite; check the weights, "
                "or try another dtype"
            )
        states[batch] = state
        self.passed(self.shapes[batch][0])

    def states(self, width: int, dtype: torch.dtype, name: str) -> HiddenStates:
        """States that one layer alone needs: in memory where there is room for them."""
        size = sum(B * S for B, S in self.shapes) * width * dtype.itemsize
        path = self.state.path(name) if size > self.room // 3 else None  # there are three at most
        return HiddenStates(self.shapes, width, dtype, path)


def batched(windows: Sequence[Sequence[int]], size: int) -> Iterator[Tensor]:
    """Windows of one length together, (B, S) each, in the order of their first ones."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    for group in lengths.values():
        for start in range(0, len(group), size):
            yield torch.tensor([list(window) for window in group[start : start + size]])


class LayerRefit:
    """Solves the output projections of a kept layer, while its weights are in memory.

    Args:
        batches: whose states enter the layer.
        index: of the layer in the decoder.
        layer: its original number.
        settings: how projections are solved.

    Attributes:
        projections: what is solved, by sublayer.
        refused: why other sublayers are not, in words.
    """

    def __init__(self, batches: Batches, index: int, layer: int, settings: SolverSettings) -> None:
        self._batches, self._index, self._layer, self._settings = batches, index, layer, settings
        state, calls = batches.state, batches.calls
        self._entering, self._leaving = state.entering(PRUNED), state.leaving(PRUNED)
        self._target = state.leaving(ORIGINAL)  # after `run_original` and the removed layers
        sample = self._entering[0][:1, :32].to(batches.device(index))  # (1, 32, D)
        self._sublayers = Sublayers.of(calls, index, sample, calls.family)
        # attention first, in whatever order they are named: the MLP restores what it leaves
        solvable = self._sublayers.projections
        names = [p for p in PARTS if p in (settings.parts or PARTS) and p in solvable]
        if settings.where == "gaps":  # the inputs are the original's: attention misses nothing
            names = names[-1:]
        self.projections = {name: solvable[name] for name in names}
        self.refused = "; ".join(dict.fromkeys(self._sublayers.refused.values()))
        self._between = HiddenStates([], 0, sample.dtype)
        self._inputs = self._context = self._between
        self._known: KnownAttention | None = None
        if len(names) > 1:  # else the attention runs once anyway
            known = KnownAttention(calls, index, self.projections["attention"], sample)
            self._known = known if known.proved else None

    def run_original(self) -> None:
        """The original model's states leaving the layer, and between its sublayers if a target.

        Where no MLP is solved, the attention restores what a gap after the layer would add.
        """
        batches, entering = self._batches, self._batches.state.entering(ORIGINAL)
        mlp, sample = self._sublayers.mlp, entering[0]
        self._between = batches.states(sample.shape[-1], sample.dtype, "between")
        for batch in batches:
            run = partial(batches.run, self._index, entering[batch])
            if mlp is None or "attention" not in self.projections:
                leaving = run()  # (B, S, D)
            else:
                between, leaving = after_attention(run, mlp)
                self._between[batch] = between if "mlp" in self.projections else between - leaving
            batches.keep(self._target, batch, leaving, self._index)

    def solve(self) -> tuple[list[Fit], dict[Parameter, Tensor]]:
        """Solves the projections, and runs the pruned model through the layer with them.

        Returns:
            How each was solved, and new values of parameters, which have their old ones again.
        """
        batches, module = self._batches, self._batches.calls.layer(self._index)
        fits: list[Fit] = []
        values: dict[Parameter, Tensor] = {}
        with ExitStack() as restored:
            for part, projection in self.projections.items():
                fits.append(self._solved(part, projection, restored))
                if fits[-1].changed:
                    values |= _values(self._layer, module, projection)
            for batch in batches:
                if "mlp" in self.projections:
                    leaving = self._added(batch, self.projections["mlp"])
                else:
                    leaving = batches.run(self._index, self._entering[batch])
                batches.keep(self._leaving, batch, leaving, self._index)
        return fits, values

    def _solved(self, part: str, projection: OutputProjection, restored: ExitStack) -> Fit:
        """Solves a projection, and leaves its new values in place until the end of a block."""
        settings, batches = self._settings, self._batches
        equations, tokens = (self._attention if part == "attention" else self._mlp)(projection)
        parameters = [p for module in projection.modules for p in module.parameters()]
        restored.callback(keep_values(parameters))

        def again(held_out: bool) -> Callable[[], Iterable[Tokens]]:
            chosen, device = batches.of(held_out=held_out), projection.device
            return lambda: (tokens(batch, self._inputs[batch].to(device)) for batch in chosen)

        solver = SublayerSolver(projection, settings, again(False), again(True))
        # tokens weigh 1 / ||T||^2: their mean square is relative to the stream's own
        noise = 16 * torch.finfo(self._entering[0].dtype).eps
        return solver.solve(equations, layer=self._layer, part=part, noise=noise)

    def _attention(self, projection: OutputProjection) -> tuple[NormalEquations, TokensOf]:
        """The equations of the attention's projection, and the tokens of a batch's inputs."""
        batches, kept = self._batches, set(self._batches.of(held_out=True))
        if projection.norm is not None or self._known is not None:
            kept = set(batches)  # all inputs are needed again

        def target(batch: int) -> Tensor:
            between = self._between[batch]  # (B, S, D)
            return between if "mlp" in self.projections else between + self._target[batch]

        mean_square = self._mean_square(target)

        def tokens(batch: int, inputs: Tensor) -> Tokens:
            return _tokens(inputs, self._entering[batch], target(batch), mean_square)

        def fitted() -> Iterator[Tokens]:
            for batch in batches:
                state = self._entering[batch].to(batches.device(self._index))
                inputs = batches.calls.until(self._index, state, projection.matrix)  # (B, S, F)
                self._keep("attention", batch, inputs, kept)
                if not batches.held_out[batch]:
                    yield tokens(batch, inputs)

        equations = equations_of(projection, fitted())
        self._context = self._inputs
        return equations, tokens

    def _mlp(self, projection: OutputProjection) -> tuple[NormalEquations, TokensOf]:
        """The same of the MLP's; of a streamed layer the output projections alone stay loaded.

        From here on the states leaving the layer are those before the MLP's output is added.
        """
        batches, module = self._batches, self._batches.calls.layer(self._index)
        last = [m for projection in self.projections.values() for m in projection.modules]
        if self._known is not None:  # nothing else of the attention is needed any more
            others = [child for child in module.children() if child is not self._known.attention]
            batches.calls.keep_only(self._index, [*last, *others])
        mean_square = self._mean_square(self._target.__getitem__)

        def tokens(batch: int, inputs: Tensor) -> Tokens:
            return _tokens(inputs, self._leaving[batch], self._target[batch], mean_square)

        def fitted() -> Iterator[Tokens]:
            for batch in batches:
                with seen_at(projection.matrix) as seen, self._attended(batch):
                    state = batches.run(self._index, self._entering[batch])  # (B, S, D)
                inputs, outputs = seen[-1]
                outputs = outputs.reshape(-1, outputs.shape[-1]).float()  # (N, D)
                added = projection.factor * projection.normed(outputs)
                self._leaving[batch] = state - added.view_as(state)
                self._keep("mlp", batch, inputs, set(batches))
                if not batches.held_out[batch]:
                    yield replace(tokens(batch, inputs), outputs=outputs)

        equations = equations_of(projection, fitted())
        batches.calls.keep_only(self._index, last)
        return equations, tokens

    def _mean_square(self, target: Callable[[int], Tensor]) -> float | None:
        """The mean of ||target||^2 that equal weights are relative to; None where they differ."""
        if self._settings.weights == "inverse":
            return None
        fitted = self._batches.of(held_out=False)
        squares = [target(batch).float().pow(2).sum(-1).flatten() for batch in fitted]  # (N,) each
        return float(torch.cat(squares).mean())

    def _attended(self, batch: int) -> AbstractContextManager[None]:
        """The attention's projection reads inputs that are known, where that is proved."""
        if self._known is None:
            return nullcontext()
        return self._known.reads(self._context[batch].to(self._batches.device(self._index)))

    def _keep(self, part: str, batch: int, inputs: Tensor, kept: set[int]) -> None:
        """Keeps the inputs of a projection, of some batches."""
        inputs = inputs.reshape(*self._batches.shapes[batch], -1)  # (B, S, F)
        if batch == 0:
            width, dtype = inputs.shape[-1], inputs.dtype
            self._inputs = self._batches.states(width, dtype, f"inputs of {part}")
        if batch in kept:
            self._inputs[batch] = inputs

    def _added(self, batch: int, projection: OutputProjection) -> Tensor:
        """The stream leaving the layer (B, S, D): the MLP's output added to what is before it."""
        before, inputs = self._leaving[batch], self._inputs[batch]
        inputs = inputs.to(projection.device).flatten(0, 1).float()  # (N, F)
        added = projection.factor * projection.normed(projection.outputs(inputs)).cpu()  # (N, D)
        return (before + added.view_as(before)).to(before.dtype)


class KnownAttention:
    """Runs a layer whose attention gives what its projection makes of inputs that are known.

    Once the attention's projection is solved, the rest of the attention need not run again.

    Args:
        calls: of the decoder.
        index: of the layer.
        projection: of its attention.
        state: (B, S, D), such as enters the layer.

    Attributes:
        attention: the module, of which the output projection alone is used so.
        proved: whether the layer gives the same bits so, on ``state``; else it has to run whole.
    """

    def __init__(
        self, calls: LayerCalls, index: int, projection: OutputProjection, state: Tensor
    ) -> None:
        self._matrix = projection.matrix
        self.attention = module = part_of(calls.layer(index), calls.family.attention)
        self.proved = False
        if module is None:
            return
        outputs: list[Output] = []
        handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            expected = calls.run(index, state)
        finally:
            handle.remove()
        # how many things, such as attention weights, it gives beside its output
        self._others = None if isinstance(outputs[0], Tensor) else len(outputs[0]) - 1
        with self.reads(calls.until(index, state, projection.matrix).view(*state.shape[:2], -1)):
            self.proved = torch.equal(calls.run(index, state), expected)

    @contextmanager
    def reads(self, inputs: Tensor) -> Iterator[None]:
        """The layer's attention gives what its projection makes of (B, S, F), inside the block."""

        def forward(*_: object, **__: object) -> object:
            out = first(self._matrix(inputs))  # (B, S, D)
            return out if self._others is None else (out, *[None] * self._others)

        assert self.attention is not None
        with patched_forward(self.attention, forward):
            yield


@contextmanager
def seen_at(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Copies of a module's inputs and outputs inside the block."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].clone(), output.clone()))

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _tokens(inputs: Tensor, residual: Tensor, target: Tensor, mean_square: float | None) -> Tokens:
    """Those of a batch, from states (B, S, ...), where the inputs are."""
    h, t = (state.to(inputs.device).flatten(0, 1).float() for state in (residual, target))
    return Tokens(inputs.reshape(len(h), -1).float(), h, t, mean_square=mean_square)


def _values(
    layer: int, module: nn.Module, projection: OutputProjection
) -> Mapping[Parameter, Tensor]:
    """Copies of the projection's parameters, by the layer's number and their names in it."""
    named = dict(module.named_parameters())
    return {
        key: named[key[1]].detach().to("cpu", copy=True)
        for key in parameters_of(layer, module, projection.modules)
    }
