"""The original in fewer bits, measured beside it: in memory and as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_windows
from gguf_families import make, write_model

from llama.formats.gguf_read import nbytes_of
from short_gpt import ShortHFModel, open_model
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.costs.rivals import (
    RIVAL,
    largest_within,
    of_file,
    requantized,
    rivals,
    rounded,
    scratch,
    smaller_types,
)
from short_gpt.wrappers.options import OpenOptions

pytest.importorskip("libgguf")
TEXTS = {"text": random_windows(3, 24), "own": random_windows(2, 16, seed=1)}
EVERY = [window for windows in TEXTS.values() for window in windows]
KEYS = {"rope.dimension_count": 64}
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def small():
    return make("llama", num_hidden_layers=3, hidden_size=256, intermediate_size=288)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("rival") / "m.gguf", "llama", small(), **KEYS)


def test_rounded_in_memory_is_what_the_file_holds(tmp_path, source):
    """The same divergence, and the bytes of the matrices as the file has them."""
    short = open_model(str(source))
    reference = short.reference(EVERY)
    layers = [p.numel() for n, p in short.model.named_parameters() if n.split(".")[-2] in MATRICES]
    stored = source.stat().st_size
    found = rivals(short, TEXTS, reference, stored=stored, itemsize=4)
    assert [rival.name for rival in found] == [
        "in Q8_0",
        "in Q4_K and Q5_0",  # down_proj has rows of 288
    ]
    for kind, rival in zip(("q8_0", "q4_k"), found, strict=True):
        path = requantized(source, tmp_path / f"{kind}.gguf", kind)
        of = of_file(path, TEXTS, reference, OpenOptions())
        assert (of.name, of.size) == (rival.name, rival.size)
        for name, measured in rival.quality.items():
            assert measured.windows == len(TEXTS[name])
            assert measured.kld.value == pytest.approx(of.quality[name].kld.value, rel=1e-3)
            assert measured.same_top.value == of.quality[name].same_top.value
            assert 0 < measured.kld.value < (0.02 if kind == "q8_0" else 1)
    assert sum(layers) * 4 > stored - found[1].size > sum(layers) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_afterwards_the_weights_are_the_same_objects_bit_for_bit(dtype):
    model = small().to(dtype)
    short = ShortHFModel(model)
    before = {name: weight.data.clone() for name, weight in model.named_parameters()}
    with rounded(short, "q4_k") as (numbers, sizes):
        changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
        assert {name.split(".")[-2] for name in changed} == {*MATRICES}
        assert all(weight.dtype == dtype for weight in model.parameters())
        assert numbers == sum(before[name].numel() for name in changed)
        assert sum(sizes.values()) < numbers
    with pytest.raises(KeyboardInterrupt), rounded(short, "q8_0"):
        raise KeyboardInterrupt
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters())


def test_routers_stay_and_experts_are_rounded():
    model = make("gpt-oss", num_hidden_layers=2, intermediate_size=64)
    before = {name: weight.data.clone() for name, weight in model.named_parameters()}
    with rounded(ShortHFModel(model), "q8_0") as (_, sizes):
        changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
        assert any("experts.down_proj" in name for name in changed)
        assert not any("router" in name or "norm" in name for name in changed)
    assert sum(sizes.values()) == sum(
        nbytes_of(name, tuple(before[name].shape), 8) for name in changed
    )


def test_the_file_is_not_larger_than_the_pruned_one_and_goes_afterwards(tmp_path, source):
    out = prune_checkpoint(source, tmp_path / "out.gguf", [1])
    folder = tmp_path / "out.gguf.shrinking"
    original = open_model(str(source))
    reference = original.reference(EVERY)
    original.release()  # its weights are gone when the rival is read
    kind = largest_within(source, out.stat().st_size)
    with scratch(folder) as place:
        path = requantized(source, place / "q8_0.gguf", kind)
        assert path.stat().st_size <= out.stat().st_size
        rival = of_file(path, TEXTS, reference, OpenOptions())
        assert rival.size == path.stat().st_size and rival.name == "in Q8_0"
        assert all(0 < own.kld.value < 0.02 for own in rival.quality.values())
    assert not (folder / RIVAL).exists()
    with pytest.raises(KeyboardInterrupt), scratch(folder):
        raise KeyboardInterrupt
    assert not (folder / RIVAL).exists()


def test_where_every_type_is_larger_there_is_no_rival(source):
    assert largest_within(source, 1000) is None


def test_types_that_make_a_file_smaller_come_largest_first(tmp_path, source):
    kinds = smaller_types(source)
    files = [requantized(source, tmp_path / f"{kind}.gguf", kind) for kind in kinds]
    sizes = [path.stat().st_size for path in (source, *files)]
    assert kinds[0] == "q8_0" and sizes == sorted({*sizes})[::-1]
    assert not {*kinds} & {*smaller_types(files[0])} - {*kinds[1:]}


def test_rows_that_fill_no_block_are_rounded_to_float16():
    model = make("llama", num_hidden_layers=1, intermediate_size=40)
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.data.clone()
    with rounded(ShortHFModel(model), "q4_k") as (_, sizes):
        assert torch.equal(weight.data, before.half().float())
        assert sizes[1] == 2 * before.numel()  # ggml's F16


def test_a_model_whose_weights_are_no_floats_has_no_rival(source):
    short = open_model(str(source))
    reference = short.reference(EVERY)
    for layer in short.decoder.layers:
        for weight in layer.parameters():
            weight.requires_grad_(False)
            if weight.ndim > 1:  # as bitsandbytes holds them, only that these compute nothing
                weight.data = weight.data.to(torch.uint8)
    assert rivals(short, {}, reference, stored=0, itemsize=2) == []
