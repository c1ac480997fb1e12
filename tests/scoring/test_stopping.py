"""The stopping rule on synthetic windows of known truth, and in real runs."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows
from torch import Tensor

from short_gpt import ShortLlama, windows
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import spearman
from short_gpt.scoring.stopping import Stop, Verdict, closest, next_look, student_t

LAYERS = 8


def scores(influence: Tensor, angles: Tensor | None = None) -> Scores:
    """Windows of 1 token with these Block Influences (B, L)."""
    B, L = influence.shape
    zeros = torch.zeros(B, L)
    angles = torch.zeros(B, L + 1, L + 1) if angles is None else angles
    return Scores(
        torch.ones(B),
        influence,
        angles,
        zeros,
        zeros,
        torch.zeros(B, 2, L),
        torch.zeros_like(angles),
    )


def population(count: int = 400, gap: float = 0.03, seed: int = 0) -> Tensor:
    """Windows x layers: means a gap apart, a common part, skewed noise of each layer's own."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.empty(count, LAYERS).exponential_(generator=generator) - 1
    common = torch.randn(count, 1, generator=generator)
    means = 1 + gap * torch.randperm(LAYERS, generator=generator)
    return means + 0.1 * own + 0.5 * common


def replay(rule: Stop, values: Tensor, order: Tensor) -> tuple[Verdict, Importance]:
    """Reads the windows in this order until the rule stops."""
    sums, at = Importance.empty(range(LAYERS)), 0
    target = rule.min_windows
    while True:
        chunk = values[order[at : min(target, len(order))]]
        sums.add(scores(chunk))
        at += len(chunk)
        verdict = rule.judge(sums, len(order), final=at == len(order) and at < target)
        if verdict.settled or at == len(order):
            return verdict, sums
        target = next_look(target)


@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_stopped_answers_are_the_full_answers_as_often_as_stated(confidence):
    values = population()
    rule = Stop(3, confidence=confidence)
    truth = set(values.mean(0).argsort()[:3].tolist())
    right, used = 0, []
    for seed in range(300):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        verdict, sums = replay(rule, values, order)
        right += set(sums.least_important(3)) == truth
        used.append(verdict.windows)
    assert right / 300 >= confidence
    assert sorted(used)[150] < 300  # the rule does save windows


def test_the_paired_difference_counts_not_the_spread_of_each_layer():
    """The common part of the windows is five times the gap, and cancels."""
    values = population(gap=0.1)
    verdict, _ = replay(Stop(3), values, torch.arange(len(values)))
    assert verdict.windows <= 60


def test_equal_layers_are_told_apart_by_their_number():
    values = population(gap=0.3)
    order = values.mean(0).argsort()
    values[:, order[3]] = values[:, order[2]]  # the third and fourth lowest are one
    verdict, sums = replay(Stop(3), values, torch.arange(len(values)))
    assert verdict.settled and verdict.windows < len(values)
    tied = min(order[2].item(), order[3].item())
    assert sums.least_important(3)[2] == tied


def test_layers_that_differ_by_chance_alone_are_not_settled_before_the_end():
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2000, LAYERS, generator=generator)
    early = 0
    for seed in range(20):
        order = torch.randperm(2000, generator=torch.Generator().manual_seed(seed))[:200]
        sums = Importance.empty(range(LAYERS))
        sums.add(scores(1 + noise[order]))
        early += Stop(3).judge(sums, 2000).settled
    assert early == 0


def test_of_equal_layers_hardly_any_is_settled_however_often_one_looks():
    """Two layers whose means are all but equal: to settle on the wrong one is the error."""
    rule, wrong, runs = Stop(1, confidence=0.9), 0, 60
    drawn = 1 + torch.randn(runs, 400, 2, generator=torch.Generator().manual_seed(5))
    for values in drawn:
        sums, read, look = Importance.empty(range(2)), 0, rule.min_windows
        while look <= len(values):
            sums.add(scores(values[read:look]))
            read, look = look, next_look(look)
            if rule.judge(sums, None).settled:
                wrong += sums.least_important(1) == [1]  # the other is lower by a hair
                break
    assert wrong / runs <= 1 - rule.confidence


def test_who_looked_more_often_needs_more():
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(population(400)))
    needed = [Stop(3, min_windows=m).judge(sums, None).needed for m in (400, 200, 64, 16)]
    assert needed == sorted(needed) and needed[3] > needed[0] + 0.5


def test_all_windows_read_is_settled_by_definition():
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(torch.ones(40, LAYERS) + torch.randn(40, LAYERS)))
    verdict = Stop(3).judge(sums, 40)
    assert verdict.settled and "all 40 windows were read" in str(verdict)
    assert not Stop(3).judge(sums, 4000).settled
    assert "NOT settled at 0.99 by 40 of 4,000 windows; closest layers" in str(
        Stop(3).judge(sums, 4000)
    )


def test_fewer_windows_than_the_minimum_never_settle():
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(torch.arange(LAYERS) + 1e-3 * torch.randn(20, LAYERS)))
    assert not Stop(3).judge(sums, None, final=True).settled
    assert Stop(3, min_windows=16).judge(sums, None).settled


def test_the_finite_population_correction():
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(population(100)))
    rule = Stop(3)
    z = [rule.judge(sums, N).z for N in (None, 400, 200, 101)]
    assert z[1] == pytest.approx(z[0] / math.sqrt(0.75))
    assert z[2] == pytest.approx(z[0] / math.sqrt(0.5))
    assert z[3] == pytest.approx(z[0] * math.sqrt(101))


def test_the_best_block_is_settled_by_its_distances():
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(50, LAYERS + 1, LAYERS + 1, generator=generator) * 0.01 + 0.5
    angles[:, 2, 5] -= 0.1  # the block 2, 3, 4
    angles = (angles.triu(1) + angles.triu(1).mT).double()
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(torch.ones(50, LAYERS), angles))
    verdict = Stop(3, angular=True).judge(sums, 1000)
    assert verdict.settled and verdict.pair[0] == 2
    assert sums.least_important(3, angular=True) == [2, 3, 4]
    assert not Stop(2, angular=True).judge(sums, 1000).settled


def test_the_closest_pair_by_hand():
    means, covariance = torch.tensor([1.0, 2.0, 4.0]).double(), torch.eye(3).double()
    covariance[0, 1] = covariance[1, 0] = 0.5
    assert closest(means, covariance, [0]) == ((0, 1), pytest.approx(1.0))
    covariance[0, 2] = covariance[2, 0] = -3.5
    assert closest(means, covariance, [0]) == ((0, 1), pytest.approx(1.0))
    assert closest(means, 9 * covariance, [0, 1]) == ((0, 2), pytest.approx(1 / 3))


def test_more_looks_and_more_pairs_ask_for_more():
    values = population(400)

    def needed(read: int, n: int) -> float:
        sums = Importance.empty(range(LAYERS))
        sums.add(scores(values[:read]))
        return Stop(n).judge(sums, None).needed

    assert needed(64, 4) > needed(64, 1)
    assert Stop(3).looks(31) == 0 and Stop(3).looks(32) == 1 and Stop(3).looks(38) == 2


def test_student_t_against_tables():
    # Abramowitz and Stegun, table 26.10
    assert student_t(0.995, 30) == pytest.approx(2.750, abs=1e-3)
    assert student_t(0.9995, 60) == pytest.approx(3.460, abs=1e-3)
    assert student_t(0.975, 120) == pytest.approx(1.980, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"confidence": 1.0}, "confidence = 1.0: expected at least 0.5, below 1"),
        ({"confidence": 0.2}, "confidence = 0.2"),
        ({"min_windows": 4}, "min_windows = 4: expected at least 16"),
    ],
)
def test_rules_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Stop(3, **values)


class Tiny:
    def __init__(self) -> None:
        self.model, self.tokenizer = make_transformer(), CharTokenizer()


def test_a_run_stops_and_gives_the_answer_of_all_windows():
    text = "".join(chr(32 + i % 90) for w in random_windows(60, 97, seed=5) for i in w)
    short = ShortLlama(Tiny(), n_prune_layers=2)
    chosen = windows([text], short.encode, size=16, stride=16, seed=0)
    verdict = short.measure(chosen, progress=False, stop=Stop(2))
    whole = ShortLlama(Tiny(), n_prune_layers=2)
    assert whole.measure(chosen, progress=False) is None
    assert verdict.settled and verdict.population == len(chosen) == whole.n_windows
    assert short.n_windows == verdict.windows < whole.n_windows
    assert set(short.layers_to_remove()) == set(whole.layers_to_remove())
    assert spearman(short.importances, whole.importances) > 0.8


def test_a_limited_sample_of_a_larger_population_may_end_unsettled():
    text = "".join(chr(32 + i % 90) for w in random_windows(60, 97, seed=5) for i in w)
    short = ShortLlama(Tiny())
    chosen = windows([text], short.encode, size=16, stride=16, seed=0, limit=20)
    verdict = short.measure(chosen, progress=False, stop=Stop(2))
    assert not verdict.settled and (verdict.windows, len(chosen)) == (20, 20)
    assert verdict.population > 300


@pytest.mark.parametrize("n", [0, 5])
def test_a_rule_for_layers_that_there_are_not_is_refused_before_the_run(n):
    short = ShortLlama(Tiny())
    with pytest.raises(ValueError, match=f"n = {n}; the model has 5 layers: expected 1 to 4"):
        short.measure(random_windows(40, 8), progress=False, stop=Stop(n))
    assert short.n_windows == 0
