"""What one forward pass tells of every layer: hooks that reduce the states as they go by.

Shapes: B windows, S tokens, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.scoring.metrics import cosine_from_products, relative_magnitude, widen

ATTENTION = ("attention", "self_attn", "attn")
MLP = ("feed_forward", "mlp")
MLP_NORM = ("ffn_norm", "pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
PROVED = 8  # tokens on which it is checked that the halves add up to the layer


@dataclass(frozen=True)
class Scores:
    """Scores of single windows, as `Importance.add` takes them.

    Attributes:
        tokens: real tokens of each window, (B,).
        influence: sums over tokens of 1 - cos(state in front, state behind), (B, L).
        angles: angular distances at the last token between all states, (B, L + 1, L + 1).
        magnitude: sums over tokens of ||f(x)|| / ||x + f(x)||, (B, L).
        norm: sums over tokens of the norm of the state behind the layer, (B, L).
        halves: like ``influence``, around a layer's attention and around its MLP, (B, 2, L); NaN
            where that was not asked for or the layer is not x + attention, then + MLP.
        token_angles: like ``angles``, summed over all tokens; NaN where not asked for.
    """

    tokens: Tensor
    influence: Tensor
    angles: Tensor
    magnitude: Tensor
    norm: Tensor
    halves: Tensor
    token_angles: Tensor

    def check_finite(self, layers: Sequence[int]) -> None:
        """Raises NotFiniteError if a state was NaN or infinite; names its layer."""
        bad = ~self.influence.isfinite()
        if bad.any():
            row, layer = (int(i) for i in bad.nonzero()[bad.nonzero()[:, 1].argmin()])
            raise NotFiniteError(
                f"layer {layers[layer]} met or gave a NaN or infinite state (window {row} of the "
                "batch); nothing of this batch was counted. Check the weights, or try another dtype"
            )

    @classmethod
    def cat(cls, parts: Sequence[Scores]) -> Scores:
        """The windows of all parts, in their order."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def score(
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    sublayers: bool = False,
    all_tokens: bool = False,
) -> Scores:
    """Scores of single windows from one pass.

    Args:
        decoder: the model.
        windows: lists of token ids.
        layers: the layers' numbers, for an error.
        sublayers: also score the attention and the MLP of every layer.
        all_tokens: also take angular distances at all tokens; keeps the states of all layers.

    Raises:
        ShortGPTError: there is no window, or one is empty, too long or not in the vocabulary.
        NotFiniteError: a state is NaN or infinite.
    """
    tokens, mask = pad(windows, decoder)
    with watch(decoder.layers, mask, sublayers=sublayers, all_tokens=all_tokens) as seen:
        decoder.run(tokens)
    found = seen.scores()
    found.check_finite(layers)
    return found


class Watch:
    """Reduces the states of one pass; `after` is called for the layers in their order.

    Args:
        mask: (B, S) bool, True for real tokens.
        all_tokens: whether to keep the states for angular distances at all tokens.
    """

    def __init__(self, mask: Tensor, *, all_tokens: bool = False) -> None:
        self._mask = mask
        self._rows = torch.arange(len(mask), device=mask.device)
        self._ends = mask.sum(1) - 1
        self._state: Tensor | None = None  # behind the previous layer, and its squared norms
        self._squares: Tensor | None = None
        self._last: list[Tensor] = []  # (B, D) float32, L + 1 of them
        self._kept: list[Tensor] | None = [] if all_tokens else None
        self._sums: list[Tensor] = []  # (5, B): influence, magnitude, norm, attention, MLP
        self._middle = _Middle()

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Forward hook: the state in front (B, S, D) and the one behind, of one layer."""
        state = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple | list) else output
        x, y = widen(state), widen(result)
        if not self._last:
            self._keep(state, x)
        xx = self._squares
        if xx is None or state is not self._state:
            xx = torch.linalg.vecdot(x, x)
        yy = torch.linalg.vecdot(y, y)
        turned = 1.0 - cosine_from_products(torch.linalg.vecdot(x, y), xx, yy)
        each = [turned, relative_magnitude(x, y, yy), yy.sqrt(), *self._middle.turned(state, y, yy)]
        self._sums.append(torch.stack([torch.where(self._mask, e, 0.0).sum(1) for e in each]))
        self._keep(result, y)
        self._state, self._squares = result, yy

    def _keep(self, state: Tensor, wide: Tensor) -> None:
        self._last.append(wide[self._rows, self._ends])
        if self._kept is not None:
            self._kept.append(state)

    def scores(self) -> Scores:
        """What was seen, once all layers have run."""
        influence, magnitude, norm, *halves = torch.stack(self._sums, dim=2)  # (5, B, L)
        angles = angular_distances(torch.stack(self._last, dim=1))
        everywhere = torch.full_like(angles, math.nan)
        if self._kept is not None:
            everywhere = torch.stack(
                [
                    _summed_angles([s[row, :length] for s in self._kept])
                    for row, length in enumerate(self._mask.sum(1).tolist())
                ]
            )
        found = (influence, angles, magnitude, norm, torch.stack(halves, dim=1), everywhere)
        return Scores(self._mask.sum(1), *found)


class _Middle:
    """The state between the two halves of a layer, while the layer runs."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.attention: Tensor | None = None
        self.mlp: Tensor | None = None

    def watch(self, layer: nn.Module) -> list[Any]:
        """Hooks on the halves of a layer; none if it has no such parts."""
        parts = dict(layer.named_children())
        attention, mlp = _first(parts, ATTENTION), _first(parts, MLP)
        norm = _first(parts, MLP_NORM)
        if attention is None or mlp is None or norm is None:
            return []

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.state = args[0]

        def attended(module: nn.Module, args: Any, output: Any) -> None:
            self.attention = (output[0] if isinstance(output, tuple) else output)[:, :PROVED]

        def mapped(module: nn.Module, args: Any, output: Any) -> None:
            self.mlp = (output[0] if isinstance(output, tuple) else output)[:, :PROVED]

        hooks = [attention.register_forward_hook(attended), mlp.register_forward_hook(mapped)]
        return [norm.register_forward_pre_hook(enter), *hooks]

    def turned(self, state: Tensor, y: Tensor, yy: Tensor) -> tuple[Tensor, Tensor]:
        """1 - cos around the attention and around the MLP, (B, S) each; NaN where unknown."""
        middle, attention, mlp = self.state, self.attention, self.mlp
        self.state = self.attention = self.mlp = None
        unknown = torch.full_like(yy, math.nan)
        if middle is None or attention is None or mlp is None or middle.shape != state.shape:
            return unknown, unknown
        start, end = state[:, :PROVED] + attention, middle[:, :PROVED] + mlp
        if not torch.equal(start, middle[:, :PROVED]) or not torch.equal(widen(end), y[:, :PROVED]):
            return unknown, unknown
        x, m = widen(state), widen(middle)
        xx, mm = torch.linalg.vecdot(x, x), torch.linalg.vecdot(m, m)
        first = cosine_from_products(torch.linalg.vecdot(x, m), xx, mm)
        second = cosine_from_products(torch.linalg.vecdot(m, y), mm, yy)
        return 1.0 - first, 1.0 - second


def _first(parts: dict[str, nn.Module], names: Sequence[str]) -> nn.Module | None:
    return next((parts[name] for name in names if name in parts), None)


@contextmanager
def watch(
    layers: nn.ModuleList, mask: Tensor, *, sublayers: bool = False, all_tokens: bool = False
) -> Iterator[Watch]:
    """Hooks on every layer for the pass inside the block; gone after it, whatever happens.

    Args:
        layers: called in order, each with the (B, S, D) state first.
        mask: (B, S) bool, True for real tokens.
        sublayers, all_tokens: as in `score`.
    """
    seen = Watch(mask, all_tokens=all_tokens)
    handles = [layer.register_forward_hook(seen.after, with_kwargs=True) for layer in layers]
    if sublayers:
        for layer in layers:
            handles += seen._middle.watch(layer)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def angular_distances(states: Tensor) -> Tensor:
    """Angular distances between all pairs of states, in float64.

    Args:
        states: (B, L + 1, D).

    Returns:
        (B, L + 1, L + 1) in [0, 1], zero on the diagonal.
    """
    states = (states.cpu() if states.device.type == "mps" else states).double()
    gram = states @ states.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    angles = cosine_from_products(gram, squares[:, :, None], squares[:, None, :]).arccos() / math.pi
    angles.diagonal(dim1=1, dim2=2).zero_()
    return angles


def _summed_angles(states: Sequence[Tensor], chunk: int = 32) -> Tensor:
    """Angular distances of one window, summed over its tokens: L + 1 of (S, D) to (L+1, L+1)."""
    chunks = (
        torch.stack([s[start : start + chunk] for s in states], dim=1)
        for start in range(0, len(states[0]), chunk)
    )
    return torch.stack([angular_distances(part).sum(0) for part in chunks]).sum(0)
