"""When a ranking is settled: tests of paired differences between layers, at planned looks.

The windows are a simple random sample, without replacement, of all windows of the data. The
answer is settled when every chosen layer (or block) lies clearly below every other one.

The promise is about runs with a random order of the windows: of all runs, at most 1 - confidence
end early with another answer than that of all windows, unless windows decide that make up less than
``rare`` of all. Of the runs that end early, a larger share may be wrong. Of the error, a quarter
goes to windows that were not seen, the rest to the tests:

Unseen windows. The first look is where a kind of windows that makes up ``rare`` of all was missed
with no more than this probability: (1 - rare)^m, or without replacement the hypergeometric one
(the "rule of three": Hanley and Lippman-Hand, JAMA 249, 1983). Of rarer kinds nothing is promised.

Tests. Differences are paired, because the same windows score all layers, and shrink by the
finite-population correction (Cochran, Sampling Techniques, 3rd ed., section 2.6). Student's t is
right for symmetric ones only. Where rare large windows would make the difference smaller, t has to
be larger by the first term of its Cornish-Fisher expansion (Johnson, JASA 73, 1978; Hall, The
Bootstrap and Edgeworth Expansion, 1992, section 3.10; see `skewness_factor`). It counts twice: a
sample shows less skewness than its population has where that rests on a few windows.

The tests' error is bounded over L - 1 pairs: let a be the highest of the n layers that all windows
choose. If another set is claimed, either a is not in it, and one of the L - n layers above is
claimed to lie below a; or it is, and one of the n - 1 others is claimed to lie above a. Over the
planned looks it is shared equally; if nobody knows how many windows there are, look k gets
1 / (k (k + 1)). The bound holds as far as t, corrected for skewness, has the right tail: not at a
near tie of layers of which a few windows, rarer than ``rare``, hold much of the sum.

Shapes: L layers (or starts of blocks); "..." are any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llama.args import MAX_INTEGER
from short_gpt.runtime.errors import ShortGPTError, check, whole
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import best_block, lowest, student_t
from short_gpt.scoring.moments import pair_spread

UNSEEN = 0.25  # of the error, for windows of a kind that was missed
CAUTION = 2  # times the skewness that the sample shows


@dataclass(frozen=True)
class Stop:
    """A rule that ends a run when its answer is settled.

    Of all runs, at most 1 - ``confidence`` end early with another answer than that of all windows,
    unless windows decide that make up less than ``rare`` of all. Of the runs that end early, a
    larger share may be wrong. The first look comes after about 6 / rare windows at 99%; of few
    windows, most are read.

    Example:
        >>> Stop(9).first_look(18_000), Stop(9).first_look(600), Stop(9, rare=0.05).first_look(600)
        (295, 234, 106)
    """

    n: int  # layers to be removed
    angular: bool = False  # the best block of n layers instead of the n lowest Block Influences
    confidence: float = 0.99  # share of all runs that do not end early and wrong
    min_windows: int = 32  # read before the first look, at least
    rare: float = 0.02  # share of all windows that a kind must make up to be guarded against

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.n))
        object.__setattr__(self, "min_windows", whole(self.min_windows))
        sure, fewest, rare = self.confidence, self.min_windows, self.rare
        check(0.5 <= sure < 1, "confidence", sure, "at least 0.5, below 1")
        check(fewest >= 16, "min_windows", fewest, "at least 16")
        check(0 < rare < 1, "rare", rare, "above 0, below 1")

    def first_look(self, population: int | None) -> int:
        """Windows at the first look, of so many in all (None: unknown)."""
        return max(self.min_windows, enough(self.rare, UNSEEN * (1 - self.confidence), population))

    def looks(self, windows: int, population: int | None) -> int:
        """How many looks are planned up to so many windows."""
        count, at = 0, self.first_look(population)
        while at <= windows:
            count, at = count + 1, next_look(at)
        return count

    def judge(
        self, importance: Importance, population: int | None, *, final: bool = False
    ) -> Verdict:
        """Whether the sums of a random sample settle the answer.

        The population is all windows; None counts as without end. ``final`` is an unplanned look,
        because there are no more windows.
        """
        n, read = self.n, importance.n_windows
        if self.angular:
            means, covariance = importance.angular.diagonal(n), importance.angular_covariance(n)
            chosen = best_block(importance.angular, n)[:1]
            skewness = importance.angular_skewness(n)
        else:
            means, covariance = importance.block_influence, importance.covariance
            chosen, skewness = lowest(importance.block_influence, n), importance.skewness
        mask = torch.zeros(len(means), dtype=torch.bool)  # (L,)
        mask[chosen] = True
        z = order_z(means, covariance * unread(read, population), mask)  # (L, L)
        needed = self.needed(skewness, read, population, final=final)  # (L, L)
        pair = divmod(int((z - needed).argmin()), len(means))  # the farthest from settled
        everything = population is not None and read >= population
        early = read >= self.first_look(population) and bool(z[pair] > needed[pair])
        names = tuple(importance.layers[i] for i in pair)
        closest = (names, float(z[pair]), float(needed[pair]))
        return Verdict(self, everything or early, read, population, *closest)

    def needed(
        self, skewness: Tensor, read: int, population: int | None, *, final: bool = False
    ) -> Tensor:
        """The z that settles pairs of this skewness, (..., L, L), after ``read`` windows."""
        look = self.looks(read, population) + final or 1
        if population is None:
            share = 1 / (look * (look + 1))  # sums to 1 over all looks
        else:
            share = 1 / (self.looks(population - 1, population) + 1)  # and one that is unplanned
        error = (1 - UNSEEN) * (1 - self.confidence) * share / max(skewness.shape[-1] - 1, 1)
        t = student_t(1 - error, max(read - 1, 1))
        return t - CAUTION * skewness.clamp(max=0) * skewness_factor(t, read, population)


def check_sample(random_order: bool, before: int) -> None:
    """Raises ShortGPTError unless a stop judges one random sample that was not scored before."""
    if not random_order:
        raise ShortGPTError(
            "stop expects windows in random order: pass windows(..., seed=0) itself, whose order a "
            "list does not tell, or random_order=True"
        )
    if before:
        raise ShortGPTError(f"stop judges one run, and {before} windows were scored before it")


@lru_cache
def enough(rare: float, error: float, population: int | None) -> int:
    """Windows that a sample needs to hold one of a kind, except with probability ``error``.

    The kind makes up at least the share ``rare`` of a population; None is without end.

    Example:
        >>> enough(0.05, 0.05, None), enough(0.05, 0.05, 1000)  # the rule of three: 3 / 0.05
        (59, 57)
    """
    if population is None:
        return math.ceil(min(math.log(error) / math.log1p(-rare), MAX_INTEGER))
    # hypergeometric, drawn one window at a time: missed so far times missed again
    kind, read, missed = math.ceil(rare * population), 0, 1.0
    while missed > error:
        missed *= max(population - kind - read, 0) / (population - read)
        read += 1
    return read


def unread(read: int, population: int | None) -> float:
    """The finite-population correction: of a variance, the share of windows not read is left."""
    return 1.0 if population is None else max(0.0, 1 - read / population)


def skewness_factor(t: float, read: int, population: int | None) -> float:
    """By how much the upper quantile t of a studentized mean falls for each unit of skewness.

    With f the share of the population that was read, a mean's third cumulant is (1 - f) (1 - 2 f)
    skewness s^3 / m^2, and its covariance with s^2 is (1 - f) skewness s^3 / m. So the studentized
    mean has the mean -(1 - f) / 2 and the third cumulant -(2 - f), both times skewness /
    sqrt(m (1 - f)), and its quantile is t + mean + third cumulant (t^2 - 1) / 6 (Cornish-Fisher).
    At f = 0 that is Johnson's and Hall's (1 + 2 t^2) / (6 sqrt(m)).
    """
    rest = unread(read, population)  # 1 - f
    if rest == 0:
        return 0.0
    return (3 * rest + (1 + rest) * (t * t - 1)) / 6 / math.sqrt(read * rest)


def next_look(windows: int) -> int:
    """Windows at the look after this one: a tenth more, at most 256."""
    return windows + min(max(windows // 10, 1), 256)


@dataclass(frozen=True)
class Verdict:
    """The answer of one look."""

    stop: Stop  # the rule
    settled: bool  # whether the run may end here; also if all windows were read
    windows: int  # read
    population: int | None  # windows in all; None if unknown
    pair: tuple[int, ...]  # the least sure: a chosen layer (or a block's first) and another
    z: float  # their difference in standard errors
    needed: float  # the z that settles them at this look; more where their difference is skewed

    @property
    def closest(self) -> str:
        kind = "blocks that start at" if self.stop.angular else "layers"
        return f"closest {kind} " + " and ".join(f"{i}" for i in self.pair)

    def apart(self, looked: bool) -> str:
        """How far apart the closest are; ``looked``: also what would have settled them."""
        if math.isnan(self.z):
            return "one window gives no error"
        needed = f", {self.needed:.2f} needed" if looked else ""
        return f"{self.z:.2f} standard errors apart{needed}"

    def __str__(self) -> str:
        what = "best block" if self.stop.angular else f"set of the {self.stop.n} lowest"
        read = f"{self.windows:,} window{'s' * (self.windows != 1)}"
        if self.population is not None and self.windows >= self.population:
            every = f"all {read} were" if self.windows > 1 else "the only window was"
            return f"{what} settled: {every} read"
        if self.population is not None:
            read = f"{self.windows:,} of {self.population:,} windows"
        first = self.stop.first_look(self.population)
        closest = f"{self.closest}: {self.apart(self.windows >= first)}"
        sure = self.stop.confidence
        if self.settled:
            promise = (
                f"of all runs at most {100 * (1 - sure):.4g}% end early and wrong, unless windows "
                f"decide that make up less than {100 * self.stop.rare:.4g}% of all"
            )
            return f"{what} settled at {sure:.4g} after {read}; {closest}; {promise}"
        early = f" (tested from {first:,} on)" if self.windows < first else ""
        more = "more windows (`max_windows`) may settle it"
        return f"{what} NOT settled at {sure:.4g} by {read}{early}; {closest}; {more}"


def unsure(importance: Importance, n: int, *, angular: bool = False) -> str | None:
    """Why other windows may choose other layers than the n of least score; None if they hardly may.

    It compares the removed layers with the kept ones as `Stop` does, at 95%.
    """
    verdict = Stop(n, angular, 0.95).judge(importance, None, final=True)
    if verdict.z > verdict.needed:
        return None
    why = verdict.apart(looked=True)
    if verdict.windows > 1:
        why = f"on {verdict.windows:,} windows, {verdict.closest} are {why}"
    return f"not sure which layers to remove: {why}; read more (`max_windows`)"


def order_z(means: Tensor, covariance: Tensor, chosen: Tensor) -> Tensor:
    """How surely chosen entries (..., L) bool of the means (..., L) lie below every other one.

    Entry [i, j] of (..., L, L) is (means[j] - means[i]) in standard errors if i is chosen and j is
    not, else infinite; also where both are equal in every window, because the lower number decides
    such a tie.
    """
    difference = means[..., None, :] - means[..., :, None]  # (..., L, L), [i, j]: of j less of i
    spread = pair_spread(covariance)  # (..., L, L)
    tied = (difference == 0) & (spread < 1e-15)  # rounding leaves that much of no variance
    sure = tied | (spread == 0) | ~chosen[..., :, None] | chosen[..., None, :]
    return torch.where(sure, math.inf, difference / spread.sqrt())
