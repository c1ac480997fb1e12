"""The comparison with other tools: what each row runs and says; their packages are not needed."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import BYTE_VOCAB, make_transformer, save_checkpoint, write_byte_tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.baselines import peers
from short_gpt import ShortHFModel, heal_refit

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_rank")]
OURS = ("ShortGPT, Block Influence", "ShortGPT, Block Influence and refit")


@pytest.fixture
def run(tmp_path, monkeypatch) -> peers.Run:
    """Our own rows, on a tiny model and book."""
    model = make_transformer(vocab_size=BYTE_VOCAB, n_layers=5)
    write_byte_tokenizer(save_checkpoint(tmp_path / "model", model))
    monkeypatch.setattr(peers.demo, "checkpoint", lambda: tmp_path / "model")
    books = {"calibration": ["abcdefgh " * 60, "ijklmnop " * 60], "held_out": ["qrstuv " * 60]}
    monkeypatch.setattr(peers.demo, "bible", lambda part="calibration": books[part])
    monkeypatch.setattr(peers, "TOOLS", {name: peers.TOOLS[name] for name in OURS})
    return peers.Run(tmp_path, 24, 8, 4, str(tmp_path / "state.json"))


def test_a_row_is_what_its_snippet_writes(run, tmp_path):
    rows = run.rows(2)
    assert [row["lines"] for row in rows.values()] == [5, 6]
    for heals, row in zip((False, True), rows.values(), strict=True):
        short = ShortHFModel(tmp_path / "original", n_prune_layers=2)
        original = short.perplexity(run.judged, progress=False)
        short.measure(run.learned, progress=False)
        layers = short.layers_to_remove()
        if heals:
            heal_refit(short, layers, run.learned, progress=False)
        else:
            short.remove_layers(layers)
        expected = short.perplexity(run.judged, progress=False)
        assert row["layers"] == sorted(layers)
        assert row["perplexity"] == pytest.approx(expected.value, rel=1e-5)
        change = math.log(expected.value / original.value)
        assert row["nats"] == pytest.approx(change, abs=1e-5)
    assert not (tmp_path / "cut").exists() and (tmp_path / "original").is_dir()


def test_rows_are_measured_once(run, tmp_path, monkeypatch):
    rows = run.rows(2)
    del run.cells
    monkeypatch.setattr(peers, "window_losses", lambda *_: pytest.fail("it is known"))
    again = peers.Run(tmp_path / "again", 24, 8, 4, str(tmp_path / "state.json"))
    assert again.rows(2) == rows


def test_only_layers_that_change_nothing_are_zero():
    for family in peers.FAMILIES:
        model = peers.tiny(family, [1, 4])
        expected = peers.predicted(model)
        layers = [layer for i, layer in enumerate(model.model.layers) if i not in (1, 4)]
        model.model.layers = torch.nn.ModuleList(layers)
        if family == "gemma3_text":  # the model tells its masks by the config's kinds
            kinds = model.config.layer_types
            model.config.layer_types = [k for i, k in enumerate(kinds) if i not in (1, 4)]
        model.config.num_hidden_layers = 10
        assert (peers.predicted(model) - expected).abs().max() < peers.EXACT
        model.model.layers = torch.nn.ModuleList(layers[1:])
        model.config.num_hidden_layers = 9
        assert (peers.predicted(model) - expected).abs().max() > 0.01


def test_our_cut_of_layers_of_two_kinds_predicts_the_same(tmp_path):
    for family in peers.FAMILIES:
        model = peers.tiny(family, [1, 4])
        model.save_pretrained(tmp_path / family)
        peers.prune_hf(tmp_path / family, tmp_path / f"{family}-cut", [1, 4])
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-cut")
        assert (peers.predicted(again) - peers.predicted(model)).abs().max() < peers.EXACT


def test_cuts_of_the_same_layers_that_differ_are_missed():
    row = {"layers": [1, 2], "nats": 0.5}
    rows = {"4": {name: dict(row) for name in peers.TOOLS}}
    content = {"rows": rows, "gemma3_gguf": [], "families": {}}
    assert peers.limits(content) == []
    rows["4"]["llama.cpp, GGUF"]["nats"] = 0.6
    rows["4"]["OptiPFair, its scores"] = {"layers": [1, 3], "nats": 0.7}  # other layers
    assert peers.limits(content) == ["4 layers: the GGUF cuts of the same layers differ"]
    rows["4"]["OptiPFair, its scores"]["layers"] = [1, 2]
    assert len(peers.limits(content)) == 2
    content["families"] = {"gemma3_text": {"ours": {"in_memory": 0.0, "from_files": 0.1}}}
    content["gemma3_gguf"] = [{"removed": [1, 4], "ours": {"difference": 0.5}}]
    assert len(peers.limits(content)) == 4
