"""One pass of the whole model and of what is left of it, layer by layer, which solves matrices.

Places are those of the layers in the decoder. Shapes: B windows, S tokens, N = B S, D width of the
stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from short_gpt.healing.moments import Moments, best_change
from short_gpt.models.decoder import Decoder
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.layer_hooks import transposed
from short_gpt.models.summands import Summand, Summands, behind_attention
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.surgery.changes import parameters_of, restored_on_error

RIDGES = (1e-2, 1e-1, 1.0)
Value = tuple[int, str]  # place of a layer, and a parameter's name in it


@dataclass(frozen=True)
class Fit:
    """How one matrix was solved.

    Attributes:
        layer: its layer.
        part: "attention" or "mlp".
        ridge: the candidate that restores most on the windows kept apart; None where each of them
            does harm there, or nothing is missing, and the matrix stays as it is.
        restored: the share of what was missing at its target, in weighted squares over the tokens
            that it was fitted on, that the change gives back: 1 is all, 0 is nothing.
        restored_held: the same on the windows kept apart.
    """

    layer: int
    part: str
    ridge: float | None
    restored: float
    restored_held: float

    def numbered(self, numbers: Sequence[int]) -> Fit:
        """The same with the original number of the layer, of which there is the place."""
        return replace(self, layer=numbers[self.layer])


class _Batch:
    """Windows of one length on their way through both models, states on the CPU.

    Attributes:
        whole: the whole model's state, (B, S, D).
        left: the state of what is left.
        between: the whole model's, between the halves of the layer at hand.
        held: whether they choose ridges instead of being fitted on.
    """

    def __init__(self, state: Tensor, *, held: bool) -> None:
        self.whole = self.left = state.cpu()
        self.between: Tensor | None = None
        self.held = held


class RefitPass:
    """Solves the last matrices of the layers that stay, each on what those in front have become.

    Args:
        decoder: with all its layers, which have their own weights again afterwards.
        gone: places of the layers that go.
        parts: halves whose last matrix is solved, "attention" or "mlp".
        ridges: candidates for every matrix.
        step: called with 1 behind every layer that stays.

    Attributes:
        refusal: why the last layer met, of which nothing can be solved, cannot; empty if none was.
    """

    def __init__(
        self,
        decoder: Decoder,
        gone: Sequence[int],
        *,
        parts: Sequence[str],
        ridges: Sequence[float],
        step: Callable[[int], object] = id,
    ) -> None:
        self._decoder, self._parts, self._ridges, self._step = decoder, parts, ridges, step
        self._calls = LayerCalls(decoder)
        count = len(decoder.layers)
        self._kept = [place for place in range(count) if place not in gone]
        # the first layer whose target is not what it gives anyway
        self._start = max(min(gone) - 1, 0)
        self.refusal = ""

    @torch.no_grad()
    def run(
        self,
        windows: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        *,
        batch_size: int = 1,
    ) -> tuple[list[Fit], dict[Value, Tensor]]:
        """Reads windows of token ids; returns how every matrix was solved, and the new values.

        Args:
            windows: to fit on.
            held: to choose ridges by.
            batch_size: windows of one length read at once.

        Raises:
            NotFiniteError: a state is NaN or infinite.
        """
        batches = [
            _Batch(self._calls.embed(tokens.to(self._decoder.device)), held=apart)
            for part, apart in ((windows, False), (held, True))
            for tokens in of_one_length(part, batch_size)
        ]
        fits: list[Fit] = []
        values: dict[Value, Tensor] = {}
        self._move_whole(batches, range(self._kept[0]))  # layers gone at the very beginning
        ends = [*self._kept[1:], len(self._decoder.layers)]
        for place, after in zip(self._kept, ends, strict=True):
            if place < self._start:
                self._move_whole(batches, [place])
                for batch in batches:
                    batch.left = batch.whole
            else:
                self._layer(batches, place, after, fits, values)
            self._step(1)
        return fits, values

    def _move_whole(self, batches: list[_Batch], places: Sequence[int]) -> None:
        for place in places:
            for batch in batches:
                batch.whole = self._run(place, batch.whole).cpu()
            check_finite([batch.whole for batch in batches], place)

    def _run(self, place: int, state: Tensor) -> Tensor:
        return self._calls.run(place, state.to(self._device(place)))

    def _device(self, place: int) -> torch.device:
        return next(self._calls.layer(place).parameters()).device

    def _layer(
        self,
        batches: list[_Batch],
        place: int,
        after: int,
        fits: list[Fit],
        values: dict[Value, Tensor],
    ) -> None:
        """Takes both models from a layer that stays to the next one, and solves its matrices."""
        layer, state = self._calls.layer(place), batches[0].left.to(self._device(place))
        halves = Summands.of(self._calls, place, state[:1, :32], self._decoder.family)
        ends = {part: halves.ends[part] for part in self._parts if part in halves.ends}
        for batch in batches:
            batch.between, batch.whole = self._halves(place, batch.whole, halves.mlp)
        behind = [batch.whole for batch in batches]
        check_finite(behind, place)
        self._move_whole(batches, range(place + 1, after))
        if "mlp" not in ends:  # what the gap added is then the attention's to restore
            for batch, before in zip(batches, behind, strict=True):
                if batch.between is not None:
                    batch.between = batch.between + (batch.whole - before)
        if not ends:
            self.refusal = "; ".join(dict.fromkeys(halves.refused.values()))
        modules = [end.module for end in ends.values()]
        with restored_on_error(p for m in modules for p in m.parameters()) as restore:
            for part, end in ends.items():
                found = self._solved(batches, place, part, end)
                fits.append(found)
                if found.ridge is not None:
                    values |= {
                        (place, name): dict(layer.named_parameters())[name]
                        .detach()
                        .to("cpu", copy=True)
                        for _, name in parameters_of(place, layer, [end.module])
                    }
            for batch in batches:
                batch.left = self._run(place, batch.left).cpu()
            restore()

    def _halves(
        self, place: int, state: Tensor, mlp: Summand | None
    ) -> tuple[Tensor | None, Tensor]:
        """The whole model's state between a layer's halves, if it can be told, and behind it."""
        if mlp is None:
            return None, self._run(place, state).cpu()
        between, behind = behind_attention(lambda: self._run(place, state), mlp)
        return between.cpu(), behind.cpu()

    def _solved(self, batches: list[_Batch], place: int, part: str, end: Summand) -> Fit:
        """Solves a matrix and puts its new value in place."""
        fitted, held = Moments(exact=False), Moments(exact=False)
        for batch in batches:
            read = self._attention if part == "attention" else self._mlp
            (held if batch.held else fitted).add(*read(batch, place, end))
        ridge, change = best_change(fitted, held, self._ridges, batches[0].left.dtype)
        add_change(end.module, change)
        apart = 0.0 if ridge is None else held.restored(change)
        return Fit(place, part, ridge, fitted.restored(change), apart)

    def _attention(self, batch: _Batch, place: int, end: Summand) -> tuple[Tensor, ...]:
        """What the attention's matrix is given, what lacks behind it, and the tokens' weights."""
        state = batch.left.to(self._device(place))
        inputs = self._calls.until(place, state, end.module)
        given = state + end.factor * end.module(inputs).view_as(state)
        assert batch.between is not None
        return lack_of(end, inputs, given, batch.between)

    def _mlp(self, batch: _Batch, place: int, end: Summand) -> tuple[Tensor, ...]:
        """What the MLP's matrix is given, what lacks behind it, and the tokens' weights."""
        with inputs_of(end.module) as inputs:
            given = self._run(place, batch.left)
        return lack_of(end, inputs[-1], given, batch.whole)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given inside the block, copies."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].clone())

    handle = module.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def lack_of(end: Summand, inputs: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """X, R and w of a batch's tokens, as `Moments.add` takes them.

    Args:
        end: the matrix.
        inputs: what it is given, (B, S, F) or (N, F).
        given: the stream behind it, (B, S, D).
        target: what that is to be.
    """
    aim = target.to(given.device).flatten(0, 1).float()  # (N, D)
    rest = (aim - given.flatten(0, 1).float()) / end.factor
    inputs = inputs.reshape(len(aim), -1).float()
    if isinstance(getattr(end.module, "bias", None), Tensor):
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (N, F + 1)
    square = aim.pow(2).sum(1)  # (N,)
    return inputs, rest, 1 / square.clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def add_change(module: nn.Module, change: Tensor) -> None:
    """Adds a change (F, D), with a last row for the bias if there is one, to a linear module."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_((bias.detach().cpu().double() + change[-1]).to(bias.dtype))
        change = change[:-1]
    new = weight.detach().cpu().double() + (change if transposed(module) else change.T)
    weight.copy_(new.to(weight.dtype))


def of_one_length(windows: Sequence[Sequence[int]], size: int) -> Iterator[Tensor]:
    """Windows of one length together, (B, S) each, in the order of their first ones."""
    lengths: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    for group in lengths.values():
        for start in range(0, len(group), size):
            yield torch.tensor([list(window) for window in group[start : start + size]])


def check_finite(states: Sequence[Tensor], place: int) -> None:
    if not all(state.isfinite().all() for state in states):
        raise NotFiniteError(
            f"the state behind the {place + 1}. layer is NaN or infinite; check the weights, or "
            "try another dtype"
        )
