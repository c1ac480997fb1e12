"""What one forward pass tells of every layer: hooks that reduce the states as they go by.

Shapes: B windows, S tokens, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from short_gpt.models.decoder import Decoder, padded
from short_gpt.models.families import Family
from short_gpt.models.layer_hooks import Arguments, Output, first, state_in
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.scoring.halves import Middle
from short_gpt.scoring.metrics import (
    angular_distances,
    cosine_from_product,
    influence,
    norms,
    relative_change,
    summed_angles,
    widen,
)


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

    def at(self, places: Sequence[int]) -> Scores:
        """The windows in the order whose places in it these are."""
        order = torch.tensor(places).argsort()
        return Scores(*(getattr(self, f.name)[order] for f in fields(self)))


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
    family = decoder.family if sublayers else None
    order: list[int] = []
    found = []
    for places, tokens, mask in padded(windows, decoder):
        with hooked(decoder.layers, mask, halves_of=family, all_tokens=all_tokens) as hooks:
            decoder.run(tokens)
        found.append(hooks.scores())
        found[-1].check_finite(layers)
        order += places
    return found[0] if len(found) == 1 else Scores.cat(found).at(order)


class LayerHooks:
    """Reduces the states of one pass; `after` is called for the layers in their order.

    Args:
        mask: (B, S) bool, True for real tokens.
        all_tokens: whether to keep the states for angular distances at all tokens.
    """

    def __init__(self, mask: Tensor, *, all_tokens: bool = False) -> None:
        self._mask = mask
        self._rows = torch.arange(len(mask), device=mask.device)
        self._ends = mask.sum(1) - 1  # the last real token of each window, (B,)
        self._state: Tensor | None = None  # behind the previous layer, (B, S, D)
        self._version: int | None = None  # of that tensor, when its norms were computed
        self._norms: Tensor | None = None  # its norms, (B, S)
        self._last: list[Tensor] = []  # (B, D) float32, L + 1 of them
        self._kept: list[Tensor] | None = [] if all_tokens else None  # (B, S, D), L + 1 of them
        self._products: list[Tensor] = []  # (4 or 7, B, S) of layers that await `_reduce`
        self._sums: list[Tensor] = []  # (3 or 5, layers, B): see `_reduce`
        self._middle: Middle | None = None
        self._entered: tuple[Tensor, int] | None = None  # the state in front, and its version

    def on_halves(self, layer: nn.Module, family: Family) -> list[RemovableHandle]:
        """Hooks on the attention and the MLP of a layer; none where it has no such parts."""
        self._middle = self._middle or Middle()
        return self._middle.hooks(layer, family)

    def forget_state(self) -> None:
        """To be called where the state goes to the next layer as a copy, or is written over.

        Its norms are not used again then, and nothing holds on to its memory.
        """
        self._reduce()
        self._state = self._norms = None

    def before(self, layer: nn.Module, args: Arguments, kwargs: Mapping[str, object]) -> None:
        """Forward pre-hook: notes the state in front of a layer, which is not to change in it."""
        state = state_in(args, kwargs)
        version = version_of(state)
        self._entered = None if version is None else (state, version)

    def after(
        self, layer: nn.Module, args: Arguments, kwargs: Mapping[str, object], output: Output
    ) -> None:
        """Forward hook: the state in front (B, S, D) and the one behind, of one layer.

        Raises:
            ShortGPTError: the layer has written over the state in front, which nothing has kept, or
                takes several states at once.
        """
        state, result = state_in(args, kwargs), first(output)
        self._check_state(layer, state)
        x, y = widen(state), widen(result)
        if not self._last:
            self._keep(state, x)
        # the state in front is the one behind the previous layer, unless something came between
        # or wrote in it; a tensor without a version may have been written in
        version = version_of(state) if state is self._state else None
        known = self._norms if version is not None and version == self._version else None
        x_norm = norms(x) if known is None else known
        y_norm = norms(y)
        products = [torch.linalg.vecdot(x, y), x_norm, y_norm, norms(y - x)]  # (B, S) each
        if self._middle is not None:
            products += self._middle.products(state, y)
        self._products.append(torch.stack(products))
        self._keep(result, y)
        self._state, self._version, self._norms = result, version_of(result), y_norm

    def _check_state(self, layer: nn.Module, state: Tensor) -> None:
        if state.dim() != 3:
            raise ShortGPTError(
                f"{type(layer).__name__} takes a state of shape {list(state.shape)}, expected "
                "(windows, tokens, width): this model's layers cannot be scored"
            )
        entered, self._entered = self._entered, None
        if entered is not None and state is entered[0] and state._version != entered[1]:
            raise ShortGPTError(
                f"{type(layer).__name__} writes over the state that it is given, which leaves "
                "nothing to compare its output with: this model's layers cannot be scored"
            )

    def _reduce(self) -> None:
        """Sums over tokens of the layers so far: influence, magnitude, norm, and of the halves.

        For many layers at once: on a processor, small calls would cost as much as the products.
        """
        if not self._products:
            return
        xy, x_norm, y_norm, change, *middle = torch.stack(self._products, dim=1)  # (layers, B, S)
        self._products = []
        each = [
            influence(cosine_from_product(xy, x_norm, y_norm)),
            relative_change(change, y_norm),
            y_norm,
        ]
        if middle:
            xm, m_norm, my = middle
            each.append(influence(cosine_from_product(xm, x_norm, m_norm)))
            each.append(influence(cosine_from_product(my, m_norm, y_norm)))
        self._sums.append(torch.where(self._mask, torch.stack(each), 0.0).sum(3))

    def _keep(self, state: Tensor, wide: Tensor) -> None:
        self._last.append(wide[self._rows, self._ends])
        if self._kept is not None:
            self._kept.append(state.clone())  # the model may go on writing in that tensor

    def scores(self) -> Scores:
        """The scores of the pass, once all layers have run."""
        self._reduce()
        turned, magnitude, norm, *halves = torch.cat(self._sums, dim=1).mT  # (B, L) each
        halves = halves or [torch.full_like(turned, math.nan)] * 2
        angles = angular_distances(torch.stack(self._last, dim=1))
        everywhere = torch.full_like(angles, math.nan)
        if self._kept is not None:
            everywhere = torch.stack(
                [
                    summed_angles([s[row, :length] for s in self._kept])
                    for row, length in enumerate(self._mask.sum(1).tolist())
                ]
            )
        sums = (turned, angles, magnitude, norm, torch.stack(halves, dim=1), everywhere)
        return Scores(self._mask.sum(1), *sums)


def version_of(state: Tensor) -> int | None:
    """How often a tensor was written in; None for an inference tensor, which does not count it."""
    return None if state.is_inference() else state._version


@contextmanager
def hooked(
    layers: nn.ModuleList,
    mask: Tensor,
    *,
    halves_of: Family | None = None,
    all_tokens: bool = False,
) -> Iterator[LayerHooks]:
    """Hooks on every layer for the pass inside the block; gone after it, whatever happens.

    Args:
        layers: called in order, each with the (B, S, D) state first.
        mask: (B, S) bool, True for real tokens.
        halves_of: also scores attention and MLP, by the names of this family.
        all_tokens: as in `score`.
    """
    hooks = LayerHooks(mask, all_tokens=all_tokens)
    handles = [layer.register_forward_pre_hook(hooks.before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(hooks.after, with_kwargs=True) for layer in layers]
    if halves_of is not None:
        for layer in layers:
            handles += hooks.on_halves(layer, halves_of)
    try:
        yield hooks
    finally:
        for handle in handles:
            handle.remove()
