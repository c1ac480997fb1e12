"""The baselines that are measured in benchmarks alone: one known answer each."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import peer_maps
import pytest
import torch
from completions import leading, repetition, turn_losses
from conftest import CharTokenizer, make_transformer, random_windows
from drafts import Agreement
from evolution import Account, evolution, evolve
from gap_refit import GapRefits
from many_sets import ManySets, greedy_healed
from torch import Tensor, nn

from llama.model import TransformerBlock
from short_gpt import ShortLlama
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.models.decoder import pad, without_layers
from short_gpt.models.meta import MetaDecoder
from short_gpt.models.numbering import runs

WINDOWS = random_windows(2, 16)
SETS = [*itertools.combinations((1, 2, 3, 5), 2), (1, 2, 3, 5)]
WORTH = [9, 1, 7, 2, 8, 3, 6, 4, 5, 10]


@pytest.mark.parametrize("seed", range(3))
def test_evolution_finds_the_best_set_behind_a_trap(seed):
    """Single layers 1, 3, 5 look cheapest, but 2, 4, 8 together cost nothing."""

    def trap(layers, batch):
        return 0.0 if layers == (2, 4, 8) else sum(WORTH[i] for i in layers) + 0.1 * batch

    account = Account(trap, costs=[1] * 4, budget=10**9)
    assert evolve(account, range(10), 3, seed=seed) == (2, 4, 8)
    spent = Account(trap, costs=[1] * 4, budget=30)
    evolve(spent, range(10), 3, seed=seed)
    assert spent.spent <= 30


def test_evolution_runs_no_more_layers_than_the_greedy_search():
    decoder = MetaDecoder(make_transformer(n_layers=7))
    greedy = ShortLlama(SimpleNamespace(model=decoder.module, tokenizer=CharTokenizer()))
    most = greedy.search(WINDOWS, 2, progress=False).evaluations
    found = evolution(decoder, WINDOWS, 2, [0, 2, 3, 4, 5, 6], budget=1.0)
    assert found.evaluations <= most and {*found.removed} <= {2, 3, 4, 5}


def test_many_sets_have_the_losses_of_each_alone_also_healed(monkeypatch):
    decoder = MetaDecoder(make_transformer(n_layers=7))
    mending = GapRefits(decoder, random_windows(8, 18, seed=3), random_windows(2, 18, seed=4))
    mending.prepare({gap for layers in SETS for gap in runs(layers, range(7))})
    healed = ManySets(decoder, SETS, mending).nats(*pad(WINDOWS, decoder))
    ran, plain = [], TransformerBlock.forward
    many = ManySets(decoder, SETS)
    with monkeypatch.context() as patch:
        patch.setattr(TransformerBlock, "forward", lambda *args: ran.append(0) or plain(*args))
        raw = many.nats(*pad(WINDOWS, decoder))
    assert len(ran) < 0.8 * sum(7 - len(layers) for layers in SETS)
    for layers in SETS:
        with without_layers(decoder, layers):
            alone = perplexity(decoder, [WINDOWS]).nats
        with mending.mended(runs(layers, range(7))), without_layers(decoder, layers):
            mended = perplexity(decoder, [WINDOWS]).nats
        assert raw[layers] == pytest.approx(alone, rel=1e-6)
        assert healed[layers] == pytest.approx(mended, rel=1e-6) != raw[layers]
    (first,) = greedy_healed(decoder, WINDOWS, 1, mending, [2, 3])
    sets = {(i,): i for i in (2, 3)}
    mending.prepare({(i, i) for i in (2, 3)})
    losses = ManySets(decoder, [*sets], mending).nats(*pad(WINDOWS, decoder))
    assert first == sets[min(losses, key=losses.get)]


def test_drafts_are_accepted_up_to_the_first_disagreement():
    """Drafts of 2: [yes no] then one by the original, so the next begins at the third."""
    text = (True, False, True, True, False, True, True)
    found = [Agreement((text,), (None,)).at(length) for length in (1, 2, 3)]
    assert [(f.accepted, f.drafted, f.passes) for f in found] == [(3, 4, 4), (5, 6, 3), (5, 8, 3)]


def test_completions_known_answers():
    assert leading([1, 2, 3], [1, 2, 4]) == 2 and repetition([1, 2, 3, 1, 2, 3, 4], n=3) == 1 / 5
    decoder = MetaDecoder(make_transformer())
    (window,) = random_windows(1, 12)
    (found,) = turn_losses(decoder, [(window[:8], window[8:])])
    logs = decoder.logits(torch.tensor([window]))[0].log_softmax(-1)
    expected = -sum(float(logs[i - 1, window[i]]) for i in range(8, 12))
    assert found.nats == pytest.approx(expected, rel=1e-5) and found.tokens == 4


class LinearLayer(nn.Module):
    """A layer that is x W."""

    def __init__(self, weight: Tensor, layer_id: int) -> None:
        super().__init__()
        self.weight, self.layer_id = nn.Parameter(weight.float(), requires_grad=False), layer_id

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x @ self.weight


def linear(kind: str, seed: int) -> Tensor:
    """A map that the kind can express: channels of the rotated stream scaled, or any."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ghosted":
        return torch.eye(32).double() + 0.1 * torch.randn(32, 32, generator=generator).double()
    rotation = peer_maps.hadamard(32)
    return rotation @ (torch.rand(32, generator=generator).double() + 0.5).diag() @ rotation.T


@pytest.mark.parametrize("kind", [peer_maps.LINEARPATCH, peer_maps.GHOSTED])
def test_gaps_that_a_map_can_express_are_restored_exactly(kind):
    """One of a single layer, and one of two, whose product the map is."""
    model, held = make_transformer(n_layers=7), torch.tensor(random_windows(2, 20, seed=7))
    for place, seed in ((1, 1), (3, 2), (4, 3)):
        model.layers[place] = LinearLayer(linear(kind, seed), place)
    short = ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))
    whole = short.decoder.logits(held)
    (maps,) = peer_maps.fit_many(short, kind, [[4, 1, 3]], random_windows(6, 40), progress=False)
    assert torch.allclose(maps.maps[2], linear(kind, 2) @ linear(kind, 3), atol=1e-4)
    with short.without_layers([1, 3, 4]):
        raw = short.decoder.logits(held)
        undo = peer_maps.apply(short, maps)
        assert torch.allclose(short.decoder.logits(held), whole, atol=2e-3)
        undo()
        assert torch.equal(short.decoder.logits(held), raw)
    matrix = peer_maps.hadamard(60)
    assert torch.allclose(matrix @ matrix.T, torch.eye(60).double(), atol=1e-12)
