"""One layer of a refit: targets from the original model, projections solved in the pruned one.

Shapes: B windows, S tokens, N = B S, D width of the residual stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from short_gpt.checkpoints.gguf import round_layer
from short_gpt.healing.refit_state import ORIGINAL, PRUNED, HiddenStates, RefitState
from short_gpt.healing.settings import PARTS, RefitSettings
from short_gpt.healing.solver import Fit, SublayerSolver, Tokens, equations_of, sink_weights
from short_gpt.models.decoder import Parameter, keep_values, parameters_of
from short_gpt.models.families import part as part_of
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.sublayers import OutputProjection, Sublayers, after_attention
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.replicas import Replicas

# of a batch: inputs of a projection, and its outputs where they are known
TokensOf = Callable[[int, Tensor, Tensor | None], Tokens]


class Batches:
    """Batches of windows, token ids (B, S) each, that pass the layers of both models together."""

    def __init__(
        self,
        calls: LayerCalls,
        state: RefitState,
        fitted: Sequence[Tensor],
        held_out: Sequence[Tensor],
        team: Replicas,  # each replica has batches of its own, to fit on at least one
        room: int,  # bytes of memory for the states of one layer; more go into a file
        passed: Callable[[int], object],  # called with B after every layer of either model
    ) -> None:
        self.calls, self.state, self.team = calls, state, team
        self._room, self._passed = room, passed
        self.tokens = [*fitted, *held_out]  # (B, S) each
        self.shapes = [(tokens.shape[0], tokens.shape[1]) for tokens in self.tokens]
        self.most = max(tokens.numel() for tokens in self.tokens)
        self.fitted = range(len(fitted))
        self.held_out = range(len(fitted), len(self.tokens))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.shapes)))

    def embed(self, *, removed: range) -> None:
        """The states entering the first kept layer, the original's through removed ones before."""
        sample = self.calls.embed(self.tokens[0][:1, :1])  # (1, 1, D)
        self.state.open(self.shapes, sample.shape[-1], sample.dtype)
        if self.state.done:
            return
        original, pruned = self.state.entering(ORIGINAL), self.state.entering(PRUNED)
        for batch, tokens in enumerate(self.tokens):
            embedded = self.calls.embed(tokens)  # (B, S, D)
            original[batch] = embedded
            pruned[batch] = embedded  # of the model whose very first layers are removed
        for index in removed:
            self.run_all(index, original, original)

    def run(self, index: int, state: Tensor) -> Tensor:
        """The state (B, S, D) leaving a layer, where its weights are."""
        return self.calls.run(index, state.to(self.device(index)))  # (B, S, D)

    def run_all(self, index: int, source: HiddenStates, target: HiddenStates) -> None:
        with self.calls.loaded(index):
            for batch in self:
                self.keep(target, batch, self.run(index, source[batch]), index)

    def device(self, index: int) -> torch.device:
        parameters = self.calls.layer(index).parameters()
        device = next((p.device for p in parameters if not p.is_meta), None)
        if device is None:
            raise ShortGPTError("the weights are offloaded: open the model without a device_map")
        return device

    def keep(self, states: HiddenStates, batch: int, state: Tensor, index: int) -> None:
        """Keeps the state leaving a layer; NotFiniteError where it is NaN or infinite."""
        if not state.isfinite().all():
            raise NotFiniteError(
                f"the output of layer {index} (counted from 0) is NaN or infinite; check the "
                "weights, or try another dtype"
            )
        states[batch] = state
        self._passed(self.shapes[batch][0])

    def states(self, width: int, dtype: torch.dtype, name: str) -> HiddenStates:
        """States that one layer alone needs: in memory if they fit."""
        size = sum(B * S for B, S in self.shapes) * width * dtype.itemsize
        folder = self.state.states if size > self._room // 3 else None  # there are three at most
        return HiddenStates(self.shapes, width, dtype, folder and folder / name)


class LayerRefit:
    """Solves the output projections of a kept layer, while its weights are in memory.

    ``index`` is its position in the decoder, ``layer`` its original number.
    """

    def __init__(
        self,
        batches: Batches,
        index: int,
        layer: int,
        settings: RefitSettings,
        types: Mapping[str, int],  # ggml's, of the matrices that are rounded
    ) -> None:
        self._batches, self._index, self._layer = batches, index, layer
        self._settings, self._types = settings, types
        state, calls = batches.state, batches.calls
        self._entering, self._leaving = state.entering(PRUNED), state.leaving(PRUNED)
        self._target = state.leaving(ORIGINAL)  # after `run_original` and the removed layers
        # (1, 32, D), one for all, who must find the same sublayers; a view would send the whole
        sample = batches.team.gather(self._entering[0][:1, :32].clone())[0]
        sample = sample.to(batches.device(index))
        self._sublayers = Sublayers.of(calls, index, sample, calls.family)
        # attention first, whatever the order of names: the MLP restores what it leaves
        solvable = self._sublayers.projections
        chosen = [part for part in PARTS if part in settings.parts]
        names = [part for part in chosen if part in solvable]
        if settings.where == "gaps" and names:
            # the last alone: their inputs are the original model's, the attention misses nothing
            names, chosen = names[-1:], chosen[chosen.index(names[-1]) :]
        if part_of(calls.layer(index), calls.family.attention) is None:  # such as Mamba's layers
            chosen = [part for part in chosen if part != "attention" or part in solvable]
        reasons = self._sublayers.refused
        self.unsolved = [Fit(layer, p, why=reasons[p]) for p in chosen if p not in solvable]
        self.projections = {name: solvable[name] for name in names}  # what is solved
        self._output_modules = [m for name in names for m in solvable[name].modules]
        self.restored = ExitStack()  # after this block the parameters have their old values again
        self._between = HiddenStates([], 0, sample.dtype)
        self._inputs: dict[str, HiddenStates] = {}  # of a projection, by sublayer

    def run_original(self) -> None:
        """The original model's states leaving the layer, and between its sublayers if a target."""
        batches, entering = self._batches, self._batches.state.entering(ORIGINAL)
        mlp, sample = self._sublayers.mlp, entering[0]
        self._between = batches.states(sample.shape[-1], sample.dtype, "between")
        for batch in batches:
            run = partial(batches.run, self._index, entering[batch])
            if mlp is None or "attention" not in self.projections:
                leaving = run()  # (B, S, D)
            else:
                between, leaving = after_attention(run, mlp)  # (B, S, D) each
                # with no MLP to solve, the attention restores what a gap after the layer would add
                self._between[batch] = between if "mlp" in self.projections else between - leaving
            batches.keep(self._target, batch, leaving, self._index)

    def solve(self) -> tuple[list[Fit], dict[Parameter, Tensor]]:
        """Solves the projections in turn, leaves new values in place and returns copies of them."""
        module = self._batches.calls.layer(self._index)
        self.restored.callback(round_layer(module, self._types))
        fits: list[Fit] = []
        values: dict[Parameter, Tensor] = {}
        for part, projection in self.projections.items():
            fits.append(self._solve_part(part, projection))
            if fits[-1].changed:
                # one at a time: what is solved next frees the layer's other weights
                for key in parameters_of(self._layer, module, projection.modules):
                    values[key] = module.get_parameter(key[1]).detach().to("cpu", copy=True)
                    own = {key[1]: self._types[key[1]]} if key[1] in self._types else {}
                    round_layer(module, own)  # what follows answers this, too
        return fits, values

    def run_pruned(self) -> None:
        """The pruned model's states leaving the layer, with its weights as they are."""
        for batch in self._batches:
            if "mlp" in self.projections:  # the states before it are kept
                leaving = self._with_mlp(batch, self.projections["mlp"])  # (B, S, D)
            else:
                leaving = self._batches.run(self._index, self._entering[batch])
            self._batches.keep(self._leaving, batch, leaving, self._index)

    def _solve_part(self, part: str, projection: OutputProjection) -> Fit:
        batches, lost = self._batches, self._settings.lost
        factors: dict[int, Tensor] = {}  # of the weights, (N,), by batch

        def tokens(batch: int, inputs: Tensor, outputs: Tensor | None) -> Tokens:
            residual = self._leaving[batch] if part == "mlp" else self._entering[batch]
            h, t = (
                state.to(inputs.device).flatten(0, 1).float()  # (N, D)
                for state in (residual, self._target_of(part, batch))
            )
            every = Tokens.of(inputs.reshape(len(h), -1).float(), h, t)
            # a norm's weight is of all tokens alike: one must not decide it
            if lost is None or projection.norm is not None:
                return every._replace(outputs=outputs)
            if batch not in factors:  # before anything is solved
                outputs = projection.outputs(every.inputs) if outputs is None else outputs  # (N, D)
                present = h + projection.factor * outputs  # (N, D)
                factors[batch] = sink_weights(present, t, lost)
            return every._replace(outputs=outputs, weights=every.weights * factors[batch])

        first_read = self._read_mlp if part == "mlp" else self._read_attention
        read = first_read(projection, tokens)
        equations = equations_of(projection, read, batches.team, batches.most)
        if part == "mlp":  # only the output projections of a streamed layer stay loaded
            batches.calls.keep_only(self._index, self._output_modules)
        parameters = [p for module in projection.modules for p in module.parameters()]
        self.restored.callback(keep_values(parameters))

        def read_again(chosen: Iterable[int]) -> Callable[[], Iterator[Tokens]]:
            inputs, device = self._inputs[part], projection.device
            return lambda: (tokens(batch, inputs[batch].to(device), None) for batch in chosen)

        reads = (read_again(batches.fitted), read_again(batches.held_out))
        how: Any = {"ridges": self._settings.ridges, "step_size": self._settings.step_size}
        solver = SublayerSolver(projection, *reads, team=batches.team, **how)
        # tokens weigh 1 / ||T||^2, or more: what rounding misses of them is relative to that, one
        # unit of a half-precision dtype, or several of float32, in which the sums are taken
        unit = torch.finfo(self._entering[0].dtype).eps
        noise = max(unit, 16 * torch.finfo(torch.float32).eps)
        return solver.solve(equations, layer=self._layer, part=part, noise=noise)

    def _read_attention(self, projection: OutputProjection, tokens: TokensOf) -> Iterator[Tokens]:
        """The tokens to fit the attention's projection on; keeps inputs that are needed again."""
        batches = self._batches
        for batch in batches:
            state = self._entering[batch].to(batches.device(self._index))  # (B, S, D)
            inputs = batches.calls.until(self._index, state, projection.matrix)  # (B, S, F)
            again = projection.norm is not None or batch in batches.held_out
            self._keep("attention", batch, inputs, again)
            if batch in batches.fitted:
                yield tokens(batch, inputs, None)

    def _read_mlp(self, projection: OutputProjection, tokens: TokensOf) -> Iterator[Tokens]:
        """The same for the MLP's; from here on ``_leaving`` is the state before its output."""
        batches = self._batches
        for batch in batches:
            with seen_at(projection.matrix) as seen:
                state = batches.run(self._index, self._entering[batch])  # (B, S, D)
            inputs, outputs = seen[-1]
            outputs = outputs.reshape(-1, outputs.shape[-1]).float()  # (N, D)
            added = projection.factor * projection.normed(outputs)  # (N, D)
            self._leaving[batch] = state - added.view_as(state)
            self._keep("mlp", batch, inputs, True)
            if batch in batches.fitted:
                yield tokens(batch, inputs, outputs)

    def _target_of(self, part: str, batch: int) -> Tensor:
        """The state (B, S, D) that should leave a sublayer."""
        if part == "mlp":
            return self._target[batch]
        between = self._between[batch]
        return between if "mlp" in self.projections else between + self._target[batch]

    def _keep(self, part: str, batch: int, inputs: Tensor, again: bool) -> None:
        """Keeps the inputs of a projection, where they are read again."""
        inputs = inputs.reshape(*self._batches.shapes[batch], -1)  # (B, S, F)
        if batch == 0:
            width, dtype = inputs.shape[-1], inputs.dtype
            self._inputs[part] = self._batches.states(width, dtype, f"inputs of {part}")
        if again:
            self._inputs[part][batch] = inputs

    def _with_mlp(self, batch: int, projection: OutputProjection) -> Tensor:
        """The state leaving the layer (B, S, D): the MLP's output added to the state before it."""
        before, inputs = self._leaving[batch], self._inputs["mlp"][batch]  # (B, S, D), (B, S, F)
        inputs = inputs.to(projection.device).flatten(0, 1).float()  # (N, F)
        added = projection.factor * projection.normed(projection.outputs(inputs)).cpu()  # (N, D)
        return (before + added.view_as(before)).to(before.dtype)  # (B, S, D)


@contextmanager
def seen_at(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Copies of a module's inputs and outputs inside the block."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0].clone(), output.clone()))  # (..., F), (..., D)

    with module.register_forward_hook(note):
        yield seen
