"""Windows of texts that judge a model, their losses, and how far one model's are from another's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from benchmarks.studies.scoring import SIZE
from short_gpt import ShortModel, windows
from short_gpt.data import demo, without_overlap
from short_gpt.evaluation.perplexity import (
    Perplexity,
    Sample,
    combined,
    difference,
    window_perplexities,
)
from short_gpt.healing import HealingWindows
from short_gpt.healing.choosing import ResultCache

Windows = list[list[int]]
Losses = dict[str, list[Perplexity]]  # of windows, by their kind
VALIDATED = 8  # windows by which the step is chosen
SPARE = 16  # windows cut beside those that are read, as some share text with others


def cut(short: ShortModel, texts: Sequence[str], limit: int, size: int = SIZE) -> Windows:
    if limit == 0:
        return []
    return list(windows(texts, short.encode, size=size, stride=size, seed=0, limit=limit))


def halves(path: str) -> tuple[str, str]:
    """A text file's two halves, parted at the end of a line."""
    text = Path(path).read_text(encoding="utf-8")
    half = text.rfind("\n", 0, len(text) // 2)
    return text[:half], text[half:]


def both_held_out(windows: Windows) -> Windows:
    """Windows of two texts in turn, with the pairs of every second eight the other way round.

    A refit holds every eighth window out, which would always be of the second text.
    """
    pairs = zip(windows[1::2], windows[::2], strict=False)
    turned = [w for pair in pairs for w in pair] + windows[len(windows) // 2 * 2 :]
    return [(turned if i // 8 % 2 else windows)[i] for i in range(len(windows))]


def judged_by(
    short: ShortModel, also: str | None, others: str | None, judged: int, size: int = SIZE
) -> dict[str, Windows]:
    """Windows to judge by, by their kind."""
    kinds = {"held-out chapters": cut(short, demo.bible("held_out"), judged, size)}
    if also is not None:
        kinds["other half of the second text"] = cut(short, [halves(also)[1]], judged, size)
    for path in filter(None, (others or "").split(",")):
        kinds[Path(path).stem] = cut(short, [Path(path).read_text("utf-8")], judged, size)
    return kinds


def judge(short: ShortModel, kinds: Mapping[str, Windows]) -> Losses:
    return {kind: window_perplexities(short.decoder, read) for kind, read in kinds.items()}


def row(
    parts: Mapping[str, list[Perplexity]],
    whole: Mapping[str, list[Perplexity]],
    cut: Mapping[str, list[Perplexity]],
) -> dict[str, dict[str, float]]:
    """Perplexity by kind, the nats that it is from the whole model, and the share brought back."""
    result = {}
    for kind, found in parts.items():
        lost, left = (difference(whole[kind], other[kind]) for other in (cut, parts))
        result[kind] = {
            "perplexity": combined(found).value,
            "nats": left.nats,
            "standard_error": left.standard_error,
            "restored": 1 - left.nats / lost.nats,
        }
    return result


def by_kind(
    cells: ResultCache, name: str, kinds: Mapping[str, Windows], measure: Callable[[], Losses]
) -> Losses:
    """Losses of every kind, kept in one cell."""
    every = cells.perplexities(
        name, lambda: [loss for found in measure().values() for loss in found]
    )
    taken = iter(every)
    return {kind: list(islice(taken, len(read))) for kind, read in kinds.items()}


def perplexities(rows: Sequence[tuple[float, int]]) -> list[Perplexity]:
    return [Perplexity.of([Sample(None, nats, tokens)]) for nats, tokens in rows]


def compared(nats: Mapping[str, Any], than: Mapping[str, Any]) -> dict[str, Any]:
    """By kind and over all kinds: perplexity, and nats less or more than another's, paired.

    Over all kinds the error is that of a sample with the kinds as strata.
    """
    result, strata, every = {}, [], []
    for kind, rows in nats.items():
        ours = perplexities(rows)
        by = difference(perplexities(than[kind]), ours)
        result[kind] = {"perplexity": combined(ours).value, "nats": by.nats}
        result[kind]["standard_error"] = by.standard_error
        strata.append((by, combined(ours).tokens))
        every += ours
    tokens = sum(own for _, own in strata)
    over_all = {"perplexity": combined(every).value}
    over_all["nats"] = sum(by.nats * own for by, own in strata) / tokens
    over_all["standard_error"] = (
        math.hypot(*(by.standard_error * own for by, own in strata)) / tokens
    )
    return {**result, "all three kinds": over_all}


def windows_to_cut(count: int) -> int:
    """Windows that are cut for `without_shared` to leave so many to train on."""
    return count + VALIDATED + SPARE


def without_shared(windows: Windows, judged: Windows, count: int) -> HealingWindows:
    """So many windows to train on, and others to validate by, which share no text at all."""
    free, _ = without_overlap(windows, judged)
    training, validation = free[:-VALIDATED], free[-VALIDATED:]
    training, _ = without_overlap(training, validation)
    return HealingWindows(training[:count], validation, judged)


def divided(
    kinds: Sequence[Windows], counts: Sequence[int], steps: int, judged: Windows
) -> tuple[Windows, HealingWindows]:
    """Windows to refit on, so many of each kind; and of the rest, by turns, those to train on."""
    firsts = [w for own, count in zip(kinds, counts, strict=True) for w in own[:count]]
    fitted = list(without_overlap(firsts, judged)[0])
    random.Random(0).shuffle(fitted)  # the refit holds out every eighth
    rests = [own[count:] for own, count in zip(kinds, counts, strict=True)]
    turns = [w for group in zip_longest(*rests) for w in group if w is not None]
    return fitted, without_shared(turns[: windows_to_cut(steps)], judged, steps)
