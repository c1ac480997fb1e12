"""The end of one half of a layer, solved: its last matrix, and a norm behind that.

A half adds a(W x) to the stream h, with a factor where the family has one. Mostly a is nothing, and
the change of W is least squares. Behind some matrices (Gemma 2 and 3, OLMo 2) stands a norm,
a(y) = y / rms(y) * e, in which only the weight e is linear: each of its D entries has a normal
equation of its own. The matrix is solved with rms(y) held where it is, which gives least squares
again, with inputs x / rms(y) and a change times e. That is no more than a step: what counts is the
error of the half as it really is on windows kept apart, and a step that does not lower it is not
taken.

Shapes: N tokens of a batch, F inputs of a matrix, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from short_gpt.healing.normal_equations import NormalEquations
from short_gpt.models.layer_hooks import transposed
from short_gpt.models.summands import Summand, effective_weight
from short_gpt.models.weight_changes import keep_values, restored_on_error

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Tokens:
    """What the end of a half has to know of some tokens, float32.

    Attributes:
        inputs: of the matrix, (N, F).
        stream: the stream that the half adds to, (N, D).
        target: what the sum is to be, (N, D).
        given: what the matrix makes of the inputs, (N, D), where that is known.
        square: None lets a token weigh by its own target; else all weigh alike, by this mean of
            ||target||^2.
    """

    inputs: Tensor
    stream: Tensor
    target: Tensor
    given: Tensor | None = None
    square: float | None = None

    @property
    def weights(self) -> Tensor:
        """1 / ||target||^2, (N,): the norms behind make a token's scale irrelevant."""
        squares = self.target.pow(2).sum(1)
        if self.square is not None:
            squares = torch.full_like(squares, self.square)
        return 1 / squares.clamp_min(TINY)


@dataclass(frozen=True)
class Solved:
    """What became of a half; attributes as those of `Fit`."""

    ridge: float | None = None
    norm_ridge: float | None = None
    restored: float = 0.0
    restored_held: float = 0.0


def equations_of(end: Summand, batches: Iterable[Tokens]) -> NormalEquations:
    """The normal equations of the end's matrix, at a norm's present root mean square."""
    sums = NormalEquations()
    for tokens in batches:
        sums.add(*_linear(end, tokens))
    return sums


def _linear(end: Summand, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """X, R and w of a batch, as `NormalEquations.add` takes them."""
    inputs = tokens.inputs
    given = end.given(inputs) if tokens.given is None else tokens.given
    rest = (tokens.target - tokens.stream) / end.factor - end.normed(given)
    if isinstance(getattr(end.matrix, "bias", None), Tensor):
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (N, F + 1)
    if end.norm is not None:
        inputs = inputs / _rms(given)
    return inputs, rest, tokens.weights


def error(end: Summand, batches: Iterable[Tokens]) -> float:
    """What the half as it is misses its targets by, in weighted squares."""
    total = 0.0
    for tokens in batches:
        rest = tokens.target - tokens.stream - end.factor * end.normed(end.given(tokens.inputs))
        total += float((rest.pow(2).sum(1) * tokens.weights).sum())
    return total


class HalfSolver:
    """Solves the end of a half, and leaves what is best in place.

    Args:
        end: what the half adds.
        ridges: candidates, for the matrix and for a norm's weight.
        fitted, held: give the tokens to fit on, and to choose by, again and again.
        aim: a factor of every change.
    """

    def __init__(
        self,
        end: Summand,
        ridges: Sequence[float],
        fitted: Callable[[], Iterable[Tokens]],
        held: Callable[[], Iterable[Tokens]],
        *,
        aim: float = 1.0,
    ) -> None:
        self._end, self._ridges, self._fitted, self._held = end, ridges, fitted, held
        self._aim = aim
        self._lacking = error(end, held())
        self._left = self._lacking  # of it, after what has been taken

    def solve(self, sums: NormalEquations, *, noise: float) -> Solved:
        """Takes what lowers the error on the tokens held apart.

        Args:
            sums: of the tokens to fit on, the end being as it is.
            noise: relative to its target, what a token lacks by rounding alone.
        """
        if sums.square <= noise**2 * sums.tokens or not self._lacking:
            return Solved()
        if self._end.norm is None:
            ridge, share = self._matrix(sums)
            return Solved(ridge, None, share, self._restored())
        before = error(self._end, self._fitted())
        ridge, _ = self._matrix(sums)
        norm_ridge = self._norm()
        again, _ = self._matrix(equations_of(self._end, self._fitted()))
        share = 1 - error(self._end, self._fitted()) / before
        return Solved(ridge if again is None else again, norm_ridge, share, self._restored())

    def _restored(self) -> float:
        return 1 - self._left / self._lacking

    def _matrix(self, sums: NormalEquations) -> tuple[float | None, float]:
        """Changes the matrix by the best of all ridges; returns that, and the share it restores."""
        matrix = self._end.matrix
        weight, bias = matrix.weight, getattr(matrix, "bias", None)
        assert isinstance(weight, Tensor)
        scale = None if self._end.norm is None else _inverse(effective_weight(self._end.norm))

        def put(columns: slice, change: Tensor) -> None:
            change = change.to(weight.device, torch.float32)
            change = change if scale is None else change * scale[columns]
            if isinstance(bias, Tensor):
                _add(bias[columns], change[-1])
                change = change[:-1]
            _add(weight[:, columns] if transposed(matrix) else weight[columns].T, change)

        if not sums.solvable:
            return None, 0.0
        parameters = [weight, bias] if isinstance(bias, Tensor) else [weight]
        return self._taken(parameters, lambda ridge: sums.solve(ridge, put, aim=self._aim))

    def _norm(self) -> float | None:
        """Changes the norm's weight by the best of all ridges; returns that."""
        assert self._end.norm is not None
        weight = self._end.norm.weight
        assert isinstance(weight, Tensor)
        squares, crosses = torch.zeros(2, len(weight), dtype=torch.float64)
        for tokens in self._fitted():
            given = self._end.given(tokens.inputs)
            rest = (tokens.target - tokens.stream) / self._end.factor - self._end.normed(given)
            unit, w = given / _rms(given), tokens.weights[:, None]
            squares += (w * unit * unit).sum(0).cpu()
            crosses += (w * unit * rest).sum(0).cpu()

        def add(ridge: float) -> float:
            change = self._aim * crosses / (squares + ridge * squares.mean())
            _add(weight, change.to(weight.device, torch.float32))
            return 0.0

        return self._taken([weight], add)[0]

    @torch.no_grad()
    def _taken(
        self, parameters: Sequence[Tensor], add: Callable[[float], float]
    ) -> tuple[float | None, float]:
        """Changes parameters by the ridge of least error; by none where each leaves more.

        Args:
            parameters: that are changed.
            add: adds the change of a ridge to them, and returns the share that it restores.

        Returns:
            The ridge, and its share.
        """
        best: tuple[float | None, float] = None, 0.0
        with restored_on_error(parameters) as restore:
            taken = restore
            for ridge in self._ridges:
                restored = add(ridge)
                left = error(self._end, self._held())
                if left < self._left:
                    self._left, best = left, (ridge, restored)
                    taken = restore  # the former best's copy goes before there is another
                    taken = keep_values(parameters)
                restore()
            taken()
        return best


def _add(part: Tensor, change: Tensor) -> None:
    """Adds to a part of a parameter, in float32."""
    part.copy_(part.float() + change)


def _rms(given: Tensor) -> Tensor:
    """The root mean square of every token, (N, 1)."""
    return given.pow(2).mean(1, keepdim=True).sqrt().clamp_min(TINY)


def _inverse(weight: Tensor) -> Tensor:
    """1 / weight, and 0 where a norm lets nothing through."""
    return torch.where(weight.abs() > 1e-6 * weight.abs().max(), 1 / weight, 0.0)
