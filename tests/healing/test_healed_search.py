"""The search whose candidates are scored as healed: its losses are those of healed models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import CharTokenizer, interrupted, make_transformer, random_windows, zero_layer
from families import make

from llama.model import TransformerBlock
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.healing import search_healed
from short_gpt.healing.gap_refit import GapRefits
from short_gpt.healing.refit import fit
from short_gpt.healing.solving import RIDGES
from short_gpt.models.layer_hooks import mlp_output, transposed
from short_gpt.models.numbering import runs
from short_gpt.runtime.state import StateFile
from short_gpt.selection.search import sleb
from short_gpt.selection.stack import Stack
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

SCORED = random_windows(3, 16)
FITTED, HELD = random_windows(10, 18, seed=3), random_windows(3, 18, seed=5)


def meta(layers: int = 7) -> ShortLlama:
    model = make_transformer(n_layers=layers)
    return ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))


def refits(short, **options) -> GapRefits:
    return GapRefits(short.decoder, FITTED, HELD, **options)


def solved_by_hand(short, start: int, end: int, ridge: float, factor: float):
    """The change (F + bias, D) of the MLP's last matrix in front of a gap, from all tokens."""
    layers, inputs, states = short.decoder.layers, [], {start - 1: [], end: []}
    handles = [mlp_output(layers[start - 1]).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]).double())
    )]  # fmt: skip
    for place, found in states.items():
        handles.append(layers[place].register_forward_hook(
            lambda _, __, out, found=found: found.append(
                (out if isinstance(out, torch.Tensor) else out[0]).flatten(0, 1).double()
            )
        ))  # fmt: skip
    with torch.no_grad():
        short.decoder.run(torch.tensor(FITTED))
    for handle in handles:
        handle.remove()
    x, given, target = inputs[0], states[start - 1][0], states[end][0]
    if getattr(mlp_output(layers[start - 1]), "bias", None) is not None:
        x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    root = 1 / target.norm(dim=1, keepdim=True)
    x, rest = x * root, (target - given) / factor * root
    penalty = ridge * x.pow(2).sum() / x.shape[1]
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).double(), x.T @ rest)


@torch.no_grad()
def really_healed(build, gone: list[int], ridge: float, factor: float) -> float:
    """Mean loss of a model whose weights are changed and whose layers are removed."""
    short = build()
    changes = {
        start - 1: solved_by_hand(short, start, end, ridge, factor)
        for start, end in runs(gone, short.kept)
    }
    for front, change in changes.items():
        module = mlp_output(short.decoder.layers[front])
        if getattr(module, "bias", None) is not None:
            module.bias += change[-1].float()
            change = change[:-1]
        module.weight += (change if transposed(module) else change.T).float()
    short.remove_layers(gone)
    found = perplexity(short.decoder, [[w] for w in SCORED])
    return found.nats / found.tokens


@pytest.mark.parametrize("family", ["meta", "gpt2", "granite"])
@pytest.mark.parametrize("max_memory", [1, 2**31])
def test_losses_are_those_of_models_really_healed(family, max_memory):
    factor = 0.22 if family == "granite" else 1.0

    def build():
        short = meta() if family == "meta" else ShortHFModel(make(family))
        if family == "granite":
            for layer in short.decoder.layers:
                layer.residual_multiplier = factor
        return short

    short = build()
    mending = GapRefits(short.decoder, FITTED, FITTED, ridges=(0.1,))
    found = sleb(short.decoder, SCORED, 3, mending=mending, max_memory=max_memory)
    tried = [(found.removed[:i], j) for i, losses in enumerate(found.losses) for j in losses]
    assert len(runs(found.removed, short.kept)) < 3  # some gap is longer than a layer
    for gone, j in tried if family == "meta" else tried[-3:]:
        loss = really_healed(build, [*gone, j], 0.1, factor)
        assert found.losses[len(gone)][j] == pytest.approx(loss, abs=2e-5)
        assert found.losses[len(gone)][j] >= found.losses[len(gone)][found.removed[len(gone)]]


def test_in_front_of_a_gap_the_refit_is_that_of_the_whole_refit():
    short = meta()
    whole = fit(short, [3, 4], FITTED, held=HELD, parts=("mlp",), progress=False)
    mending = refits(short, ridges=RIDGES)
    mending.prepare([(3, 4)])
    with mending.mended([(3, 4)]):
        weight = short.decoder.layers[2].feed_forward.w2.weight
        assert torch.allclose(weight, whole.values[2, "feed_forward.w2.weight"], atol=1e-6)


def linear_in_front() -> ShortLlama:
    """Layer 2 adds a linear map of what layer 1's last matrix is given; layer 3 adds less."""
    short = meta(5)
    layers = short.decoder.layers
    zero_layer(short.decoder.module, 1)
    with torch.no_grad():
        for i in (2, 3):
            layers[i].attention.wo.weight.zero_()
        for part in ("ffn_norm.weight", "feed_forward.w1.weight", "feed_forward.w3.weight"):
            ours, theirs = (dict(layers[i].named_parameters())[part] for i in (2, 1))
            ours.copy_(theirs)
        layers[3].feed_forward.w2.weight.mul_(0.4)
    return short


def test_a_layer_that_costs_more_as_cut_but_nothing_healed_is_removed_first():
    short, options = linear_in_front(), {"candidates": [2, 3], "progress": False}
    # the model's own words: whatever changes it costs something
    windows = [[*ids, *short.greedy(list(ids), 40)] for ids in random_windows(6, 3, seed=8)]
    found = perplexity(short.decoder, [windows])
    whole = found.nats / found.tokens
    raw = short.search(windows, 1, **options)
    assert raw.removed == [3] and whole + 0.1 < raw.losses[0][3] < raw.losses[0][2] - 0.5
    mending = refits(short, ridges=(1e-6,))
    healed = short.search(windows, 1, method="sleb_healed", mending=mending, **options)
    assert healed.removed == [2]
    assert (
        healed.losses[0][2] == pytest.approx(whole, abs=1e-4) and healed.losses[0][3] > whole + 0.1
    )


def test_the_model_is_left_as_it_was_to_the_very_parameters():
    short = meta()
    before = {name: (id(p), p.detach().clone()) for name, p in short.llama.model.named_parameters()}
    search_healed(short, SCORED, 2, fitted_on=FITTED, progress=False)
    for name, parameter in short.llama.model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("stop_at", [2, 8])
def test_an_interrupted_search_continues_bit_for_bit(tmp_path, stop_at):
    options = {"fitted_on": FITTED, "progress": False}
    whole = search_healed(meta(), SCORED, 3, **options)
    with interrupted(Stack, "nats", stop_at):
        search_healed(meta(), SCORED, 3, state=StateFile(tmp_path / "s", {}), **options)
    state = StateFile(tmp_path / "s", {})
    assert search_healed(meta(), SCORED, 3, state=state, **options) == whole


@pytest.mark.parametrize("max_memory", [1, 2**31])
def test_evaluations_are_the_layers_run_in_trials_and_in_fits(monkeypatch, max_memory):
    ran, plain = [], TransformerBlock.forward

    def counted(self, x, *args, **kwargs):
        ran.append(len(x))
        return plain(self, x, *args, **kwargs)

    short = meta()
    mending = refits(short)
    prove = mending._find_end

    def uncounted(*args):
        before = len(ran)
        prove(*args)
        del ran[before:]  # of the proof that the MLP is a summand, on a few tokens

    monkeypatch.setattr(mending, "_find_end", uncounted)
    mending._calls._of_shape(torch.Size((1, 18)))  # what layers are called with
    Stack(short.decoder)
    monkeypatch.setattr(TransformerBlock, "forward", counted)
    looked = Stack(short.decoder) and len(ran)
    found = sleb(short.decoder, SCORED, 3, mending=mending, max_memory=max_memory)
    assert found.evaluations == len(ran) - 2 * looked


def test_every_fourth_window_scores_and_the_others_are_fitted_on():
    every = random_windows(9, 16)
    rest = [w for i, w in enumerate(every) if i not in (0, 4, 8)]
    split = search_healed(meta(), every, 1, progress=False)
    given = search_healed(meta(), [every[i] for i in (0, 4, 8)], 1, fitted_on=rest, progress=False)
    assert split == given
    with pytest.raises(ValueError, match="at least 2 windows to refit on .* got 1: give more"):
        search_healed(meta(), every[:2], 1, progress=False)


def test_only_gaps_that_a_round_tries_are_held():
    short = meta()
    mending = refits(short)
    mending.prepare([(1, 1), (2, 3)])
    first = mending._values[2, 3]
    mending.prepare([(2, 3), (4, 4)])
    assert set(mending._values) == {(2, 3), (4, 4)} and mending._values[2, 3] is first
    assert mending.layers_run([(1, 1), (2, 3)]) == 4 * 13 and mending.layers_run([]) == 0


def test_what_cannot_be_healed_so_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="the first 2 layers begin the model"):
        refits(meta()).prepare([(0, 1)])
    gemma = ShortHFModel(make("gemma2"))
    with pytest.raises(ValueError, match="cannot be scored as healed: .* search by sleb"):
        search_healed(gemma, SCORED, 1, fitted_on=FITTED, progress=False)
    with pytest.raises(ValueError, match="needs what heals: short_gpt.healing.search_healed"):
        meta().search(SCORED, 1, method="sleb_healed", progress=False)
    short = meta()
    with pytest.raises(ValueError, match="the search by sleb scores models as cut"):
        short.search(SCORED, 1, mending=refits(short), progress=False)
