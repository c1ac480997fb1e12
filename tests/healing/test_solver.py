"""The solver of an output projection, with a norm after it and without."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows
from families import make
from torch import nn

from short_gpt.healing.refit import apply_refit, fit
from short_gpt.healing.solver import (
    NormalEquations,
    SublayerSolver,
    Tokens,
    _inverse,
    equations_of,
    error,
    sink_weights,
)
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.sublayers import OutputProjection, Sublayers, effective_weight
from short_gpt.wrappers.short_hf import ShortHFModel

NORMS_BEHIND = ["gemma2", "gemma3", "gemma3, wrapped", "olmo2"]
WINDOWS, HELD = random_windows(24, 16, vocab=8), random_windows(6, 16, vocab=8, seed=5)
HERE = {"layer": 1, "part": "mlp"}
JUDGED = random_windows(8, 16, vocab=8, seed=7)


class Norm(nn.Module):
    """x / rms(x) * (1 + weight), as Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) / 4, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).sqrt() * (1 + self.weight)


def sublayer(
    inputs: int = 12, width: int = 8, *, factor: float = 1.0, bias: bool = False
) -> OutputProjection:
    torch.manual_seed(0)
    return OutputProjection(
        Norm(width), factor, nn.Linear(inputs, width, bias=bias).requires_grad_(False)
    )


def tokens(end: OutputProjection, *, seed: int, count: int = 200) -> Tokens:
    """Tokens of which the half as it is gives the targets."""
    generator = torch.Generator().manual_seed(seed)
    weight = end.matrix.weight
    inputs = torch.randn(count, weight.shape[1], generator=generator)
    stream = torch.randn(count, weight.shape[0], generator=generator)
    return Tokens.of(inputs, stream, stream + end.factor * end.normed(end.outputs(inputs)))


def solver(end: OutputProjection, fitted: Tokens, held: Tokens, ridges=(1e-9,)) -> SublayerSolver:
    return SublayerSolver(end, lambda: [fitted], lambda: [held], ridges=ridges)


def test_a_lost_state_weighs_relative_to_what_is_there():
    present = torch.tensor([[8.0, 0], [0, 2], [1, 0], [0, 0]])
    target = torch.tensor([[8.0, 0], [8, 0], [8, 0], [8, 0]])  # 1, 4, 8 and any times as long
    assert sink_weights(present, target, 4.0).tolist() == [1, 1, 4, 250**2]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_weight_of_a_norm_that_was_scaled_is_found_back(factor):
    end = sublayer(factor=factor)
    fitted, held = tokens(end, seed=1), tokens(end, seed=2)
    true = end.norm.weight.clone()
    end.norm.weight.copy_(1.5 * true + 0.2)
    work = solver(end, fitted, held)
    assert work._solve_norm() == 1e-9
    assert torch.allclose(end.norm.weight, true, atol=1e-5)
    assert work._restored() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_a_matrix_behind_which_a_norm_stands_is_brought_near_what_gave_the_targets(bias):
    end = sublayer(bias=bias)
    end.norm.weight.copy_(torch.linspace(-0.8, 3.0, 8))  # a factor of 0.2 to 4
    fitted, held = tokens(end, seed=1), tokens(end, seed=2)
    change = 0.05 * torch.randn(end.matrix.weight.shape, generator=torch.Generator().manual_seed(3))
    end.matrix.weight += change
    before = error(end, [held])
    found = solver(end, fitted, held).solve(equations_of(end, [fitted]), **HERE, noise=1e-6)
    assert found.ridge == 1e-9 and 0.9 < found.restored_held < 1 and 0.9 < found.restored < 1
    left = error(end, [held])
    assert left == pytest.approx(before * (1 - found.restored_held), rel=1e-4)


def test_what_would_raise_the_error_on_tokens_kept_apart_is_not_taken():
    end = sublayer()
    held = tokens(end, seed=2)
    held = held._replace(target=held.target + 1e-3)  # as good as right
    fitted = tokens(end, seed=1)
    fitted = fitted._replace(target=fitted.target + torch.randn(200, 8))
    before = [p.clone() for p in (end.matrix.weight, end.norm.weight)]
    found = solver(end, fitted, held, (1e-2, 1.0)).solve(
        equations_of(end, [fitted]), **HERE, noise=1e-6
    )
    assert found.ridge is None and found.norm_ridge is None and found.restored_held == 0
    assert all(map(torch.equal, before, (end.matrix.weight, end.norm.weight)))


@pytest.fixture
def blocks(monkeypatch):
    """Sums whose rows are added, and whose columns are solved, few at a time."""
    monkeypatch.setattr("short_gpt.healing.solver.ROWS", 5)
    monkeypatch.setattr("short_gpt.healing.solver.COLUMNS", 3)


def solved(sums: NormalEquations, ridge: float) -> tuple[torch.Tensor, float]:
    """The whole change, put together of the blocks of its columns, and the share it restores."""
    parts: list[tuple[slice, torch.Tensor]] = []
    share = sums.solve(ridge, lambda columns, part: parts.append((columns, part)))
    assert [at.start for at, _ in parts] == [0, 3, 6]
    return torch.cat([part for _, part in parts], 1), share


def test_the_sums_in_blocks_solve_the_normal_equations(blocks):
    x, r, w = torch.randn(40, 12), torch.randn(40, 7), torch.rand(40)
    sums = NormalEquations()
    for part in (slice(0, 15), slice(15, 40)):
        sums.add(x[part], r[part], w[part])
    gram, cross = ((x * w[:, None]).double().T @ m.double() for m in (x, r))
    for ridge in (1e-1, 1e-3, 1.0):
        change, share = solved(sums, ridge)
        penalty = ridge * gram.trace() / 12 * torch.eye(12).double()
        expected = torch.linalg.solve(gram + penalty, cross)
        assert torch.allclose(change, expected, rtol=1e-4, atol=1e-6)
        left = (w[:, None] * (x.double() @ expected - r).pow(2)).sum() / (w[:, None] * r * r).sum()
        assert share == pytest.approx(1 - left.item(), rel=1e-4)


def test_equations_without_a_solution_change_nothing():
    """Two equal inputs, and a ridge that is lost beside their squares: the sums are singular."""
    x, r = torch.ones(4, 2), torch.ones(4, 3)
    sums = NormalEquations()
    sums.add(x, r, torch.ones(4))
    put = []
    assert sums.solve(1e-30, lambda *part: put.append(part)) == 0 and not put
    share = sums.solve(0.1, lambda *part: put.append(part))  # a ridge that counts solves them
    each = 4 / (2 * 4 + 0.1 * 4)  # x.r / (2 x.x + ridge tr(X^T X) / 2)
    assert torch.allclose(put[0][1], torch.full((2, 3), each).double())
    assert share == pytest.approx(1 - (2 * each - 1) ** 2)
    matrix = nn.Linear(2, 3, bias=False).requires_grad_(False)
    matrix.weight.zero_()
    told = Tokens.of(x, torch.zeros(4, 3), r)
    found = solver(OutputProjection(matrix, 1.0), told, told, (1e-30, 0.1)).solve(
        sums, **HERE, noise=0
    )
    assert found.ridge == 0.1 and torch.allclose(matrix.weight, torch.full((3, 2), each))


def test_tokens_are_counted_over_all_batches():
    sums = NormalEquations()
    for count in (3, 4):
        sums.add(torch.ones(count, 2), torch.ones(count, 1), torch.ones(count))
    assert sums.tokens == 7 and sums.square == 7
    # what a token lacks by rounding is a share of every token's target: 7 of them may lack 7
    for noise, expected in ((1.01, None), (0.99, 1e-9)):
        matrix = nn.Linear(2, 1, bias=False).requires_grad_(False)
        matrix.weight.zero_()
        told = Tokens.of(torch.ones(7, 2), torch.zeros(7, 1), torch.ones(7, 1))
        found = solver(OutputProjection(matrix, 1.0), told, told).solve(sums, **HERE, noise=noise)
        assert found.ridge == expected


def test_what_a_norm_nearly_shuts_out_is_still_solved():
    """A matrix's change is divided by the norm's weight, be that a hundredth of the largest."""
    end = sublayer()
    end.norm.weight.copy_(torch.tensor([1.0, 0.01, 1, 1, 1, 1, 1, 0]) - 1)
    inverse = _inverse(effective_weight(end.norm))
    assert torch.allclose(inverse, torch.tensor([1.0, 100, 1, 1, 1, 1, 1, 0]), rtol=1e-4)


@pytest.mark.parametrize("step_size", [1.0, 0.5])
@pytest.mark.parametrize("ridge", [1e-9, 0.5])
def test_a_norms_weight_gets_its_share_of_the_solution(step_size, ridge):
    """Each entry is a number by itself: step u.r / (u.u + ridge mean(u.u)), weighted."""
    end = sublayer()
    fitted = tokens(end, seed=1)
    true = end.norm.weight.clone()
    end.norm.weight.copy_(1.5 * true + 0.2)
    start = end.norm.weight.clone()
    solving = {"ridges": (ridge,), "step_size": step_size}
    work = SublayerSolver(end, lambda: [fitted], lambda: [fitted], **solving)
    unit = end.outputs(fitted.inputs).double()
    unit = unit / unit.pow(2).mean(1, keepdim=True).sqrt()
    rest = fitted.target.double() - unit * (1 + start.double())
    w = fitted.weights.double()[:, None]
    squares = (w * unit * unit).sum(0)
    expected = step_size * (w * unit * rest).sum(0) / (squares + ridge * squares.mean())
    assert work._solve_norm() == ridge
    assert torch.allclose((end.norm.weight - start).double(), expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().min() > 1e-3  # so that each entry tells


def test_the_ridge_that_is_told_is_the_matrixs_last_one(monkeypatch):
    end = sublayer()
    fitted = tokens(end, seed=1)
    fitted = fitted._replace(target=fitted.target + 1)
    for found, told in (((0.1, 0.2), 0.2), ((0.1, None), 0.1), ((None, None), None)):
        turns = iter(found)
        work = solver(end, fitted, fitted)
        monkeypatch.setattr(work, "_solve_matrix", lambda _, turns=turns: (next(turns), 0.5))
        monkeypatch.setattr(work, "_solve_norm", lambda: 0.3)
        assert work.solve(equations_of(end, [fitted]), **HERE, noise=0).ridge == told


@pytest.mark.parametrize("family", NORMS_BEHIND)
def test_a_family_with_norms_behind_its_halves_loses_less_when_refitted(family):
    short = ShortHFModel(make(family))
    refit = fit(short, [3], WINDOWS, held=HELD, progress=False)
    assert any(found.ridge is not None for found in refit.fits)
    assert any(found.norm_ridge is not None for found in refit.fits)
    for found in refit.fits:
        assert found.changed == (found.restored_held > 0)
    whole = short.decoder.logits(torch.tensor(JUDGED)).log_softmax(-1)

    def off() -> float:  # what the predictions of the whole model lose
        left = short.decoder.logits(torch.tensor(JUDGED)).log_softmax(-1)
        return float((whole.exp() * (whole - left)).sum(-1).mean())

    with short.without_layers([3]):
        raw = off()
        undo = apply_refit(short, refit)
        assert off() < 0.9 * raw
        undo()


@pytest.mark.parametrize("family", NORMS_BEHIND)
def test_a_norm_behind_is_proved_and_not_believed(family):
    short = ShortHFModel(make(family))
    calls = LayerCalls(short.decoder)
    state = calls.embed(torch.tensor(WINDOWS[:1]))
    found = Sublayers.of(calls, 0, state, short.decoder.family)
    assert set(found.projections) == {"attention", "mlp"} and not found.refused
    for end in found.projections.values():
        assert end.norm is not None and end.matrix is not end.norm
        one = torch.ones(1, 32)
        assert torch.allclose(effective_weight(end.norm), end.norm(one)[0], atol=1e-5)
    norm = found.projections["mlp"].norm
    plain = type(norm).forward
    centred = lambda self, x: plain(self, x - x.mean(-1, keepdim=True))  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(norm), "forward", centred)
        assert "mlp" not in Sublayers.of(calls, 0, state, short.decoder.family).projections
