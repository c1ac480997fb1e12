"""The methods by name: what each removes, from the scores of one pass or without any."""

from __future__ import annotations

from collections.abc import Callable

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.order import at_random, best_block, deepest, lowest, reverse, sequential

METHODS: dict[str, str] = {
    "bi": "lowest Block Influence (ShortGPT)",
    "angular": "best block by the last token's angle (Gromov et al.)",
    "angular_all": "best block by the angle at all tokens",
    "deepest": "deepest layers but the last (Gromov et al., simple heuristic)",
    "relative_magnitude": "lowest relative magnitude (Samragh et al.)",
    "norm": "largest hidden-state norm (ShortGPT, Table 10)",
    "sequential": "first layers",
    "reverse": "last layers",
    "random": "random layers",
    "perplexity": "lowest perplexity without the one layer (Shortened LLaMA)",
    "sleb": "greedily, lowest loss without the layer, scored anew (SLEB)",
    "evolution": "the set of lowest loss that evolution finds (EvoPress)",
}
GREEDY = ("sleb",)
BY_LOSS = ("perplexity", *GREEDY, "evolution")  # these run the model without layers: see `search`
AS_SETS = ("evolution",)  # of these, fewer layers are not a part of more
BLOCKS = ("angular", "angular_all", "deepest")  # these remove consecutive layers

_CHOICES: dict[str, Callable[[Importance, int, int], list[int]]] = {
    "bi": lambda scores, n, _: lowest(scores.block_influence, n),
    "angular": lambda scores, n, _: best_block(scores.angular, n),
    "angular_all": lambda scores, n, _: best_block(scores.angular_all_tokens, n),
    "deepest": lambda scores, n, _: deepest(len(scores.layers), n),
    "relative_magnitude": lambda scores, n, _: lowest(scores.relative_magnitude, n),
    "norm": lambda scores, n, _: lowest(-scores.mean_norm, n),
    "sequential": lambda scores, n, _: sequential(len(scores.layers), n),
    "reverse": lambda scores, n, _: reverse(len(scores.layers), n),
    "random": lambda scores, n, seed: at_random(len(scores.layers), n, seed),
}


def choose(importance: Importance, n: int, *, method: str = "bi", seed: int = 0) -> list[int]:
    """The n layers that a method removes, by the scores of one pass.

    Args:
        importance: the scores; those that need none only take the layers' numbers from it.
        n: 1 to L - 1.
        method: a name of `METHODS`.
        seed: of ``random``.

    Returns:
        Original layer numbers: least important first, or a block in ascending order.

    Raises:
        ShortGPTError: n is out of range, the method is unknown, needs more than these scores, or
            the scores lack what it reads.

    Example:
        >>> choose(Importance.empty([0, 1, 2, 3, 4]), 2, method="deepest")
        [2, 3]
    """
    check_method(method)
    if method in BY_LOSS:
        raise ShortGPTError(
            f"{method} runs the model without layers, so scores do not tell them: rank by `method` "
            f"{method} (in Python short_gpt.selection.search)"
        )
    if method == "angular_all" and importance.token_angles.isnan().any():
        raise ShortGPTError("angular_all needs scores of all tokens; measure with all_tokens")
    return [importance.layers[i] for i in _CHOICES[method](importance, n, seed)]


def check_method(method: str) -> None:
    """Raises ShortGPTError unless there is a method of this name."""
    if method not in METHODS:
        raise ShortGPTError(f"no method {method!r}; expected one of {', '.join(METHODS)}")


def check_by_loss(method: str, *, healed: bool) -> None:
    """Raises ShortGPTError unless there is a search by loss of this name.

    Args:
        method: the name.
        healed: whether something heals in its trials, as "sleb_healed" needs, and no other.
    """
    if method not in BY_LOSS:
        raise ShortGPTError(f"no search by {method!r}; expected one of {', '.join(BY_LOSS)}")
    if healed != (method == "sleb_healed"):
        raise ShortGPTError(
            f"the search by {method} "
            + ("scores models as cut" if healed else "needs what heals")
            + ": short_gpt.healing.search_healed scores them as healed"
        )
