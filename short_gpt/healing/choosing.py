"""Layers to remove, chosen by the held-out loss of the refitted model.

Which set is removed matters more than how the rest is refitted, and what is best before a refit
need not be best after it. So the sets of several methods are refitted and judged on other windows,
and then swaps of one removed layer for a kept one, as far as a budget goes.

Costs are counted in layers that a window runs through; a bare pass is all layers on the windows to
begin with, and a refit takes `REFIT` times its windows' passes. L = layers of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

from short_gpt.data.disjoint import without_overlap
from short_gpt.evaluation.cells import Cells
from short_gpt.evaluation.paired import Difference, difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import refit
from short_gpt.healing.refit import RefitSettings, Windows
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import Bar, bar
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import measure
from short_gpt.selection.methods import BY_LOSS, choose
from short_gpt.selection.search import losses_without, most_layers_run
from short_gpt.wrappers.short_model import ShortModel

CANDIDATES = ("bi", "angular", "relative_magnitude", "sleb")
FIRST, LEAST = 16, 4  # windows to begin with, and the fewest
MOST = 48  # windows that `rank` cuts where the user names no number
FEW = 4  # windows of those to fit on that trials without a refit read
REFIT = 3  # bare passes of a refit over its windows; `benchmarks/healing.py` measures 2.6
BUDGET = 60  # bare passes
Layers = tuple[int, ...]  # original numbers, ascending


def pruned_losses(
    short: ShortModel,
    layers: Sequence[int],
    evaluation: Windows,
    *,
    fit_on: Windows | None = None,
    settings: RefitSettings | None = None,
    progress: bool = False,
) -> list[Perplexity]:
    """Losses of windows without some layers; ``fit_on``, if given, has the windows of a refit."""
    fitted = None
    if fit_on is not None:
        fitted = refit.fit(short, layers, fit_on, settings=settings, progress=progress)
    with ExitStack() as stack:
        stack.enter_context(short.without_layers(layers))
        if fitted is not None:
            stack.callback(refit.fold(short, fitted))
        return losses(short.decoder, evaluation, progress=False)


@dataclass(frozen=True)
class Candidate:
    """A set of layers that methods would remove, refitted and judged."""

    methods: list[str]
    layers: list[int]
    loss: float  # held-out, nats a token
    difference: Difference  # its loss minus that of the chosen set, paired over the windows

    @property
    def told_apart(self) -> bool:
        """Whether the 95% interval of the difference leaves 0 out."""
        return _told_apart(self.difference)


@dataclass(frozen=True)
class Swap:
    """A trial of one removed layer for a kept one."""

    back: int  # put back
    removed: int  # in its place
    difference: Difference  # of the loss, from before
    kept: bool  # lower by more than one standard error


@dataclass(frozen=True)
class HealedChoice:
    """What `choose_healed` chose, and why."""

    layers: list[int]  # to remove, original numbers, ascending
    loss: float  # of the refitted model on the judging windows, nats a token; the least of many
    candidates: list[Candidate]
    swaps: list[Swap]  # in the order of the trials
    fitted: int  # windows that the refits read
    judged: int  # windows that judged in the end
    passes: float  # bare passes spent
    budget: int
    notes: list[str]  # what was left out, and why

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        content = asdict(self)
        for row, candidate in zip(content["candidates"], self.candidates, strict=True):
            row["told_apart"] = candidate.told_apart
        return content

    def __str__(self) -> str:
        rows = [f"{'loss, nats':>10}  {'from the chosen (95%)':<36}layers of"]
        for one in self.candidates:
            off = f"{_shown(one.difference)}{'' if one.told_apart else ', not told apart'}"
            off = "chosen" if one.layers == self.layers else off
            rows.append(f"{one.loss:>10.4f}  {off:<36}{', '.join(one.methods)} {one.layers}")
        kept = [swap for swap in self.swaps if swap.kept]
        rows.append(f"{len(self.swaps)} swaps tried, {len(kept)} kept")
        rows += [f"  {s.back} back, {s.removed} removed: {_shown(s.difference)}" for s in kept]
        rows.append(f"{self.loss:.4f} without {self.layers}, refitted; the least of many, and so")
        rows[-1] += " lower than on new text"
        spent = f"{self.passes:.1f} of {self.budget} bare passes"
        windows = f"refitted on {self.fitted} windows, judged on {self.judged}"
        return "\n".join([*rows, f"{windows}; {spent}", *self.notes])


def _told_apart(change: Difference) -> bool:
    return abs(change.nats) > change.error.reach()  # False where there is no interval: NaN


def _shown(change: Difference) -> str:
    reach = change.error.reach()
    return f"{change.nats:+.4f} " + ("(-)" if math.isnan(reach) else f"(+- {reach:.4f})")


def choose_healed(
    short: ShortModel,
    windows: Windows,
    n: int,
    *,
    budget: int | None = None,
    settings: RefitSettings | None = None,
    max_memory: int = 2**31,
    state: StateFile | None = None,
    progress: bool = True,
) -> HealedChoice:
    """The n layers whose removal, followed by a refit, costs least on held-out windows.

    Candidates are lowest Block Influence, the best angular block, lowest relative magnitude and
    greedy search (SLEB). The first half of the first 16 windows scores, searches and refits; the
    second half judges, and never proposes. Halves, because judging a window costs a third of
    fitting on one, and the noise of a difference falls with the windows that judge.

    While sets are not told apart from the best (95%, paired), 16 more windows judge them, if there
    are more; this spends at most half of what is left. The rest tries swaps of one removed layer
    for a kept one. They are ordered by the sum of two losses without a refit: with the one put
    back, and with the other removed too. A swap is kept if it lowers the loss by more than one
    standard error, and the next are ordered anew.

    A candidate costs (3 x windows to fit on + windows to judge) / 16 bare passes, 2 at first; a
    greedy search of 8 of 30 layers, on 4 windows, 23.

    Args:
        windows: token ids of calibration text, in random order: the first 16, or all if fewer, but
            at least 4; more may judge.
        n: how many layers, 1 to L - 2.
        budget: in bare passes, each the original model's layers on the windows to begin with; None
            is `BUDGET`. Greedy search is left out where it would exceed it.
        settings: of the refits; None takes those of `RefitSettings`.
        max_memory: of states that the greedy search stores, in bytes.
        state: keeps what was measured; a call with the same arguments continues from it.

    Raises:
        ShortGPTError: too few windows, or too small a budget for the candidates; as in `refit.fit`.
        NotFiniteError: a state or a loss is NaN or infinite.

    Example:
        >>> print(choose_healed(short, windows, 8))  # doctest: +SKIP
    """
    check_count(n, len(short.kept), most=len(short.kept) - 2)
    cells, budget = Cells(state), BUDGET if budget is None else budget
    choosing = _Choosing(short, windows, n, cells, budget, settings, max_memory)
    total = budget * choosing.a_pass
    with bar("choosing", total=total, unit="layer", show=progress, delay=0) as shown:
        return choosing.run(shown)


class _Choosing:
    """The choice so far: windows, what was spent, and the losses of the sets that were refitted."""

    def __init__(
        self,
        short: ShortModel,
        windows: Windows,
        n: int,
        cells: Cells,
        budget: int,
        settings: RefitSettings | None,
        max_memory: int,
    ) -> None:
        self._short, self._n, self._cells, self._settings = short, n, cells, settings
        self._budget, self._max_memory, self._count = budget, max_memory, len(short.kept)
        half = min(FIRST, len(windows)) // 2
        windows = list(windows)
        self._fit = windows[:half]
        others, shared = without_overlap(windows[half:], self._fit)
        self._judging, self._more = others[:half], others[half:]
        if half < LEAST // 2 or len(self._judging) < LEAST // 2:
            but = f", of which {shared} share text with the first {half}" if shared else ""
            raise ShortGPTError(
                f"expected at least {LEAST} windows, half to refit on and half to judge by, got "
                f"{len(windows)}{but}: give more text"
            )
        self.a_pass = self._count * (half + len(self._judging))
        self._spent, self._losses = 0, dict[Layers, list[Perplexity]]()
        self._notes = [f"{shared} windows left out: they share text with others"] if shared else []
        if half + len(self._judging) < FIRST:
            few = f"{half + len(self._judging)} windows, fewer than {FIRST}"
            self._notes.append(f"{few}: differences are less sure")
        scored = [name for name in CANDIDATES if name not in BY_LOSS]
        least = math.ceil((self._count * half + len(scored) * self._price()) / self.a_pass)
        if budget < least:
            raise ShortGPTError(
                f"budget = {budget}: expected at least {least} bare passes, which refitting the "
                f"candidates takes; the default is {BUDGET}"
            )

    def run(self, shown: Bar) -> HealedChoice:
        self._shown = shown
        methods = self._candidates()
        chosen = best = self._grown([*methods])
        swaps: list[Swap] = []
        while (swap := self._swap(best, swaps)) is not None:
            best = chosen = _swapped(best, swap)
        candidates = [
            Candidate(names, [*layers], _loss(self._losses[layers]), self._change(chosen, layers))
            for layers, names in methods.items()
        ]
        return HealedChoice(
            layers=[*chosen],
            loss=_loss(self._losses[chosen]),
            candidates=sorted(candidates, key=lambda one: one.difference.nats),
            swaps=swaps,
            fitted=len(self._fit),
            judged=len(self._judging),
            passes=self._spent / self.a_pass,
            budget=self._budget,
            notes=self._notes,
        )

    def _candidates(self) -> dict[Layers, list[str]]:
        """The methods of each set."""
        few = self._fit[:FEW]
        self._spend(self._count * len(self._fit))
        scores = Importance.from_dict(self._cells.value("scores", self._scores))
        methods: dict[Layers, list[str]] = {}
        for name in CANDIDATES:
            if name in BY_LOSS:
                price = most_layers_run(self._count, self._n) * len(few)
                said = f"{name}'s search takes up to {price / self.a_pass:.1f} bare passes"
                if not self._affords(price + self._price()):
                    self._notes.append(f"{name} left out: {said}, more than the budget has left")
                    continue
                self._shown.set_postfix_str(said)
                layers = self._cells.resumed(name, partial(self._searched, name, few))
                self._spend(price)
            else:
                layers = choose(scores, self._n, method=name)
            methods.setdefault(tuple(sorted(layers)), []).append(name)
            self._refitted(tuple(sorted(layers)))
        return methods

    def _scores(self) -> dict[str, object]:
        into = Importance.empty(self._short.kept)
        return measure(self._short.decoder, [[w] for w in self._fit], into=into).to_dict()

    def _searched(self, method: str, few: Windows, state: StateFile | None) -> list[int]:
        options = {"max_memory": self._max_memory, "state": state, "progress": False}
        return self._short.search(few, self._n, method=method, **options).removed

    def _grown(self, sets: list[Layers]) -> Layers:
        """The best set, after more windows have judged those that are not told apart from it."""
        limit = (self._spent + self._budget * self.a_pass) // 2  # the rest is for swaps
        while True:
            best = min(sets, key=lambda layers: _loss(self._refitted(layers)))
            sets = [s for s in sets if s == best or not _told_apart(self._change(best, s))]
            price = len(sets) * self._price(more=len(self._more[:FIRST]))
            if len(sets) == 1 or not self._more or self._spent + price > limit:
                return best
            self._judging = [*self._judging, *self._more[:FIRST]]
            self._more = self._more[FIRST:]

    def _swap(self, best: Layers, swaps: list[Swap]) -> Swap | None:
        """The next swap that is kept; None if there is none in the budget. Adds all trials."""
        kept = [layer for layer in self._short.kept if layer not in best]
        trials = len(best) * (len(kept) + 1) + len(kept) * (len(kept) + 1) // 2  # layers run
        price = trials * len(self._fit[:FEW])
        if not self._affords(price + self._price()):
            return None
        order = self._cells.value(f"swaps of {[*best]}", partial(self._ordered, best, kept))
        self._spend(price)
        for back, removed in order:
            layers = tuple(sorted({*best, removed} - {back}))
            if layers in self._losses:
                continue
            if not self._affords(self._price()):
                return None
            self._refitted(layers)
            change = self._change(best, layers)
            swap = Swap(back, removed, change, kept=change.nats < -change.standard_error)
            swaps.append(swap)
            if swap.kept:
                return swap
        return None

    def _ordered(self, best: Layers, kept: list[int]) -> list[tuple[int, int]]:
        """Pairs of a removed layer and a kept one, the most promising first."""
        short, few = self._short, self._fit[:FEW]
        removed, positions = ([short.kept.index(i) for i in part] for part in (best, kept))
        further = losses_without(
            short.decoder, few, removed, positions, max_memory=self._max_memory
        )
        back = {}
        for layer in best:
            back[layer] = _loss(pruned_losses(short, [i for i in best if i != layer], few))
        pairs = product(best, kept)
        return sorted(pairs, key=lambda p: back[p[0]] + further[short.kept.index(p[1])])

    def _refitted(self, layers: Layers) -> list[Perplexity]:
        """Losses of the judging windows without these layers, refitted; measured once."""
        fit_on, judging = self._fit, self._judging
        if len(self._losses.get(layers, [])) < len(judging):
            name = f"refit of {[*layers]}, {len(judging)} windows"
            options = {"fit_on": fit_on, "settings": self._settings}
            run = partial(pruned_losses, self._short, layers, judging, **options)
            self._losses[layers] = self._cells.losses(name, run)
            self._spend(self._price())
        return self._losses[layers]

    def _change(self, first: Layers, second: Layers) -> Difference:
        """From one set's loss to another's, on the windows that judged both."""
        both = [self._losses[layers] for layers in (first, second)]
        return difference(*(each[: min(map(len, both))] for each in both))

    def _price(self, *, more: int = 0) -> int:
        """Of a refit and its losses, in layers run."""
        return self._count * (REFIT * len(self._fit) + len(self._judging) + more)

    def _affords(self, price: int) -> bool:
        return self._spent + price <= self._budget * self.a_pass

    def _spend(self, price: int) -> None:
        """Counts what was measured, now or in the run that this one continues."""
        self._spent += price
        self._shown.update(price)


def _swapped(layers: Layers, swap: Swap) -> Layers:
    return tuple(sorted({*layers, swap.removed} - {swap.back}))


def _loss(parts: Sequence[Perplexity]) -> float:
    """The mean, in nats a token."""
    every = together(parts)
    return every.nats / every.tokens
