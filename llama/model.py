"""The Llama decoder with the reference's attribute and parameter names, on fairscale's layers.

Shapes: B sequences, S tokens, D width, L layers, V vocabulary, H heads, Hkv key/value heads,
hd = D / H the width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from llama.args import ModelArgs, check_split, kv_heads_of_rank
from llama.errors import check
from llama.parallel import model_parallel_size

# devices whose own causal kernel lets half-precision positions see later ones
# (https://github.com/pytorch/pytorch/issues/195910): they are given the mask
MASKED = ("mps",)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2 over D) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the dtype of ``x``."""
        wide = x.float()  # squares of massive activations overflow float16
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight  # rounded before the weight, as the reference does


def _keep(weight: Tensor) -> Tensor:
    """An initialization that leaves the weight as it is: it is loaded or drawn later."""
    return weight


def _column(inputs: int, outputs: int) -> nn.Module:
    """A linear layer of which each rank computes some outputs and keeps them to itself."""
    return ColumnParallelLinear(inputs, outputs, bias=False, gather_output=False, init_method=_keep)


def _row(inputs: int, outputs: int) -> nn.Module:
    """A linear layer of which each rank holds some inputs; the ranks' results are added up."""
    return RowParallelLinear(inputs, outputs, bias=False, input_is_parallel=True, init_method=_keep)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    softmax(q k^T / sqrt(hd) + mask) v, with one key/value head for ``n_rep`` query heads. Each rank
    holds a part of the heads. The key/value cache is made at the first cached call.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        ranks = model_parallel_size()
        self.n_kv_heads = args.kv_heads
        self.n_local_heads = args.n_heads // ranks
        # With fewer key/value heads than ranks, several ranks hold the same one, as each needs it
        # for its own query heads: more rows in all ranks together than the model has.
        self.n_local_kv_heads = len(kv_heads_of_rank(args, 0, ranks))
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = args.head_dim
        self.max_seq_len = args.max_seq_len
        self.wq = _column(args.dim, args.n_heads * self.head_dim)
        self.wk = _column(args.dim, ranks * self.n_local_kv_heads * self.head_dim)
        self.wv = _column(args.dim, ranks * self.n_local_kv_heads * self.head_dim)
        self.wo = _row(args.n_heads * self.head_dim, args.dim)
        self.cache_k: Tensor | None = None
        self.cache_v: Tensor | None = None
        self.cache_ends: list[int] = []  # how many positions of its text each row holds

    def forward(
        self, x: Tensor, start_pos: int | None, freqs_cis: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of S new positions to themselves and to those in the cache: (B, S, D).

        Args:
            x: (B, S, D).
            start_pos: the position of ``x[:, 0]``; None neither reads nor writes the cache.
            freqs_cis: (S, hd / 2, 2) float32, the rotations of these positions.
            mask: (S, T) bool over the T positions so far, true where attention goes; None is
                causal for S = T, and sees all for S = 1.
        """
        B, S, _ = x.shape
        q = self.wq(x).view(B, S, self.n_local_heads, self.head_dim)
        k = self.wk(x).view(B, S, self.n_local_kv_heads, self.head_dim)
        v = self.wv(x).view(B, S, self.n_local_kv_heads, self.head_dim)
        # keys are cached turned: the angle belongs to the position and never changes
        q, k = apply_rotary_emb(q, freqs_cis), apply_rotary_emb(k, freqs_cis)
        if start_pos is not None:
            k, v = self.update_cache(k, v, start_pos)  # (B, T, Hkv, hd)
        if mask is None and S > 1 and x.device.type in MASKED:
            mask = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, H, S, hd)
            k.transpose(1, 2),  # (B, Hkv, T, hd)
            v.transpose(1, 2),
            attn_mask=mask,
            # torch allows one of the two. One new token sees all before it: nothing to hide.
            is_causal=mask is None and S > 1,
            # each key/value head serves n_rep query heads, without being copied for it
            enable_gqa=self.n_rep > 1,
        )
        return self.wo(out.transpose(1, 2).reshape(B, S, -1))  # heads side by side: (B, S, D)

    def update_cache(self, k: Tensor, v: Tensor, start_pos: int) -> tuple[Tensor, Tensor]:
        """Writes (B, S, Hkv, hd) rotated keys, and values, at ``start_pos`` and on; 0 starts again.

        Returns views of both for all T = start_pos + S positions, (B, T, Hkv, hd) each.
        """
        B, end = len(k), start_pos + k.shape[1]
        if start_pos == 0:
            self._allocate_cache(k)
            self.cache_ends = [0] * B
        # every row of this batch holds the positions before start_pos
        whole = len(self.cache_ends) >= B and min(self.cache_ends[:B], default=0) >= start_pos
        check(whole, "start_pos", start_pos, f"0 first: {B} rows do not hold so many positions yet")
        assert self.cache_k is not None and self.cache_v is not None
        # A smaller batch uses the first rows; further rows and positions are of an earlier text.
        self.cache_k[:B, start_pos:end] = k.detach()  # no gradient runs through the cache
        self.cache_v[:B, start_pos:end] = v.detach()
        self.cache_ends[:B] = [end] * B
        return self.cache_k[:B, :end], self.cache_v[:B, :end]

    def _allocate_cache(self, k: Tensor) -> None:
        """Makes a cache for a batch like ``k``, unless there is one that is large enough."""
        old = self.cache_k
        fits = old is not None and len(old) >= len(k)
        if old is not None and old.is_inference():  # cannot be written to outside inference mode
            fits = fits and torch.is_inference_mode_enabled()
        if old is None or not fits or (old.dtype, old.device) != (k.dtype, k.device):
            shape = (len(k), self.max_seq_len, *k.shape[2:])
            self.cache_k = torch.zeros(shape, dtype=k.dtype, device=k.device)
            self.cache_v = torch.zeros(shape, dtype=k.dtype, device=k.device)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = _column(args.dim, args.ffn_dim)
        self.w2 = _row(args.ffn_dim, args.dim)
        self.w3 = _column(args.dim, args.ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: x + attention(norm(x)), then the same with the feed-forward layer."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self, x: Tensor, start_pos: int | None, freqs_cis: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states leaving the layer, (B, S, D); arguments as of `Attention.forward`."""
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The decoder. Parameters have the names and shapes of Meta's checkpoints.

    Args:
        params: Shape of the model; ``vocab_size`` must be set.
        vocab_parallel: Share the embedding among ranks by vocabulary (Llama 3) and not by width
            (Llama 2). Default: False.
        device: "meta" makes the model without weights, to be loaded with ``assign=True``.
            Default: the CPU, with weights drawn from N(0, 0.02).
    """

    def __init__(
        self, params: ModelArgs, *, vocab_parallel: bool = False, device: str | None = None
    ) -> None:
        super().__init__()
        params.check()
        check(params.vocab_size > 0, "vocab_size", params.vocab_size, "the number of token ids")
        check_split(params, model_parallel_size())
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers

        embedding = VocabParallelEmbedding if vocab_parallel else ParallelEmbedding
        self.tok_embeddings = embedding(params.vocab_size, params.dim, init_method=_keep)
        # fairscale allocates on the CPU: each part moves before the next is made
        self.tok_embeddings.to(device)
        self.layers = nn.ModuleList(
            TransformerBlock(i, params).to(device) for i in range(params.n_layers)
        )
        self.norm = RMSNorm(params.dim, eps=params.norm_eps).to(device)
        self.output = ColumnParallelLinear(
            params.dim, params.vocab_size, bias=False, init_method=_keep
        ).to(device)
        # twice as long as generation needs, as in the reference: windows to score may be longer
        self.freqs_cis = precompute_freqs_cis(params, 2 * params.max_seq_len)
        if device is None:
            for name, weight in self.named_parameters():
                if "norm" not in name:  # the norms stay 1
                    nn.init.normal_(weight, std=0.02)

    def hidden(self, tokens: Tensor, start_pos: int | None = None) -> Tensor:
        """The hidden states before the final norm, (B, S, D), of (B, S) int64 tokens.

        ``start_pos`` None reads complete sequences and caches nothing; a number is the position of
        ``tokens[:, 0]``, whose predecessors are in the cache.
        """
        S, first = tokens.shape[1], start_pos or 0
        limit = len(self.freqs_cis) if start_pos is None else self.params.max_seq_len
        within = f"at most {limit}: the model was built for max_seq_len {self.params.max_seq_len}"
        check(first + S <= limit, "positions", first + S, within)
        h = self.tok_embeddings(tokens)  # (B, S, D)
        freqs_cis = self.freqs_cis[first : first + S].to(h.device)
        mask = None
        # Several new rows under old columns: not the square that torch's is_causal means, which
        # would hide all but the first columns. Row i sees the columns up to first + i.
        if first and S > 1:
            mask = torch.ones(S, first + S, dtype=torch.bool, device=h.device).tril(first)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        return h

    def forward(self, tokens: Tensor, start_pos: int | None = None) -> Tensor:
        """Logits of every position, (B, S, V) float32; arguments as in `hidden`."""
        return self.head(self.hidden(tokens, start_pos))

    def head(self, states: Tensor) -> Tensor:
        """Logits of hidden states before the final norm: (..., D) to (..., V) float32."""
        return self.output(self.norm(states)).float()


# Llama 3.1's stretching of the rotary wavelengths (meta-llama/llama-models, model.py).
ROPE_LOW_FACTOR, ROPE_HIGH_FACTOR, ROPE_ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def rope_frequencies(head_dim: int, theta: float, factor: float | None = None) -> Tensor:
    """Rotary frequencies (Su et al. 2021, arXiv:2104.09864), (hd / 2,) float32 in radians a token.

    f_i = theta^(-2 i / hd). With ``factor``, Llama 3.1's scaling: wavelengths over 8192 tokens are
    stretched by the factor, those under 2048 stay, those between are interpolated.
    """
    # in the reference's order of operations, so that the last bits are the same
    f = 1.0 / (theta ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
    if factor is None:
        return f
    wavelength = 2 * math.pi / f
    span = ROPE_HIGH_FACTOR - ROPE_LOW_FACTOR
    smooth = (ROPE_ORIGINAL_CONTEXT / wavelength - ROPE_LOW_FACTOR) / span
    smooth = smooth.clamp(0, 1)  # 0 for wavelengths from 8192 tokens, 1 up to 2048
    return (1 - smooth) * f / factor + smooth * f


def precompute_freqs_cis(args: ModelArgs, length: int) -> Tensor:
    """Cosine and sine of every position's rotation, (length, hd / 2, 2) float32."""
    frequencies = rope_frequencies(args.head_dim, args.rope_theta, args.rope_factor)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotates components (2i, 2i+1) of x, (B, S, H, hd), by (S, hd / 2, 2) cosines and sines."""
    # In float32: bfloat16 keeps 8 bits, too few to tell late positions apart by their angles.
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, H, hd / 2) each
    cos, sin = freqs_cis[:, None].unbind(-1)  # (S, 1, hd / 2): the same for all heads
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)
