"""Weights rounded to ggml's types of 4 to 6 bits, with scales that make the squared error small.

A group of weights is ``scale * codes + offset``; some types have no offset. K-quants also round the
scales and offsets of 256 weights. The layout of the bytes is that of ggml's ``ggml-common.h``. The
package gguf reads these types, but writes no K-quants, and the others with more error: it takes
scales from the outermost weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = 2, 3, 6, 7, 12, 13, 14  # ggml's numbers of types
AT_A_TIME = 2**20  # weights


class Layout(NamedTuple):
    """How a type stores weights."""

    block: int  # weights in a block
    group: int  # weights that share a scale
    bits: int  # of a weight's code
    offset: bool  # whether a group has one; else codes are below and above 0
    row: int  # codes in a row; the low bits of two rows share bytes


LAYOUTS = {
    Q4_0: Layout(32, 32, 4, False, 16),
    Q4_1: Layout(32, 32, 4, True, 16),
    Q5_0: Layout(32, 32, 5, False, 16),
    Q5_1: Layout(32, 32, 5, True, 16),
    Q4_K: Layout(256, 32, 4, True, 32),
    Q5_K: Layout(256, 32, 5, True, 32),
    Q6_K: Layout(256, 16, 6, False, 64),
}
# The codes begin spread over such shares of a group's range: less than all clips the outermost.
SHARES = (0.9, 0.925, 0.95, 0.975, 1.0, 1.025, 1.05)
STEPS = 2  # codes and scale that follow from each other, from each of these


def quantized(weight: Tensor, kind: int) -> bytes:
    """The bytes of a tensor (..., K) on the CPU, K a multiple of the block of ``kind``."""
    blocks = weight.detach().reshape(-1, LAYOUTS[kind].block)
    pieces = blocks.split(AT_A_TIME // LAYOUTS[kind].block)
    return b"".join(_packed(piece.float(), kind).numpy().tobytes() for piece in pieces)


def _packed(blocks: Tensor, kind: int) -> Tensor:
    """Blocks (N, block) in float32 as bytes (N, bytes of a block)."""
    layout = LAYOUTS[kind]
    is_k = layout.block > layout.group
    groups = blocks.reshape(len(blocks), -1, layout.group)  # (N, G, group)
    scale, offset = _fitted(groups, layout, below=is_k)
    head: list[Tensor] = []  # bytes before the codes, and after them
    tail: list[Tensor] = []
    if not is_k:
        scale, offset = scale.half().float(), offset.half().float()
        head = [_half(scale), _half(offset)] if layout.offset else [_half(scale)]
    elif layout.offset:
        (step, scales), (low, offsets) = _rounded(scale, 63), _rounded(-offset, 63)
        scale, offset = step * scales, -low * offsets
        head = [_half(step), _half(low), _six_bits(scales, offsets)]
    else:
        step, scales = _rounded(scale, -128)
        scale = step * scales
        tail = [scales.squeeze(-1).to(torch.int8).view(torch.uint8), _half(step)]
    codes = _codes(groups, scale, offset, layout) - _lowest(layout)
    codes = codes.to(torch.uint8).reshape(len(blocks), -1)
    if layout.bits == 5:
        head.append(_merged(codes >> 4, 8, 32 if is_k else 1))
    if layout.bits == 6:
        tail.insert(0, _merged(codes >> 4, 4, 32))
    return torch.cat([*head, _merged(codes & 15, 2, layout.row), *tail], dim=1)


def _lowest(layout: Layout) -> int:
    return 0 if layout.offset else -(2 ** (layout.bits - 1))


def _codes(groups: Tensor, scale: Tensor, offset: Tensor, layout: Layout) -> Tensor:
    low = _lowest(layout)  # 0 / 0, of a group of one value, gives the code nearest to 0
    return ((groups - offset) / scale).round().nan_to_num(0).clamp(low, low + 2**layout.bits - 1)


def _fitted(groups: Tensor, layout: Layout, *, below: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset (N, G, 1) of every group, the offset at most 0 where ``below``.

    Alternates nearest codes and the least-squares scale and offset, and keeps the best pair.
    """
    count, total = groups.shape[-1], groups.sum(-1, keepdim=True)
    if layout.offset:
        first = groups.amin(-1, keepdim=True)
        first = first.clamp(max=0) if below else first
        unit = (groups.amax(-1, keepdim=True) - first) / (2**layout.bits - 1)
    else:
        first = torch.zeros_like(total)
        outermost = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        unit = outermost / _lowest(layout)
    best, least = (unit, first), torch.full_like(total, torch.inf)
    for share in SHARES:
        scale, offset = unit * share, first
        for _ in range(STEPS):
            codes = _codes(groups, scale, offset, layout)
            squares = codes.square().sum(-1, keepdim=True)
            product = (codes * groups).sum(-1, keepdim=True)
            scale = product / squares
            if layout.offset:
                mean = codes.sum(-1, keepdim=True) / count
                slope = (product - mean * total) / (squares - mean * mean * count)
                level = total / count - slope * mean
                free = level <= 0 if below else level.isfinite()
                scale, offset = slope.where(free, scale), level.where(free, 0)
            error = (scale * codes + offset - groups).square().sum(-1, keepdim=True)
            better = error < least  # never where it is not a number
            least = error.where(better, least)
            best = scale.where(better, best[0]), offset.where(better, best[1])
    return best


def _rounded(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A block's step (N, 1, 1), in float16, and the codes of its ``values`` (N, G, 1) in that step.

    The value of largest magnitude gets the code ``most``.
    """
    outermost = values.gather(1, values.abs().argmax(1, keepdim=True))
    step = (outermost / most).half().float()
    low, high = (0, most) if most > 0 else (most, -most - 1)
    # 0 / 0, of a block of zeros, gives the code 0
    return step, (values / step).round().nan_to_num(0).clamp(low, high)


def _half(values: Tensor) -> Tensor:
    """A value a block as the bytes (N, 2) of float16."""
    return values.reshape(-1, 1).half().view(torch.uint8)


def _six_bits(scales: Tensor, offsets: Tensor) -> Tensor:
    """Numbers of 6 bits (N, 8, 1) as bytes (N, 12): 4 and 4 whole, then 8 halves and quarters."""
    first, second = (x.squeeze(-1).to(torch.uint8) for x in (scales, offsets))
    whole = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (first, second)]
    return torch.cat([*whole, first[:, 4:] & 15 | (second[:, 4:] & 15) << 4], dim=1)


def _merged(codes: Tensor, count: int, row: int) -> Tensor:
    """``count`` codes in one byte, the first in the lowest bits: of rows that follow each other."""
    rows = codes.reshape(len(codes), -1, count, row)
    parts = [rows[:, :, i] << (8 // count * i) for i in range(count)]
    return torch.stack(parts).sum(0, dtype=torch.uint8).flatten(1)
