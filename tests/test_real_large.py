"""A second real family, Qwen2.5-Coder-0.5B-Instruct: ranked, cut, refitted, opened by llama.cpp.

Its GGUF file has 491 MB, and transformers takes minutes and 4 GB to read it.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import second_family
import torch
from llama_cpp import LlamaCpp

from llama.formats.gguf_read import GGUFParts
from short_gpt import open_model
from short_gpt.checkpoints import Provenance
from short_gpt.checkpoints.gguf_layers import Stack

pytestmark = [pytest.mark.real_large, pytest.mark.filterwarnings("default")]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "In the year 1492, Columbus"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("qwen")


@pytest.fixture(scope="module")
def found(folder) -> dict:
    torch.set_num_threads(2)
    return second_family.road(folder, 3, size=128, scored=4, learned=24, judged=4)


def test_the_road_from_scores_to_a_refitted_file(folder, found):
    assert len(found["removed"]) == 3 and found["removed"] == sorted(found["removed"])
    values = [p["perplexity"] for p in found["perplexity"].values()]
    whole, cut, refitted, written = values
    assert 1 < whole < refitted < cut
    assert written == pytest.approx(refitted, rel=0.02) and written != refitted
    change = found["quantization"]["nats"]
    assert change == pytest.approx(math.log(written / refitted), abs=1e-9)
    sizes = found["megabytes"]
    assert sizes["cut"] < sizes["whole"] and "of Q6_K as Q8_0" in found["remark"]
    for name in ("cut", "refitted"):
        path = folder / f"{name}.gguf"
        assert sorted(Provenance.of_checkpoint(path).removed_layers) == found["removed"]
        assert Stack.of(GGUFParts(path)).layers == 21


def test_llama_cpp_gives_what_transformers_gives_of_every_file(folder, found):
    """K-quants and others: its products take activations in 8 bits, which no cut changes."""
    largest = {}
    for name in ("whole", "cut", "refitted"):
        path = second_family.gguf_file() if name == "whole" else folder / f"{name}.gguf"
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
