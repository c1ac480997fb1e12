"""Scores of every layer from one forward pass: hooks reduce the hidden states as layers run.

Shapes: B windows, S tokens, D width, L layers, M metrics; x enters a layer, m is between its
sublayers, y leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from short_gpt.models.decoder import Decoder, padded
from short_gpt.models.families import Family, part
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
    summed_angles,
    widen,
)

CHECKED_TOKENS = 8  # tokens of each window on which the sublayers are seen to add up to the layer
UNKNOWN = torch.empty(0)  # stands for scores that were not taken


@dataclass(frozen=True)
class Scores:
    """Scores of single windows, as `Importance.add` takes them; NaN where one was not taken."""

    tokens: Tensor  # real tokens of each window, (B,)
    influence: Tensor  # sums over tokens of 1 - cos(x, y), (B, L)
    angles: Tensor  # angular distances at the last token of all states, (B, L + 1, L + 1)
    metrics: Tensor = UNKNOWN  # sums over tokens of each of `LAYER_METRICS`, (B, M, L)
    # like ``influence``, around a layer's attention and around its MLP, (B, 2, L); NaN also where
    # the layer is not x + attention, then + MLP
    sublayers: Tensor = UNKNOWN
    token_angles: Tensor = UNKNOWN  # like ``angles``, summed over all tokens

    def __post_init__(self) -> None:
        B, L = self.influence.shape
        unknown = {"metrics": (B, len(LAYER_METRICS), L), "sublayers": (B, 2, L)}
        for name, shape in {**unknown, "token_angles": (B, L + 1, L + 1)}.items():
            if getattr(self, name) is UNKNOWN:
                object.__setattr__(self, name, self.angles.new_full(shape, math.nan))

    def metric(self, name: str) -> Tensor:
        return self.metrics[:, [*LAYER_METRICS].index(name)]

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
    decoder: Decoder,
    windows: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    sublayers: bool = False,
    all_tokens: bool = False,
) -> Scores:
    """Scores of single windows of token ids, of any lengths, from one pass.

    With ``sublayers`` also of the attention and the MLP of every layer, with ``all_tokens`` angular
    distances at all tokens, which keeps the states of all layers; ``layers`` are for an error.
    """
    family = decoder.family if sublayers else None
    positions: list[int] = []
    parts = []
    for batch, tokens, mask in padded(windows, decoder):  # tokens and mask (B, S)
        with hooked(decoder.layers, mask, sublayers_of=family, all_tokens=all_tokens) as hooks:
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


class BetweenSublayers:
    """The hidden state between a layer's attention and its MLP, while the layer runs."""

    def __init__(self) -> None:
        self.state: Tensor | None = None  # (B, S, D) entering the MLP's norm
        self.attention: Tensor | None = None  # (B, CHECKED_TOKENS, D) that the attention adds
        self.mlp: Tensor | None = None  # (B, CHECKED_TOKENS, D) that the MLP adds

    def hooks(self, layer: nn.Module, family: Family) -> list[RemovableHandle]:
        attention, mlp = part(layer, family.attention), part(layer, family.mlp)
        norm = part(layer, family.mlp_norm)
        if attention is None or mlp is None or norm is None:
            return []

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.state = args[0]

        def attended(module: nn.Module, args: object, output: Output) -> None:
            # a copy, because the layer may write in that tensor later
            self.attention = first(output)[:, :CHECKED_TOKENS].clone()  # (B, CHECKED_TOKENS, D)

        def mapped(module: nn.Module, args: object, output: Output) -> None:
            self.mlp = first(output)[:, :CHECKED_TOKENS].clone()  # (B, CHECKED_TOKENS, D)

        hooks = [attention.register_forward_hook(attended), mlp.register_forward_hook(mapped)]
        return [norm.register_forward_pre_hook(enter), *hooks]

    def products(self, state: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x . m, ||m|| and m . y, (B, S) each, for x and a wide y (B, S, D); NaN where unknown."""
        middle = self._proved(state, y)
        if middle is None:
            unknown = torch.full(y.shape[:2], math.nan, dtype=y.dtype, device=y.device)  # (B, S)
            return unknown, unknown, unknown
        m = widen(middle)  # (B, S, D)
        return inner(widen(state), m), norms(m), inner(m, y)

    def _proved(self, state: Tensor, y: Tensor) -> Tensor | None:
        """The state m (B, S, D), if the sublayers add up to the layer on the first tokens."""
        middle, attention, mlp = self.state, self.attention, self.mlp
        self.state = self.attention = self.mlp = None  # the next layer's are others
        if middle is None or attention is None or mlp is None or middle.shape != state.shape:
            return None
        x, m = state[:, :CHECKED_TOKENS], middle[:, :CHECKED_TOKENS]  # (B, CHECKED_TOKENS, D) each
        if attention.shape != x.shape or mlp.shape != x.shape:  # experts may flatten the windows
            return None
        # exact, in the model's own dtype: a parallel block or a norm after a sublayer fails
        adds_up = torch.equal(x + attention, m) and torch.equal(
            widen(m + mlp), y[:, :CHECKED_TOKENS]
        )
        return middle if adds_up else None


class LayerHooks:
    """Reduces the states of one pass; `after` is called for the layers in their order.

    The mask is (B, S) bool, True for real tokens; ``all_tokens`` keeps all states for their angles.
    """

    def __init__(self, mask: Tensor, *, all_tokens: bool = False) -> None:
        self._mask = mask
        self._rows = torch.arange(len(mask), device=mask.device)  # (B,), to index with `_ends`
        self._ends = mask.sum(1) - 1  # the last real token of each window, (B,)
        self._state: Tensor | None = None  # leaving the previous layer, (B, S, D)
        self._version: int | None = None  # of that tensor, when its norms were computed
        self._norms: Tensor | None = None  # its norms, (B, S)
        self._last: list[Tensor] = []  # (B, D) float32, L + 1 of them
        self._kept: list[Tensor] | None = [] if all_tokens else None  # (B, S, D), L + 1 of them
        self._products: list[Tensor] = []  # (4 or 7, B, S) of layers that await `_reduce`
        self._sums: list[Tensor] = []  # (1 + M (+ 2), layers, B): see `_reduce`
        self._middle: BetweenSublayers | None = None
        self._entered: tuple[Tensor, int] | None = None  # the state entering, and its version

    def on_sublayers(self, layer: nn.Module, family: Family) -> list[RemovableHandle]:
        """Hooks on the attention and the MLP of a layer; none where it has no such parts."""
        self._middle = self._middle or BetweenSublayers()
        return self._middle.hooks(layer, family)

    def forget_state(self) -> None:
        """To be called where the state goes to the next layer as a copy, or is written over."""
        self._reduce()
        # norms of another tensor are of no use, and nothing shall hold on to this one's memory
        self._state = self._norms = None

    def before(self, layer: nn.Module, args: Arguments, kwargs: Mapping[str, object]) -> None:
        """Forward pre-hook: notes the state entering a layer, which is not to change in it."""
        state = state_in(args, kwargs)
        version = version_of(state)
        self._entered = None if version is None else (state, version)

    def after(
        self, layer: nn.Module, args: Arguments, kwargs: Mapping[str, object], output: Output
    ) -> None:
        """Forward hook: the states (B, S, D) entering and leaving one layer."""
        state, result = state_in(args, kwargs), first(output)  # (B, S, D) each
        self._check_state(layer, state)
        # of layers on several devices, a state is moved inside the layer
        entering = state.to(result.device)
        x, y = widen(entering), widen(result)  # (B, S, D) each, float32 or wider
        if not self._last:
            self._keep(state, x)
        # the state entering is the one that left the previous layer, unless something came between
        # or wrote in it; a tensor without a version may have been written in
        version = version_of(state) if state is self._state else None
        same = version is not None and version == self._version
        reused = self._norms if same else None
        x_norm = norms(x) if reused is None else reused.to(x.device)  # (B, S)
        y_norm = norms(y)  # (B, S), which the next layer takes as those of its x
        products = [inner(x, y), x_norm, y_norm, norms(y - x)]  # (B, S) each
        if self._middle is not None:
            products += self._middle.products(entering, y)
        self._products.append(torch.stack(products).to(self._mask.device))  # (4 or 7, B, S)
        self._keep(result, y)
        self._state, self._version, self._norms = result, version_of(result), y_norm

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

    def _reduce(self) -> None:
        """Sums over tokens of the layers so far: influence, metrics, and influence of sublayers."""
        if not self._products:
            return
        # many layers at once: on a processor, small calls would cost as much as the products
        stacked = torch.stack(self._products, dim=1)  # (4 or 7, layers, B, S)
        tokens, middle = TokenProducts(*stacked[:4]), stacked[4:]
        xy, x_norm, y_norm, _ = tokens
        self._products = []
        each = [influence(cosine_from_product(xy, x_norm, y_norm))]  # (layers, B, S) each
        each += [metric(tokens) for metric in LAYER_METRICS.values()]
        if len(middle):
            xm, m_norm, my = middle
            each.append(influence(cosine_from_product(xm, x_norm, m_norm)))
            each.append(influence(cosine_from_product(my, m_norm, y_norm)))
        # padding counts for nothing, NaN included: (1 + M (+ 2), layers, B)
        self._sums.append(torch.where(self._mask, torch.stack(each), 0.0).sum(3))

    def _keep(self, state: Tensor, wide: Tensor) -> None:
        rows, ends = self._rows.to(wide.device), self._ends.to(wide.device)
        last = wide[rows, ends]  # (B, D): Eq. 6 reads last tokens alone
        self._last.append(last.to(self._mask.device))
        if self._kept is not None:  # a copy, as the model may write in that tensor later
            self._kept.append(state.to(self._mask.device, copy=True))

    def scores(self) -> Scores:
        """The scores of the pass, once all layers have run."""
        self._reduce()
        # influence (B, L), then M metrics, then the two sublayers where these are scored
        turned, *rest = torch.cat(self._sums, dim=1).mT  # (B, L) each
        metrics, sublayers = rest[: len(LAYER_METRICS)], rest[len(LAYER_METRICS) :]
        everywhere = UNKNOWN
        if self._kept is not None:
            lengths = enumerate(self._mask.sum(1).tolist())
            each = [summed_angles([s[row, :end] for s in self._kept]) for row, end in lengths]
            everywhere = torch.stack(each)  # (B, L + 1, L + 1)
        return Scores(
            tokens=self._mask.sum(1),  # (B,)
            influence=turned,
            angles=angular_distances(torch.stack(self._last, dim=1)),  # of (B, L + 1, D)
            metrics=torch.stack(metrics, dim=1),  # (B, M, L)
            sublayers=torch.stack(sublayers, dim=1) if sublayers else UNKNOWN,  # (B, 2, L)
            token_angles=everywhere,
        )


def version_of(state: Tensor) -> int | None:
    """How often a tensor was written in; None for an inference tensor, which does not count it."""
    return None if state.is_inference() else state._version


@contextmanager
def hooked(
    layers: nn.ModuleList,
    mask: Tensor,
    *,
    sublayers_of: Family | None = None,
    all_tokens: bool = False,
) -> Iterator[LayerHooks]:
    """Hooks on every layer inside the block; removed after it, whatever happens.

    ``layers`` run in order, each with the (B, S, D) state first; the mask is (B, S) bool, True for
    real tokens; by the names of ``sublayers_of``, attention and MLP are scored too.
    """
    hooks = LayerHooks(mask, all_tokens=all_tokens)
    # with_kwargs: some families pass the state by its name
    handles = [layer.register_forward_pre_hook(hooks.before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(hooks.after, with_kwargs=True) for layer in layers]
    if sublayers_of is not None:
        for layer in layers:
            handles += hooks.on_sublayers(layer, sublayers_of)
    with ExitStack() as removed:
        for handle in handles:
            removed.callback(handle.remove)
        yield hooks
