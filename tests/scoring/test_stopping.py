"""The stopping rule on synthetic windows of known truth, and in real runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import random_windows, refuses, short_llama
from scipy.stats import skew
from torch import Tensor

from benchmarks.lib.adversarial import KINDS, attack, least_median
from short_gpt import windows
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import spearman, student_t
from short_gpt.scoring.moments import pair_skewness
from short_gpt.scoring.stopping import (
    Stop,
    Verdict,
    enough,
    next_look,
    order_z,
    skewness_factor,
    unread,
    unsure,
)

LAYERS = 8
TEXT = "".join(chr(32 + i % 90) for w in random_windows(60, 97, seed=5) for i in w)


def scores(influence: Tensor, angles: Tensor | None = None) -> Scores:
    """Windows of 1 token with these Block Influences (B, L)."""
    B, L = influence.shape
    angles = torch.zeros(B, L + 1, L + 1) if angles is None else angles
    return Scores(torch.ones(B), influence, angles)


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
    target = rule.first_look(len(order))
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
    rule = Stop(3, confidence=confidence, rare=0.2)
    truth = set(values.mean(0).argsort()[:3].tolist())
    right, used = 0, []
    for seed in range(60):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
        verdict, sums = replay(rule, values, order)
        right += set(sums.least_important(3)) == truth
        used.append(verdict.windows)
    assert right / 60 >= confidence
    assert sorted(used)[30] < 300  # the rule does save windows


def test_the_paired_difference_counts_not_the_spread_of_each_layer():
    """The common part of the windows is five times the gap, and cancels."""
    values = population(gap=0.1)
    verdict, _ = replay(Stop(3, rare=0.2), values, torch.arange(len(values)))
    assert verdict.windows <= 80


def test_equal_layers_are_told_apart_by_their_number():
    values = population(gap=0.3)
    order = values.mean(0).argsort()
    values[:, order[3]] = values[:, order[2]]  # the third and fourth lowest are one
    verdict, sums = replay(Stop(3), values, torch.arange(len(values)))
    assert verdict.settled and verdict.windows < len(values)
    tied = min(order[2].item(), order[3].item())
    assert sums.least_important(3)[2] == tied


def test_all_windows_read_is_settled_by_definition():
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(torch.ones(40, LAYERS) + torch.randn(40, LAYERS)))
    verdict = Stop(3).judge(sums, 40)
    assert verdict.settled and "all 40 windows were read" in str(verdict)
    one = Importance.empty(range(LAYERS))
    one.add(scores(torch.rand(1, LAYERS)))
    assert str(Stop(3).judge(one, 1)).endswith("settled: the only window was read")
    assert not Stop(3).judge(sums, 4000).settled
    text = str(Stop(3).judge(sums, 4000))
    assert "NOT settled at 0.99 by 40 of 4,000 windows (tested from 286 on); closest" in text
    text = str(Stop(3, rare=0.2).judge(sums, 4000))
    assert "NOT settled at 0.99 by 40 of 4,000 windows; closest layers" in text


def test_a_choice_is_unsure_where_a_kept_layer_may_be_lower():
    torch.manual_seed(0)
    spread = 0.1 * torch.randn(12, LAYERS)
    apart, near = torch.arange(1.0, LAYERS + 1), torch.ones(LAYERS)
    sums = {name: Importance.empty(range(LAYERS)) for name in ("apart", "near", "one")}
    sums["apart"].add(scores(apart + spread))
    sums["near"].add(scores(near + spread))
    sums["one"].add(scores((apart + spread)[:1]))  # one window tells no error
    assert unsure(sums["apart"], 2) is None
    text = unsure(sums["near"], 2)
    assert text.startswith("not sure which layers to remove: on 12 windows, closest layers ")
    assert text.endswith(" needed; read more (`max_windows`)")
    assert "remove: one window gives no error; read more" in unsure(sums["one"], 2)


def test_fewer_windows_than_the_minimum_never_settle():
    sums = Importance.empty(range(LAYERS))
    sums.add(scores(torch.arange(LAYERS) + 1e-3 * torch.randn(20, LAYERS)))
    assert not Stop(3).judge(sums, None, final=True).settled
    assert Stop(3, min_windows=16, rare=0.4).judge(sums, None).settled
    assert not Stop(3, min_windows=16).judge(sums, None).settled


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
    verdict = Stop(3, angular=True, rare=0.2).judge(sums, 1000)
    assert verdict.settled and verdict.pair[0] == 2
    assert sums.least_important(3, angular=True) == [2, 3, 4]
    assert not Stop(2, angular=True, rare=0.2).judge(sums, 1000).settled


def test_z_of_pairs_by_hand():
    means, covariance = torch.tensor([1.0, 2.0, 4.0]).double(), torch.eye(3).double()
    covariance[0, 1] = covariance[1, 0] = 0.5
    first = torch.tensor([True, False, False])
    z = order_z(means, covariance, first)
    assert z[0].tolist() == [math.inf, pytest.approx(1.0), pytest.approx(3 / math.sqrt(2))]
    assert z[1:].isinf().all()
    z = order_z(means, 9 * covariance, torch.tensor([True, True, False]))
    assert z[1, 2] == pytest.approx(2 / math.sqrt(18)) and z[0, 1].isinf()
    every = order_z(means[None], covariance[None], first[None])
    assert every[0, 0, 1:].tolist() == pytest.approx([1.0, 3 / math.sqrt(2)])


def test_more_looks_and_more_layers_ask_for_more():
    symmetric = torch.zeros(LAYERS, LAYERS)

    def needed(rule: Stop, read: int, population: int | None) -> float:
        return float(rule.needed(symmetric, read, population)[0, 0])

    rule = Stop(3, rare=0.2)
    # without end look k has 1 / (k (k + 1)) of the tests' error, shared by L - 1 pairs
    looks = [rule.looks(read, None) for read in (390, 400)]
    assert looks == [28, 29]
    for k, read in zip(looks, (390, 400), strict=True):
        share = 1 / (k * (k + 1))
        assert needed(rule, read, None) == pytest.approx(
            student_t(1 - 0.0075 / 7 * share, read - 1)
        )
    assert needed(rule, 300, 4000) > needed(rule, 300, 400)  # more looks are planned
    wide = float(rule.needed(torch.zeros(30, 30), 300, 400)[0, 0])
    assert wide > needed(rule, 300, 400)
    # a quarter of the error is for what is not seen; L - 1 pairs; all planned looks and one more
    looks = rule.looks(399, 400) + 1
    assert needed(rule, 300, 400) == pytest.approx(student_t(1 - 0.0075 / 7 / looks, 299))
    # without end the first look has 1 / (1 * 2) of it; one more at the end, unplanned, 1 / (2 * 3)
    for final, share in ((False, 2), (True, 6)):
        settles = float(rule.needed(symmetric, 34, None, final=final)[0, 0])
        assert settles == pytest.approx(student_t(1 - 0.0075 / 7 / share, 33))
    assert rule.looks(31, None) == 0 and rule.looks(32, None) == 1 and rule.looks(35, None) == 2


def test_windows_that_lean_towards_another_answer_ask_for_more():
    rule, skewness = Stop(3, rare=0.2), torch.tensor([[0.0, -2.0], [2.0, 0.0]])
    needed = rule.needed(skewness, 100, 1000)
    assert needed[0, 1] > needed[0, 0] and needed[1, 0] == needed[0, 0]
    # twice the skewness of 2; a tenth of the windows was read, so 0.9 is left
    t = float(needed[0, 0])
    factor = (3 * 0.9 + 1.9 * (t * t - 1)) / 6 / math.sqrt(100 * 0.9)
    assert float(needed[0, 1]) == pytest.approx(t + 2 * 2.0 * factor)
    t = 4.0
    assert skewness_factor(t, 50, None) == pytest.approx((1 + 2 * t * t) / (6 * math.sqrt(50)))


def test_the_quantile_of_skewed_samples_without_replacement():
    """The lower tail of t over samples of a skewed population, simulated."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(400, dtype=torch.float64).exponential_(generator=generator)
    values = -(values - values.mean()) / values.std()  # rare ones are low
    read, runs = 160, 40_000
    order = torch.rand(runs, 400, generator=generator).argsort(1)[:, :read]
    sample = values[order]
    z = sample.mean(1) / (sample.std(1) * math.sqrt((1 - read / 400) / read))
    t = student_t(0.99, read - 1)
    skewness = (values**3).mean() / (values**2).mean() ** 1.5
    exact = float(z.quantile(0.99))
    assert t - float(skewness) * skewness_factor(t, read, 400) == pytest.approx(exact, abs=0.1)
    assert exact > t + 0.25


def test_enough_windows_to_see_a_rare_kind():
    # without replacement: exact, by counting the samples
    for population, share, error in ((600, 0.02, 0.0025), (40, 0.1, 0.05)):
        kind = math.ceil(share * population)

        def missed(read: int, population: int = population, kind: int = kind) -> float:
            return math.comb(population - kind, read) / math.comb(population, read)

        read = enough(share, error, population)
        assert missed(read) <= error < missed(read - 1)
    assert enough(0.02, 0.0025, 10**7) == pytest.approx(enough(0.02, 0.0025, None), abs=1)


@pytest.mark.parametrize("angular", [False, True])
def test_the_skewness_of_differences_is_that_of_the_windows(angular):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(60, LAYERS, generator=generator).exp().double()
    tokens = torch.randint(3, 9, (60,), generator=generator).double()
    angles = torch.rand(60, LAYERS + 1, LAYERS + 1, generator=generator).double() ** 3
    found = scores(values * tokens[:, None], angles)
    found = Scores(**{**vars(found), "tokens": tokens})
    sums = Importance.empty(range(LAYERS))
    for part in range(0, 60, 20):
        rows = slice(part, part + 20)
        sums.add(Scores(found.tokens[rows], found.influence[rows], found.angles[rows]))
    if angular:
        blocks = angles.diagonal(2, dim1=1, dim2=2)
        rest, skewness = blocks - blocks.mean(0), sums.angular_skewness(2)
    else:
        rest, skewness = tokens[:, None] * (values - sums.block_influence), sums.skewness
    expected = skew(rest[:, None, :] - rest[:, :, None], axis=0)
    off = ~torch.eye(len(skewness), dtype=torch.bool)
    assert torch.allclose(skewness[off], torch.tensor(expected)[off], atol=1e-9)
    assert skewness.diagonal().eq(0).all()


MISLEADING = [kind for kind in KINDS if "one layer" in kind and "0.5" not in kind]


@pytest.mark.parametrize("kind", MISLEADING)
def test_few_runs_end_early_and_wrong_on_populations_made_to_mislead(kind):
    """The full simulation is ``benchmarks/studies/stopping.py --adversarial``."""
    found = attack(Stop(3), KINDS[kind], 600, seed=5)
    assert found["early_stops"] > 60
    assert found["wrong_of_runs"] <= 0.01


def test_no_rule_with_this_promise_reads_less_than_the_hypergeometric_bound():
    """Half of the runs, less 1% that are wrong, times the chance to miss 12 of 600, is 1%."""
    least = round(600 * least_median(Stop(3), 600))
    missed = [math.comb(588, m) / math.comb(600, m) for m in (least - 1, least)]
    assert missed[1] * (0.5 - 0.01) <= 0.01 < missed[0] * (0.5 - 0.01)


def test_a_verdict_tells_its_kind_of_answer_and_its_windows():
    settled = Verdict(Stop(3, confidence=0.975, rare=0.055), True, 400, 4000, (2, 5), 9.0, 4.25)
    assert str(settled).startswith(
        "set of the 3 lowest settled at 0.975 after 400 of 4,000 windows"
    )
    promise = (
        "of all runs at most 2.5% end early and wrong, unless windows decide that make up less"
    )
    assert str(settled).endswith(f"; {promise} than 5.5% of all")
    verdict = Verdict(Stop(3, angular=True), False, 297, None, (2, 5), 1.5, 4.25)
    told = "best block NOT settled at 0.99 by 297 windows; closest blocks that start at 2 and 5"
    more = "more windows (`max_windows`) may settle it"
    assert str(verdict) == f"{told}: 1.50 standard errors apart, 4.25 needed; {more}"
    early = str(replace(verdict, windows=31, needed=18461.97))
    looked = " 31 windows (tested from 297 on); closest blocks that start at 2 and 5: 1.50 "
    assert early.endswith(f"{looked}standard errors apart; {more}")
    one = str(replace(verdict, windows=1, z=math.nan))
    assert one.endswith(f"closest blocks that start at 2 and 5: one window gives no error; {more}")


def test_when_is_looked_at_how_much_is_unread():
    assert [Stop(9).first_look(windows) for windows in (18_000, 600, None)] == [295, 234, 297]
    assert Stop(9, rare=0.5).first_look(None) == 32  # the least number of windows
    assert [next_look(m) for m in (19, 20, 100, 2560, 10_000)] == [20, 22, 110, 2816, 10_256]
    assert [unread(m, 40) for m in (10, 40, 50)] == [0.75, 0.0, 0.0] and unread(10, None) == 1
    assert skewness_factor(4.0, 40, 40) == 0


def test_many_looks_at_two_layers_as_good_as_tied_err_no_more_than_stated():
    """Every look could end the run with the wrong one."""
    rule = Stop(1, confidence=0.9, rare=0.2)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, 1500, 2, generator=generator).double()
    values -= values.mean(1, keepdim=True)
    values[:, :, 1] += 1e-6  # layer 0 is the answer
    wrong, going, at = 0, torch.ones(1000, dtype=torch.bool), rule.first_look(1500)
    while at < 1500:
        part = values[:, :at]
        means = part.mean(1)
        rest = part - means[:, None]
        covariance = rest.mT @ rest / (at * (at - 1))
        skewness = pair_skewness(covariance, rest.square().mT @ rest, at)
        chosen = torch.zeros(1000, 2, dtype=torch.bool).scatter(1, means.argmin(1)[:, None], True)
        z = order_z(means, covariance * (1 - at / 1500), chosen)
        settled = (z > rule.needed(skewness, at, 1500)).flatten(1).all(1) & going
        wrong += int((settled & chosen[:, 1]).sum())
        going, at = going & ~settled, next_look(at)
    assert 0 < wrong / 1000 <= 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"confidence": 1.0}, "confidence = 1.0: expected at least 0.5, below 1"),
        ({"confidence": 0.2}, "confidence = 0.2"),
        ({"min_windows": 4}, "min_windows = 4: expected at least 16"),
        ({"rare": 0.0}, "rare = 0.0: expected above 0, below 1"),
    ],
)
def test_rules_out_of_range(values, message):
    refuses(message, Stop, 3, **values)


def test_a_run_stops_and_gives_the_answer_of_all_windows():
    short = short_llama(n=2)
    chosen = windows([TEXT], short.encode, size=16, stride=16, seed=0)
    assert short.measure(chosen, progress=False, stop=Stop(2, rare=0.1)) is short.importance
    whole, verdict = short_llama(n=2), short.verdict
    assert whole.measure(chosen, progress=False).n_windows == len(chosen) and not whole.verdict
    assert verdict.settled and verdict.population == len(chosen) == whole.n_windows
    assert short.n_windows == verdict.windows < whole.n_windows
    assert set(short.layers_to_remove()) == set(whole.layers_to_remove())
    assert spearman(short.importances, whole.importances) > 0.8


def test_a_limited_sample_of_a_larger_population_may_end_unsettled():
    short = short_llama()
    chosen = windows([TEXT], short.encode, size=16, stride=16, seed=0, limit=20)
    short.measure(chosen, progress=False, stop=Stop(2))
    verdict = short.verdict
    assert not verdict.settled and (verdict.windows, len(chosen)) == (20, 20)
    assert verdict.population > 300


def test_a_stop_judges_one_run_over_windows_in_random_order():
    short, rule = short_llama(), Stop(2, rare=0.1)
    in_order = windows([TEXT], short.encode, size=16, stride=16)
    for ordered in (in_order, random_windows(40, 8)):
        with pytest.raises(ValueError, match=r"in random order.*windows\(\.\.\., seed=0\)"):
            short.measure(ordered, progress=False, stop=rule)
    assert short.n_windows == 0
    drawn = windows([TEXT], short.encode, size=16, stride=16, seed=0)
    read = short.measure(drawn, progress=False, stop=rule).n_windows
    refuses(f"{read} windows were scored before", short.measure, drawn, progress=False, stop=rule)
    assert short.n_windows == read
    again = short_llama()
    again.measure(list(drawn), progress=False, stop=rule, random_order=True)
    assert again.verdict.windows == again.n_windows > 0


@pytest.mark.parametrize("n", [0, 5])
def test_a_rule_for_layers_that_there_are_not_is_refused_before_the_run(n):
    short = short_llama()
    with pytest.raises(ValueError, match=f"n = {n}; the model has 5 layers: expected 1 to 4"):
        short.measure(random_windows(40, 8), progress=False, stop=Stop(n))
    assert short.n_windows == 0
