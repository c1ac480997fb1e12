"""ggml's types of 4 to 6 bits: bytes that the package gguf reads, error beside ggml's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from conftest import refuses
from llama_cpp import ggml_bytes

from llama.formats.gguf_write import LAYOUTS, Q4_0, Q4_K, Q6_K, Q8_0, packed, quantized

KINDS = gguf.GGMLQuantizationType
NAMES = [KINDS(kind).name for kind in LAYOUTS]


def read(weight: torch.Tensor, kind: int) -> np.ndarray:
    """What the package gguf reads of our bytes."""
    shape = gguf.quants.quant_shape_to_byte_shape(tuple(weight.shape), KINDS(kind))
    return gguf.quants.dequantize(
        np.frombuffer(quantized(weight, kind), np.uint8).reshape(shape), KINDS(kind)
    )


def theirs(weight: torch.Tensor, kind: int) -> np.ndarray:
    """What the package gguf reads of ggml's bytes."""
    return gguf.quants.dequantize(ggml_bytes(weight.numpy(), kind), KINDS(kind))


def some(how: str) -> torch.Tensor:
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(64, 1024)
    if how == "tails":
        weight /= torch.randn(64, 1024).abs().clamp(min=0.3)
    return {"above 0": weight.abs() + 0.05, "below 0": -weight.abs()}.get(how, weight)


@pytest.mark.parametrize("how", ["normal", "tails", "above 0", "below 0"])
@pytest.mark.parametrize("kind", LAYOUTS, ids=NAMES)
def test_the_squared_error_is_about_that_of_ggml_or_less(kind, how):
    """At most half a per cent more; with the offsets of K-quants, which are at most 0, 3."""
    weight = some(how)
    ours, other = (
        np.square(found - weight.numpy()).mean()
        for found in (read(weight, kind), theirs(weight, kind))
    )
    most = 0.95 if kind < Q4_K else 1.005 if how in ("normal", "tails") else 1.03
    assert 0 < ours < most * other


@pytest.mark.parametrize("kind", LAYOUTS, ids=NAMES)
def test_what_a_type_can_say_exactly_is_kept(kind):
    """Zeros, one value, and weights that came from the type itself."""
    for weight in (torch.zeros(1, 256), torch.full((1, 256), -0.5)):
        assert np.allclose(read(weight, kind), weight, rtol=1e-3, atol=0)
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    first = torch.from_numpy(theirs(weight, kind).copy())
    anew, again = (
        np.square(read(weight, kind) - weight.numpy()),
        np.square(read(first, kind) - first.numpy()),
    )
    assert again.mean() < 0.01 * anew.mean()
    damaged = weight.clone()
    damaged[3, 5] = torch.nan
    assert np.isnan(read(damaged, kind)).any(1).nonzero()[0].tolist() == [3]  # is not hidden
    assert quantized(weight.T.reshape(16, 256), kind) == quantized(
        weight.T.reshape(16, 256).clone(), kind
    )


@pytest.mark.parametrize("kind", LAYOUTS, ids=NAMES)
def test_weights_of_which_float16_holds_no_scale_stay_small(kind):
    torch.manual_seed(0)
    for size in (1e-3, 2e-4, 1e-4, 5e-5, 3e-5, 2e-5, 1e-5, 1e-6, 1e-9):
        weight = size * torch.randn(16, 256)
        ours, other = (
            np.square(found - weight.numpy()).mean()
            for found in (read(weight, kind), theirs(weight, kind))
        )
        assert ours < 1.5 * other, size


def test_many_weights_are_packed_in_pieces(monkeypatch):
    weight = torch.randn(10, 512)
    whole = {kind: quantized(weight, kind) for kind in LAYOUTS}
    monkeypatch.setattr("llama.formats.gguf_write.AT_A_TIME", 768)
    assert whole == {kind: quantized(weight, kind) for kind in LAYOUTS}
    assert quantized(weight.bfloat16(), Q4_K) == quantized(weight.bfloat16().float(), Q4_K)


def test_weights_beyond_float16_are_refused():
    weight = torch.ones(2, 256)
    weight[1, 3] = 7e4
    for kind in (Q4_0, Q6_K):
        refuses("name has values beyond F16's: write bf16", packed, "name", weight, kind)
    packed("name", weight, Q8_0)  # whose step alone is of float16
    weight[1, 3] = 9e6
    refuses("name has values beyond F16's: write bf16 or f32", packed, "name", weight, Q8_0)
