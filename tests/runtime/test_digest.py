"""Digests tell apart what differs anywhere, and pay for a file once."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_transformer
from families import make

from short_gpt.runtime import digest
from short_gpt.runtime.digest import files_digest, weights_digest


@pytest.mark.parametrize("place", [0, 1, -2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_differ_in_one_value_anywhere_are_told_apart(place, dtype):
    model, other = make_transformer().to(dtype), make_transformer().to(dtype)
    assert weights_digest(model) == weights_digest(other)
    with torch.no_grad():
        other.layers[1].feed_forward.w1.weight.flatten()[place] += 1
    assert weights_digest(model) != weights_digest(other)


def test_shapes_and_dtypes_of_equal_bytes_are_told_apart():
    wide, tall = torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 4, bias=False)
    for layer in (wide, tall):
        torch.nn.init.zeros_(layer.weight)
    assert weights_digest(wide) != weights_digest(tall)
    assert weights_digest(wide.half()) != weights_digest(torch.nn.Linear(2, 2, bias=False))


def test_buffers_that_a_file_holds_count_as_weights():
    """GPTQ and AWQ have all their weights in such."""
    model = make_transformer()
    plain = weights_digest(model)
    model.layers[0].register_buffer("factors", torch.ones(3), persistent=False)
    assert weights_digest(model) == plain
    model.layers[0].register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    model.layers[0].register_buffer("few", torch.zeros((), dtype=torch.bool))
    quantized = weights_digest(model)
    assert quantized != plain
    model.layers[0].qweight[1, 0] = 1
    assert weights_digest(model) not in (plain, quantized)


@pytest.mark.parametrize("model_type", ["own", "llama", "gpt2"])
def test_without_such_buffers_it_is_that_of_the_parameters(model_type):
    model = make_transformer() if model_type == "own" else make(model_type)
    bare = SimpleNamespace(state_dict=dict, named_buffers=list)
    bare.named_parameters = model.named_parameters
    assert weights_digest(model) == weights_digest(bare)


@pytest.mark.parametrize("place", [0, 1500, 2**15, 10**5 - 1])
def test_files_that_differ_in_one_byte_anywhere_are_told_apart(tmp_path, monkeypatch, place):
    monkeypatch.setattr(digest, "PIECE", 2**15)
    content = bytearray(random.Random(0).randbytes(10**5))
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(content)
    content[place] ^= 1
    other.write_bytes(content)
    assert files_digest([one]) != files_digest([other])
    one.write_bytes(content)
    assert files_digest([one]) == files_digest([other])  # names do not count
    assert files_digest([one, other]) != files_digest([one])


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    reads, plain = [], digest._piece
    monkeypatch.setattr(digest, "_piece", lambda *a: reads.append(a) or plain(*a))
    first = files_digest([path])
    assert files_digest([path]) == first and len(reads) == 1
    path.write_bytes(b"abd")
    os.utime(path, ns=(0, 1))
    assert files_digest([path]) != first and len(reads) == 2
