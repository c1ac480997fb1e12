"""Evolution: by its seed, within its budget, to the best set of a landscape that is known."""

from __future__ import annotations

import itertools
import math

import pytest
from conftest import interrupted, make_transformer, random_windows

from llama.model import TransformerBlock
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.models.layer_removal import without_layers
from short_gpt.models.meta import MetaDecoder
from short_gpt.runtime.state import StateFile
from short_gpt.selection.account import Account, Spent
from short_gpt.selection.evolution import Evolution, evolve
from short_gpt.selection.evolved import evolution, sleb_layers
from short_gpt.selection.found import Options
from short_gpt.selection.search import sleb
from short_gpt.selection.stack import Stack

WINDOWS = random_windows(4, 12)
WORTH = [9, 1, 7, 2, 8, 3, 6, 4, 5, 10]


def trap(layers: tuple[int, ...], batch: int) -> float:
    """Single layers 1, 3, 5 look cheapest, but 2, 4, 8 together cost nothing."""
    return 0.0 if layers == (2, 4, 8) else sum(WORTH[i] for i in layers) + 0.1 * batch


def account(measure=trap, budget=10**9, batches=4) -> Account:
    return Account(measure, costs=[1] * batches, budget=budget)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_set_of_a_landscape_with_a_trap_is_found(seed):
    every = list(itertools.combinations(range(10), 3))
    assert min(every, key=lambda layers: trap(layers, 0)) == (2, 4, 8)
    assert evolve(account(), range(10), 3, seed=seed) == (2, 4, 8)


def test_a_slope_is_climbed_with_few_of_all_sets_measured():
    measured = set()

    def slope(layers, batch):
        measured.add(layers)
        return float(sum(layers))

    found = evolve(account(slope, budget=600), range(1, 25), 4)
    assert found == (1, 2, 3, 4) and len(measured) < math.comb(24, 4) / 15


def test_the_seed_decides_all():
    def run(seed):
        seen = []

        def noted(layers, batch):
            seen.append((layers, batch))
            return trap(layers, batch)

        return evolve(account(noted, budget=150), range(10), 3, seed=seed), seen

    assert run(1) == run(1) and run(1)[1] != run(2)[1]


@pytest.mark.parametrize("budget", [4, 5, 7, 11, 30, 77])
def test_the_budget_is_never_exceeded_and_the_best_is_measured_on_all(budget):
    counted = []

    def noted(layers, batch):
        counted.append((layers, batch))
        return trap(layers, batch)

    spending = account(noted, budget=budget)
    best = evolve(spending, range(10), 3)
    assert spending.spent == len(counted) == len(set(counted)) <= budget
    whole = {layers for layers, _ in counted if all((layers, i) in counted for i in range(4))}
    assert best == min(whole, key=lambda layers: sum(trap(layers, i) for i in range(4)))


def test_an_account_takes_all_windows_or_none():
    spending = account(budget=6)
    spending.nats((1, 2, 3), range(4))
    with pytest.raises(Spent):
        spending.nats((1, 2, 4), range(3))
    assert spending.spent == 4
    spending.nats((1, 2, 3), range(4))  # known
    spending.reserve = 1
    with pytest.raises(Spent):
        spending.nats((1, 2, 4), range(2))
    spending.nats((1, 2, 4), range(1))
    assert spending.spent == 5


def test_offspring_are_judged_on_few_windows_and_survivors_on_all():
    counts = {}

    def noted(layers, batch):
        counts.setdefault(layers, set()).add(batch)
        return float(sum(layers))

    evolve(account(noted, budget=200, batches=8), range(20), 4, settings=Evolution(share=0.25))
    sizes = [len(batches) for batches in counts.values()]
    assert set(sizes) <= {2, 3, 4, 5, 6, 8} and sizes.count(2) > sizes.count(8) > 1


def model(layers: int = 8):
    return MetaDecoder(make_transformer(n_layers=layers))


def test_the_loss_is_that_of_the_model_without_the_layers():
    decoder = model()
    found = evolution(decoder, WINDOWS, 3)
    with without_layers(decoder, found.removed):
        without = perplexity(decoder, [[w] for w in WINDOWS])
    assert found.loss == pytest.approx(without.nats / without.tokens, abs=1e-6)
    assert found.removed == sorted(set(found.removed)) and not {0, 7} & set(found.removed)


def test_of_all_sets_of_a_model_it_finds_the_best():
    decoder, losses = model(), {}
    for pair in itertools.combinations(range(1, 7), 2):
        with without_layers(decoder, pair):
            losses[pair] = perplexity(decoder, [[w] for w in WINDOWS]).nats
    assert tuple(evolution(decoder, WINDOWS, 2, budget=3.0).removed) == min(losses, key=losses.get)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_it_runs_no_more_layers_than_the_greedy_search(monkeypatch, n):
    ran, plain = [], TransformerBlock.forward

    def counted(self, x, *args, **kwargs):
        ran.append(len(x))
        return plain(self, x, *args, **kwargs)

    decoder = model()
    greedy = sleb(decoder, WINDOWS, n).evaluations
    assert len(WINDOWS) * sleb_layers(8, range(1, 7), n) <= greedy
    Stack(decoder)
    monkeypatch.setattr(TransformerBlock, "forward", counted)
    looked = Stack(decoder) and sum(ran)
    found = evolution(decoder, WINDOWS, n)
    assert found.evaluations == sum(ran) - 2 * looked <= greedy
    few = evolution(decoder, WINDOWS, n, Options(candidates=[0, 2, 3, 4, 5, 6]))
    assert set(few.removed) <= {2, 3, 4, 5, 6}


def test_what_the_greedy_search_runs_among_candidates_is_told_from_their_places():
    places = [2, 3, 6]
    least = sleb_layers(8, places, 2) * len(WINDOWS)
    assert 0.8 < least / sleb(model(), WINDOWS, 2, candidates=places).evaluations <= 1


@pytest.mark.parametrize("stop_at", [1, 9, 25])
def test_an_interrupted_evolution_continues_bit_for_bit(tmp_path, stop_at):
    whole = evolution(model(), WINDOWS, 3, seed=3)
    with interrupted(Stack, "nats", stop_at):
        evolution(model(), WINDOWS, 3, Options(state=StateFile(tmp_path / "s", {})), seed=3)
    state = StateFile(tmp_path / "s", {})
    ran = []
    plain = Stack.nats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "nats", lambda *args: ran.append(0) or plain(*args))
        assert evolution(model(), WINDOWS, 3, Options(state=state), seed=3) == whole
    assert len(ran) == whole.evaluations // 5 - stop_at  # nothing twice


def test_messages(tmp_path):
    with pytest.raises(ValueError, match=r"budget = 0.05: \d+ layers .* for one set, .* 20"):
        evolution(model(), WINDOWS, 3, budget=0.05)
    with pytest.raises(ValueError, match="n = 7; the model has 8 layers: expected 1 to 6"):
        evolution(model(), WINDOWS, 7)
    with pytest.raises(ValueError, match="nothing was predicted"):
        evolution(model(5), [[1], [2]], 1)
    StateFile(tmp_path / "s", {}).save({"evolution": [[1, 2, 0, 3.0]]})
    with pytest.raises(ValueError, match="is no whole state of an evolution; delete it"):
        evolution(model(), WINDOWS, 3, Options(state=StateFile(tmp_path / "s", {})))
