"""Scores of every layer from one forward pass: hooks reduce the hidden states as layers run.

Shapes: B windows, S tokens, D width, L layers, M metrics; x enters a layer, y leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder, padded
from short_gpt.models.layer_calls import Arguments, Output, first, state_in
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.scoring.metrics import (
    LAYER_METRICS,
    TokenProducts,
    angular_distances,
    cosine_from_product,
    influence,
    inner,
    norms,
    widen,
)

NAN = torch.tensor(math.nan)  # of any shape: scores that were not taken


@dataclass(frozen=True)
class Scores:
    """Scores of single windows, as `Importance.add` takes them; NaN where one was not taken."""

    tokens: Tensor  # real tokens of each window, (B,)
    influence: Tensor  # sums over tokens of 1 - cos(x, y), (B, L)
    angles: Tensor  # angular distances at the last token of all states, (B, L + 1, L + 1)
    metrics: Tensor = NAN  # sums over tokens of each of `LAYER_METRICS`, (B, M, L)

    def check_finite(self, layers: Sequence[int]) -> None:
        """Raises NotFiniteError if a state was NaN or infinite; names its layer."""
        bad = ~self.influence.isfinite()  # (B, L): a state that is not finite makes its cosine NaN
        if bad.any():
            row, layer = (int(i) for i in bad.nonzero()[bad.nonzero()[:, 1].argmin()])
            raise NotFiniteError(
                f"NaN or infinity in the input or output of layer {layers[layer]} (window {row} of "
                "the batch); none of this batch counts. Check the weights, or try another dtype"
            )

    @classmethod
    def cat(cls, parts: Sequence[Scores]) -> Scores:
        """The windows of all parts, in their order."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})

    def at(self, positions: Sequence[int]) -> Scores:
        """The windows put in order: the first of these at the first of ``positions``, and so on."""
        order = torch.tensor(positions).argsort()  # the inverse of a permutation
        return Scores(**{f.name: getattr(self, f.name)[order] for f in fields(self)})


def score_batch(
    decoder: Decoder, windows: Sequence[Sequence[int]], *, layers: Sequence[int]
) -> Scores:
    """Scores of single windows of token ids, of any lengths, from one pass.

    ``layers`` are for an error.
    """
    positions: list[int] = []
    parts = []
    for batch, tokens, mask in padded(windows, decoder):  # tokens and mask (B, S)
        with hooked(decoder.layers, mask) as hooks:
            decoder.run(tokens)
        parts.append(hooks.scores())
        if (ran := parts[-1].influence.shape[1]) != len(decoder.layers):
            raise ShortGPTError(
                f"a pass ran layers {ran} times, expected each of {len(decoder.layers)} once: this "
                "model's layers cannot be scored"
            )
        parts[-1].check_finite(layers)
        positions += batch
    return parts[0] if len(parts) == 1 else Scores.cat(parts).at(positions)


class LayerHooks:
    """Reduces the states of one pass; `after` is called for the layers in their order.

    The mask is (B, S) bool, True for real tokens.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._rows = torch.arange(len(mask), device=mask.device)  # (B,), to index with `_ends`
        self._ends = mask.sum(1) - 1  # the last real token of each window, (B,)
        self._last: list[Tensor] = []  # (B, D) float32, L + 1 of them
        self._products: list[Tensor] = []  # (4, B, S) of layers that await `reduce`
        self._sums: list[Tensor] = []  # (1 + M, layers, B): see `reduce`
        self._entered: tuple[Tensor, int] | None = None  # the state entering, and its version

    def before(self, layer: nn.Module, args: Arguments, kwargs: Mapping[str, object]) -> None:
        """Forward pre-hook: notes the state entering a layer, which is not to change in it."""
        state = state_in(args, kwargs)
        # an inference tensor does not count how often it was written in
        self._entered = None if state.is_inference() else (state, state._version)

    def after(
        self, layer: nn.Module, args: Arguments, kwargs: Mapping[str, object], output: Output
    ) -> None:
        """Forward hook: the states (B, S, D) entering and leaving one layer."""
        state, result = state_in(args, kwargs), first(output)  # (B, S, D) each
        self._check_state(layer, state)
        # of layers on several devices, a state is moved inside the layer
        x, y = widen(state.to(result.device)), widen(result)  # (B, S, D) each, float32 or wider
        if not self._last:
            self._keep(x)
        products = [inner(x, y), norms(x), norms(y), norms(y - x)]  # (B, S) each
        self._products.append(torch.stack(products).to(self._mask.device))  # (4, B, S)
        self._keep(y)

    def _check_state(self, layer: nn.Module, state: Tensor) -> None:
        entered, self._entered = self._entered, None
        written = entered is not None and state is entered[0] and state._version != entered[1]
        # a state of another shape, or one that is written over, has nothing to be compared with
        if state.dim() != 3 or state.shape[:2] != self._mask.shape or written:
            shape = f"a state of shape {list(state.shape)}, expected {list(self._mask.shape)} and D"
            raise ShortGPTError(
                f"{type(layer).__name__} {'writes over its state' if written else f'takes {shape}'}"
                ": this model's layers cannot be scored"
            )

    def reduce(self) -> None:
        """Sums influence and metrics of the layers so far over tokens, and frees their products."""
        if not self._products:
            return
        # many layers at once: on a processor, small calls would cost as much as the products
        tokens = TokenProducts(*torch.stack(self._products, dim=1))  # (layers, B, S) each
        xy, x_norm, y_norm, _ = tokens
        self._products = []
        each = [influence(cosine_from_product(xy, x_norm, y_norm))]  # (layers, B, S) each
        each += [metric(tokens) for metric in LAYER_METRICS.values()]
        # padding counts for nothing, NaN included: (1 + M, layers, B)
        self._sums.append(torch.where(self._mask, torch.stack(each), 0.0).sum(3))

    def _keep(self, wide: Tensor) -> None:
        rows, ends = self._rows.to(wide.device), self._ends.to(wide.device)
        last = wide[rows, ends]  # (B, D): Eq. 6 reads last tokens alone
        self._last.append(last.to(self._mask.device))

    def scores(self) -> Scores:
        """The scores of the pass, once all layers have run."""
        self.reduce()
        turned, *metrics = torch.cat(self._sums, dim=1).mT  # influence and M metrics, (B, L) each
        angles = angular_distances(torch.stack(self._last, dim=1))  # of (B, L + 1, D)
        return Scores(
            tokens=self._mask.sum(1),  # (B,)
            influence=turned,
            angles=angles,
            metrics=torch.stack(metrics, dim=1),  # (B, M, L)
        )


@contextmanager
def hooked(layers: nn.ModuleList, mask: Tensor) -> Iterator[LayerHooks]:
    """Hooks on every layer inside the block; removed after it, whatever happens.

    ``layers`` run in order, each with the (B, S, D) state first; the mask is (B, S) bool, True for
    real tokens.
    """
    hooks = LayerHooks(mask)
    # with_kwargs: some families pass the state by its name
    handles = [layer.register_forward_pre_hook(hooks.before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(hooks.after, with_kwargs=True) for layer in layers]
    with ExitStack() as removed:
        for handle in handles:
            removed.callback(handle.remove)
        yield hooks
