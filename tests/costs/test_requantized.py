"""The original in fewer bits: llama.cpp's bytes and types, and a size that is known before."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_families import make, write_model
from gguf_files import data, in_types, stack_file
from llama_cpp import LlamaCpp, ggml_bytes

from llama.formats.gguf_read import GGUFParts
from llama.formats.gguf_write import UINT32, copied, record, write_again
from short_gpt.checkpoints.gguf import FILE_TYPE, TYPES, is_quantized
from short_gpt.costs import largest_within, requantized
from short_gpt.costs.rivals import size_in
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError

KINDS = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A Llama in float32 of width 256, whose down_proj has rows of 288."""
    model = make("llama", num_hidden_layers=2, hidden_size=256, intermediate_size=288)
    keys = {"rope.dimension_count": 64}
    return write_model(tmp_path_factory.mktemp("wide") / "m.gguf", "llama", model, **keys)


def kinds_of(path: Path) -> dict[str, KINDS]:
    return {name: KINDS(entry.kind) for name, entry in GGUFParts(path).tensors.items()}


@pytest.mark.parametrize("kind", TYPES)
def test_matrices_of_layers_have_the_reference_quantizers_bytes(tmp_path, wide, kind, monkeypatch):
    """As libgguf makes them, and as llama.cpp's own library does."""
    libgguf = pytest.importorskip("libgguf")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)  # by parts of unequal size
    out = requantized(wide, tmp_path / "out.gguf", kind)
    before, after = GGUFParts(wide), GGUFParts(out)
    for name, entry in before.tensors.items():
        new = KINDS(after.tensors[name].kind)
        if not name.startswith("blk.") or "norm" in name:
            assert new == entry.kind and data(out)[name] == data(wide)[name], name
            continue
        fallback = {"q8_0": "Q8_0", "q6_k": "Q8_0", "q5_k": "Q5_1", "q4_k": "Q5_0"}
        expected = fallback.get(kind, "Q4_0") if "ffn_down" in name else kind.upper()
        assert new.name == expected, name
        rows = np.ascontiguousarray(before.read(name).numpy())
        assert data(out)[name] == libgguf.quantize_rows(rows, int(new)).tobytes(), name
        assert data(out)[name] == ggml_bytes(rows, int(new)).tobytes(), name
    assert out.stat().st_size == size_in(before, kind)


def test_a_matrix_never_becomes_larger(tmp_path, wide):
    pytest.importorskip("libgguf")
    source = in_types(wide, tmp_path / "m.gguf", {"ffn_up": KINDS.Q4_0, "ffn_gate": KINDS.Q8_0})
    out = requantized(source, tmp_path / "out.gguf", "q5_k")
    kinds, last = kinds_of(out), "blk.1.ffn_{}.weight"
    assert kinds[last.format("up")] == KINDS.Q4_0 and kinds[last.format("gate")] == KINDS.Q5_K
    assert data(out)[last.format("up")] == data(source)[last.format("up")]


def test_the_file_type_follows_where_something_changes(tmp_path, wide):
    pytest.importorskip("libgguf")
    typed, parts = tmp_path / "typed.gguf", GGUFParts(wide)
    tensors = {name: copied(parts, name) for name in parts.tensors}
    write_again(typed, parts, tensors, records={FILE_TYPE: record(FILE_TYPE, 1, UINT32)})
    out = requantized(typed, tmp_path / "out.gguf", "q3_k")
    assert GGUFParts(out).fields[FILE_TYPE] == gguf.LlamaFileType.MOSTLY_Q3_K_S
    assert out.stat().st_size == size_in(GGUFParts(typed), "q3_k")
    again = requantized(out, tmp_path / "again.gguf", "q8_0")
    assert again.read_bytes() == out.read_bytes()


def test_rows_that_fill_no_block_get_float16(tmp_path):
    """Of 33; in turn 33 rows of Q5_0 end between two alignments, which the size counts."""
    pytest.importorskip("libgguf")
    model = make("llama", num_hidden_layers=2, intermediate_size=33)
    source = write_model(tmp_path / "m.gguf", "llama", model)
    out = requantized(source, tmp_path / "out.gguf", "q4_k")
    assert kinds_of(out)["blk.0.ffn_down.weight"] == KINDS.F16
    assert GGUFParts(out).tensors["blk.0.ffn_up.weight"].nbytes % 32
    assert out.stat().st_size == size_in(GGUFParts(source), "q4_k")


@pytest.mark.parametrize(
    "name, yes",
    [
        ("blk.0.ffn_up_exps.weight", True),
        ("blk.0.ffn_gate_inp.weight", False),
        ("blk.0.attn_q_norm.weight", False),
        ("blk.0.ssm_conv1d.weight", False),
        ("blk.0.attn_q.bias", False),
        ("token_embd.weight", False),
    ],
)
def test_routers_norms_convolutions_and_the_embedding_stay(name, yes):
    assert is_quantized(name, (256, 256)) == yes
    assert not is_quantized(name, (1, 256))  # a vector, as llama.cpp counts


def test_the_largest_type_within_so_many_bytes(wide):
    sizes = {kind: size_in(GGUFParts(wide), kind) for kind in TYPES}
    assert sorted(sizes.values(), reverse=True) == [*sizes.values()]
    for kind, size in sizes.items():
        assert largest_within(wide, size) == kind
    assert largest_within(wide, sizes["q2_k"] - 1) is None
    assert largest_within(wide, sizes["q4_k"] - 1) == "q3_k"


def test_llama_cpp_opens_it_and_says_almost_the_same(tmp_path, wide):
    pytest.importorskip("libgguf")
    out = requantized(wide, tmp_path / "out.gguf", "q8_0")
    first, second = (LlamaCpp(path, context=64).logprobs([5, 6, 7], 20) for path in (wide, out))
    shared = first.keys() & second.keys()
    assert len(shared) > 15 and max(abs(first[i] - second[i]) for i in shared) < 0.2
    for kind in ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k"):
        small = requantized(wide, tmp_path / f"{kind}.gguf", kind)
        assert LlamaCpp(small, context=64).greedy([5, 6, 7], 2)


def test_one_error_says_what_is_missing(tmp_path, wide, monkeypatch):
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(MissingPackageError, match="pip install libgguf"):
        requantized(wide, tmp_path / "out.gguf", "q4_k")
    assert [*tmp_path.iterdir()] == []


def test_an_unknown_type_is_refused(tmp_path, wide):
    with pytest.raises(ShortGPTError, match="expected one of q8_0"):
        requantized(wide, tmp_path / "out.gguf", "q1_0")


def test_a_source_in_several_files_becomes_one(tmp_path, wide):
    """Its size is foretold a little too large, as each file has a header."""
    pytest.importorskip("libgguf")
    stack_file(tmp_path / "m.gguf", split=5)
    part = min(tmp_path.glob("m-*.gguf"))
    out = requantized(part, tmp_path / "out.gguf", "q2_k")
    assert 0 <= size_in(GGUFParts(part), "q2_k") - out.stat().st_size < 4096
    assert np.array_equal(
        GGUFParts(out).read("token_embd.weight"), GGUFParts(part).read("token_embd.weight")
    )
