"""What of a run of `shrink` fits into its time, foretold from one timed window and a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from short_gpt.healing.settings import CLOSED_WINDOWS
from short_gpt.selection.methods import AUTO

MINUTES = {"cpu": 30, "": 15}  # of a run, by device; "" is any accelerator
MANY = 3 * CLOSED_WINDOWS  # windows of its own text that a model writes for a training
SHARE = 0.25  # of the time, at least, that a training is worth


class Plan(NamedTuple):
    """How a run spends its time."""

    method: str  # that chooses the layers
    windows: int | None  # to learn from, at most; None: all
    eval_windows: int
    seconds: float = 0.0  # of everything, foretold
    training: float = 0.0  # seconds of it for distillation


# The best first. What tells sets apart least, for its time, goes first: windows, then `auto`.
PLANS = (
    Plan(AUTO, CLOSED_WINDOWS, 32),
    Plan(AUTO, 48, 24),
    Plan(AUTO, 32, 16),
    Plan("greedy_kld", 48, 16),
    Plan("greedy_kld", 32, 16),
    Plan("greedy_kld", 24, 8),
    Plan("bi", 24, 8),
    Plan("bi", 16, 8),
)


def fitted(
    foretell: Callable[[Plan], float],
    most: float,
    named: Mapping[str, Any],
    train_on: int | None = 0,
) -> Plan:
    """The best plan that takes ``most`` seconds, or the cheapest one.

    Args:
        foretell: Seconds that a plan takes, without training.
        named: Fields of the plan that the user named; "method" is "" if it was the layers.
        train_on: Windows of a run that distills in the rest of the time, if that is at least a
            quarter of it; None: all, 0: no training.
    """
    for usual in PLANS:
        plan = usual._replace(**named)
        plan = plan._replace(seconds=foretell(plan))
        if plan.seconds <= most:
            break
    longer = plan._replace(**{"windows": train_on, **named})
    if train_on != 0 and (rest := most - foretell(longer)) >= SHARE * most:
        return longer._replace(seconds=most, training=rest)
    return plan
