"""What a model costs, and how long a job will take: sizes, speeds, forecasts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NoReturn

from short_gpt.runtime import replicas
from short_gpt.runtime.devices import wait
from short_gpt.runtime.progress import DryRun, duration
from short_gpt.scoring.stopping import Stop
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_model import ShortModel


def size_without(short: ShortModel, layers: Sequence[int]) -> tuple[int, int]:
    """Parameters and bytes of the model without some layers; tied ones count once."""
    removed = [short.decoder.layers[short.kept.index(number)] for number in layers]
    excluded = {id(p) for layer in removed for p in layer.parameters()}
    kept = {id(p): p for p in short.decoder.module.parameters() if id(p) not in excluded}.values()
    return sum(p.numel() for p in kept), sum(p.numel() * p.element_size() for p in kept)


def tokens_per_second(
    short: ShortModel,
    window: Sequence[int],
    *,
    prompt: int = 64,
    count: int = 32,
    runs: int = 3,
    warm_up: int = 1,
) -> float:
    """Greedy generation with the cache after the start of the window; the fastest of some runs.

    No token ends a text, and so every model writes as many.
    """
    half_context = short.decoder.max_seq_len // 2
    ids, count = list(window[: min(prompt, half_context)]), min(count, half_context)
    seconds = []
    for _ in range(warm_up + runs):
        started = time.perf_counter()
        short.continued([ids], count, lambda logits: logits.argmax(-1))
        wait(short.decoder.module)
        seconds.append((time.perf_counter() - started) / count)
    return 1 / min(seconds[warm_up:])  # other programs can only slow it down


def forecast(
    short: ScoredModel,
    window: list[int],
    *,
    batch_size: int = 1,
    rule: Stop | None = None,
    total: int | None = None,
    population: int | None = None,
    read: int = 0,
) -> str:
    """How long a run will take, from one window that is timed. All ranks must call it.

    Of ``total`` windows, a sample of ``population``, ``read`` were read before; None is unknown.
    """
    one = short.seconds_a_window(window, batch_size) / replicas.current(short.decoder.device).count
    line = f"a window of {len(window):,} tokens takes {duration(one)}"
    if total is None:
        return f"{line}; how many there are shows as they are read"
    parts, first = [], total if rule is None else rule.first_look(population)
    if read < first < total:
        settled = duration((first - read) * one)
        parts.append(f"{first:,} windows, where the answer may be settled, take {settled}")
    parts.append(f"all {total:,} take {duration((total - read) * one)}")
    before = f"; {read:,} were read before" if read else ""
    return f"{line}: {'; '.join(parts)}{before}"


def end_dry_run(
    short: ScoredModel, work: str, size: int, total: int | None = None, **how: Any
) -> NoReturn:
    """Raises DryRun with the work and its `forecast`, from a window of ``size`` that is timed."""
    window = [0] * min(size, short.decoder.max_seq_len)  # its tokens do not change the time
    seconds = forecast(short, window, total=total, **how)
    raise DryRun(f"dry run: it would {work}\n{seconds}\nnothing was written")
