"""The choice by held-out KL divergence after a refit: known answers, its budget, resuming."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from conftest import interrupted, random_windows, refuses, short_llama

from llama.model import TransformerBlock
from short_gpt import ShortLlama, choose_healed, heal_refit
from short_gpt.evaluation.perplexity import Difference, Perplexity, Sample, combined, difference
from short_gpt.healing import choosing, refit
from short_gpt.healing.choosing import ResultCache, pruned_losses
from short_gpt.runtime.errors import NotRemovableError
from short_gpt.runtime.state import StateFile
from short_gpt.selection import search

WINDOWS = random_windows(16, 12)
QUIET = {"progress": False}


def model(layers: int = 6, *identities: int) -> ShortLlama:
    return short_llama(n_layers=layers, identities=identities)


@cache
def written(layers: int, *identities: int, count: int = 16) -> list[list[int]]:
    """Windows of 12 tokens drawn from the model itself."""
    decoder, windows = model(layers, *identities).decoder, []
    torch.manual_seed(1)
    for first in torch.randint(0, 96, (count, 1, 1)):
        tokens = first
        while tokens.shape[1] < 12:
            chances = decoder.logits(tokens)[:, -1].softmax(-1)  # (1, V)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1)], 1)
        windows += tokens.tolist()
    return windows


@pytest.fixture
def candidates(monkeypatch):
    """Sets the methods whose sets are the candidates."""
    return lambda *names: monkeypatch.setattr(choosing, "CANDIDATES", names)


@pytest.fixture
def refitted(monkeypatch):
    """The sets that were refitted, in their order, with the windows read."""
    found, plain = [], refit.fit

    def fit(short, layers, windows, **options):
        found.append((*layers, len(windows)))
        return plain(short, layers, windows, **options)

    monkeypatch.setattr(refit, "fit", fit)
    return found


def test_identities_are_chosen_at_no_distance_and_equal_sets_are_refitted_once(refitted):
    short, windows = model(6, 1, 4), written(6, 1, 4)
    result = choose_healed(short, windows, 2, budget=12, **QUIET)
    assert result.layers == [1, 4]
    assert 0 <= result.kld < 1e-6
    best, *others = result.candidates
    assert (
        best.methods == ["bi", "relative_magnitude", "greedy_kld", "stepwise_bi"]
        and best.difference.nats == 0
    )
    assert [one.methods for one in others] == [["angular"]]
    assert refitted.count((1, 4, 8)) == 1 == refitted.count((*others[0].layers, 8))
    assert others[0].difference.nats > 0


@pytest.mark.parametrize("heal_by", ["refit", "patch"])
def test_candidates_are_judged_by_their_refit_on_windows_that_it_does_not_read(candidates, heal_by):
    candidates("bi", "deepest")
    short = model()
    result = choose_healed(short, WINDOWS, 2, budget=5, heal_by=heal_by, **QUIET)
    judged, reference = {}, short.reference(WINDOWS[8:])
    for one in result.candidates:
        own = judged[tuple(one.layers)] = pruned_losses(
            short, one.layers, WINDOWS[8:], fit_on=WINDOWS[:8], heal_by=heal_by, reference=reference
        )
        assert one.kld == pytest.approx(combined(own).kld.value, abs=1e-6)
    best, worse = judged
    expected = difference(judged[best], judged[worse], by="kld")
    assert result.candidates[1].difference.nats == pytest.approx(expected.nats, abs=1e-6)
    assert list(best) == result.layers and expected.nats > 0


def test_the_budget_is_never_passed_and_a_bare_pass_is_the_first_windows(candidates, monkeypatch):
    layers_run, plain = [], TransformerBlock.forward

    def counted(self, x, *args, **kwargs):
        layers_run.append(len(x) * (x.shape[1] > 1))  # one token shows what a layer returns
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(TransformerBlock, "forward", counted)
    candidates("sequential", "greedy_kld")
    result = choose_healed(model(), WINDOWS, 2, budget=14, **QUIET)
    assert result.passes <= 14
    price = 3 * 8 + 8
    # 10 and 6 for the trials of two rounds, 4 and 3 to move on, all on 4 windows
    spent = 6 * 16 + 4 * (10 + 4 + 6 + 3) + 6 * price * 2
    assert result.passes == pytest.approx(spent / (6 * 16))
    assert sum(layers_run) <= result.passes * 6 * 16  # refits' products take the rest


def test_a_search_on_fewer_windows_costs_less(candidates):
    candidates("sequential", "greedy_kld")
    result = choose_healed(model(), WINDOWS[:6], 2, budget=20, **QUIET)
    spent = 6 * 6 + 3 * (10 + 4 + 6 + 3) + 6 * (3 * 3 + 3) * 2
    assert result.passes == pytest.approx(spent / (6 * 6))


def test_searches_are_left_out_where_the_budget_does_not_allow_it(candidates):
    candidates("deepest", "greedy_kld", "stepwise_bi")
    result = choose_healed(model(), WINDOWS, 2, budget=3, **QUIET)
    assert [one.methods for one in result.candidates] == [["deepest"]]
    assert result.notes == [
        "greedy_kld takes up to 3.0 bare passes, more than were left: left out",
        "stepwise_bi takes up to 4.0 bare passes, more than were left: left out",
    ]


def test_bars_move_while_a_search_runs(candidates, monkeypatch):
    """A bar of the greedy search's own trials, and a step of the choice's bar for each refit."""
    shown, done = [], []
    real = search.bar
    monkeypatch.setattr(
        search, "bar", lambda *a, show, **how: shown.append(show) or real(*a, show=False, **how)
    )
    for name in ("_lowest", "_spend"):
        plain = getattr(choosing._Choosing, name)
        monkeypatch.setattr(
            choosing._Choosing,
            name,
            lambda self, given, plain=plain, name=name: done.append(name) or plain(self, given),
        )
    candidates("greedy_kld", "stepwise_bi")
    for progress in (True, False):
        choose_healed(model(), WINDOWS, 3, budget=14, progress=progress)
    assert shown == [True, False]
    steps = [i for i, name in enumerate(done) if name == "_lowest"]
    assert len(steps) == 4 and all(done[i + 1] == "_spend" for i in steps)


def test_stepwise_removes_the_lowest_layer_refits_and_scores_again(candidates):
    candidates("bi", "stepwise_bi")
    torch.manual_seed(2)
    factors = (1 + 1.5 * torch.rand(100)).tolist()

    def uneven() -> ShortLlama:
        """With matrices of many sizes, so that a refit changes the order of the layers."""
        short = model()
        matrices = [p for p in short.decoder.module.parameters() if p.dim() == 2]
        for matrix, factor in zip(matrices, factors, strict=False):
            matrix.data.mul_(factor)
        return short

    first, fit = uneven(), WINDOWS[:8]
    first.measure(fit, **QUIET)
    removed = first.layers_to_remove(1)
    while len(removed) < 3:
        short = uneven()
        heal_refit(short, removed, fit, **QUIET)
        short.measure(fit, **QUIET)
        removed += short.layers_to_remove(1)
    result = choose_healed(uneven(), WINDOWS, 3, budget=12, **QUIET)
    sets = {one.methods[0]: one.layers for one in result.candidates}
    assert sets["stepwise_bi"] == sorted(removed) != sets["bi"]
    # of 16 windows: scores on 8, the others read, twice a refit and scores on 8, two candidates
    assert result.passes == 1 + 2 * (3 + 1) * 0.5 + 2 * 2
    result = choose_healed(uneven(), WINDOWS, 3, budget=8, **QUIET)
    assert result.notes == [
        "stepwise_bi takes up to 6.0 bare passes, more than were left: left out"
    ]


def test_sets_that_cannot_be_removed_are_left_out(candidates, monkeypatch):
    """Such as all layers with attention of a hybrid."""

    plain = choosing.pruned

    def refused(short, layers, *args, **options):
        if {0, 1} & {*layers}:
            raise NotRemovableError("these layers cannot be removed")
        return plain(short, layers, *args, **options)

    monkeypatch.setattr(choosing, "pruned", refused)
    candidates("sequential", "reverse")
    result = choose_healed(model(), WINDOWS, 2, **QUIET)
    assert [one.methods for one in result.candidates] == [["reverse"]]
    assert result.notes == ["sequential left out: these layers cannot be removed"]
    candidates("sequential")
    with pytest.raises(NotRemovableError, match="these layers cannot be removed"):
        choose_healed(model(), WINDOWS, 2, **QUIET)


def test_40_windows_judge_at_first(candidates):
    windows = random_windows(56, 8)
    candidates("deepest", "sequential")
    result = choose_healed(model(), windows, 1, budget=11, **QUIET)
    assert (result.fitted, result.judged) == (8, 40)
    # 48 windows of the original, and each set refitted on 8; the second is told apart on 16
    assert result.passes == 3 + (3 * 8 + 40) / 16 + (3 * 8 + 16) / 16


@pytest.mark.parametrize("names", [("bi", "deepest"), ("deepest", "bi")])
def test_a_set_told_apart_as_worse_is_judged_no_more(candidates, names):
    windows = written(6, 1, 4, count=48)
    candidates(*names)
    result = choose_healed(model(6, 1, 4), windows, 2, budget=11, **QUIET)
    best, worse = result.candidates
    assert (best.methods, best.layers, worse.layers) == (["bi"], [1, 4], [3, 4])
    # what is better goes through all windows, also where it is told apart
    judged = 16 if names[0] == "bi" else 40
    assert (result.judged, worse.difference.windows, worse.told_apart) == (40, judged, True)
    short = model(6, 1, 4)
    how = {"fit_on": windows[:8], "reference": short.reference(windows[8:])}
    own, other = (
        pruned_losses(short, layers, windows[8:], **how) for layers in (best.layers, worse.layers)
    )
    expected = difference(own[:judged], other[:judged], by="kld")
    assert worse.difference.nats == pytest.approx(expected.nats, abs=1e-6)
    assert best.kld == pytest.approx(combined(own).kld.value, abs=1e-6)
    assert worse.kld == pytest.approx(best.kld + expected.nats, abs=1e-6)
    assert result.passes == 3 + (24 + 40) / 16 + (24 + judged) / 16
    assert f"judged on {'16 to ' * (judged == 16)}40;" in str(result)


@pytest.fixture
def stubbed(monkeypatch, candidates):
    """Chooses among sets whose KL divergences on 40 windows are given."""

    def choice(**sets):
        candidates(*sets)
        windows = random_windows(48, 8)
        layers = {name: own for name, (own, _) in sets.items()}
        nats, now = {tuple(own): loss for own, loss in sets.values()}, []
        monkeypatch.setattr(choosing, "choose", lambda scores, n, method: layers[method])

        @contextmanager
        def pruned(short, layers, *, heal_by, calibration):
            now[:] = nats[layers]
            yield
            now.clear()

        def losses(decoder, some, progress, reference):
            own = [now[windows.index(window) - 8] for window in some]
            return [Perplexity.of([Sample(None, 0.0, 11, 11 * nats, 0)]) for nats in own]

        monkeypatch.setattr(choosing, "pruned", pruned)
        monkeypatch.setattr(choosing, "window_perplexities", losses)
        return choose_healed(model(), windows, 1, budget=60, **QUIET)

    return choice


def noisy(first: float, rest: float, noise: float = 0.01) -> list[float]:
    """A divergence on the first 16 of 40 windows, and one on the others."""
    return [(first if i < 16 else rest) + (-noise if i % 2 else noise) for i in range(40)]


def test_a_set_told_apart_from_another_best_is_judged_again(stubbed):
    # a is told apart from x on 16 windows, but not from b, which beats x on all; a beats b
    x, a, b = noisy(2.0, 2.0), noisy(2.1, 1.0, 0.02), noisy(2.15, 1.2, 0.6)
    result = stubbed(x=([1], x), a=([2], a), b=([3], b))
    assert result.layers == [2] and result.kld == pytest.approx((16 * 2.1 + 24) / 40)
    judged = {one.methods[0]: one.difference.windows for one in result.candidates}
    assert judged == {"x": 40, "a": 40, "b": 40}
    assert result.passes == 3 + (4 * 24 + 3 * 40) / 16  # a is refitted twice, its losses once


def test_a_set_that_two_methods_name_is_judged_once_also_where_it_was_told_apart(stubbed):
    # a seems better than b on the 16 windows that told it apart from x
    x, a, b, c = noisy(2.0, 2.0), noisy(2.1, 2.3), noisy(2.15, 1.2, 0.6), noisy(2.1, 1.3)
    result = stubbed(x=([1], x), a=([2], a), b=([3], b), again=([2], a), c=([4], c))
    assert result.layers == [3]
    assert [one.methods for one in result.candidates] == [["b"], ["c"], ["x"], ["a", "again"]]


def test_a_set_is_looked_at_after_16_windows_and_then_every_8(candidates, monkeypatch):
    """It is told apart here where its difference is over 24 windows or more."""
    candidates("bi", "deepest")
    looks, plain = [], choosing.difference

    def noted(first, second, by):
        looks.append(len(first))
        return plain(first, second, by=by)

    monkeypatch.setattr(choosing, "difference", noted)
    monkeypatch.setattr(Difference, "told_apart", property(lambda change: change.windows >= 24))
    windows = written(6, 1, 4, count=48)
    result = choose_healed(model(6, 1, 4), windows, 2, budget=11, **QUIET)
    assert looks[:2] == [16, 24] and result.candidates[1].difference.windows == 24


def test_a_difference_is_told_apart_where_its_interval_leaves_0_out():
    first = [Perplexity.of([Sample(None, nats, 11)]) for nats in (20.0, 22.0, 24.0, 21.0)]
    for change, apart in ((1.0, True), (0.15, False)):
        second = [
            Perplexity.of([Sample(None, p.nats + change + noise, 11)])
            for p, noise in zip(first, (0.2, -0.2, 0.1, 0.0), strict=True)
        ]
        one = difference(first, second)
        assert abs(one.nats) > one.standard_error  # of which the 95% interval has 3.2
        assert one.told_apart is apart
        assert difference(second, first).told_apart is apart
    assert not difference(first[:1], second[:1]).told_apart  # no interval


@pytest.mark.parametrize(("count", "stop_at"), [(16, 3), (16, 4), (48, 2), (48, 4)])
def test_an_interrupted_choice_continues_to_the_same_result(tmp_path, candidates, count, stop_at):
    candidates("deepest", "greedy_kld", "stepwise_bi")
    windows, budget = written(6, 1, 4, count=count), 14 if count == 16 else 22

    def choice(**options):
        return choose_healed(model(6, 1, 4), windows, 2, budget=budget, **QUIET, **options)

    whole = choice()
    state = StateFile(tmp_path / "s", {}, every=0.0)
    with interrupted(ResultCache, "value", stop_at):
        choice(state=state)
    state = StateFile(tmp_path / "s", {}, every=0.0)
    assert len(state.content["cells"]) == stop_at
    assert choice(state=state) == whole


@pytest.mark.parametrize(
    ("names", "layers", "first", "then"),
    [
        # where the search is left out, the last candidate is judged beside another best
        (("deepest", "greedy_kld", "reverse"), (6, 1, 4), {"budget": 11}, {"budget": 16}),
        (("bi", "greedy_kld", "stepwise_bi"), (6,), {"heal_by": "refit"}, {"heal_by": "patch"}),
    ],
)
def test_a_state_of_another_choice_changes_nothing(
    tmp_path, candidates, names, layers, first, then
):
    candidates(*names)
    windows = written(*layers, count=48 if "budget" in first else 16)

    def choice(**how):
        return choose_healed(model(*layers), windows, 2, **QUIET, **how)

    kept, whole = choice(**first, state=StateFile(tmp_path / "s", {}, every=0.0)), choice(**then)
    assert choice(**then, state=StateFile(tmp_path / "s", {}, every=0.0)) == whole != kept
    assert layers == (6,) or whole.layers == [1, 4]


def test_what_was_measured_is_not_measured_again(tmp_path, candidates, refitted):
    candidates("deepest")
    for _ in range(2):
        state = StateFile(tmp_path / "s", {}, every=0.0)
        result = choose_healed(model(), WINDOWS, 2, budget=8, state=state, **QUIET)
    assert len(refitted) == 1
    assert json.loads(json.dumps(result.to_dict()))["layers"] == result.layers


def test_the_model_and_its_scores_are_left_as_they_were():
    short, tokens = model(), torch.tensor(random_windows(2, 12, seed=3))
    short.measure(WINDOWS[:2], **QUIET)
    before = [p.clone() for p in short.decoder.module.parameters()]
    logits, scores = short.decoder.logits(tokens), short.importance.to_dict()
    choose_healed(short, WINDOWS, 2, budget=10, **QUIET)
    assert all(map(torch.equal, before, short.decoder.module.parameters()))
    assert torch.equal(short.decoder.logits(tokens), logits)
    assert short.importance.to_dict() == scores and short.kept == [*range(6)]


def test_of_a_pruned_model_the_numbers_are_the_originals(candidates):
    candidates("deepest")
    short = model(7, 0, 2, 5)
    short.remove_layers([0])
    result = choose_healed(short, written(7, 0, 2, 5), 2, budget=10, **QUIET)
    assert result.layers == [4, 5]


def test_few_windows_and_windows_that_share_text():
    notes = choose_healed(model(), WINDOWS[:6], 1, budget=9, **QUIET).notes
    assert notes[0] == "chosen on 6 windows, fewer than 16: the differences are less sure"
    refuses("at least 4 windows, .* got 3, of", choose_healed, model(), WINDOWS[:3], 1, **QUIET)
    refuses("got 8, of which 4 share text", choose_healed, model(), WINDOWS[:4] * 2, 1, **QUIET)
    refuses("expected 1 to 4", choose_healed, model(), WINDOWS, 5, **QUIET)
    refuses("budget", choose_healed, model(), WINDOWS, 1, **{**QUIET, "budget": -5})


def test_where_the_windows_do_not_settle_it_the_searched_set_is_taken(stubbed, monkeypatch):
    monkeypatch.setattr(choosing, "GREEDY", "searched")
    a, close, far = noisy(1.0, 1.0), noisy(1.01, 1.01, 0.2), noisy(1.5, 1.5)
    result = stubbed(a=([2], a), searched=([3], close))
    assert result.layers == [3] and result.kld == pytest.approx(1.01)
    assert result.notes == ["a [2] is not told apart from searched's set, which is taken"]
    assert [one.layers for one in result.candidates] == [[2], [3]]
    assert stubbed(a=([2], a), searched=([3], far)).layers == [2]
