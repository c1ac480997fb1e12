"""Matrices of GGUF models in fewer bits: their types, their bytes, and the values that these give.

Types are those of ``llama-quantize --pure`` without an importance matrix, except that embedding
and output head stay as they are: ``tensor_allows_quantization`` and ``tensor_type_fallback`` of
llama.cpp's ``src/llama-quant.cpp`` name the tensors and types. The package libgguf quantizes, with
llama.cpp's bytes: our own quantizer has less squared error and yet more distance from the original.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from llama.formats.gguf_read import GGUFParts, Record, nbytes_of
from llama.formats.gguf_write import F16, UINT32, Stored, packed, record
from short_gpt.checkpoints.gguf_layers import LAYER
from short_gpt.models.decoder import keep_values
from short_gpt.runtime.errors import check, required

# Largest first: the type where rows do not fill its blocks, and llama.cpp's number of such files.
TYPES = {
    "q8_0": ("F16", 7),
    "q6_k": ("Q8_0", 18),
    "q5_k": ("Q5_1", 16),
    "q4_k": ("Q5_0", 14),
    "q3_k": ("Q4_0", 11),
    "q2_k": ("Q4_0", 10),
}
FILE_TYPE = "general.file_type"
# Routers, convolutions and other small matrices, which are not quantized.
PLAIN = re.compile(
    r"_norm\.|ffn_gate_(inp|tid2eid)|altup|laurel|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj"
    r"|time_mix_(first|[avgw]\d|decay_w\d|lerp_fused)|attn_rel_b"
)


def file_type(parts: GGUFParts, kind: str) -> dict[str, Record]:
    """The key that names a requantized file's type, where the source has one."""
    number = record(FILE_TYPE, TYPES[kind][1], UINT32)
    return {FILE_TYPE: number} if FILE_TYPE in parts.fields else {}


def changes(parts: GGUFParts, kind: str) -> dict[str, Stored]:
    """The tensors that get another type, read and quantized when they are written."""

    def pieces(name: str, number: int) -> Iterator[bytes]:
        yield quantized(name, parts.read(name), number)

    changed: dict[str, Stored] = {}
    for name, (shape, _, _, nbytes) in parts.tensors.items():
        number = type_of(shape, kind)
        size = nbytes_of(name, shape, number) if is_quantized(name, shape) else nbytes
        if size < nbytes:
            changed[name] = Stored(shape, number, size, partial(pieces, name, number))
    return changed


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp quantizes this tensor, and it is a layer's."""
    is_matrix = name.endswith(".weight") and math.prod(shape[:-1]) > 1
    return bool(is_matrix and LAYER.fullmatch(name) and not PLAIN.search(name))


def check_type(kind: str) -> None:
    """Raises ShortGPTError unless this is a type of `TYPES`."""
    check(kind in TYPES, "type", kind, f"one of {', '.join(TYPES)}")


def type_of(shape: Sequence[int], kind: str) -> int:
    """Ggml's number of the type that a matrix gets in ``kind`` of `TYPES`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    check_type(kind)
    numbers = [GGMLQuantizationType[name] for name in (kind.upper(), TYPES[kind][0], "F16")]
    return next(int(n) for n in numbers if shape[-1] % GGML_QUANT_SIZES[n][0] == 0)


def quantized(name: str, weight: Tensor, number: int) -> bytes:
    """The bytes of a matrix (..., K) in a type of `type_of`, by libgguf, which may be missing."""
    if number == F16:
        return packed(name, weight, number)
    with required("libgguf", by="a model in fewer bits"):
        import libgguf
    rows = weight.detach().cpu().float().flatten(0, -2)
    parts = rows.split(-(-len(rows) // torch.get_num_threads()))
    with ThreadPoolExecutor() as pool:  # each part without Python's lock
        done = pool.map(lambda part: libgguf.quantize_rows(part.numpy(), number), parts)
        return b"".join(part.tobytes() for part in done)


def rounded_values(name: str, weight: Tensor, number: int) -> Tensor:
    """A matrix as it is read of a GGUF file, in its own dtype and on its device."""
    from gguf import GGMLQuantizationType, quants

    rows = math.prod(weight.shape[:-1])
    packed = np.frombuffer(quantized(name, weight, number), np.uint8).reshape(rows, -1)
    values = quants.dequantize(packed, GGMLQuantizationType(number))  # (rows, K) in float32
    return torch.from_numpy(values).view(weight.shape).to(weight)


@torch.no_grad()
def round_layer(layer: nn.Module, types: Mapping[str, int]) -> Callable[[], None]:
    """Rounds matrices of a layer to ggml's types, by their names; returns what undoes it."""
    weights = {name: layer.get_parameter(name) for name in types}
    undo = keep_values(weights.values())
    for name, weight in weights.items():
        weight.copy_(rounded_values(name, weight, types[name]))
    return undo
