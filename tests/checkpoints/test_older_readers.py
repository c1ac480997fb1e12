"""Directories that this library writes, in older programs and in others: the same model there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import without_us
from conftest import BYTE_VOCAB, make_transformer, random_windows, save_byte_llama
from families import DROP, FAMILIES, TOKENS, make
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama.formats.hf import for_older_readers, meta_to_hf
from short_gpt import ShortHFModel
from short_gpt.jobs import convert, heal, prune, shrink

pytestmark = pytest.mark.usefixtures("few_timed_tokens")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
THETA = {"rope_theta": 500.0}
# Entries that transformers 4.57 writes and reads. Version 5 reads them and writes others.
OLDER: dict[str, dict] = {
    "llama": THETA | {"rope_scaling": LLAMA3},
    "gemma3": THETA | {"rope_local_base_freq": 50.0},
    "gpt_neox": {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    "phi": THETA | {"partial_rotary_factor": 0.25},
    "phi3": THETA | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "qwen3_moe": THETA | {"num_experts": 4},
    "gemma3, wrapped": THETA | {"rope_local_base_freq": 50.0},
}
WINDOWS = {"eval_data": "book.txt", "size": 16, "max_windows": 8, "eval_windows": 4}
HOW = {"data": "book.txt"}
ROUTES = {
    "convert-meta": lambda out: convert("meta", out),
    "convert-gguf": lambda out: convert("model.gguf", out, to="hf"),
    "prune-files": lambda out: prune("new", out, layers=[1]),
    "heal": lambda out: heal("new", out, layers=[1], **WINDOWS, **HOW),
    "shrink": lambda out: shrink("model.gguf", out, n=1, method="bi", **WINDOWS, **HOW),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory, one_rank):
    """A Llama with another theta than 10,000: from Meta, in GGUF, as transformers 5 saves it."""
    folder = tmp_path_factory.mktemp("older")
    model = make_transformer(vocab_size=BYTE_VOCAB, rope_theta=100000.0)
    write_gguf(folder / "model.gguf", model)
    hf = meta_to_hf(save_byte_llama(folder / "meta", model), folder / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(hf)
    theirs.config.mine = "kept"
    theirs.save_pretrained(folder / "new")
    tokenizer = AutoTokenizer.from_pretrained(hf, additional_special_tokens=["<tool>"])
    tokenizer.save_pretrained(folder / "new")
    ids = random_windows(1, 900, vocab=26)[0]
    (folder / "book.txt").write_text("".join(chr(97 + token) for token in ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def written(here) -> Path:
    """A folder with what every route writes, and what `without_us` is to find with it."""
    for name, write in ROUTES.items():
        out = here / "written" / name
        out.parent.mkdir(exist_ok=True)
        write(str(out))
        short = ShortHFModel(out)
        expect(out, short, AutoTokenizer.from_pretrained(out)(without_us.TEXT)["input_ids"])
    return here / "written"


def expect(out: Path, short: ShortHFModel, ids: list[int] | None = None) -> None:
    expected = short.decoder.logits(TOKENS).log_softmax(-1)
    torch.save({"tokens": TOKENS, "expected": expected, "ids": ids}, out / "expected.pt")


def saved(family: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """What is written of a pruned model of a family, its rotary settings not the usual ones."""
    kind, arguments = FAMILIES[family]
    patch.setitem(FAMILIES, family, (kind, {**arguments, **deepcopy(OLDER.get(family, THETA))}))
    short = ShortHFModel(make(family))
    short.remove_layers(DROP)
    out = short.save_pretrained(folder / family.replace(", ", "-"))
    expect(out, short)
    return out


@pytest.mark.parametrize("family", OLDER)
def test_the_entries_of_transformers_4_come_back(family, tmp_path, monkeypatch):
    config = json.loads((saved(family, tmp_path, monkeypatch) / "config.json").read_text())
    entries = OLDER[family] | {"torch_dtype": "float32", "dtype": "float32"}
    text = {**config.get("text_config", {}), **config}
    assert {key: text.get(key) for key in entries} == entries


def test_sections_of_images_are_in_the_scaling_that_older_programs_ask_for(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {"model_type": "qwen2_vl_text", "rope_parameters": rotary}
    whole = {"model_type": "qwen2_vl", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    for_older_readers(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert found["rope_scaling"] == {"rope_type": "default", "mrope_section": [1, 1, 2]}
    assert found["rope_theta"] == 1e6 and found["rope_parameters"] == rotary


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_writes_what_older_programs_read(route, written):
    config = json.loads((written / route / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (100000.0, "float32")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    words = json.loads((written / route / "tokenizer_config.json").read_text())
    assert words.get("tokenizer_class") in ("PreTrainedTokenizerFast", None)
    assert not isinstance(words.get("extra_special_tokens"), list)
    if route in ("prune-files", "heal"):  # both from "new"
        assert config["mine"] == "kept" and words["additional_special_tokens"] == ["<tool>"]


def test_the_oldest_transformers_computes_the_same(written, tmp_path, monkeypatch):
    """OLDEST_TRANSFORMERS is a folder that holds it, as .ci/run installs it."""
    if (old := os.environ.get("OLDEST_TRANSFORMERS")) is None:
        pytest.skip("OLDEST_TRANSFORMERS names no folder")
    for family in FAMILIES:
        saved(family, tmp_path, monkeypatch)
    for folder in (written, tmp_path):
        command = [sys.executable, without_us.__file__, str(folder)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": old}, check=True, stdout=-1)
        found = json.loads(done.stdout)
        assert found.pop("version").startswith("4.")
        assert found.keys() == {path.name for path in folder.iterdir()}
        assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("route", ROUTES)
def test_mlx_lm_computes_the_same(route, written):
    mlx_lm, mlx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    model, _ = mlx_lm.load(str(written / route))
    given = torch.load(written / route / "expected.pt")
    logits = torch.tensor(model(mlx.array(given["tokens"].tolist())).tolist())
    assert (logits.log_softmax(-1) - given["expected"]).abs().max() < 1e-3
