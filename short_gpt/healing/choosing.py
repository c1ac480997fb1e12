"""Layers to remove: those without which the refitted model is nearest to the original.

Which set is removed matters more than how the rest is refitted, and the best set before a refit
need not be the best after it. So the sets of several methods are refitted and judged on other
windows, within a budget. What judges is the KL divergence from the original model: it averages over
the next token where the loss draws it, and tells sets apart with fewer windows.

Costs count layers that a window runs through. A bare pass is all layers, L, on the first windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from llama.files import JsonObject
from short_gpt.data.disjoint import without_overlap
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import (
    Difference,
    Perplexity,
    Sample,
    combined,
    difference,
    window_perplexities,
)
from short_gpt.healing.context import TokenWindows
from short_gpt.healing.job import CLOSED, RAW, pruned
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError, at_least, check
from short_gpt.runtime.progress import Bar, bar
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import measure
from short_gpt.selection.methods import AUTO, SEARCHED, choose
from short_gpt.selection.search import most_layers_run
from short_gpt.wrappers.short_model import ShortModel

REFIT = "refit"
STEPWISE = "stepwise_bi"  # Prune&Comp (arXiv:2507.18212), with the refit in place of its factors
GREEDY = "greedy_kld"
SEARCHES = (GREEDY, STEPWISE)
CANDIDATES = ("bi", "angular", "relative_magnitude", *SEARCHES)
BARE_PASS, MIN_WINDOWS = 16, 4  # windows of a bare pass, half of them to fit on; and the fewest
JUDGES = 40  # most windows that judge
EARLIEST, STEP = 16, 8  # windows before the first check of a set's loss, and between checks
MAX_WINDOWS = 48  # that `rank` cuts where the user names no number
TRIAL_WINDOWS = 4  # that trials without a refit read
REFIT_PASSES = 3  # passes of a refit over its windows (measured: 2.4 to 2.6)
BUDGET = 60  # bare passes
T = TypeVar("T")
Layers = tuple[int, ...]  # original numbers, ascending


class ResultCache:
    """What a long run has measured, by name, saved in its state file, if there is one, at once.

    A cell is a set of layers removed, healed one way and judged on one text; or scores, a search.
    """

    def __init__(self, state: StateFile | None = None) -> None:
        self._state = state
        self._values: JsonObject = ((state and state.content) or {}).get("cells", {})

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def value(self, name: str, measure: Callable[[], T]) -> T:
        """The cell's value, ready for JSON, measured if there is none yet."""
        if name not in self._values:
            self._values[name] = measure()
            if self._state is not None:
                self._state.save({"cells": self._values})
        return self._values[name]

    def perplexities(self, name: str, measure: Callable[[], list[Perplexity]]) -> list[Perplexity]:
        """What single windows gave, each as ``{"sample": Sample, "precision": ...}`` in the file.

        Rows of earlier versions were lists of other fields, and are no such objects.
        """

        def rows() -> list[JsonObject]:
            return [{"sample": p.samples[0], "precision": p.precision} for p in measure()]

        values = self.value(name, rows)
        return [
            replace(Perplexity.of([Sample(*row["sample"])]), precision=row["precision"])
            for row in values
        ]

    def resumed(self, name: str, measure: Callable[[StateFile | None], T]) -> T:
        """The cell's value, by a long measurement that keeps a state file of its own meanwhile."""
        part = None if self._state is None else self._state.part(name.replace(" ", "-"))
        value = self.value(name, lambda: measure(part))
        if part is not None:  # the value is saved now, maybe by a run that was killed here
            part.clear()
        return value


def pruned_losses(
    short: ShortModel,
    layers: Sequence[int],
    evaluation: TokenWindows,
    *,
    fit_on: TokenWindows | None = None,
    heal_by: str = REFIT,
    reference: Reference | None = None,
    progress: bool = False,
) -> list[Perplexity]:
    """What windows give without some layers; ``fit_on``, if given, has those of a closed form."""
    how = RAW if fit_on is None else heal_by
    with pruned(short, layers, how, fit_on or (), progress=progress):
        return window_perplexities(short.decoder, evaluation, progress=False, reference=reference)


@dataclass(frozen=True)
class Candidate:
    """A set of layers that methods would remove, refitted and judged."""

    methods: list[str]
    layers: list[int]
    kld: float  # from the original, held-out, nats a token: the chosen set's, plus the difference
    difference: Difference  # its KLD minus that of the chosen set, paired over its windows
    told_apart: bool  # whether the 95% interval of the difference leaves 0 out


@dataclass(frozen=True)
class HealedChoice:
    """What `choose_healed` chose, and why."""

    layers: list[int]  # to remove, original numbers, ascending
    kld: float  # refitted, on the windows that judged it, in nats a token
    candidates: list[Candidate]  # the best first
    fitted: int  # windows that the refits read
    judged: int  # windows that judge; fewer where a set was told apart before that
    passes: float  # bare passes spent
    budget: int
    notes: list[str]  # what was left out, and why

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> HealedChoice:
        """The inverse of `to_dict`."""
        rows = [
            Candidate(**{**row, "difference": Difference(**row["difference"])})
            for row in content["candidates"]
        ]
        return cls(**{**content, "candidates": rows})

    def __str__(self) -> str:
        rows = [f"{'KLD, nats':>10}  {'from the chosen (95%)':<36}layers of"]
        for one in self.candidates:
            off = _in_nats(one.difference) + ("" if one.told_apart else ", not told apart")
            off = "chosen" if one.layers == self.layers else off
            rows.append(f"{one.kld:>10.4f}  {off:<36}{', '.join(one.methods)} {one.layers}")
        rows.append(f"{self.kld:.4f} chosen; optimistic, as one of several sets")
        least = min(one.difference.windows for one in self.candidates)
        judged = f"{least} to {self.judged}" if least < self.judged else self.judged
        windows = f"refitted on {self.fitted} windows, judged on {judged}"
        spent = f"{self.passes:.1f} of {self.budget} bare passes"
        return "\n".join([*rows, f"{windows}; {spent}", *self.notes])


def _in_nats(change: Difference) -> str:
    margin = change.error.margin()
    return f"{change.nats:+.4f} " + ("(-)" if math.isnan(margin) else f"(± {margin:.4f})")


def refit_windows(fit: int, read: int) -> int:
    """Windows through the whole model for a refit on some, and to read others without layers."""
    return REFIT_PASSES * fit + read


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
        sizes = 2 * n.bit_length()  # a quarter of the windows judges the refit on the others
        passes, compared = sizes * refit_windows(3, 1) * windows / 4, sizes * windows / 4
    if method == AUTO:
        fit = min(BARE_PASS, windows) // 2
        judging = min(JUDGES, windows - fit)
        each = min((EARLIEST + JUDGES) // 2, judging)  # bad sets are told apart early
        sets = min(len(CANDIDATES), n + 1)  # of few layers, most methods choose the same
        trials = sets * refit_windows(fit, each) + (n - 1) * refit_windows(fit, fit)
        passes += min(fit + judging + trials, BUDGET * min(BARE_PASS, windows))
        compared += sets * each
    if method == AUTO or (method in SEARCHED and not searches):
        searches.append(1 if method == "perplexity" else n)
    for most in searches:
        passes += TRIAL_WINDOWS * most_layers_run(n_layers, most) / n_layers
        compared += TRIAL_WINDOWS * sum(n_layers - 2 - removed for removed in range(most))
    return passes, compared


def choose_healed(
    short: ShortModel,
    windows: TokenWindows,
    n: int,
    *,
    budget: int | None = None,
    heal_by: str = REFIT,
    state: StateFile | None = None,
    progress: bool = True,
) -> HealedChoice:
    """The n layers whose removal, followed by a refit, changes held-out predictions least.

    Candidates are lowest Block Influence, the best angular block, lowest relative magnitude, greedy
    search by KL divergence, and stepwise Block Influence: the lowest layer goes, the rest is
    refitted and scored again, and so on (Prune&Comp, arXiv:2507.18212). The first 8 windows score,
    search and refit; the others judge, and propose nothing. How many judge a set depends on the
    noise: 16, then 8 more at a time, until it is found worse than the best (95%, paired), and at
    most 40. Where these do not tell the best set from that of the greedy search, the latter is
    taken: it was chosen by the divergence of every layer, and not among a few sets on noise.

    A candidate takes (3 x windows to refit on + windows that judge) / 16 bare passes, 2.5 to 4. For
    8 of 30 layers the greedy search takes 23, on 4 windows, and the stepwise choice 14, on 8.

    Args:
        windows: Token ids of calibration text in random order, at least 4 windows.
        n: Layers to remove, 1 to L - 2.
        budget: Bare passes, each the original model on the first 16 windows; a search that would
            take more than is left is left out, other candidates never. Default: 60.
        heal_by: Closed form that heals the candidates, one of `job.CLOSED`. Default: the refit.
        state: Keeps what was measured; the same call continues from it. Default: none.

    Raises:
        ShortGPTError: too few windows; as in `refit.fit`.
        NotFiniteError: a state or a loss is NaN or infinite.

    Example:
        >>> print(choose_healed(short, windows, 8))  # doctest: +SKIP
    """
    n = check_count(n, len(short.kept), most=len(short.kept) - 2)
    budget = BUDGET if budget is None else budget
    at_least(0, budget=budget)
    check(heal_by in CLOSED, "heal_by", heal_by, f"one of {', '.join(CLOSED)}")
    choosing = _Choosing(short, list(windows), n, budget, ResultCache(state), heal_by)
    total = budget * choosing.a_pass
    with bar("choosing", total=total, unit="layer", show=progress, delay=0) as shown:
        chosen = choosing.run(shown)
        shown.total = shown.n  # the budget need not be used up
    return chosen


class _Choosing:
    """The choice so far: its windows, what was spent, and the losses of refitted sets."""

    def __init__(
        self,
        short: ShortModel,
        windows: TokenWindows,
        n: int,
        budget: int,
        cells: ResultCache,
        heal_by: str,
    ) -> None:
        self._short, self._n, self._budget, self._cells = short, n, budget, cells
        self._heal_by, self._healed = heal_by, partial(pruned, short, heal_by=heal_by)
        half, self._count = min(BARE_PASS, len(windows)) // 2, len(short.kept)
        self._fit = windows[:half]
        others, shared = without_overlap(windows[half:], self._fit)
        self._judging, self._reference = others[:JUDGES], Reference(short.decoder)
        if min(half, len(self._judging)) < MIN_WINDOWS // 2:
            raise ShortGPTError(
                f"expected at least {MIN_WINDOWS} windows, half to refit on and half to judge by, "
                f"got {len(windows)}, of which {shared} share text with those: give more text"
            )
        first = half + len(self._judging)
        self.a_pass, self._spent = self._count * min(BARE_PASS, first), 0
        self._judged: dict[Layers, list[Perplexity]] = {}
        self._notes = [f"{shared} windows left out: they share text with others"] * bool(shared)
        if first < BARE_PASS:
            self._notes.append(
                f"chosen on {first} windows, fewer than {BARE_PASS}: the differences are less sure"
            )

    def run(self, shown: Bar) -> HealedChoice:
        self._shown = shown
        best, methods = self._candidates()
        best = self._settled(self._judged_further(best, [*methods]), methods)
        candidates, mean = [], combined(self._judged[best]).kld
        assert mean is not None
        for layers, names in methods.items():
            change = self._change(best, layers)
            total = mean.value + change.nats
            candidates.append(Candidate(names, [*layers], total, change, change.told_apart))
        return HealedChoice(
            layers=[*best],
            kld=mean.value,
            candidates=sorted(candidates, key=lambda one: one.kld),
            fitted=len(self._fit),
            judged=len(self._judging),
            passes=self._spent / self.a_pass,
            budget=self._budget,
            notes=self._notes,
        )

    def _settled(self, best: Layers, methods: Mapping[Layers, Sequence[str]]) -> Layers:
        """The best set, or that of the greedy search if the windows do not tell the two apart."""
        for layers, names in methods.items():
            if GREEDY in names and layers != best and not self._change(best, layers).told_apart:
                found = (
                    f"{', '.join(methods[best])} {[*best]} is not told apart from {GREEDY}'s set"
                )
                self._notes.append(f"{found}, which is taken")
                return layers
        return best

    def _candidates(self) -> tuple[Layers, dict[Layers, list[str]]]:
        """The best set, and the methods of each set; all are refitted and judged."""
        scores = Importance.from_dict(self._cells.value("scores", self._scores))
        # the original model scores the first windows, and predicts those that judge
        self._spend(self._count * (len(self._fit) + len(self._judging)))
        methods: dict[Layers, list[str]] = {}
        best: Layers | None = None
        refused: NotRemovableError | None = None
        for name in CANDIDATES:
            try:
                if name not in SEARCHES:
                    layers = tuple(sorted(choose(scores, self._n, method=name)))
                elif not (layers := tuple(sorted(self._searched(name, scores)))):
                    continue
                if layers not in methods:
                    best = self._better(best, layers)
            except NotRemovableError as error:  # such as all layers with attention of a hybrid
                self._notes.append(f"{name} left out: {error}")
                refused = error
            else:
                methods.setdefault(layers, []).append(name)
        if best is None:
            assert refused is not None
            raise refused
        return best, methods

    def _scores(self) -> dict[str, object]:
        into = Importance.empty(self._short.kept)
        return measure(self._short.decoder, [[w] for w in self._fit], into=into).to_dict()

    def _searched(self, name: str, scores: Importance) -> list[int]:
        """The layers that a search would remove; none where the budget does not allow it."""
        price = most_layers_run(self._count, self._n) * len(self._fit[:TRIAL_WINDOWS])
        if name == STEPWISE:
            price = (self._n - 1) * self._price(len(self._fit))
        total = price + self._price()
        cost = f"{name} takes up to {total / self.a_pass:.1f} bare passes"
        if not self._affords(total):
            self._notes.append(f"{cost}, more than were left: left out")
            return []
        self._shown.set_postfix_str(cost)
        try:
            return self._stepwise(scores) if name == STEPWISE else self._greedy(price)
        finally:
            self._shown.set_postfix_str("")

    def _greedy(self, price: int) -> list[int]:
        few, show = self._fit[:TRIAL_WINDOWS], not self._shown.disable
        search = partial(self._short.search, few, self._n, method=GREEDY, progress=show)
        try:
            return self._cells.resumed(GREEDY, lambda state: search(state=state).removed)
        finally:  # also where the layers turn out not to be removable
            self._spend(price)

    def _stepwise(self, scores: Importance) -> list[int]:
        layers = choose(scores, 1)
        while len(layers) < self._n:
            lowest, name = partial(self._lowest, layers), f"{STEPWISE} by {self._heal_by}"
            try:
                layers = [*layers, self._cells.value(f"{name} after {layers}", lowest)]
            finally:
                self._spend(self._price(len(self._fit)))
        return layers

    def _lowest(self, removed: list[int]) -> int:
        """The layer of lowest Block Influence in the model refitted without those removed."""
        short = self._short
        with self._healed(removed, calibration=self._fit):
            into = Importance.empty([i for i in short.kept if i not in removed])
            return choose(measure(short.decoder, [[w] for w in self._fit], into=into), 1)[0]

    def _judged_further(self, best: Layers, sets: Sequence[Layers]) -> Layers:
        """The best set once every other is judged on all windows, or is worse than this one."""
        while True:
            stopped = [
                layers
                for layers in sets
                if len(self._judged[layers]) < len(self._judging)
                and not _is_worse(self._change(best, layers))
            ]
            left = (len(self._judging) - len(self._judged[layers]) for layers in stopped)
            if not stopped or not self._affords(sum(map(self._price, left))):
                return best
            for layers in stopped:
                best = self._better(best, layers)

    def _better(self, best: Layers | None, layers: Layers) -> Layers:
        """The set of lower KL divergence, after judging the second."""
        self._judge(layers, best)
        return layers if best is None or self._change(best, layers).nats < 0 else best

    def _judge(self, layers: Layers, best: Layers | None) -> None:
        """Measures the model without these layers, refitted, on as many windows as are needed."""
        before, best = self._judged.get(layers, []), None if best == layers else best
        windows = f"windows {len(before)} to {len(self._judging)}"
        # of the cell in the state
        name = f"{self._heal_by} {[*layers]} on {windows} beside {best and [*best]}"
        new = self._cells.perplexities(name, partial(self._refitted, layers, best, before))
        self._judged[layers] = [*before, *new]
        self._spend(self._price(len(new)))

    def _refitted(
        self, layers: Layers, best: Layers | None, before: Sequence[Perplexity]
    ) -> list[Perplexity]:
        """What the windows after those ``before`` give, until the set is worse than the best."""
        new: list[Perplexity] = []
        self._reference.read(self._judging)
        with self._healed(layers, calibration=self._fit):
            for start in range(len(before), len(self._judging), STEP):
                some = self._judging[start : start + STEP]
                new += window_perplexities(
                    self._short.decoder, some, progress=False, reference=self._reference
                )
                judged = [*before, *new]
                if best is None or len(judged) < EARLIEST:
                    continue
                if _is_worse(_difference(self._judged[best][: len(judged)], judged)):
                    break
        return new

    def _change(self, first: Layers, second: Layers) -> Difference:
        """The change from one set's KLD to another's, on the windows that judged both."""
        both = self._judged[first], self._judged[second]
        return _difference(*(each[: min(map(len, both))] for each in both))

    def _price(self, judging: int | None = None) -> int:
        """The price of a refit and its losses, in layers run."""
        judging = len(self._judging) if judging is None else judging
        return self._count * refit_windows(len(self._fit), judging)

    def _affords(self, price: int) -> bool:
        return self._spent + price <= self._budget * self.a_pass

    def _spend(self, price: int) -> None:
        """Counts what was measured, by this run or by the one that it continues."""
        self._spent += price
        self._shown.update(price)


def _is_worse(change: Difference) -> bool:
    return change.nats > 0 and change.told_apart


def _difference(first: Sequence[Perplexity], second: Sequence[Perplexity]) -> Difference:
    return difference(first, second, by="kld")
