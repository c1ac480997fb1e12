"""Healed models back in GGUF: what changed in its type, all else byte for byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from commands import TEXT, fails, run
from conftest import BYTE_VOCAB, make_transformer, random_windows, refuses
from gguf_families import FAMILIES, LAYERS, make, write_model
from gguf_files import data, in_types, stack_file, write_gguf

from llama.formats.gguf_read import GGUFParts
from llama.formats.gguf_write import writable
from short_gpt import ShortHFModel
from short_gpt.checkpoints import Provenance
from short_gpt.data import demo
from short_gpt.models.decoder import WeightChange
from short_gpt.models.gguf_loading import ARCHITECTURES

KINDS = gguf.GGMLQuantizationType
MAPPED = {arch for arch, row in ARCHITECTURES.items() if row.healed}


def opened(path: Path) -> ShortHFModel:
    return ShortHFModel(path, dtype=torch.float32)


@pytest.mark.parametrize("family", sorted(MAPPED & FAMILIES.keys()))
def test_every_weight_goes_back_to_where_it_came_from(tmp_path, family):
    """In float32, with heads of queries and keys in the file's order: the same bytes again."""
    width = {"head_dim": 128} if family == "qwen3" else {}  # transformers reads no other here
    model = make(family, num_hidden_layers=2, **width)
    path = write_model(tmp_path / "m.gguf", family, model)
    short = ShortHFModel(model) if family == "olmo2" else opened(path)
    short.source = str(path)  # of OLMo 2, whose GGUF files transformers does not read
    layers = enumerate(short.decoder.layers)
    every = {(number, name) for number, layer in layers for name, _ in layer.named_parameters()}
    short.note_change(WeightChange({"method": "by hand"}, frozenset(every)))
    short.save(tmp_path / "again.gguf")
    ours, theirs = data(tmp_path / "again.gguf"), data(path)
    for name in theirs:  # a norm that is stored plus one loses its last bit on the way
        one, other = (np.frombuffer(found[name], np.float32) for found in (ours, theirs))
        assert np.allclose(one, other, rtol=3e-7 if "norm" in name else 0, atol=0), name
    assert Provenance.of_checkpoint(tmp_path / "again.gguf").healing == [{"method": "by hand"}]


def test_all_that_is_healed_was_tried():
    assert {arch for arch, *_ in FAMILIES.values()} >= MAPPED


def test_changed_tensors_keep_their_type_where_it_can_be_written(tmp_path):
    """Q4_0 stays, Q3_K goes to Q4_K; what did not change is not touched."""
    model = make("qwen2", num_hidden_layers=3, hidden_size=256, intermediate_size=256)
    plain = write_model(tmp_path / "plain.gguf", "qwen2", model)
    kinds = {"1.ffn_down": KINDS.Q4_0, "2.ffn_down": KINDS.Q3_K, "ffn_up": KINDS.Q3_K}
    path = in_types(plain, tmp_path / "m.gguf", kinds)
    short = opened(path)
    short.remove_layers([0])
    changed_layers = short.decoder.layers
    with torch.no_grad():
        for layer in changed_layers:
            layer.mlp.down_proj.weight.copy_(torch.randn(256, 256))
    names = frozenset((number, "mlp.down_proj.weight") for number in (1, 2))
    short.note_change(WeightChange({"method": "by hand"}, names))
    short.save(tmp_path / "out.gguf")
    before, after = GGUFParts(path), GGUFParts(tmp_path / "out.gguf")
    assert after.tensors["blk.0.ffn_down.weight"].kind == KINDS.Q4_0
    assert after.tensors["blk.1.ffn_down.weight"].kind == KINDS.Q4_K
    for place, bound in ((0, 0.5), (1, 0.35)):
        weight = changed_layers[place].mlp.down_proj.weight
        found = after.read(f"blk.{place}.ffn_down.weight")
        assert 0 < (found - weight).abs().max() < bound
    ours, theirs = data(tmp_path / "out.gguf"), data(path)
    for name in after.tensors:
        old = name.replace("blk.1", "blk.2").replace("blk.0", "blk.1")
        if "ffn_down" not in name:
            assert ours[name] == theirs[old], name
            assert after.tensors[name].kind == before.tensors[old].kind


@pytest.mark.parametrize(
    ("kind", "shape", "found"),
    [
        (KINDS.F32, (4, 8), KINDS.F32),
        (KINDS.Q4_1, (4, 64), KINDS.Q4_1),
        (KINDS.Q6_K, (4, 256), KINDS.Q6_K),
        (KINDS.IQ4_XS, (4, 256), KINDS.Q4_K),
        (KINDS.MXFP4, (4, 320), KINDS.Q8_0),
        (KINDS.IQ4_NL, (4, 64), KINDS.Q8_0),
        (KINDS.Q8_0, (4, 40), KINDS.F16),
        (KINDS.Q4_K, (4, 40), KINDS.F16),
        (KINDS.F64, (256,), KINDS.F32),
    ],
)
def test_the_type_that_a_tensor_is_written_in(kind, shape, found):
    assert writable(kind, shape) == found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = make_transformer(vocab_size=BYTE_VOCAB)
    write_gguf(tmp_path / "plain.gguf", model)
    in_types(Path("plain.gguf"), Path("model.gguf"), {"ffn_down": KINDS.Q8_0})
    for name, text in (("a", TEXT), ("b", TEXT.upper())):
        Path("books").mkdir(exist_ok=True)
        Path(f"books/{name}.txt").write_text(text * 3)
    return tmp_path


HEAL = ("--data", "books", "--size", 32, "--max_windows", 20, "--eval_windows", 4)
HEALED = ("--layers", "2,3", *HEAL, "--heal_by", "patch", "--json", "healed.json")


def check_rounding(found: dict, said: str) -> None:
    """A Q8_0 tensor was rounded after all else was measured: the file was read again."""
    assert "written: out.gguf" in said
    before, after = (found["perplexity"][state] for state in ("healed", "as written"))
    assert before != after == pytest.approx(before, rel=0.05)
    assert found["quantization"]["nats"] == pytest.approx(math.log(after / before))
    row = next(line for line in said.splitlines() if line.startswith("as written"))
    assert row.split()[2] == f"{after:.3f}" and row.split()[-1] == "4"  # windows
    assert "writing it in the file's own types changes the loss by" in said


@pytest.mark.parametrize("source", ["model.gguf", "demo"])
def test_heal_writes_what_it_changed_into_a_copy_of_the_file(source, here, capsys, monkeypatch):
    monkeypatch.setattr(demo, "gguf_file", lambda: here / "model.gguf")
    run("heal", source, "out.gguf", *HEALED)
    check_rounding(json.loads(Path("healed.json").read_text())["result"], capsys.readouterr().out)
    record = Provenance.of_checkpoint("out.gguf")
    assert record.removed_layers == [2, 3] and record.steps[0]["method"] == "patch"
    before, after = data(Path("model.gguf")), data(Path("out.gguf"))
    old = {name: name.replace("blk.2", "blk.4") for name in after}
    assert [n for n in after if after[n] != before[old[n]]] == ["blk.1.ffn_down.weight"]
    kinds = GGUFParts(Path("out.gguf")).tensors
    assert kinds["blk.1.ffn_down.weight"].kind == KINDS.Q8_0
    capsys.readouterr()
    run("prune", "model.gguf", "cut.gguf", "--layers", "2,3")
    cut, healed = (opened(Path(f"{name}.gguf")) for name in ("cut", "out"))
    window = [cut.encode(TEXT)[:32]]
    assert cut.perplexity(window).value != healed.perplexity(window).value


def test_preset_small_trains_output_projections_where_more_would_be_rounded(here):
    names = ("attn_q", "attn_output", "ffn_up", "ffn_down", "ffn_gate")
    in_types(Path("plain.gguf"), Path("few.gguf"), dict.fromkeys(names, KINDS.Q4_0))
    Path("random").mkdir()
    for seed in range(4):
        letters = random_windows(1, 900, vocab=26, seed=seed)[0]
        Path(f"random/{seed}.txt").write_text("".join(chr(97 + i) for i in letters))
    data = ("--data", "random", *HEAL[2:])
    how = ("--layers", "2,3", *data, "--heal_by", "lora", "--recipe", "small,steps=1")
    for name, modules in (("plain", ["all"]), ("few", ["outputs"])):
        run("heal", f"{name}.gguf", f"{name}-out.gguf", *how, "--json", f"{name}.json")
        (step,) = json.loads(Path(f"{name}.json").read_text())["result"]["healing"]
        assert step["recipe"]["modules"] == modules


@pytest.fixture
def gemma(here) -> Path:
    """A Gemma 3 with norms behind its halves, and a text of letters that it has tokens of."""
    letters = np.random.default_rng(0).integers(97, 123, 2000).astype(np.uint8).tobytes().decode()
    for name, text in (("a", letters), ("b", letters[::-1])):
        Path(f"books/{name}.txt").write_text(text)
    return write_model(here / "gemma.gguf", "gemma3", make("gemma3", num_hidden_layers=5))


REFIT = ("heal", "gemma.gguf", "out.gguf", "--layers", "2", *HEAL, "--json", "healed.json")


def test_heal_writes_the_norms_behind_the_halves(gemma, capsys):
    run(*REFIT)
    assert "original, 5 layers: perplexity " in capsys.readouterr().err
    found = json.loads(Path("healed.json").read_text())["result"]
    assert any(fit["norm_ridge"] is not None for fit in found["healing"][0]["fits"])
    values = found["perplexity"]
    assert values["as written"] == pytest.approx(values["healed"], 1e-5)
    assert values["healed"] != values["pruned, 4 layers"]
    assert not Path("out.gguf.refit").exists()


def test_what_cannot_be_written_back_is_refused_before_the_model_is_opened(here, capsys):
    write_model(here / "granite.gguf", "granite", make("granite"))
    stack_file(here / "laguna.gguf", "laguna")
    for name, said in (("granite", "of granite"), ("laguna", "of laguna")):
        line = fails(capsys, "heal", f"{name}.gguf", "out.gguf", "--layers", "2", *HEAL)
        assert f"{said}: name a directory instead" in line
        assert "written to GGUF files of gemma2, gemma3, llama" in line
        how = ("--n", 2, "--data", "a.txt", "--dry_run")
        assert f"{said}: name a" in fails(capsys, "shrink", f"{name}.gguf", "out.gguf", *how)
    stack_file(here / "large.gguf", "gemma2", 46)
    line = fails(capsys, "shrink", "large.gguf", "out.gguf", *how)
    assert "no layers of large.gguf can be removed: llama.cpp tells variants of gemma2" in line
    line = fails(capsys, "heal", "model.gguf", "out.gguf", "--layers", "9", *HEAL)
    assert "layers [9] do not exist" in line


def test_what_is_not_written_to_gguf_is_said_before_anything_is_done(here, capsys):
    run("convert", "model.gguf", "meta")
    capsys.readouterr()
    line = fails(capsys, "heal", "meta", "out.gguf", "--layers", "2", *HEAL)
    assert "out.gguf is written from a GGUF file alone: heal into a directory" in line
    Path("out.gguf").write_text("mine")
    line = fails(capsys, "heal", "model.gguf", "out.gguf", "--layers", "2", *HEAL, "--overwrite")
    assert "out.gguf exists and is not what this would write" in line


def test_weights_without_a_place_are_refused_by_name(tmp_path):
    path = write_model(tmp_path / "m.gguf", "granite", make("granite", num_hidden_layers=2))
    short = ShortHFModel(make("granite", num_hidden_layers=2))
    short.source = str(path)
    norm = frozenset({(1, "input_layernorm.weight")})
    short.note_change(WeightChange({"method": "by hand"}, norm))
    message = "written to GGUF files of gemma2.* is of granite: name a directory"
    refuses(message, short.save, tmp_path / "out.gguf")
    other = ShortHFModel(make("llama", num_hidden_layers=LAYERS))
    other.source = str(path)
    refuses("has 2 layers, this model began with 8", other.save, tmp_path / "out.gguf")
    other.source = "llama-2-7b"
    refuses("is written from a GGUF file, got llama-2-7b", other.save, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
