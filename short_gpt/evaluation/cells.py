"""What a long run has measured, by name, in the file that it continues from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from llama.files import JsonObject
from short_gpt.evaluation.perplexity import Perplexity, Sample
from short_gpt.runtime.state import StateFile

T = TypeVar("T")


class ResultCache:
    """Values by name, saved in a state file, if there is one, as soon as they are measured.

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
