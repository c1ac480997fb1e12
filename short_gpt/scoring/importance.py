"""Scores of all layers as sums over windows.

Shapes: B windows, G texts, L layers, M metrics; S stands for a vector of a window's sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.frames import Table
from short_gpt.scoring import moments
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.metrics import LAYER_METRICS, best_block, lowest, spearman, t_quantile
from short_gpt.scoring.moments import Texts


@dataclass(repr=False)
class Importance(Table):
    """Block Influence, angular distances and further scores of a model's layers.

    Plain data that knows no model: two of them add up (`+`, or `merge` for parts of one reading),
    and `to_dict` / `from_dict` keep every digit. Sums are float64, on the CPU.

    Windows fall alternately into two groups, whose agreement tells how settled the ranking is.
    Standard errors take the texts as samples where there are several, else the windows, as if they
    were independent: those that overlap (a stride below the size) are not.

    Example:
        >>> Importance.empty([0, 1, 2]).n_windows
        0
    """

    layers: list[int]  # numbers in the original model, ascending
    windows: Tensor  # in each group, (2,)
    tokens: Tensor  # in each group, (2,)
    influence: Tensor  # sums over tokens of 1 - cos, (2, L)
    products: Tensor  # over windows of S S^T, (L + 1, L + 1), S a window's L sums and its tokens
    cubes: Tensor  # third moments of S, of `moments.cube_sums`, (2, L + 1, L + 1)
    angles: Tensor  # sums over windows of angular distances, (L + 1, L + 1)
    # over windows of the products of the distances of blocks of n layers that start at l and at m:
    # entry [n - 1, l, m], (L, L, L); zero where there is no block
    angle_products: Tensor
    angle_cubes: Tensor  # the same with the square of the first distance
    metrics: Tensor  # sums of `hooks.Scores` over all windows, (M, L); NaN where not scored so
    # of each text by its number, the sums S of its windows; None if the texts are not known
    texts: Texts | None = field(default_factory=dict, kw_only=True)

    @classmethod
    def empty(cls, layers: Sequence[int]) -> Importance:
        """Zero sums for these layers."""
        n = len(layers)
        shapes: dict[str, tuple[int, ...]] = {"windows": (2,), "tokens": (2,), "influence": (2, n)}
        shapes |= {"products": (n + 1, n + 1), "cubes": (2, n + 1, n + 1), "angles": (n + 1, n + 1)}
        shapes |= {"angle_products": (n, n, n), "angle_cubes": (n, n, n)}
        shapes |= {"metrics": (len(LAYER_METRICS), n)}
        zeros: dict[str, Any] = {k: torch.zeros(v, dtype=torch.float64) for k, v in shapes.items()}
        return cls(list(layers), **zeros)

    def add(self, scores: Scores, texts: Sequence[int | None] | None = None) -> None:
        """Adds the scores of B windows: all of them or, if interrupted, none.

        ``texts`` numbers the text of each, None if unknown; a number already here is the same text.
        """
        new = {f.name: getattr(scores, f.name).cpu().double() for f in fields(scores)}
        tokens, influence, angles = (new[n] for n in ("tokens", "influence", "angles"))
        group = (torch.arange(len(tokens)) + self.n_windows) % 2  # of each window, (B,)
        sums = torch.cat((influence, tokens[:, None]), dim=1)  # (B, L + 1)
        numbered = zip(texts or [None] * len(sums), sums, strict=True)
        products, cubes = moments.block_sums(angles)  # (L, L, L) each
        changed: dict[str, object] = {
            "texts": moments.add_texts(self.texts, numbered),
            "windows": self.windows + torch.bincount(group, minlength=2),  # (2,)
            "tokens": self.tokens.index_add(0, group, tokens),  # (2,)
            "influence": self.influence.index_add(0, group, influence),  # (2, L)
            "products": self.products + sums.T @ sums,  # (L + 1, B) (B, L + 1)
            "cubes": self.cubes + moments.cube_sums(sums),
            "angles": self.angles + angles.sum(0),
            "angle_products": self.angle_products + products,
            "angle_cubes": self.angle_cubes + cubes,
            "metrics": self.metrics + new["metrics"].sum(0),
        }
        # in one step, which no interruption divides
        vars(self).update(changed)

    def __add__(self, other: Importance) -> Importance:
        """The scores of both, read from different texts, whose numbers may be the same."""
        start, theirs = moments.next_number(self.texts), other.texts
        # numbers begin at 0 in every call of `data.windows`
        apart = None if theirs is None else {start + n: sums for n, sums in theirs.items()}
        return self._sum(other, moments.merge_texts([self.texts, apart]))

    def merge(self, other: Importance) -> Importance:
        """The scores of parts of one reading, as of two machines: the same number is one text."""
        return self._sum(other, moments.merge_texts([self.texts, other.texts]))

    def _sum(self, other: Importance, texts: Texts | None) -> Importance:
        if self.layers != other.layers:
            raise ShortGPTError(f"scores of layers {self.layers} and {other.layers} do not add up")
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        return Importance(self.layers, **sums, texts=texts)

    @property
    def n_windows(self) -> int:
        return int(self.windows.sum())

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def block_influence(self) -> Tensor:
        """Mean over tokens of 1 - cos(state entering, state leaving): (L,) in [0, 2]; Eq. 1."""
        return self.influence.sum(0) / self.tokens.sum()

    @property
    def covariance(self) -> Tensor:
        """Covariance of `block_influence` over samples of windows, (L, L); NaN for fewer than two.

        Of a ratio of means: (n / (n-1)) sum r r^T / T^2, r = a window's sums - its tokens x mean.
        """
        n = self.n_windows
        if n < 2:
            return torch.full((len(self.layers),) * 2, math.nan, dtype=torch.float64)
        eye = torch.eye(len(self.layers), dtype=torch.float64)  # (L, L)
        # (L, L + 1): what makes r of S
        residual = torch.cat((eye, -self.block_influence[:, None]), dim=1)
        return residual @ self.products @ residual.T * (n / (n - 1) / self.tokens.sum() ** 2)

    @property
    def sampling_covariance(self) -> Tensor:
        """Like `covariance`, (L, L), over samples of texts where there are several.

        Of windows that differ in length the effective number (Kish) stands for their number.
        """
        if (sums := self._text_sums) is not None:
            return moments.ratio_covariance(sums[:, :-1], sums[:, -1])
        n, effective = self.n_windows, self._effective_windows
        if n < 2:
            return self.covariance
        # n / (n - 1) of `covariance` with the effective number in the place of n
        return self.covariance * ((n - 1) / n * effective / (effective - 1))

    @property
    def standard_error(self) -> Tensor:
        """Standard error of every entry of `block_influence`, (L,); of `degrees` of freedom."""
        return self.sampling_covariance.diagonal().clamp(min=0).sqrt()

    @property
    def margin(self) -> Tensor:
        """Half of the 95% interval of `block_influence`, (L,), by t; NaN for too few `degrees`."""
        return t_quantile(0.975, self.degrees) * self.standard_error

    @property
    def n_texts(self) -> int | None:
        return None if self.texts is None else len(self.texts)

    @property
    def degrees(self) -> float:
        """Of freedom: texts less 1 if all have one length, else fewer; of windows if one text."""
        if (sums := self._text_sums) is not None:
            return moments.degrees_of_freedom(sums[:, -1])
        return self._effective_windows - 1 if self.n_windows > 1 else 0.0

    @property
    def _text_sums(self) -> Tensor | None:
        return torch.stack([*self.texts.values()]) if self.texts and len(self.texts) > 1 else None

    @property
    def _effective_windows(self) -> float:
        """How many windows of one length say as much: (sum of tokens)^2 / sum of their squares."""
        return float(self.tokens.sum() ** 2 / self.products[-1, -1])

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of `block_influence` between the two groups of windows."""
        if self.windows.min() == 0:
            return math.nan
        first, second = self.influence / self.tokens[:, None]  # (L,) each
        return spearman(first, second)

    @property
    def angular(self) -> Tensor:
        """Mean angular distances, (L + 1, L + 1), symmetric, in [0, 1].

        Entry [l, l + n] compares the last token's states entering layers l and l + n (Eq. 6).
        """
        return self.angles / self.windows.sum()

    def angular_covariance(self, n: int) -> Tensor:
        """Covariance of the mean distances of blocks of n, (L - n + 1, L - n + 1), over windows."""
        count, starts = self.n_windows, len(self.layers) - n + 1
        if count < 2:
            return torch.full((starts, starts), math.nan, dtype=torch.float64)
        mean = self.angular.diagonal(n)  # (L - n + 1,)
        second = self.angle_products[n - 1, :starts, :starts] / count  # (L - n + 1, L - n + 1)
        return (second - torch.outer(mean, mean)) / (count - 1)

    @property
    def skewness(self) -> Tensor:
        """Skewness over windows of the difference of layers j and i, entry [i, j], (L, L)."""
        third = moments.residual_cubes(self.block_influence, *self.cubes)  # (L, L)
        scale = self.n_windows / self.tokens.sum()  # residuals of sums, in the unit of the mean
        return moments.pair_skewness(self.covariance, third * scale**3, self.n_windows)

    def angular_skewness(self, n: int) -> Tensor:
        """Like `skewness`, of the distances of all blocks of n layers, by the blocks' starts."""
        count, starts = self.n_windows, len(self.layers) - n + 1
        blocks = (n - 1, slice(starts), slice(starts))  # (starts, starts), those that exist
        products, cubes = self.angle_products[blocks], self.angle_cubes[blocks]
        sums = self.angles.diagonal(n)  # (starts,), of all windows
        # every window weighs 1 here, where it has its tokens in `skewness`
        cubes = moments.with_count(cubes, products.diagonal(), count)
        weighted = moments.with_count(products, sums, count)
        third = moments.residual_cubes(sums / count, cubes, weighted)
        return moments.pair_skewness(self.angular_covariance(n), third, count)

    def mean(self, metric: str) -> Tensor:
        """Mean over tokens of a metric of `metrics.LAYER_METRICS`, (L,).

        "magnitude" is ||f(x)|| / ||x + f(x)|| (Samragh et al. 2023), "norm" is ||x + f(x)||.
        """
        return self.metrics[[*LAYER_METRICS].index(metric)] / self.tokens.sum()

    def least_important(self, n: int, *, angular: bool = False) -> list[int]:
        """Original numbers of the n layers to remove: least important first, or the best block.

        ShortGPTError unless n is 1 to L - 1.
        """
        chosen = best_block(self.angular, n) if angular else lowest(self.block_influence, n)
        return [self.layers[i] for i in chosen]

    @property
    def columns(self) -> dict[str, list[object]]:
        """A value a layer of every score: Block Influence, its 95% margin and rank, and metrics."""
        scores = self.block_influence
        table = {"layer": self.layers, "block_influence": scores.tolist()}
        table["margin"] = self.margin.tolist()
        table["rank"] = (scores.argsort(stable=True).argsort() + 1).tolist()
        return {**table, **{name: self.mean(name).tolist() for name in LAYER_METRICS}}

    def __repr__(self) -> str:
        about = f"{len(self.layers)} layers, {self.n_windows:,} windows, {self.n_tokens:,} tokens"
        scored = self.n_windows and len(self.layers) > 1
        if not scored or not self.block_influence.isfinite().all():
            return f"Importance({about})"
        order = lowest(self.block_influence, min(10, len(self.layers) - 1))
        few = ", ".join(str(self.layers[i]) for i in order)
        return f"Importance({about}; lowest Block Influence first: {few}, ...)"

    def to_dict(self) -> dict[str, object]:
        """The sums as lists of numbers, every digit kept; None for NaN, and for unknown texts."""
        sums = {name: to_lists(getattr(self, name)) for name in SUMS if name != "metrics"}
        # in a file, each metric has its own name
        metrics = dict(zip(LAYER_METRICS, map(to_lists, self.metrics), strict=True))
        texts: dict[str, object] | None = None
        if self.texts is not None:
            own = [to_lists(values) for values in self.texts.values()]
            texts = {"numbers": list(self.texts), "sums": own}
        return {"layers": self.layers, **sums, **metrics, "texts": texts}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Importance:
        """What `to_dict` wrote; ShortGPTError if it did not. A metric that is missing is NaN."""
        try:
            layers, texts = list(content["layers"]), content["texts"]
            sums = {name: from_lists(content[name]) for name in SUMS if name != "metrics"}
            unknown = [math.nan] * len(layers)
            metrics = [from_lists(content.get(name, unknown)) for name in LAYER_METRICS]
            if texts is not None:
                own = map(from_lists, texts["sums"])
                texts = dict(zip(texts["numbers"], own, strict=True))
            return cls(layers, **sums, metrics=torch.stack(metrics), texts=texts)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ShortGPTError("these are not saved scores: score again") from error


SUMS = [f.name for f in fields(Importance) if f.name not in ("layers", "texts")]


def to_lists(values: Tensor) -> list[Any]:
    """A tensor as lists, every digit kept; None for NaN, which JSON does not have."""
    numbers = values.numpy().astype(object)
    numbers[values.isnan().numpy()] = None
    return numbers.tolist()


def from_lists(content: object) -> Tensor:
    """The tensor in float64 that `to_lists` wrote."""
    return torch.from_numpy(np.array(content, dtype=np.float64))
