"""Scores of all layers from one forward pass: hooks, and the sums they add to.

Shapes: B windows, S tokens, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from short_gpt.decoder import Decoder, pad
from short_gpt.metrics import cosine_from_products, spearman, widen
from short_gpt.progress import bar, set_rate
from short_gpt.selection import best_block, lowest


@dataclass
class Importance:
    """Block Influence and angular distances of a model's layers, as sums over windows.

    Plain data that knows no model: two of them add up (`+`), and `to_dict` / `from_dict` keep
    every digit. Sums are float64, on the CPU. A window is one sequence that the model read.

    The windows fall alternately into two halves, whose agreement tells how settled the ranking
    is. Standard errors take the windows as independent samples: windows that overlap (a stride
    below the size) are not, and make both look better than they are.

    Attributes:
        layers: the layers' numbers in the original model, ascending.
        windows: windows in each half, (2,).
        tokens: tokens in each half, (2,).
        influence: sums over tokens of 1 - cos, (2, L).
        products: sums over windows of the outer product with itself of the vector of a window's
            L sums and its token count, (L + 1, L + 1).
        angles: sums over windows of angular distances, (L + 1, L + 1).
    """

    layers: list[int]
    windows: Tensor
    tokens: Tensor
    influence: Tensor
    products: Tensor
    angles: Tensor

    @classmethod
    def empty(cls, layers: Sequence[int]) -> Importance:
        """Zero sums for these layers."""
        n = len(layers)
        shapes = ((2,), (2,), (2, n), (n + 1, n + 1), (n + 1, n + 1))
        return cls(list(layers), *(torch.zeros(s, dtype=torch.float64) for s in shapes))

    def add(self, influence: Tensor, tokens: Tensor, angles: Tensor) -> None:
        """Adds windows.

        Args:
            influence: (B, L) sums over each window's tokens.
            tokens: (B,) token counts.
            angles: (B, L + 1, L + 1) angular distances at each window's last token.
        """
        first = int(self.windows.sum())
        half = torch.arange(first, first + len(tokens)) % 2
        sums = torch.cat((influence, tokens[:, None]), dim=1).cpu().double()  # MPS has no float64
        self.windows += torch.bincount(half, minlength=2)
        self.tokens.index_add_(0, half, sums[:, -1])
        self.influence.index_add_(0, half, sums[:, :-1])
        self.products += sums.T @ sums
        self.angles += angles.cpu().double().sum(0)

    def __add__(self, other: Importance) -> Importance:
        if self.layers != other.layers:
            raise ValueError(f"scores of layers {self.layers} and {other.layers} do not add up")
        sums = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[1:])
        return Importance(self.layers, *sums)

    @property
    def n_windows(self) -> int:
        return int(self.windows.sum())

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def block_influence(self) -> Tensor:
        """Mean over tokens of 1 - cos(state in front, state behind): (L,) in [0, 2]; Eq. 1."""
        return self.influence.sum(0) / self.tokens.sum()

    @property
    def covariance(self) -> Tensor:
        """Covariance of the entries of `block_influence` over samples of windows, (L, L).

        The estimate for a ratio of means with windows as sampling units, (n / (n-1)) sum r r^T /
        T^2 with r = a window's sums - its tokens x the mean. NaN for fewer than two windows.
        """
        n = self.n_windows
        if n < 2:
            return torch.full((len(self.layers),) * 2, math.nan, dtype=torch.float64)
        eye = torch.eye(len(self.layers), dtype=torch.float64)
        residual = torch.cat((eye, -self.block_influence[:, None]), dim=1)
        return residual @ self.products @ residual.T * (n / (n - 1) / self.tokens.sum() ** 2)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of every entry of `block_influence`, (L,)."""
        return self.covariance.diagonal().clamp(min=0).sqrt()

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of `block_influence` between the two halves."""
        if self.windows.min() == 0:
            return math.nan
        first, second = self.influence / self.tokens[:, None]
        return spearman(first, second)

    @property
    def angular(self) -> Tensor:
        """Mean angular distances, (L + 1, L + 1), symmetric, in [0, 1].

        Entry [l, l + n] compares the last token's state in front of layer l with that in front
        of layer l + n, as `selection.best_block` reads it (Gromov et al., Eq. 6).
        """
        return self.angles / self.windows.sum()

    def least_important(self, n: int, *, angular: bool = False) -> list[int]:
        """The n layers to remove: those of `selection.lowest`, or of `selection.best_block`.

        Args:
            n: 1 to L - 1.
            angular: the best block of consecutive layers instead of the lowest Block Influence.

        Returns:
            Original layer numbers: least important first, or a block in ascending order.

        Raises:
            ValueError: n is out of range.
        """
        places = best_block(self.angular, n) if angular else lowest(self.block_influence, n)
        return [self.layers[i] for i in places]

    def to_dict(self) -> dict[str, Any]:
        """The sums as lists, ready for JSON."""
        sums = {f.name: getattr(self, f.name).tolist() for f in fields(self)[1:]}
        return {"layers": self.layers, **sums}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Importance:
        """What `to_dict` wrote.

        Raises:
            ValueError: a field is missing or has the wrong shape.
        """
        try:
            empty = cls.empty(content["layers"])
            sums = [torch.tensor(content[f.name], dtype=torch.float64) for f in fields(cls)[1:]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are not saved scores: {error!r}") from None
        for f, loaded in zip(fields(cls)[1:], sums, strict=True):
            expected = getattr(empty, f.name).shape
            if loaded.shape != expected:
                raise ValueError(f"{f.name} is {list(loaded.shape)}, expected {list(expected)}")
        return cls(empty.layers, *sums)


def measure(
    decoder: Decoder,
    batches: Iterable[Sequence[Sequence[int]]],
    *,
    into: Importance | None = None,
    total: int | None = None,
    progress: bool = False,
) -> Importance:
    """Reads batches of windows and scores every layer: one pass, both papers' measures.

    Args:
        decoder: the model.
        batches: lists of windows of token ids; windows may differ in length.
        into: sums to add to, which also name the layers; None starts new ones from layer 0.
        total: number of windows to come, for the progress bar.
        progress: whether to show one.

    Returns:
        ``into``. A batch counts whole or not at all: after an error or an interruption, the
        batches before it are in the sums.

    Raises:
        ValueError: there is no window, or one is empty, too long or not in the vocabulary.
        FloatingPointError: a state is NaN or infinite; the message names the layer.
    """
    into = Importance.empty(range(len(decoder.layers))) if into is None else into
    read = 0
    with bar("scoring", total=total, unit="window", show=progress) as shown:
        for batch in batches:
            influence, tokens, angles = score(decoder, batch, layers=into.layers)
            into.add(influence, tokens, angles)
            read += int(tokens.sum())
            set_rate(shown, read)
            shown.update(len(batch))
    if not read:
        raise ValueError("expected at least one window of tokens, got none")
    return into


def score(
    decoder: Decoder, windows: Sequence[Sequence[int]], *, layers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of single windows from one pass, in the form that `Importance.add` takes.

    Raises:
        ValueError, FloatingPointError: as in `measure`.
    """
    tokens, mask = pad(windows, decoder)
    with watch(decoder.layers, mask) as seen:
        decoder.run(tokens)
    influence = torch.stack(seen.influence, dim=1)  # (B, L)
    bad = ~influence.isfinite()
    if bad.any():
        row, layer = (int(i) for i in bad.nonzero()[bad.nonzero()[:, 1].argmin()])
        raise FloatingPointError(
            f"layer {layers[layer]} met or gave a NaN or infinite state (window {row} of the "
            "batch); nothing of this batch was counted. Check the weights, or try another dtype"
        )
    return influence, mask.sum(1), angular_distances(torch.stack(seen.last, dim=1))


def angular_distances(states: Tensor) -> Tensor:
    """Angular distances between all pairs of states, in float64.

    Args:
        states: (B, L + 1, D).

    Returns:
        (B, L + 1, L + 1) in [0, 1], zero on the diagonal.
    """
    states = states.cpu().double()
    gram = states @ states.mT
    squares = gram.diagonal(dim1=1, dim2=2)
    angles = cosine_from_products(gram, squares[:, :, None], squares[:, None, :]).arccos() / math.pi
    angles.diagonal(dim1=1, dim2=2).zero_()
    return angles


class Watch:
    """What the hooks of one pass have reduced the states to.

    Attributes:
        influence: for every layer, (B,) sums over real tokens of 1 - cos, float32.
        last: the last real token's state in front of the first layer and behind every layer,
            L + 1 of (B, D), float32.
    """

    def __init__(self, mask: Tensor) -> None:
        self.influence: list[Tensor] = []
        self.last: list[Tensor] = []
        self._mask = mask
        self._rows = torch.arange(len(mask), device=mask.device)
        self._ends = mask.sum(1) - 1
        self._state: Tensor | None = None  # behind the previous layer, and its squared norms
        self._squares: Tensor | None = None

    def after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Forward hook: the state in front (B, S, D) and the one behind, of one layer."""
        state = args[0] if args else kwargs["hidden_states"]
        result = output[0] if isinstance(output, tuple) else output
        x, y = widen(state), widen(result)
        if not self.last:
            self.last.append(x[self._rows, self._ends])
        xx = self._squares
        if xx is None or state is not self._state:
            xx = torch.linalg.vecdot(x, x)
        yy = torch.linalg.vecdot(y, y)
        turned = 1.0 - cosine_from_products(torch.linalg.vecdot(x, y), xx, yy)
        self.influence.append(torch.where(self._mask, turned, 0.0).sum(1))
        self.last.append(y[self._rows, self._ends])
        self._state, self._squares = result, yy


@contextmanager
def watch(layers: nn.ModuleList, mask: Tensor) -> Iterator[Watch]:
    """Hooks on every layer for the passes inside the block; gone after it, whatever happens.

    Args:
        layers: called in order, each with the (B, S, D) state first.
        mask: (B, S) bool, True for real tokens.
    """
    seen = Watch(mask)
    handles = [layer.register_forward_hook(seen.after, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
