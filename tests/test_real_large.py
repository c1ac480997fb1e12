"""A second real family, Qwen2.5-Coder-0.5B-Instruct: ranked, cut, refitted, opened by llama.cpp.

Its GGUF file has 491 MB, and transformers takes minutes and 4 GB to read it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_cpp import LlamaCpp

from benchmarks.lib.real_models import MODELS
from short_gpt import open_model, shrink
from short_gpt.checkpoints import Provenance, prune_checkpoint
from short_gpt.checkpoints.gguf import Stack
from short_gpt.jobs import ShrinkResult

pytestmark = pytest.mark.real_large
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "In the year 1492, Columbus"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("qwen")


@pytest.fixture(scope="module")
def done(folder) -> ShrinkResult:
    """Three layers less: ``cut.gguf``, and refitted ``refitted.gguf``."""
    torch.set_num_threads(2)
    read = {"eval_data": "demo", "size": 128, "max_windows": 24, "eval_windows": 4}
    settings = {"n": 3, "method": "bi", "data": "demo", **read}
    found = shrink(MODELS["0.5b"](), folder / "refitted.gguf", **settings)
    prune_checkpoint(MODELS["0.5b"](), folder / "cut.gguf", found.layers)
    return found


def test_the_road_from_scores_to_a_refitted_file(folder, done):
    assert len({*done.layers}) == 3
    original, pruned, healed = (p.value for p in done.quality["demo"].values())
    assert 1 < original < healed < pruned
    whole, cut = (path.stat().st_size for path in (MODELS["0.5b"](), folder / "cut.gguf"))
    assert cut < whole
    (about,) = (text for text in done.remarks if text.startswith("writing it in the file's own"))
    change = float(about.partition(" by ")[2].split()[0])
    assert 0 < abs(change) < 0.05
    assert (folder / "refitted.gguf").stat().st_size < cut + 10000  # and its longer record
    for name in ("cut", "refitted"):
        path = folder / f"{name}.gguf"
        assert sorted(Provenance.of_checkpoint(path).removed_layers) == sorted(done.layers)
        assert Stack(path).layers == 21


def test_llama_cpp_gives_what_transformers_gives_of_every_file(folder, done):
    """K-quants and others: its products take activations in 8 bits, which no cut changes."""
    largest = {}
    for name in ("whole", "cut", "refitted"):
        path = MODELS["0.5b"]() if name == "whole" else folder / f"{name}.gguf"
        short, client = open_model(str(path), device="cpu"), LlamaCpp(path)
        differences = []
        for prompt in PROMPTS:
            ids = short.encode(prompt)
            assert client.count(prompt) == len(ids)
            expected = torch.log_softmax(short.decoder.logits(torch.tensor([ids]))[0, -1], -1)
            theirs = client.logprobs(ids, 5)
            differences += [abs(expected[i].item() - value) for i, value in theirs.items()]
        largest[name] = max(differences)
        del short, client
    print(largest)
    assert max(largest["cut"], largest["refitted"]) < max(2 * largest["whole"], 0.5)
