"""How often the intervals hold the truth where texts differ in length; simulated texts.

A text's mean loss is that of all text and an effect of its own, so that all its tokens are off
alike: the hardest case for texts that differ in length. In each of many samples of texts, the mean
over all tokens gets its interval by the library's rule (the jackknife over texts, with degrees of
freedom by Bell and McCaffrey), by Bell and McCaffrey's CR2, and by a plainer rule (the
error of Liang and Zeger with texts less 1 degrees). Reported is how often an interval holds the
mean of all text: of 95% intervals, and of their one-sided ends.

    python benchmarks/studies/coverage.py --out benchmarks/results/coverage.json

At the end stand kinds of texts beyond the promise, for which no limit is checked: the t interval
takes the errors of texts for symmetric and independent of their lengths.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import numpy as np
from scipy.stats import t

from benchmarks.lib.outcome import begin, finish
from benchmarks.tables.rows import covering
from short_gpt.evaluation.perplexity import Sample, sampling_error
from short_gpt.runtime.progress import bar
from short_gpt.scoring.metrics import LEAST_DEGREES

TEXTS = (3, 5, 10, 20)
LEAST = 0.93  # of intervals that hold, also one-sided
TOKENS = 256  # of a window
WITHIN = 0.3  # spread of windows of one text, in parts of that of texts

CHECKED = 20  # samples of a case whose errors are compared with the library's

Lengths = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Effects = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def equal(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Windows of the texts, (runs, texts)."""
    return np.full(shape, 4.0)


def lognormal(sd: float) -> Lengths:
    """Lengths whose logarithms have this standard deviation."""
    return lambda draw, shape: np.ceil(4 * np.exp(draw.normal(0, sd, shape)))


def one_long(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One text of 20 windows, the others of 2."""
    return np.where(np.arange(shape[1]) == 0, 20.0, 2.0) * np.ones(shape)


def two_long(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Two texts of 20 windows, the others of 2."""
    return np.where(np.arange(shape[1]) < 2, 20.0, 2.0) * np.ones(shape)


def normal(draw: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Effects of texts, (runs, texts)."""
    return draw.normal(0, 1, sizes.shape)


def independent(draw: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """None: windows of one text are no more alike than those of several."""
    return np.zeros(sizes.shape)


def skewed(draw: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    return draw.exponential(1, sizes.shape) - 1


def longer_is_higher(draw: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Effects with a correlation of 0.2 or 0.29 with log length, for a spread of 1 or 1.5."""
    return draw.normal(0, 1, sizes.shape) + 0.2 * np.log(sizes / 4)


LENGTHS: dict[str, Lengths] = {
    "equal": equal,
    "lognormal, sd 1": lognormal(1.0),
    "lognormal, sd 1.5": lognormal(1.5),
    "one of 20 windows, others of 2": one_long,
    "two of 20 windows, others of 2": two_long,
}
EFFECTS: dict[str, Effects] = {"alike within a text": normal, "independent windows": independent}
BEYOND: dict[str, tuple[Lengths, Effects]] = {
    "equal, skewed effects": (equal, skewed),
    "lognormal, sd 1, skewed effects": (lognormal(1.0), skewed),
    "lognormal, sd 1, longer is higher": (lognormal(1.0), longer_is_higher),
    "lognormal, sd 1.5, longer is higher": (lognormal(1.5), longer_is_higher),
}


def main(runs: int = 20_000, out: str | None = None, overwrite: bool = False) -> None:
    """Runs the simulation, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    started, found = time.perf_counter(), {}
    kinds = {f"{n}, {e}": (LENGTHS[n], EFFECTS[e]) for n, e in product(LENGTHS, EFFECTS)}
    with bar("simulating", total=(len(kinds) + len(BEYOND)) * len(TEXTS), unit="case") as shown:
        for name, (lengths, effects) in {**kinds, **BEYOND}.items():
            found[name] = {}
            for count in TEXTS:
                seed = [len(found), count]
                found[name][str(count)] = case(lengths, effects, count, runs, seed)
                shown.update()
    missed = [
        f"{name}, {count} texts: {end} {own['new'][end]:.1%}"
        for name in kinds
        for count, own in found[name].items()
        for end in ("two_sided", "upper", "lower")
        if own["new"][end] < LEAST
    ]
    content: dict[str, Any] = {"runs": runs, "least": LEAST, "checked": [*kinds], "kinds": found}
    content["seconds"] = time.perf_counter() - started
    print("\n".join(covering(content)))
    held = f"all intervals held in at least {LEAST:.0%}"
    finish("coverage", missed, content, held=held, out=out, overwrite=overwrite)


def case(
    lengths: Lengths, effects: Effects, count: int, runs: int, seed: list[int]
) -> dict[str, Any]:
    """Shares of intervals that hold, by both rules, of so many samples of texts."""
    draw = np.random.default_rng(seed)
    truth = mean_of_all(lengths, effects)
    sizes = lengths(draw, (runs, count))  # (R, G)
    noise = 1.0 if effects is independent else WITHIN
    means = effects(draw, sizes) + noise * draw.normal(size=sizes.shape) / np.sqrt(sizes)
    error, degrees = jackknife(means, sizes)
    same_as_the_library(means[:CHECKED], sizes[:CHECKED], error, degrees)
    known = degrees >= LEAST_DEGREES
    off = (means * sizes).sum(1) / sizes.sum(1) - truth
    return {
        "new": shares(off[known], error[known], degrees[known]),
        "cr2": shares(off, *bell_mccaffrey(means, sizes)),
        "former": shares(off, liang_zeger(means, sizes), np.full(runs, count - 1)),
        "no_interval": float(1 - known.mean()),
    }


def jackknife(means: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The library's errors and degrees of freedom, (R,), of many samples at once."""
    count, odds = sizes.shape[1], sizes / (sizes.sum(1, keepdims=True) - sizes)
    whole = (means * sizes).sum(1, keepdims=True) / sizes.sum(1, keepdims=True)
    error = np.sqrt((((means - whole) * odds) ** 2).sum(1) * (count - 1) / count)
    squares = (odds**2).sum(1)
    return error, odds.sum(1) ** 2 / (squares**2 - (odds**4).sum(1) + squares)


def same_as_the_library(
    means: np.ndarray, sizes: np.ndarray, error: np.ndarray, degrees: np.ndarray
) -> None:
    """Raises AssertionError unless the first samples have the errors that the library gives."""
    for i, (own, windows) in enumerate(zip(means, sizes, strict=True)):
        pairs = enumerate(zip(own, windows * TOKENS, strict=True))
        found = sampling_error([Sample(text, m * t, int(t)) for text, (m, t) in pairs])
        assert math.isclose(found.standard_error, error[i], rel_tol=1e-9)
        assert math.isclose(found.degrees, degrees[i], rel_tol=1e-9)


def bell_mccaffrey(means: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors and degrees of freedom of CR2, (R,), which is less wide where it holds."""
    share = sizes / sizes.sum(1, keepdims=True)
    residual = share * (means - (means * share).sum(1, keepdims=True))
    weights = share**2 / (1 - share)
    error = np.sqrt((residual**2 / (1 - share)).sum(1))
    spread = weights.sum(1) ** 2 - (weights**2).sum(1) + (share**2).sum(1)
    return error, 1 / spread


def liang_zeger(means: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The errors of the rule before, (R,)."""
    count, total = sizes.shape[1], sizes.sum(1, keepdims=True)
    residual = (means - (means * sizes).sum(1, keepdims=True) / total) * sizes / total
    return np.sqrt((residual**2).sum(1) * count / (count - 1))


def shares(off: np.ndarray, error: np.ndarray, degrees: np.ndarray) -> dict[str, float]:
    """How often the interval and its upper and lower ends hold, and half of its median width."""
    both, one = (t.ppf(p, degrees) * error for p in (0.975, 0.95))
    held = {"two_sided": abs(off) <= both, "upper": off >= -one, "lower": off <= one}
    return {**{end: float(h.mean()) for end, h in held.items()}, "width": float(np.median(both))}


def mean_of_all(lengths: Lengths, effects: Effects) -> float:
    """The mean over all tokens of all text."""
    if effects is not longer_is_higher:
        return 0.0
    sizes = lengths(np.random.default_rng(0), (2_000_000, 1))
    return float((sizes * 0.2 * np.log(sizes / 4)).sum() / sizes.sum())


if __name__ == "__main__":
    fire.Fire(main)
