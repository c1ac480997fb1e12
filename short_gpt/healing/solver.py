"""One output projection solved by least squares, and the weight of a norm after it.

A sublayer (attention or MLP) adds a(W x) to the residual stream, with a factor where the family has
one. Mostly a is the identity, and the change of W is least squares. In some families (Gemma 2 and
3, OLMo 2) a norm follows the matrix, a(y) = y / rms(y) * e, in which only the weight e is linear:
each of its D entries has a normal equation of its own. The matrix is solved with rms(y) held where
it is, which gives least squares again, with inputs x / rms(y) and a change times e. That is only a
step: what counts is the error of the real sublayer on held-out windows, and a step that does not
lower it is not taken.

Shapes: N tokens of a batch, F inputs of a matrix, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from short_gpt.models.layer_hooks import transposed
from short_gpt.models.sublayers import OutputProjection, effective_weight
from short_gpt.models.weight_changes import keep_values, restored_on_error
from short_gpt.runtime.errors import ShortGPTError

PARTS = ("attention", "mlp")
RIDGES = (1e-2, 1e-1, 1.0)
# How a token weighs: by the inverse square of its target, or as much as any other.
WEIGHTS = ("inverse", "equal")
# Which layers are solved: all from the first gap on, or those before gaps alone.
WHERE = ("all", "gaps")
TINY = torch.finfo(torch.float32).tiny
ROWS = 256  # of X^T W X that are added at once
COLUMNS = 256  # of C that are solved at once


@dataclass(frozen=True)
class SolverSettings:
    """How every output projection is solved.

    Attributes:
        parts: the sublayers whose output projection is solved; None tries several settings and
            keeps those of the lowest loss on held-out windows.
        ridges: candidates, relative to the mean square of the weighted inputs.
        weights: w of a token, "inverse" for 1 / ||target||^2, or "equal" for all alike.
        aim: the step size, above 0 and at most 1: a factor of every solved change.
        where: "all" solves every kept layer from the first gap on; "gaps" the last projection of
            the layers before gaps alone, on the original model's hidden states.

    Raises:
        ShortGPTError: a value out of range.

    Example:
        >>> SolverSettings(aim=0.7).parts
        ('attention', 'mlp')
    """

    parts: tuple[str, ...] | None = PARTS
    ridges: Sequence[float] = RIDGES
    weights: str = WEIGHTS[0]
    aim: float = 1.0
    where: str = WHERE[0]

    def __post_init__(self) -> None:
        parts, ridges = self.parts, self.ridges
        if parts is not None and (
            not parts or isinstance(parts, str) or not set(parts) <= set(PARTS)
        ):
            raise ShortGPTError(f"parts = {parts!r}: expected some of {', '.join(PARTS)}")
        if not ridges or not all(0 < ridge < float("inf") for ridge in ridges):
            raise ShortGPTError(
                f"ridges = {ridges!r}: expected numbers above 0, such as {RIDGES[0]}"
            )
        for name, known in (("weights", WEIGHTS), ("where", WHERE)):
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise ShortGPTError(f"{name} = {got!r}: expected one of {', '.join(known)}")
        if not 0 < self.aim <= 1:
            raise ShortGPTError(f"aim = {self.aim}: expected above 0 and at most 1")

    @property
    def label(self) -> str:
        """Parts, weights and step size in a few words."""
        return f"{','.join(self.parts or ())} {self.weights} {self.aim:g}"


@dataclass(frozen=True)
class Fit:
    """How one output projection was solved.

    Attributes:
        layer: its layer, in the original model's numbering.
        part: "attention" or "mlp".
        ridge: the candidate that restores most on held-out windows; None where every candidate
            raises the error there, or nothing is missing, and the matrix stays as it is.
        restored: the share of what was missing at its target, in weighted squares over the tokens
            that it was fitted on, that the change gives back: 1 is all, 0 is nothing.
        restored_held: the same on held-out windows.
        norm_ridge: of the weight of a norm after the matrix; None where there is none, or it stays
            as it is.
    """

    layer: int
    part: str
    ridge: float | None = None
    restored: float = 0.0
    restored_held: float = 0.0
    norm_ridge: float | None = None

    @property
    def changed(self) -> bool:
        """Whether any parameter changes."""
        return self.ridge is not None or self.norm_ridge is not None


@dataclass(frozen=True)
class Tokens:
    """What solving an output projection needs of some tokens, float32.

    Attributes:
        inputs: of the matrix, (N, F).
        residual: the stream that the sublayer adds to, (N, D).
        target: what the sum should be, (N, D).
        outputs: of the matrix on these inputs, (N, D), where they are known.
        mean_square: None weighs a token by its own target; else all weigh alike, by this mean of
            ||target||^2.
    """

    inputs: Tensor
    residual: Tensor
    target: Tensor
    outputs: Tensor | None = None
    mean_square: float | None = None

    @property
    def weights(self) -> Tensor:
        """1 / ||target||^2, (N,): the norms that follow make a token's scale irrelevant."""
        squares = self.target.pow(2).sum(1)  # (N,)
        if self.mean_square is not None:
            squares = torch.full_like(squares, self.mean_square)
        return 1 / squares.clamp_min(TINY)


class NormalEquations:
    """Sums over tokens from which a change C of a matrix is solved, float64 on the CPU.

    C minimises

        sum over tokens w ||x C - r||^2 + ridge (tr(X^T W X) / F) ||C||^2.

    X^T W X is symmetric and its Cholesky factor a triangle, and so one F x F matrix holds both: the
    sums above the diagonal, the factor below it, for one ridge after the other.

    Attributes:
        square: tr(R^T W R).
        tokens: N.
    """

    def __init__(self) -> None:
        self._gram = torch.zeros(0, 0, dtype=torch.float64)
        self._cross = torch.zeros(0, 0, dtype=torch.float64)
        self._diagonal = torch.zeros(0, dtype=torch.float64)  # a factor overwrites that of the sums
        self.square, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, rest: Tensor, weights: Tensor) -> None:
        """Adds tokens, before anything is solved; products are made in float32 where they are.

        Args:
            inputs, rest: X (N, F) and R (N, D), float32.
            weights: w (N,), at least 0.
        """
        root = weights.sqrt()[:, None]  # (N, 1)
        inputs, rest = inputs * root, rest * root  # (N, F), (N, D)
        width = inputs.shape[1]
        if not len(self._gram):
            self._gram = torch.zeros(width, width, dtype=torch.float64)  # (F, F)
            self._cross = torch.zeros(width, rest.shape[1], dtype=torch.float64)  # (F, D)
        for start in range(0, width, ROWS):  # only the part right of the diagonal is computed
            rows, end = inputs[:, start : start + ROWS].T, start + ROWS  # (ROWS, N)
            self._gram[start:end, start:] += (rows @ inputs[:, start:]).cpu()
            self._cross[start:end] += (rows @ rest).cpu()
        self._diagonal = self._gram.diagonal().clone()  # (F,)
        self.square += float(rest.pow(2).sum())
        self.tokens += len(inputs)

    @property
    def solvable(self) -> bool:
        """Whether something is missing, and some input is not zero."""
        return bool(self.square and self._diagonal.any())

    def solve(
        self, ridge: float, put: Callable[[slice, Tensor], object], *, step: float = 1.0
    ) -> float:
        """Solves C for a ridge, some columns at a time.

        Args:
            ridge: above 0.
            put: takes which columns of step C these are, and they, (F, columns) float64.
            step: a factor of C.

        Returns:
            The share of ``square`` that X step C restores; 0, and nothing is put, where the
            equations have no solution in float64, as with a ridge that is lost beside the sums.
        """
        # relative to the mean of the eigenvalues: a ridge suits any scale of X
        penalty = ridge * float(self._diagonal.mean())
        solve_columns, restored = self._factorized(self._diagonal + penalty), 0.0
        if solve_columns is None:
            return 0.0
        for start in range(0, self._cross.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            right, change = self._cross[:, columns].numpy(), solve_columns(columns)  # (F, columns)
            # where the equations hold, tr(C^T X^T X C) = tr(C^T X^T R) - penalty ||C||^2
            gained, size = _inner(change, right), _inner(change, change)
            restored += step * (2 - step) * gained + step**2 * penalty * size
            put(columns, torch.from_numpy(step * change))
        return restored / self.square

    def _factorized(self, diagonal: Tensor) -> Callable[[slice], np.ndarray] | None:
        """Solves for columns of C, (F, columns), with another diagonal; None if singular."""
        from scipy.linalg import lapack

        # LAPACK counts columns first: what is below our diagonal is its upper triangle
        gram, cross = self._gram.numpy().T, self._cross.numpy()  # (F, F), (F, D)
        self._mirror(diagonal)
        factor, failed = lapack.dpotrf(gram, lower=0, clean=0, overwrite_a=1)
        if not failed:
            return lambda columns: lapack.dpotrs(
                factor, np.array(cross[:, columns], order="F"), lower=0, overwrite_b=1
            )[0]
        # float32's rounding may leave a small ridge short of positive definite
        self._mirror(diagonal)
        room = {"lwork": 64 * len(gram), "overwrite_a": 1, "overwrite_b": 1}
        _, _, whole, failed = lapack.dsysv(gram, np.array(cross, order="F"), lower=0, **room)
        return None if failed else lambda columns: whole[:, columns]

    def _mirror(self, diagonal: Tensor) -> None:
        """Copies the sums above the diagonal below it, where a factor may be, and a diagonal."""
        for start in range(0, len(self._gram), ROWS):
            end = start + ROWS
            self._gram[end:, start:end] = self._gram[start:end, end:].T
            block = self._gram[start:end, start:end]
            above = block.triu(1)
            block.copy_(above + above.T)
        self._gram.diagonal().copy_(diagonal)


def equations_of(projection: OutputProjection, batches: Iterable[Tokens]) -> NormalEquations:
    """Those of the matrix, as it is; before a norm, at the outputs' present root mean square."""
    equations = NormalEquations()
    for tokens in batches:
        inputs, outputs = tokens.inputs, _outputs(projection, tokens)  # (N, F), (N, D)
        rest = _missing(projection, tokens, outputs)  # (N, D)
        if isinstance(getattr(projection.matrix, "bias", None), Tensor):
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (N, F + 1)
        if projection.norm is not None:
            inputs = inputs / _rms(outputs)
        equations.add(inputs, rest, tokens.weights)
    return equations


def error(projection: OutputProjection, batches: Iterable[Tokens]) -> float:
    """By how much the sublayer misses its targets, in weighted squares."""
    total = 0.0
    for tokens in batches:
        added = projection.factor * projection.normed(projection.outputs(tokens.inputs))  # (N, D)
        rest = tokens.target - tokens.residual - added
        total += float((rest.pow(2).sum(1) * tokens.weights).sum())
    return total


class SublayerSolver:
    """Solves the output projection of a sublayer, and leaves what is best in place.

    Args:
        projection: what the sublayer adds.
        settings: candidates of the ridge, for the matrix and for a norm's weight; the step size.
        fitted, held_out: yield the tokens to fit on, and to choose by, as often as they are called.
    """

    def __init__(
        self,
        projection: OutputProjection,
        settings: SolverSettings,
        fitted: Callable[[], Iterable[Tokens]],
        held_out: Callable[[], Iterable[Tokens]],
    ) -> None:
        self._projection, self._settings = projection, settings
        self._fitted, self._held_out = fitted, held_out
        self._error_before = error(projection, held_out())
        self._error = self._error_before  # after the best change so far

    def solve(self, equations: NormalEquations, *, layer: int, part: str, noise: float) -> Fit:
        """Takes what lowers the error on held-out tokens.

        Args:
            equations: of the tokens to fit on, the projection being as it is.
            layer, part: whose projection this is, for the `Fit`.
            noise: relative to its target, what a token misses by rounding alone.
        """
        if equations.square <= noise**2 * equations.tokens or not self._error_before:
            return Fit(layer, part)
        if self._projection.norm is None:
            ridge, restored = self._solve_matrix(equations)
            return Fit(layer, part, ridge, restored, self._restored())
        before = error(self._projection, self._fitted())
        ridge, _ = self._solve_matrix(equations)
        norm_ridge = self._solve_norm()
        again, _ = self._solve_matrix(equations_of(self._projection, self._fitted()))
        restored = 1 - error(self._projection, self._fitted()) / before
        last = ridge if again is None else again
        return Fit(layer, part, last, restored, self._restored(), norm_ridge)

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
        step = self._settings.aim
        return self._best_ridge(parameters, lambda ridge: equations.solve(ridge, put, step=step))

    def _solve_norm(self) -> float | None:
        """Changes the norm's weight by the best of all ridges; returns that."""
        projection = self._projection
        assert projection.norm is not None
        weight = projection.norm.weight
        assert isinstance(weight, Tensor)
        squares, crosses = torch.zeros(2, len(weight), dtype=torch.float64)  # (D,) each
        for tokens in self._fitted():
            outputs = projection.outputs(tokens.inputs)  # (N, D)
            rest = _missing(projection, tokens, outputs)
            unit, w = outputs / _rms(outputs), tokens.weights[:, None]  # (N, D), (N, 1)
            squares += (w * unit * unit).sum(0).cpu()
            crosses += (w * unit * rest).sum(0).cpu()

        def add(ridge: float) -> float:
            change = self._settings.aim * crosses / (squares + ridge * squares.mean())  # (D,)
            _add(weight, change.to(weight.device, torch.float32))
            return 0.0

        return self._best_ridge([weight], add)[0]

    @torch.no_grad()
    def _best_ridge(
        self, parameters: Sequence[Tensor], add: Callable[[float], float]
    ) -> tuple[float | None, float]:
        """Changes parameters by the ridge of least held-out error; not at all where each adds some.

        Args:
            parameters: that are changed.
            add: adds the change of a ridge to them, and returns the share that it restores.
        """
        best: tuple[float | None, float] = None, 0.0
        with restored_on_error(parameters) as restore:
            set_best = restore
            for ridge in self._settings.ridges:
                restored = add(ridge)
                held_out = error(self._projection, self._held_out())
                if held_out < self._error:
                    self._error, best = held_out, (ridge, restored)
                    set_best = restore  # frees the former best's copy before another is made
                    set_best = keep_values(parameters)
                restore()
            set_best()
        return best


def _missing(projection: OutputProjection, tokens: Tokens, outputs: Tensor) -> Tensor:
    """What the sublayer should add beyond what it adds, (N, D)."""
    return (tokens.target - tokens.residual) / projection.factor - projection.normed(outputs)


def _outputs(projection: OutputProjection, tokens: Tokens) -> Tensor:
    return projection.outputs(tokens.inputs) if tokens.outputs is None else tokens.outputs


def _add(part: Tensor, change: Tensor) -> None:
    """Adds to a part of a parameter, in float32."""
    part.copy_(part.float() + change)


def _rms(outputs: Tensor) -> Tensor:
    """The root mean square of every token, (N, 1)."""
    return outputs.pow(2).mean(1, keepdim=True).sqrt().clamp_min(TINY)


def _inverse(weight: Tensor) -> Tensor:
    """1 / weight, and 0 where a norm lets nothing through."""
    return torch.where(weight.abs() > 1e-6 * weight.abs().max(), 1 / weight, 0.0)


def _inner(first: np.ndarray, second: np.ndarray) -> float:
    """The sum of all products of entries, without a temporary."""
    return float(np.einsum("ij,ij->", first, second))
