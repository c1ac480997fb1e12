"""One output projection solved by least squares, and the weight of a norm after it.

A sublayer (attention or MLP) adds a(W x) to the residual stream, in some families times a factor.
Mostly a is the identity, and the change of W is least squares. In Gemma 2 and 3 and OLMo 2 a norm
follows the matrix, a(y) = y / rms(y) * e, in which only the weight e is linear: each of its D
entries has its own normal equation. The matrix is solved with rms(y) fixed, which is least
squares again, with inputs x / rms(y) and a change times e. What counts is the error of the real
sublayer on held-out windows: a step that does not lower it is not taken.

Shapes: N tokens of a batch, F inputs of a matrix, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama.parallel import has_float64
from short_gpt.healing.settings import RIDGES
from short_gpt.models.decoder import keep_values, restored_on_error
from short_gpt.models.layer_calls import transposed
from short_gpt.models.sublayers import OutputProjection, effective_weight
from short_gpt.runtime.memory import CPU, UNUSED, free_memory
from short_gpt.runtime.replicas import Replicas

TINY = torch.finfo(torch.float32).tiny
LONGEST = 1000.0  # times as long as the state: a target beyond that weighs no more
ROWS = 256  # of X^T W X that are added together
COLUMNS = 256  # of C that are solved together
ALONE = Replicas()


@dataclass(frozen=True)
class Fit:
    """How one output projection was solved, or why it cannot be."""

    layer: int  # original number
    part: str  # "attention" or "mlp"
    ridge: float | None = None  # the best on held-out windows; None: the matrix stays
    restored: float = 0.0  # share of the weighted square error removed, on the tokens to fit on
    restored_held: float = 0.0  # the same on held-out windows
    norm_ridge: float | None = None  # of the weight of a norm after the matrix; None: it stays
    why: str | None = None  # it cannot be solved; None where it was

    @property
    def changed(self) -> bool:
        return self.ridge is not None or self.norm_ridge is not None


class Tokens(NamedTuple):
    """What solving an output projection needs of some tokens, float32."""

    inputs: Tensor  # of the matrix, (N, F)
    target: Tensor  # what the sublayer should add to the stream, (N, D)
    weights: Tensor  # in the sum of squares, (N,)
    outputs: Tensor | None = None  # of the matrix on these inputs, (N, D), where they are known

    @classmethod
    def of(cls, inputs: Tensor, residual: Tensor, target: Tensor) -> Tokens:
        """Tokens at which the stream ``residual``, (N, D), is to become ``target``, (N, D).

        They weigh 1 / ||target||^2, because the norms that follow make a token's scale irrelevant.
        """
        return cls(inputs, target - residual, 1 / target.pow(2).sum(1).clamp_min(TINY))


def sink_weights(present: Tensor, target: Tensor, beyond: float) -> Tensor:
    """A factor of the weights of tokens, (N,), by their present and target states, (N, D).

    It is (||target|| / (beyond ||present||))^2, and at least 1: where the target is much longer,
    errors are relative to the present state. Such tokens are attention sinks: some layer
    gives the first token of a window a state a hundred times as long as others, on which later
    attention rests. Without that layer, one token in hundreds would hardly weigh in the sum.
    """
    ratio = target.norm(dim=1) / present.norm(dim=1).clamp_min(TINY)  # (N,)
    return (ratio.clamp_max(LONGEST) / beyond).clamp_min(1.0).square()


class NormalEquations:
    """Sums over tokens, in float64, from which a change C of a matrix is solved.

    C minimises sum over tokens w ||x C - r||^2 + ridge (tr(X^T W X) / F) ||C||^2.

    They stay on the device of the tokens if that has float64 and room for them beside batches of
    ``most`` tokens; else each product crosses to the CPU. So it is with the factor, for which the
    sums cross once. In an 8B's MLP (F = 14,336, D = 4,096) the sums take 2.1 GB and the factor
    1.6 GB, which a GPU of 24 GB has beside 16.1 GB of weights; products are 0.65 GB a batch.
    """

    def __init__(self, most: int = 0) -> None:
        self.most = most
        # X^T W X is symmetric and its Cholesky factor a triangle, and so on the CPU one matrix
        # holds both: the sums above the diagonal, the factor below it, one ridge after the other
        self._gram = torch.zeros(0, 0, dtype=torch.float64)  # (F, F)
        self._cross = torch.zeros(0, 0, dtype=torch.float64)  # X^T W R, (F, D)
        # (F,), by itself because a factor overwrites that of the sums
        self._diagonal = torch.zeros(0, dtype=torch.float64)
        self.square, self.tokens = 0.0, 0  # tr(R^T W R), N

    def add(self, inputs: Tensor, rest: Tensor, weights: Tensor) -> None:
        """Adds tokens X (N, F), R (N, D) and w (N,), float32, before anything is solved."""
        root = weights.sqrt()[:, None]  # (N, 1)
        inputs, rest = inputs * root, rest * root  # (N, F), (N, D)
        width, outputs = inputs.shape[1], rest.shape[1]
        if not len(self._gram):
            size = 8 * width * (width + outputs) + working_memory(self.most, width, outputs)
            home = _with_room(inputs.device, size)
            self._gram = torch.zeros(width, width, dtype=torch.float64, device=home)  # (F, F)
            self._cross = torch.zeros(width, outputs, dtype=torch.float64, device=home)  # (F, D)
        home = self._gram.device
        for start in range(0, width, ROWS):  # only the part right of the diagonal is computed
            rows, end = inputs[:, start : start + ROWS].T, start + ROWS  # (ROWS, N)
            self._gram[start:end, start:] += (rows @ inputs[:, start:]).to(home)
            self._cross[start:end] += (rows @ rest).to(home)  # (ROWS, D)
        self._diagonal = self._gram.diagonal().clone()  # (F,)
        self.square += float(rest.pow(2).sum())
        self.tokens += len(inputs)

    def add_up(self, team: Replicas) -> None:
        """Adds the sums of all replicas, each of which has some; all ranks must call it."""
        for start in range(0, len(self._gram) if team.count > 1 else 0, ROWS):
            rows = self._gram[start : start + ROWS, start:]  # (ROWS, F - start)
            rows.copy_(team.summed(rows))
            rows = self._cross[start : start + ROWS]  # (ROWS, D)
            rows.copy_(team.summed(rows))
        counts = torch.tensor([self.square, self.tokens], dtype=torch.float64)  # (2,)
        self.square, tokens = team.summed(counts).tolist()
        size = 8 * len(self._gram) * (len(self._gram) + 3 * COLUMNS)  # of the factor and columns
        # on all ranks alike, or their solutions would differ by rounding
        if team.any_rank(_with_room(self._gram.device, size) == CPU):
            self._gram, self._cross = self._gram.cpu(), self._cross.cpu()
        self.tokens, self._diagonal = int(tokens), self._gram.diagonal().clone()  # (F,)

    @property
    def usual_ridge(self) -> float:
        """2 F / N, the default: the more tokens, the less a change is held back."""
        return 2 * len(self._gram) / self.tokens

    @property
    def solvable(self) -> bool:
        """Whether something is missing, and some input is not zero."""
        return bool(self.square and self._diagonal.any())

    def solve(
        self, ridge: float, put: Callable[[slice, Tensor], object], *, step: float = 1.0
    ) -> float:
        """Solves C for a ridge above 0, and calls ``put`` with each slice of its columns.

        ``put`` gets step C in these, (F, columns) float64. Returns the share of ``square`` that X
        step C restores; 0, and nothing is put, where the ridge is below the rounding of the sums.
        """
        # relative to the mean of the eigenvalues: a ridge suits any scale of X
        penalty = ridge * float(self._diagonal.mean())
        solve_columns, restored = self._factorized(self._diagonal + penalty), 0.0
        if solve_columns is None:
            return 0.0
        for start in range(0, self._cross.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            right = self._cross[:, columns]  # (F, columns)
            change = solve_columns(right)  # (F, columns)
            # where the equations hold, tr(C^T X^T X C) = tr(C^T X^T R) - penalty ||C||^2
            gained, size = (float((change * m).sum()) for m in (right, change))
            restored += step * (2 - step) * gained + step**2 * penalty * size
            put(columns, step * change)
        return restored / self.square

    def _factorized(self, diagonal: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What solves for columns of C, (F, columns), from those of X^T W R; None if singular."""
        self._mirror(diagonal)
        if not self._gram.is_cpu:
            lower, failed = torch.linalg.cholesky_ex(self._gram)  # (F, F)
            solve = torch.linalg.solve_triangular  # where `cholesky_solve` would copy the factor

            def solve_columns(right: Tensor) -> Tensor:
                return solve(lower.mT, solve(lower, right, upper=False), upper=True)

            return None if failed else solve_columns
        from scipy.linalg import lapack

        # LAPACK counts columns first: what is below our diagonal is its upper triangle
        factor, failed = lapack.dpotrf(self._gram.numpy().T, lower=0, clean=0, overwrite_a=1)
        if failed:  # a ridge below what float32's rounding adds to the sums
            return None
        return lambda right: torch.from_numpy(
            lapack.dpotrs(factor, np.array(right.numpy(), order="F"), lower=0, overwrite_b=1)[0]
        )

    def _mirror(self, diagonal: Tensor) -> None:
        """Writes the sums above the diagonal below it, too, over a factor; and the diagonal."""
        for start in range(0, len(self._gram), ROWS):
            end = start + ROWS
            self._gram[end:, start:end] = self._gram[start:end, end:].T
            block = self._gram[start:end, start:end]  # (ROWS, ROWS)
            above = block.triu(1)
            block.copy_(above + above.T)
        self._gram.diagonal().copy_(diagonal)


def equations_of(
    projection: OutputProjection, batches: Iterable[Tokens], team: Replicas = ALONE, most: int = 0
) -> NormalEquations:
    """The equations of a projection as it is; before a norm, at the outputs' present rms.

    Every replica of the ``team`` has its own batches, at least one, of ``most`` tokens at most.
    """
    equations = NormalEquations(most)
    for inputs, target, weights, outputs in batches:
        if outputs is None:
            outputs = projection.outputs(inputs)  # (N, D)
        rest = target / projection.factor - projection.normed(outputs)  # (N, D)
        if isinstance(getattr(projection.matrix, "bias", None), Tensor):
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (N, F + 1)
        if projection.norm is not None:
            inputs = inputs / _rms(outputs)  # (N, F)
        equations.add(inputs, rest, weights)
    equations.add_up(team)
    return equations


def error(projection: OutputProjection, batches: Iterable[Tokens]) -> float:
    """The weighted sum of squares by which a sublayer misses its targets."""
    total = 0.0
    for inputs, target, weights, _ in batches:
        added = projection.factor * projection.normed(projection.outputs(inputs))  # (N, D)
        rest = target - added  # (N, D)
        total += float((rest.pow(2).sum(1) * weights).sum())  # over (N,)
    return total


class SublayerSolver:
    """Solves the output projection of a sublayer, and leaves the best in place.

    ``fitted`` yields the tokens to fit on, ``held_out`` those to choose by, as often as called.
    Every replica of the ``team`` has others, and finds the same solution.
    """

    def __init__(
        self,
        projection: OutputProjection,
        fitted: Callable[[], Iterable[Tokens]],
        held_out: Callable[[], Iterable[Tokens]],
        *,
        ridges: Sequence[float] | None = RIDGES,
        step_size: float = 1.0,
        team: Replicas = ALONE,
    ) -> None:
        self._projection, self._ridges, self._step_size = projection, ridges or (), step_size
        self._fitted, self._held_out, self._team = fitted, held_out, team
        self._error_before = self._error_on(held_out)
        self._error = self._error_before  # after the best change so far

    def solve(self, equations: NormalEquations, *, layer: int, part: str, noise: float) -> Fit:
        """Applies the change that lowers the error on held-out tokens most.

        ``noise`` is a token's error by rounding alone, relative to its target.
        """
        if equations.square <= noise**2 * equations.tokens or not self._error_before:
            return Fit(layer, part)
        if not self._ridges:
            self._ridges = (equations.usual_ridge,)
        if self._projection.norm is None:
            ridge, restored = self._solve_matrix(equations)
            return Fit(layer, part, ridge, restored, self._restored())
        before = self._error_on(self._fitted)
        ridge, _ = self._solve_matrix(equations)
        norm_ridge = self._solve_norm()
        equations = equations_of(self._projection, self._fitted(), self._team, equations.most)
        again, _ = self._solve_matrix(equations)
        restored = 1 - self._error_on(self._fitted) / before
        last = ridge if again is None else again
        return Fit(layer, part, last, restored, self._restored(), norm_ridge)

    def _error_on(self, read: Callable[[], Iterable[Tokens]]) -> float:
        square = torch.tensor([error(self._projection, read())], dtype=torch.float64)  # (1,)
        return float(self._team.summed(square))

    def _restored(self) -> float:
        return 1 - self._error / self._error_before

    def _solve_matrix(self, equations: NormalEquations) -> tuple[float | None, float]:
        """Changes the matrix by the best of all ridges; returns that, and the share it restores."""
        matrix, norm = self._projection.matrix, self._projection.norm
        weight, bias = matrix.weight, getattr(matrix, "bias", None)
        assert isinstance(weight, Tensor)
        scale = None if norm is None else _inverse(effective_weight(norm))  # (D,)

        def put(columns: slice, change: Tensor) -> None:
            change = change.to(weight.device, torch.float32)  # (F, columns), or F + 1 with a bias
            change = change if scale is None else change * scale[columns]
            if isinstance(bias, Tensor):
                _add(bias[columns], change[-1])
                change = change[:-1]
            _add(weight[:, columns] if transposed(matrix) else weight[columns].T, change)

        if not equations.solvable:
            return None, 0.0
        parameters = [weight, bias] if isinstance(bias, Tensor) else [weight]
        step = self._step_size
        return self._best_ridge(parameters, lambda ridge: equations.solve(ridge, put, step=step))

    def _solve_norm(self) -> float | None:
        projection = self._projection
        assert projection.norm is not None
        weight = projection.norm.weight
        assert isinstance(weight, Tensor)
        squares, crosses = torch.zeros(2, len(weight), dtype=torch.float64)  # (D,) each
        for inputs, target, weights, _ in self._fitted():
            outputs = projection.outputs(inputs)  # (N, D)
            rest = target / projection.factor - projection.normed(outputs)  # (N, D)
            unit, w = outputs / _rms(outputs), weights[:, None]  # (N, D), (N, 1)
            squares += (w * unit * unit).sum(0).cpu()  # (D,)
            crosses += (w * unit * rest).sum(0).cpu()  # (D,)
        squares, crosses = self._team.summed(squares), self._team.summed(crosses)  # (D,) each

        def add(ridge: float) -> float:
            change = self._step_size * crosses / (squares + ridge * squares.mean())  # (D,)
            _add(weight, change.to(weight.device, torch.float32))
            return 0.0

        return self._best_ridge([weight], add)[0]

    @torch.no_grad()
    def _best_ridge(
        self, parameters: Sequence[Tensor], add: Callable[[float], float]
    ) -> tuple[float | None, float]:
        """Takes the ridge of least held-out error, if any lowers it; ``add`` returns its share."""
        best: tuple[float | None, float] = None, 0.0
        with restored_on_error(parameters) as restore:
            set_best = restore
            for ridge in self._ridges:
                restored = add(ridge)
                held_out = self._error_on(self._held_out)
                if held_out < self._error:
                    self._error, best = held_out, (ridge, restored)
                    set_best = restore  # frees the former best's copy before another is made
                    set_best = keep_values(parameters)
                restore()
            set_best()
        return best


def working_memory(tokens: int, inputs: int, width: int) -> int:
    """Bytes at most that so many tokens take, beside their states, while they pass a layer."""
    return 4 * tokens * (4 * inputs + 10 * width)


def _with_room(device: torch.device, size: int) -> torch.device:
    """The device, where it has float64 and so many bytes, or the CPU, whose memory was planned."""
    there = device.type != "cpu" and has_float64(device)
    return device if there and size + UNUSED <= free_memory(device) else CPU


def _add(part: Tensor, change: Tensor) -> None:
    part.copy_(part.float() + change)


def _rms(outputs: Tensor) -> Tensor:
    """The root mean square of every token, (N, 1)."""
    return outputs.pow(2).mean(1, keepdim=True).sqrt().clamp_min(TINY)


def _inverse(weight: Tensor) -> Tensor:
    """1 / weight, and 0 where a norm lets nothing through."""
    return torch.where(weight.abs() > 1e-6 * weight.abs().max(), 1 / weight, 0.0)
