"""What a model without some layers costs to keep and to run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from short_gpt.wrappers.short_model import ShortModel


def size_without(short: ShortModel, layers: Sequence[int]) -> tuple[int, int]:
    """Parameters and bytes of the model without some layers; tied ones count once.

    Args:
        short: the whole model.
        layers: to leave out, original numbers.
    """
    places = [short.kept.index(number) for number in layers]
    gone = {id(p) for place in places for p in short.decoder.layers[place].parameters()}
    left = {id(p): p for p in short.decoder.module.parameters() if id(p) not in gone}.values()
    return sum(p.numel() for p in left), sum(p.numel() * p.element_size() for p in left)


def tokens_per_second(
    short: ShortModel, window: Sequence[int], *, prompt: int = 64, count: int = 32
) -> float:
    """Greedy generation with the cache, one sequence; the median of three runs behind a warm-up.

    Args:
        short: the model as it is now.
        window: token ids; its beginning is the prompt.
        prompt: tokens of it, at most half of what the model takes.
        count: tokens to generate, likewise.
    """
    room = short.decoder.max_seq_len // 2
    ids, count = list(window[: min(prompt, room)]), min(count, room)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        made = len(short.greedy(ids, count))
        seconds.append((time.perf_counter() - started) / max(made, 1))
    return 1 / statistics.median(seconds[1:])
