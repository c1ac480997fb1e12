"""What an experiment measures: every cell once, also over an interruption; a model's cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from llama.io.json_files import JsonObject
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.sampling import Sample
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.short_model import ShortModel

T = TypeVar("T")


class Cells:
    """Values by name, saved as soon as they are measured.

    Args:
        state: the file to continue from and to save in; None keeps values in memory.
    """

    def __init__(self, state: StateFile | None = None) -> None:
        self._state = state
        content = state.content if state and state.content else {}
        self._values: JsonObject = content.get("cells", {})

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def value(self, name: str, measure: Callable[[], T]) -> T:
        """The cell's value, ready for JSON; ``measure`` is called if there is none yet."""
        if name not in self._values:
            self._values[name] = measure()
            if self._state is not None:
                self._state.save({"cells": self._values})
        return self._values[name]

    def losses(self, name: str, measure: Callable[[], list[Perplexity]]) -> list[Perplexity]:
        """Losses of windows, each as ``[nats, tokens, windows, text]`` in the file.

        Older files lack the text's number.
        """
        rows = self.value(name, lambda: [_row(p) for p in measure()])
        return [_losses(*row) for row in rows]

    def inner(self, name: str) -> StateFile | None:
        """A state file for a long measurement inside this experiment; None where none is kept."""
        return None if self._state is None else self._state.part(name)


def _row(found: Perplexity) -> tuple[float, int, int, int | None]:
    text = found.samples[0].text if found.samples else None
    return found.nats, found.tokens, found.windows, text


def _losses(nats: float, tokens: int, windows: int, text: int | None = None) -> Perplexity:
    """What `_row` wrote."""
    return Perplexity(nats, tokens, windows, (Sample(text, nats, tokens),))


def size_without(short: ShortModel, layers: Sequence[int]) -> tuple[int, int]:
    """Parameters and bytes of the model without some layers; tied ones count once.

    Args:
        short: the original model.
        layers: to leave out, original numbers.
    """
    places = [short.kept.index(number) for number in layers]
    gone = {id(p) for place in places for p in short.decoder.layers[place].parameters()}
    left = {id(p): p for p in short.decoder.module.parameters() if id(p) not in gone}.values()
    return sum(p.numel() for p in left), sum(p.numel() * p.element_size() for p in left)


def tokens_per_second(
    short: ShortModel, window: Sequence[int], *, prompt: int = 64, count: int = 32
) -> float:
    """Greedy generation with the cache, one sequence; the median of three runs after a warm-up.

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
