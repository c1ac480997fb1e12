"""The baselines that are measured in benchmarks alone: one known answer each."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows, save_chat_llama
from torch import Tensor, nn

from benchmarks.baselines import layerwise, peer_maps, replaceme
from benchmarks.baselines.evolution import Account, evolution, evolve
from benchmarks.baselines.gap_refit import GapRefits
from benchmarks.baselines.many_sets import ManySets, greedy_healed
from benchmarks.lib import word_problems
from benchmarks.lib.completions import leading, repetition, turn_losses
from benchmarks.studies.drafts import Agreement
from llama.model import TransformerBlock
from short_gpt import ShortLlama, open_model
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.models.decoder import MetaDecoder, pad, without_layers
from short_gpt.models.layer_calls import LayerCalls
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


def test_evolution_runs_no_more_layers_than_the_greedy_search(monkeypatch):
    ran, plain = [], TransformerBlock.forward

    def counted(self, x, *args, **kwargs):
        ran.append(len(x))
        return plain(self, x, *args, **kwargs)

    monkeypatch.setattr(TransformerBlock, "forward", counted)
    decoder = MetaDecoder(make_transformer(n_layers=7))
    greedy = ShortLlama(SimpleNamespace(model=decoder.module, tokenizer=CharTokenizer()))
    greedy.search(WINDOWS, 2, progress=False)
    most, ran[:] = sum(ran), []
    found = evolution(decoder, WINDOWS, 2, [0, 2, 3, 4, 5, 6], budget=1.0)
    assert 0 < sum(ran) <= most and {*found.removed} <= {2, 3, 4, 5}


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


def linear_model(*weights: tuple[int, Tensor]) -> ShortLlama:
    model = make_transformer()
    for place, weight in weights:
        model.layers[place] = LinearLayer(weight, place)
    return ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))


def test_layers_trained_one_by_one_learn_the_original_states():
    """A linear layer before two linear ones learns their product with its own."""
    first, second, third = (linear("ghosted", seed) for seed in (1, 2, 3))
    short = linear_model((2, first), (3, second), (4, third))
    held = torch.tensor(random_windows(2, 20, seed=7))
    before = short.decoder.logits(held)
    ticks = itertools.count()
    windows = random_windows(3, 40)
    found = layerwise.heal(short, [3, 4], windows, 3000, rate=1e-2, clock=lambda: next(ticks))
    assert short.kept == [0, 1, 2] and [one.layer for one in found] == [2]
    learned = short.decoder.layers[2].weight.double()
    assert torch.allclose(learned, first @ second @ third, atol=0.01)
    assert found[0].after < 1e-6 < 0.01 < found[0].before
    assert torch.allclose(short.decoder.logits(held), before, atol=0.1)
    assert next(ticks) == pytest.approx(3000, rel=0.02)


def test_every_kept_layer_after_a_gap_comes_nearer_to_the_original():
    model = make_transformer(n_layers=6)
    short = ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))
    before = [{k: v.clone() for k, v in layer.named_parameters()} for layer in model.layers]
    states = [short.layer_calls().embed(torch.tensor([w])) for w in WINDOWS]
    original = states
    for place in (0, 1, 2):
        original = [short.layer_calls().run(place, state) for state in original]
    ticks = itertools.count()
    found = layerwise.heal(short, [2, 4], WINDOWS, 300, rate=1e-3, clock=lambda: next(ticks))
    assert [one.layer for one in found] == [1, 3, 5]
    assert all(one.after < one.before and one.steps > 50 for one in found)
    layers = short.decoder.layers
    for place, number in enumerate(short.kept):
        own = dict(layers[place].named_parameters())
        same = [torch.equal(own[name], value) for name, value in before[number].items()]
        assert all(same) if number == 0 else not any(same)
    for place in (0, 1):  # the state before the gap is to be the one after it
        states = [short.layer_calls().run(place, state) for state in states]
    assert layerwise.mean_loss(states, original) == pytest.approx(found[0].after, rel=1e-4)


def test_passes_between_layers_take_nothing_of_the_layers_time(monkeypatch):
    now, run = [0], LayerCalls.run

    def clock() -> int:
        now[0] += 1
        return now[0]

    def slow(*args):
        now[0] += 100
        return run(*args)

    monkeypatch.setattr(LayerCalls, "run", slow)
    model = make_transformer(n_layers=6)
    short = ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))
    found = layerwise.heal(short, [2], WINDOWS, 200, clock=clock)
    assert [one.layer for one in found] == [1, 3, 4, 5]
    assert [one.steps for one in found] == [pytest.approx(50, abs=2)] * 4


class Residual(nn.Module):
    """A layer that is x + x W, W by the name of an MLP's last matrix."""

    def __init__(self, weight: Tensor, layer_id: int) -> None:
        super().__init__()
        self.feed_forward, self.layer_id = nn.Module(), layer_id
        self.feed_forward.w2 = nn.Linear(*weight.shape, bias=False).requires_grad_(False)
        self.feed_forward.w2.weight.copy_(weight.T)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x + self.feed_forward.w2(x)


def test_replaceme_restores_what_a_map_of_the_mlps_output_can_express():
    """x + x W and then A: with x = m W^-1, the state after it is x + m T for some T."""
    short = linear_model((3, linear("ghosted", 2)))
    short.llama.model.layers[2] = Residual(linear("ghosted", 1), 2)
    held = torch.tensor(random_windows(2, 20, seed=7))
    before = short.decoder.logits(held)
    replaceme.heal(short, [3], random_windows(6, 40))
    assert 3 not in short.kept
    assert torch.allclose(short.decoder.logits(held), before, atol=2e-3)


def test_word_problems_known_answers(tmp_path, monkeypatch):
    texts = ["It is 5.", "so $1,234.50.", "a -3 b", "none...", "7 eggs, 10-3", "18, or 9"]
    numbers = [word_problems.last_number(text) for text in texts]
    assert numbers == [5, 1234.5, -3, None, 3, 9]
    rows = [{"context": f"{i}?", "answer": answer} for i, answer in enumerate(["1,200", "7", "7"])]
    tmp_path.joinpath("svamp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = word_problems.read(tmp_path, "svamp", 3)
    assert word_problems.read(tmp_path, "svamp", 1) == problems[:1]
    answers = ["It is 1200.", "7 or 8", "who knows"]
    monkeypatch.setattr(word_problems, "BATCH", 2)
    monkeypatch.setattr(
        word_problems, "answers", lambda _, batch: [answers[problems.index(p)] for p in batch]
    )
    found = word_problems.asked(SimpleNamespace(), problems)
    assert found == {"exact_match": [1, 0, 0], "well_formed": [1, 1, 0]}


@pytest.mark.filterwarnings("default")  # transformers' own
def test_word_problems_are_answered_together_as_alone(tmp_path, monkeypatch, one_rank):
    save_chat_llama(tmp_path, 4, "{% for m in messages %}<s>{{ m.content }}>{% endfor %}")
    monkeypatch.setattr(word_problems, "TOKENS", 12)
    short = open_model(str(tmp_path / "hf"), device="cpu")
    short.tokenizer.pad_token = short.tokenizer.eos_token
    problems = [word_problems.Problem(text, "1") for text in ("Two?", "How many are left?", "1")]
    alone = []
    for problem in problems:
        ids = short.tokenizer(f"<s>{problem.question}>", add_special_tokens=False)["input_ids"]
        alone.append(short.decode(short.greedy(ids, 12)))
    assert len(set(alone)) == 3
    assert word_problems.answers(short, problems) == alone
