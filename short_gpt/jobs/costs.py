"""What a model costs: sizes and speeds."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from short_gpt.models.decoder import wait
from short_gpt.wrappers.short_model import ShortModel

TIMED = 3  # steps of writing by which its time is foretold
CLOSED_WINDOWS = 64  # that a closed form reads; training after it begins with other windows


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


def seconds_a_token(short: ShortModel, texts: int) -> float:
    """Seconds that it takes to write a token in so many texts together, timed on a few."""
    times = list[float]()

    def likeliest(logits: Tensor) -> Tensor:  # (B, V) to (B,)
        tokens = logits.argmax(-1)
        tokens[0].item()  # which a device may not have computed until it is read
        times.append(time.perf_counter())
        return tokens

    short.continued([[0]] * texts, TIMED, likeliest)
    return (times[-1] - times[0]) / (TIMED - 1)
