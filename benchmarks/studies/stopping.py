"""How often a stopped run gives the answer of the full run, and what it saves; real small model.

The model scores every window once. Its windows are then replayed in many random orders, each until
the stopping rule ends it, for the k layers of lowest Block Influence and for the best block of k
layers. Reported: the share of orders whose stopped answer is the answer of all windows, and the
share of windows read.

Then the real windows are made to mislead: in 2% of them, drawn at random once, the layer that was
chosen last is six times as high, so that another one belongs in its place. What such windows force
on every rule with this promise is proved at `adversarial.least_median`.

    python benchmarks/studies/stopping.py --windows 600 --out benchmarks/results/stopping.json

``--scores FILE`` keeps the scores of single windows, or takes them from there. ``--adversarial``
attacks the rule with simulated populations instead, see `adversarial`:

    python benchmarks/studies/stopping.py --adversarial --out stopping_adversarial.json
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire
import numpy as np
import torch
from torch import Tensor

from benchmarks.lib import adversarial as hostile
from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import SIZE, build
from short_gpt import windows
from short_gpt.data import demo
from short_gpt.runtime.progress import bar
from short_gpt.scoring.hooks import Scores, score_batch
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.stopping import Stop, next_look

COUNTS = (4, 8, 12)
RARE, FACTOR = 0.02, 6  # the windows that mislead: their share, and how much higher they are


def main(
    windows: int = 600,
    orders: int = 1000,
    confidence: float = 0.99,
    scores: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    adversarial: bool = False,
    populations: int = 10_000,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    if adversarial:
        attack(confidence, populations, out, overwrite)
    influence, angles, seconds = read_scores(windows, scores)
    cases = {}
    for angular in (False, True):
        for k in COUNTS:
            rule = Stop(k, angular=angular, confidence=confidence)
            case = replays(rule, influence, angles, orders)
            case["misled"] = replays(rule, *misleading(rule, influence, angles), orders)
            cases[f"{'best block' if angular else 'lowest BI'}, k = {k}"] = case
    print(table(cases, len(influence)))
    print(f"no rule has a median below {hostile.least_median(rule, len(influence)):.1%}")
    missed = [name for name, case in cases.items() if case["agreement"] < confidence]
    missed += [f"{n}, misled" for n, c in cases.items() if c["misled"]["agreement"] < confidence]
    content = {"confidence": confidence, "orders": orders, "windows": len(influence)}
    content |= {"tokens_per_window": SIZE, "scoring_seconds": seconds, "cases": cases}
    held = "no more runs ended early and wrong than promised"
    finish("stopping", missed, content, held=held, out=out, overwrite=overwrite)


def attack(confidence: float, populations: int, out: str | None, overwrite: bool) -> NoReturn:
    """Runs the simulation, in which no more runs may end early and wrong than promised."""
    rule = Stop(hostile.N, confidence=confidence)
    kinds = hostile.attacks(rule, populations)
    print(hostile.table(kinds))
    wrong = {kind: kinds[kind]["wrong_of_runs"] for kind in hostile.KINDS}
    missed = [kind for kind, share in wrong.items() if share > 1 - confidence]
    content = {"confidence": confidence, "rare": rule.rare, "populations": populations}
    content |= {"windows": hostile.WINDOWS, "kinds": kinds}
    held = "no more runs ended early and wrong than promised"
    finish("stopping", missed, content, held=held, out=out, overwrite=overwrite)


def read_scores(count: int, file: str | None) -> tuple[Tensor, Tensor, float | None]:
    """Block Influence (N, L) and angular distances (N, L + 1, L + 1) of single windows."""
    if file is not None and Path(file).exists():
        kept = np.load(file)
        if len(kept["influence"]) != count:
            raise ValueError(f"{file} has {len(kept['influence'])} windows, expected {count}")
        return torch.tensor(kept["influence"]), torch.tensor(kept["angles"]), None
    short = build()
    text = demo.bible("calibration") + demo.bible("held_out")
    chosen = windows(text, short.encode, size=SIZE, stride=SIZE, seed=0, limit=count)
    parts, started = [], time.perf_counter()
    with bar("scoring", total=len(chosen), unit="window") as shown:
        for window in chosen:
            parts.append(score_batch(short.decoder, [window], layers=short.kept))
            shown.update()
    seconds = time.perf_counter() - started
    found = Scores.cat(parts)
    influence = found.influence.double() / found.tokens[:, None]
    if file is not None:
        np.savez_compressed(file, influence=influence.numpy(), angles=found.angles.numpy())
    return influence, found.angles, seconds


def replays(rule: Stop, influence: Tensor, angles: Tensor, orders: int) -> dict[str, Any]:
    """Runs the rule on random orders of the windows."""
    whole = Importance.empty(range(influence.shape[1]))
    whole.add(as_scores(influence, angles))
    truth = set(whole.least_important(rule.n, angular=rule.angular))
    right, shares, unsettled = 0, [], 0
    for seed in range(orders):
        order = torch.randperm(len(influence), generator=torch.Generator().manual_seed(seed))
        sums = replay(rule, influence[order], angles[order])
        right += set(sums.least_important(rule.n, angular=rule.angular)) == truth
        shares.append(sums.n_windows / len(influence))
        unsettled += sums.n_windows == len(influence)
    cuts = statistics.quantiles(shares, n=20, method="inclusive")
    return {
        "agreement": right / orders,
        "wrong_of_early_stops": (orders - right) / max(orders - unsettled, 1),
        "share_of_windows": {"median": cuts[9], "95th percentile": cuts[18], "min": min(shares)},
        "read_to_the_end": unsettled / orders,
        "layers": sorted(truth),
    }


def misleading(rule: Stop, influence: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The scores with the layer (or block) that was chosen last made higher in rare windows."""
    values = angles.diagonal(rule.n, dim1=1, dim2=2) if rule.angular else influence
    place = int(values.mean(0).argsort()[0 if rule.angular else rule.n - 1])
    random = torch.Generator().manual_seed(0)
    rare = torch.randperm(len(values), generator=random)[: math.ceil(RARE * len(values))]
    influence, angles = influence.clone(), angles.clone()
    changed = angles[:, place, place + rule.n] if rule.angular else influence[:, place]
    changed[rare] = (changed[rare] * FACTOR).clamp(max=1)
    return influence, angles


def replay(rule: Stop, influence: Tensor, angles: Tensor) -> Importance:
    """Reads the windows in their order until the rule stops."""
    count = len(influence)
    sums, at, target = Importance.empty(range(influence.shape[1])), 0, rule.first_look(count)
    while at < count:
        part = slice(at, min(target, count))
        sums.add(as_scores(influence[part], angles[part]))
        at, target = part.stop, next_look(target)
        if rule.judge(sums, count).settled:
            break
    return sums


def as_scores(influence: Tensor, angles: Tensor) -> Scores:
    """Windows of one token each, whose sums are their means: all windows are equally long."""
    return Scores(torch.ones(len(influence)), influence, angles)


def table(cases: dict[str, Any], count: int) -> str:
    head = f"{'':<20}  {'same answer':>11}  {'median':>7}  {'95th':>6}  {'to the end':>10}"
    head += f"  {'misled: wrong of runs':>21}  {'of early stops':>14}"
    rows = [f"{count} windows; share of them read:", head]
    for name, case in cases.items():
        shares = case["share_of_windows"]
        rows.append(
            f"{name:<20}  {case['agreement']:>11.2%}  {shares['median']:>7.1%}"
            f"  {shares['95th percentile']:>6.1%}  {case['read_to_the_end']:>10.1%}"
            f"  {1 - case['misled']['agreement']:>21.2%}"
            f"  {case['misled']['wrong_of_early_stops']:>14.2%}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    fire.Fire(main)
