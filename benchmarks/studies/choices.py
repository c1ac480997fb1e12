"""What `choose_healed` chooses on the real small model, against each candidate alone.

Calibration windows are half of the book and half of another text, drawn anew for each draw. The
first of them choose. Every set is then refitted on more of them, and judged on held-out chapters,
on the half of the second text that nothing was fitted on, and on novels. Differences are paired
over windows. Means over draws say how far each candidate's set is from auto's, and what
auto would lose without the candidate: the loss of the best of the others, less that of the best.

    python benchmarks/studies/choices.py --also FILE --others FILE --out choices.json

``--also`` and ``--others`` are as in ``healing.py``. With ``--mixed`` the choice reads windows with
products in bfloat16; the chosen sets are refitted and judged in float32 all the same. What is
measured is kept in a state beside the file, and the same command continues from it; ``--counts``
and ``--draws`` may grow meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.judging import Windows, both_held_out, compared, halves, judged_by
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import build, in_mixed
from short_gpt import ShortLlama, choose_healed, windows
from short_gpt.data import demo
from short_gpt.healing import RefitSettings
from short_gpt.healing.choosing import CANDIDATES, MAX_WINDOWS, ResultCache, pruned_losses
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile

WITHOUT = "without "  # before the name of a candidate


def main(
    also: str,
    others: str | None = None,
    counts: Sequence[int] = (8, 4, 12),
    draws: int | Sequence[int] = 3,
    learned: int = 24,
    size: int = 512,
    judged: int = 8,
    budget: int | None = None,
    mixed: bool = False,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        also, others: as in ``healing.py``.
        counts: numbers of layers to remove, of 30.
        draws: samples of calibration text; one number, or one for each of ``counts``.
        learned: windows that the chosen sets are refitted on, in the end.
        size: tokens of all windows.
        judged: windows of each kind to judge by.
        budget: of the choice, in bare passes.
        mixed: choose with products in bfloat16.
        out, overwrite: the JSON file.
    """
    begin(out, overwrite=overwrite)
    short = build()
    kinds = judged_by(short, also, others, judged, size)
    identity = {"model": short.identity(), "learned": learned, "judged by": json_digest(kinds)}
    identity |= {"budget": budget, "refit": vars(RefitSettings())}
    identity |= {"mixed": True} if mixed else {}
    cells = ResultCache(StateFile(f"{out or 'choices'}.state", identity, every=0.0))
    rows: list[dict[str, Any]] = []
    measured: dict[int, list[Nats]] = {}  # by the number of layers, of every draw
    numbers = [counts] if isinstance(counts, int) else [*counts]
    each = [draws] * len(numbers) if isinstance(draws, int) else [*draws]
    for draw in range(max(each)):
        text = drawn(short, also, size, draw)
        name = f"draw {draw}, {json_digest(text)}"
        for n in [n for n, own in zip(numbers, each, strict=True) if draw < own]:
            trial = Trial(cells, short, kinds, text, name, learned)
            row, nats = trial.row(n, budget, mixed=mixed)
            rows.append({"n": n, "draw": draw, **row})
            measured.setdefault(n, []).append(nats)
            print(f"\n{n} layers, draw {draw}\n{table(rows[-1])}", flush=True)
    content: dict[str, Any] = {"chosen in": "mixed" if mixed else "float32"}
    content |= {"windows": learned, "tokens_per_window": size, "judged": judged, "rows": rows}
    content |= {"means": [{"n": n, **over_draws(own)} for n, own in measured.items()]}
    finish("choices", [], content, out=out, overwrite=overwrite)


def drawn(short: ShortLlama, also: str, size: int, draw: int) -> Windows:
    """Windows of the book and of the second text's first half, in turn; see `both_held_out`."""
    options = {"size": size, "stride": size, "seed": draw, "limit": MAX_WINDOWS // 2}
    texts = (demo.bible("calibration"), [halves(also)[0]])
    pairs = zip(*(windows(text, short.encode, **options) for text in texts), strict=True)
    return both_held_out([window for pair in pairs for window in pair])


Nats = dict[str, dict[str, list[tuple[float, int]]]]  # by what chose, and by the kind of text


def over_draws(draws: Sequence[Nats]) -> dict[str, Any]:
    """Of each that chose in some draws: the mean difference from auto's set, paired over windows.

    Likewise of the best of the other candidates from the best of all.
    """
    names = list(dict.fromkeys(name for nats in draws for name in nats if name != "auto"))
    found: dict[str, Any] = {"from auto": {}, "without it": {}}
    for name in names:
        own = [nats for nats in draws if name in nats]
        change = compared(mean([n[name] for n in own]), mean([n["auto"] for n in own]))
        kind = "without it" if name.startswith(WITHOUT) else "from auto"
        found[kind][name.removeprefix(WITHOUT)] = {"draws": len(own), **change}
    return found


def mean(draws: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, int]]]:
    """The mean nats of every window over the draws."""
    return {
        kind: [
            (sum(nats for nats, _ in window) / len(window), window[0][1])
            for window in zip(*(draw[kind] for draw in draws), strict=True)
        ]
        for kind in draws[0]
    }


class Trial:
    """Choices by the windows of one draw, and what they are worth."""

    def __init__(
        self,
        cells: ResultCache,
        short: ShortLlama,
        kinds: Mapping[str, Windows],
        text: Windows,
        name: str,
        learned: int,
    ) -> None:
        self._cells, self._short, self._kinds = cells, short, kinds
        self._text, self._name, self._learned = text, name, learned

    def row(self, n: int, budget: int | None, *, mixed: bool) -> tuple[dict[str, Any], Nats]:
        """The sets by what chose them, their losses, and how far each is from auto's.

        The losses also have, for each candidate, the best set of the others.
        """
        chosen = self._cells.resumed(
            f"{self._name}, auto {n}", partial(self._auto, n=n, budget=budget, mixed=mixed)
        )
        sets = {name: one["layers"] for one in chosen["candidates"] for name in one["methods"]}
        sets["auto"] = chosen["layers"]
        nats = {name: self._nats(layers) for name, layers in sets.items()}
        found = {name: compared(own, nats["auto"]) for name, own in nats.items()}
        found["original"] = compared(self._nats([]), nats["auto"])
        kept = {name: chosen[name] for name in ("passes", "fitted", "judged")}
        for name in sets.keys() & {*CANDIDATES}:
            others = (one for one in chosen["candidates"] if one["methods"] != [name])
            nats[f"{WITHOUT}{name}"] = self._nats(next(others)["layers"])
        return {"sets": sets, "from auto": found, "kld": chosen["kld"], **kept}, nats

    def _auto(self, state: StateFile | None, *, n: int, budget: int | None, mixed: bool) -> Any:
        def choose() -> Any:
            return choose_healed(self._short, self._text, n, budget=budget, state=state)

        chosen = in_mixed(self._short, choose) if mixed else choose()
        print(chosen, flush=True)
        return chosen.to_dict()

    def _nats(self, layers: Sequence[int]) -> dict[str, list[tuple[float, int]]]:
        """Nats and tokens of every window, by its kind, of the model refitted on more windows."""

        def measured() -> Any:
            every = [window for read in self._kinds.values() for window in read]
            fit_on = self._text[: self._learned] if layers else None
            each = iter(pruned_losses(self._short, layers, every, fit_on=fit_on))
            return {
                kind: [(p.nats, p.tokens) for p in (next(each) for _ in read)]
                for kind, read in self._kinds.items()
            }

        name = f"{self._name}, " if layers else ""
        return self._cells.value(f"{name}losses {sorted(layers)}", measured)


def table(row: Mapping[str, Any]) -> str:
    """A line for every set: perplexities by kind, and nats more than auto's with the error."""
    lines = [f"{row['passes']:.1f} bare passes"]
    for name, found in row["from auto"].items():
        texts = [
            f"{kind} {own['perplexity']:.2f} {own['nats']:+.4f} ({own['standard_error']:.4f})"
            for kind, own in found.items()
        ]
        lines.append(f"{name:<20}{sorted(row['sets'].get(name, []))!s:<42}{'; '.join(texts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
