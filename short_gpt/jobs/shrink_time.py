"""What of a run of `shrink` fits into its time, foretold from one timed window and a few tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from short_gpt.healing.choosing import (
    BARE_PASS,
    BUDGET,
    CANDIDATES,
    EARLIEST,
    JUDGES,
    MAX_WINDOWS,
    REFIT_PASSES,
    TRIAL_WINDOWS,
)
from short_gpt.healing.settings import CLOSED_WINDOWS
from short_gpt.selection.methods import AUTO, SEARCHED
from short_gpt.selection.search import most_layers_run

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


def windows_to_choose(
    method: str, n: int | None, n_layers: int, windows: int
) -> tuple[float, float]:
    """Windows through the whole model, about, that it takes to choose n layers.

    And those of which the predictions are compared with the original's. Scores are extra.

    Args:
        method: Name of the method that chooses.
        n: Layers to remove; None until a divergence has told how many: then an eighth is assumed.
        n_layers: Layers of the model.
        windows: Calibration windows.
    """
    windows, passes, compared = min(windows, MAX_WINDOWS), 0.0, 0.0
    searches = []  # by the number of layers that each removes
    if n is None:
        n = max(1, n_layers // 8)
        searches.append(min(2 * n, n_layers - 2))
        # a quarter of the windows judges the refit on the others, of so many sizes
        sizes = 2 * n.bit_length()
        passes, compared = sizes * (REFIT_PASSES * 3 + 1) * windows / 4, sizes * windows / 4
    if method == AUTO:
        fit = min(BARE_PASS, windows) // 2
        judging = min(JUDGES, windows - fit)
        each = min((EARLIEST + JUDGES) / 2, judging)  # bad sets are told apart early
        sets = min(len(CANDIDATES), n + 1)  # of few layers, most methods choose the same
        stepwise = (n - 1) * (REFIT_PASSES + 1) * fit
        trials = sets * (REFIT_PASSES * fit + each)
        passes += min(fit + judging + trials + stepwise, BUDGET * min(BARE_PASS, windows))
        compared += sets * each
    if method == AUTO or (method in SEARCHED and not searches):
        searches.append(1 if method == "perplexity" else n)
    for most in searches:
        passes += TRIAL_WINDOWS * most_layers_run(n_layers, most) / n_layers
        compared += TRIAL_WINDOWS * sum(n_layers - 2 - removed for removed in range(most))
    return passes, compared
