"""The methods by name: what each removes, from the scores of one pass or by the loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import best_block, lowest


class Method(NamedTuple):
    """One method: a row of `REGISTRY` is all that the rest of the library needs to know."""

    name: str  # as users write it
    about: str  # what it removes, for help and records
    # from the scores, the number of layers and a seed to positions of layers; None runs the model
    # without layers, see `search`
    choose: Callable[[Importance, int, int], list[int]] | None = None
    label: str = ""  # as pictures write it; else as ``about``
    metric: str = ""  # of `LAYER_METRICS`, if ``choose`` reads one


AUTO = "auto"  # see `healing.choosing`
KLD = "greedy_kld"  # the greedy search whose loss is the KL divergence from the original
REGISTRY = (
    Method(
        "bi",
        "lowest Block Influence (ShortGPT)",
        lambda scores, n, _: lowest(scores.block_influence, n),
        "Block Influence",
    ),
    Method(
        "angular",
        "best block by the last token's angle (Gromov et al.)",
        lambda scores, n, _: best_block(scores.angular, n),
        "best block by angle",
    ),
    Method(
        "deepest",
        "deepest layers but the last (Gromov et al., simple heuristic)",
        # section 4.4 prints "(L-n) to (L-1)", which leaves out the last only if counted from 1
        lambda scores, n, _: [*range(len(scores.layers) - 1 - n, len(scores.layers) - 1)],
        "deepest layers but the last",
    ),
    Method(
        "relative_magnitude",
        "lowest relative magnitude (Samragh et al.)",
        lambda scores, n, _: lowest(scores.mean("magnitude"), n),
        "relative magnitude",
        "magnitude",
    ),
    Method(
        "norm",
        "largest hidden-state norm (ShortGPT, Table 10)",
        lambda scores, n, _: lowest(-scores.mean("norm"), n),
        "largest norm",
        "norm",
    ),
    Method("sequential", "first layers", lambda scores, n, _: [*range(n)]),
    Method(
        "reverse", "last layers", lambda scores, n, _: [*range(len(scores.layers))[: -n - 1 : -1]]
    ),
    Method(
        "random",
        "random layers",
        lambda scores, n, seed: random.Random(seed).sample(range(len(scores.layers)), n),
    ),
    Method(
        "perplexity",
        "lowest perplexity without the one layer (Shortened LLaMA)",
        label="perplexity without one layer",
    ),
    Method(
        "sleb",
        "greedily, lowest loss without the layer, scored again (SLEB)",
        label="greedy search (SLEB)",
    ),
    Method(
        KLD,
        "greedily, lowest KL divergence from the original model without the layer, scored again",
        label="greedy search by KL divergence",
    ),
    Method(
        AUTO,
        "refitted candidates, lowest held-out KL divergence from the original model",
        label="nearest to the original once refitted",
    ),
)
METHODS = {method.name: method.about for method in REGISTRY}
LABELS = {method.name: method.label or method.about for method in REGISTRY}
BY_LOSS = tuple(method.name for method in REGISTRY if method.choose is None)
SEARCHED = tuple(name for name in BY_LOSS if name != AUTO)  # by `selection.search`
WITHOUT_TEXT = ("deepest", "sequential", "reverse", "random")  # whatever the scores are


def choose(importance: Importance, n: int, *, method: str = "bi", seed: int = 0) -> list[int]:
    """The n layers that a method removes, by the scores of one pass.

    Args:
        importance: The scores; methods that need none only take the layers' numbers from it.
        n: Layers to remove, 1 to L - 1.
        method: Name of the method, as in `METHODS`.
        seed: Seed of the method "random".

    Returns:
        Original layer numbers: least important first, or a block in ascending order.

    Example:
        >>> choose(Importance.empty([0, 1, 2, 3, 4]), 2, method="deepest")
        [2, 3]
    """
    check_method(method)
    (row,) = (row for row in REGISTRY if row.name == method)
    if row.choose is None:
        function = "choose_healed" if method == AUTO else "selection.search"
        raise ShortGPTError(
            f"{method} runs the model without layers, and uses no scores: rank by `method` "
            f"{method} (in Python short_gpt.{function})"
        )
    if row.metric and importance.mean(row.metric).isnan().all():
        raise ShortGPTError(f"{method} needs the metric {row.metric}, which these scores lack")
    n = check_count(n, len(importance.layers))
    return [importance.layers[i] for i in row.choose(importance, n, seed)]


def check_method(method: str) -> None:
    """Raises ShortGPTError unless there is a method of this name."""
    if method not in METHODS:
        raise ShortGPTError(f"no method {method!r}; expected one of {', '.join(METHODS)}")
