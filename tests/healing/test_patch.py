"""The patch: known answers, every family, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows, share_model, short_llama, states_of, zero_layer
from families import FAMILIES, make

from short_gpt.healing import PatchSettings, heal_patch, refit
from short_gpt.healing.refit import Refit, apply_refit
from short_gpt.healing.settings import RIDGES
from short_gpt.models.layer_calls import mlp_output
from short_gpt.models.numbering import runs
from short_gpt.wrappers.short_hf import ShortHFModel

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

WINDOWS, HELD = random_windows(12, 16), random_windows(4, 16, seed=5)
TOKENS = torch.tensor(random_windows(2, 16, seed=9))
EXPERTS = ["mixtral", "qwen3_moe", "llama4", "gpt_oss", "qwen3_next"]  # no single down_proj
PATCHED = [name for name in FAMILIES if name != "mamba"]


def fit(short, layers, windows=WINDOWS, **options) -> Refit:
    options = {"held": HELD, "progress": False, **options}
    return refit.fit(short, layers, windows, settings=PatchSettings(), **options)


def test_runs_of_consecutive_layers():
    assert runs([7, 3, 4, 9], range(12)) == [(3, 4), (7, 7), (9, 9)]
    assert runs([5, 3], [0, 3, 5, 8]) == [(1, 2)]  # what was removed earlier joins its neighbours


def test_layers_that_add_nothing_need_no_patch():
    short = short_llama()
    for layer in (2, 3):
        zero_layer(short.decoder.model, layer)
    before = short.decoder.logits(TOKENS)
    patch = heal_patch(short, [3, 2], WINDOWS, progress=False)
    assert [(found.layer, found.changed) for found in patch.fits] == [(1, False)]
    assert short.kept == [0, 1, 4] and not patch.values
    assert torch.equal(short.decoder.logits(TOKENS), before)


@pytest.mark.parametrize("family", ["meta", *PATCHED])
def test_the_share_is_what_the_folded_model_does(family):
    """On held-out windows, of the state after the gap, weighted by the target or what is there."""
    short = short_llama() if family == "meta" else ShortHFModel(make(family))
    target = states_of(short, HELD)[4].double()  # leaving layer 3
    patch = fit(short, [2, 3])
    (found,) = patch.fits
    assert (found.layer, found.part) == (1, "attention" if family in EXPERTS else "mlp")
    off, scale = [], target.norm(dim=-1)
    with short.without_layers(patch.layers):
        if not short.decoder.family.mlp_norm_after:
            scale = torch.minimum(scale, 2 * states_of(short, HELD)[2].double().norm(dim=-1))
        for _ in range(2):
            left = (states_of(short, HELD)[2].double() - target).norm(dim=-1)
            off.append((left / scale).pow(2).sum())
            undo = apply_refit(short, patch)
        undo()
    if family in EXPERTS:  # what the MLP makes of another attention is not counted
        assert found.changed
        return
    assert found.changed == (found.restored_held > 0)
    assert found.restored_held == pytest.approx(float(1 - off[1] / off[0]), abs=1e-3)


def test_of_every_gap_the_layer_before_is_solved_on_the_original_models_states():
    """What one gap changes does not change what the next is solved on: each is as if alone."""
    both = fit(short_llama(), [4, 2])
    assert [found.layer for found in both.fits] == [1, 3]
    for gap, layer in ((2, 1), (4, 3)):
        alone = fit(short_llama(), [gap])
        assert [found.layer for found in alone.fits] == [layer]
        for key, value in alone.values.items():
            assert torch.equal(value, both.values[key])
    assert len(both.values) == 2


def test_before_the_first_gap_it_is_the_refit():
    ours = fit(short_llama(), [2])
    options = {"parts": ("mlp",), "ridge": RIDGES, "step_size": 1.0}
    theirs = refit.fit(short_llama(), [2], WINDOWS, held=HELD, **options, progress=False)
    assert ours.fits == theirs.fits[:1]
    assert all(torch.equal(value, theirs.values[key]) for key, value in ours.values.items())


def test_after_an_earlier_removal():
    short = short_llama()
    short.remove_layers([2])
    patch = heal_patch(short, [3], WINDOWS, progress=False)
    assert [found.layer for found in patch.fits] == [1]
    assert short.kept == [0, 1, 4]


def test_other_refusals(monkeypatch):
    short = short_llama()
    with pytest.raises(ValueError, match="windows to fit on = 0: expected 1 or more"):
        fit(short, [2], [])
    with pytest.raises(ValueError, match="layer 0 cannot be patched: it begins the model"):
        fit(short, [1, 0])
    share_model(monkeypatch, 2)
    with pytest.raises(ValueError, match="a refit needs the whole model on every rank, got 2"):
        fit(short_llama(), [2])


def test_an_output_projection_that_cannot_be_read_is_refused():
    layer = make("llama").model.layers[0]
    with pytest.raises(ValueError, match="not in memory: open the model without stream"):
        mlp_output(layer.to("meta"))
    eight_bit = torch.nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    layer.mlp.down_proj.weight = eight_bit
    with pytest.raises(ValueError, match="Linear of torch.int8: load the model"):
        mlp_output(layer)
