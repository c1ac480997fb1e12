"""When a ranking is settled: tests of paired differences between layers, at planned looks.

The windows are a simple random sample, without replacement, of all windows of the data. The
answer is settled when every chosen layer (or block) lies below every other one so clearly that
reading all windows would not change the choice, at a stated confidence. The error is bounded over
all pairs and all looks by Bonferroni's inequality; the differences are paired, because the same
windows score all layers, and shrink by the finite-population correction to nothing once all
windows are read (Cochran, Sampling Techniques, 3rd ed., section 2.6). Like every rule that sees
only means and variances, it cannot know of windows so rare that none was read and so different
that they decide; ``min_windows`` guards against these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.order import best_block, lowest


@dataclass(frozen=True)
class Stop:
    """A rule that ends a run when its answer is settled.

    Args:
        n: how many layers are to be removed.
        angular: settle the best block of n layers instead of the n lowest Block Influences.
        confidence: probability, at least, that a settled answer is that of all windows.
        min_windows: windows read before the first look.

    Raises:
        ShortGPTError: a value is out of range.

    Example:
        >>> Stop(9, confidence=0.95).min_windows
        32
    """

    n: int
    angular: bool = False
    confidence: float = 0.99
    min_windows: int = 32

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ShortGPTError(f"confidence = {self.confidence!r}: expected at least 0.5, below 1")
        if self.min_windows < 16:
            raise ShortGPTError(f"min_windows = {self.min_windows!r}: expected at least 16")

    def looks(self, windows: int) -> int:
        """How many looks are planned up to so many windows."""
        count, at = 0, self.min_windows
        while at <= windows:
            count, at = count + 1, next_look(at)
        return count

    def judge(
        self, importance: Importance, population: int | None, *, final: bool = False
    ) -> Verdict:
        """Whether the answer is settled.

        Args:
            importance: the sums of a random sample of windows.
            population: windows in all; None if unknown, which counts as without end.
            final: an unplanned look at the end, because there are no more windows.
        """
        n, read = self.n, importance.n_windows
        if self.angular:
            means, covariance = importance.angular.diagonal(n), importance.angular_covariance(n)
            chosen = best_block(importance.angular, n)[:1]
        else:
            means, covariance = importance.block_influence, importance.covariance
            chosen = lowest(importance.block_influence, n)
        # finite-population correction: of a variance, the share of windows not read is left
        left = 1.0 if population is None else max(0.0, 1 - read / population)
        pair, z = closest(means, covariance * left, chosen)
        look = self.looks(read) + final or 1
        pairs = len(chosen) * (len(means) - len(chosen))
        error = (1 - self.confidence) / pairs / (look * (look + 1))  # sums to 1 over all looks
        needed = student_t(1 - error, max(read - 1, 1))
        everything = population is not None and read >= population
        settled = everything or (read >= self.min_windows and z > needed)
        names = tuple(importance.layers[i] for i in pair)
        return Verdict(self, settled, read, population, names, z, needed)


def next_look(windows: int) -> int:
    """Windows at the look after this one: a fifth more, at most 256."""
    return windows + min(max(windows // 5, 1), 256)


@dataclass(frozen=True)
class Verdict:
    """What a look found.

    Attributes:
        stop: the rule.
        settled: whether the answer would stay if all windows were read.
        windows, population: windows read, of how many.
        pair: the closest pair: a chosen layer (or a block's first) and another, original numbers.
        z: their difference in standard errors.
        needed: the z that settles a pair at this look.
    """

    stop: Stop
    settled: bool
    windows: int
    population: int | None
    pair: tuple[int, ...]
    z: float
    needed: float

    def __str__(self) -> str:
        what = "best block" if self.stop.angular else f"set of the {self.stop.n} lowest"
        of = "" if self.population is None else f" of {self.population:,}"
        read = f"{self.windows:,}{of} windows"
        if self.population is not None and self.windows >= self.population:
            return f"{what} settled: all {self.windows:,} windows were read"
        names = " and ".join(f"{i}" for i in self.pair)
        kind = "blocks that start at" if self.stop.angular else "layers"
        closest = f"closest {kind} {names}: z = {self.z:.2f}, needed {self.needed:.2f}"
        if self.settled:
            return f"{what} settled at {self.stop.confidence:.4g} after {read}; {closest}"
        return f"{what} NOT settled at {self.stop.confidence:.4g} by {read}; {closest}"


def closest(means: Tensor, covariance: Tensor, chosen: list[int]) -> tuple[tuple[int, int], float]:
    """The pair of a chosen entry and another whose order is least sure.

    Args:
        means: (N,).
        covariance: of the means, (N, N).
        chosen: entries that should lie below all others.

    Returns:
        The pair, and (means[other] - means[chosen]) in standard errors. Entries that are equal in
        every window count as infinitely sure: the lower number decides such a tie.
    """
    others = [i for i in range(len(means)) if i not in set(chosen)]
    difference = means[others][None, :] - means[chosen][:, None]  # (chosen, others)
    variance = covariance.diagonal()
    spread = variance[chosen][:, None] + variance[others][None, :]
    # var(a - b) = var(a) + var(b) - 2 cov(a, b): what all layers share of a window cancels
    spread = (spread - 2 * covariance[chosen][:, others]).clamp(min=0)
    tied = (difference == 0) & (spread < 1e-15)  # rounding leaves that much of no variance
    z = torch.where(tied | (spread == 0), math.inf, difference / spread.sqrt())
    place = int(z.argmin())
    row, column = divmod(place, len(others))
    return (chosen[row], others[column]), float(z[row, column])


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, from ``scipy.stats``.

    Args:
        probability: 0.5 to below 1.
        degrees: of freedom, at least 1.

    Example:
        >>> round(student_t(0.975, 120), 3)
        1.98
    """
    from scipy.stats import t

    # nearer to 1 than float64 can tell from it, the quantile would be infinite
    return float(t.ppf(min(probability, 1 - 1e-15), degrees))
