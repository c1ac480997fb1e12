"""Tensors in ggml's types: from torch to the bytes of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from llama.errors import InputError, MissingPackageError
from llama.formats.gguf_header import nbytes_of
from llama.formats.gguf_write import Stored

F32, F16, Q8_0, BF16 = 0, 1, 8, 30  # ggml's numbers of types
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
BLOCK = 32  # values in a block of Q8_0


def type_name(kind: int) -> str:
    """Ggml's name of a type: ``"Q8_0"``."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def writable(kind: int, shape: tuple[int, ...]) -> int:
    """The type to write a tensor in that is wanted in another one.

    Args:
        kind: ggml's number of the type that is wanted.
        shape: of the tensor, in torch's order.

    Returns:
        ``kind``; Q8_0 where that is a type that is only read here, such as the K-quants; F16 where
        the rows are not whole blocks.
    """
    if kind in PLAIN:
        return kind
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
    except ImportError:
        raise MissingPackageError('writing GGUF needs: pip install "short-gpt[demo]"') from None
    known = GGMLQuantizationType(kind)
    row = torch.ones(1, GGML_QUANT_SIZES[known][0]).numpy()
    try:
        quants.quantize(row, known)
    except NotImplementedError:
        kind = Q8_0
    return kind if not shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0] else F16


def packed(name: str, weight: Tensor, kind: int) -> bytes:
    """A tensor's bytes in a type that `writable` gives.

    Raises:
        InputError: a value is too large for F16.
    """
    if kind in PLAIN:
        values = weight.detach().cpu().to(PLAIN[kind]).contiguous()
        if kind == F16 and not bool(values.isfinite().all() or not weight.isfinite().all()):
            raise InputError(f"{name} has values beyond F16's; take bf16, f32 or q8_0")
        return values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
    from gguf import GGMLQuantizationType, quants

    rows = weight.detach().cpu().float().contiguous().numpy()
    return quants.quantize(rows, GGMLQuantizationType(kind)).tobytes()


def stored(name: str, weight: Tensor, kind: int, *, part: int = 0) -> Stored:
    """A tensor of torch to be written in a type that `writable` gives, packed when it is.

    Args:
        name: of the tensor, for messages.
        weight: it.
        kind: ggml's number of the type.
        part: as of `Stored`.
    """
    shape = tuple(weight.shape)
    size = nbytes_of(name, shape, kind)
    return Stored(shape, kind, size, lambda: [packed(name, weight, kind)], part)
