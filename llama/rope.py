"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with Llama 3.1's scaling.

Shapes: B sequences, S tokens, H heads, hd the width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama.args import ModelArgs

# Llama 3.1's stretching of the rotary wavelengths (meta-llama/llama-models, model.py).
ROPE_LOW_FACTOR, ROPE_HIGH_FACTOR, ROPE_ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def rope_frequencies(head_dim: int, theta: float, factor: float | None = None) -> Tensor:
    """Rotary frequencies, (hd / 2,) float32 in radians per token.

    f_i = theta^(-2 i / hd). With ``factor``, Llama 3.1's scaling: wavelengths over 8192 tokens
    are stretched by the factor, those under 2048 stay, those between are interpolated.

    Args:
        head_dim: hd.
        theta: the base, 10,000 in Llama 2 and 500,000 in Llama 3.
        factor: of the scaling; None does not scale.
    """
    # in the reference's order of operations, so that the last bits are the same
    f = 1.0 / (theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
    if factor is None:
        return f
    wavelength = 2 * math.pi / f
    smooth = (ROPE_ORIGINAL_CONTEXT / wavelength - ROPE_LOW_FACTOR) / (
        ROPE_HIGH_FACTOR - ROPE_LOW_FACTOR
    )
    smooth = smooth.clamp(0, 1)  # 0 for wavelengths from 8192 tokens, 1 up to 2048
    return (1 - smooth) * f / factor + smooth * f


def precompute_freqs_cis(args: ModelArgs, length: int) -> Tensor:
    """Cosine and sine of every position's rotation, (length, hd / 2, 2) float32.

    These are the real and imaginary parts of the reference's complex table, kept as real
    numbers so that every device can multiply with them.
    """
    frequencies = rope_frequencies(args.head_dim, args.rope_theta, args.rope_factor)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotates neighbouring components (2i, 2i+1) by the position's angles, in float32.

    Args:
        x: (B, S, H, hd).
        freqs_cis: (S, hd / 2, 2) float32, see `precompute_freqs_cis`.

    Returns:
        (B, S, H, hd) in the dtype of ``x``.
    """
    # In float32: bfloat16 keeps 8 bits, too few to tell late positions apart by their angles.
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, H, hd / 2) each
    cos, sin = freqs_cis[:, None].unbind(-1)  # (S, 1, hd / 2): the same for all heads
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
