"""Layer numbers: those of the original model, from 0. Which exist, and how many may go."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from short_gpt.runtime.errors import ShortGPTError


def check_exist(layers: Sequence[int], present: Sequence[int]) -> None:
    """Raises ShortGPTError unless ``layers`` are different numbers of those ``present``."""
    # True is an int, and would be layer 1
    numbers = [i for i in layers if not isinstance(i, bool) and isinstance(i, int)]
    if len(numbers) != len(layers):
        raise ShortGPTError(f"expected layer numbers, got {list(layers)}")
    if unknown := sorted({i for i in layers if i not in present}):
        raise ShortGPTError(f"layers {unknown} do not exist; the model has {span(present)}")
    if len(set(layers)) != len(layers):
        raise ShortGPTError(f"layers {list(layers)} name a layer twice")


def check_layers(drop: Sequence[int], present: Sequence[int]) -> None:
    """Raises ShortGPTError unless ``drop`` names different layers of ``present``, but not all."""
    check_exist(drop, present)
    check_count(len(drop), len(present), name="number of layers to remove")


def check_count(n: object, n_layers: int, *, most: int | None = None, name: str = "n") -> None:
    """Raises ShortGPTError unless n layers can be removed.

    Args:
        n: 1 to ``most``.
        n_layers: layers that the model has.
        most: of them that may go; None is all but one.
        name: what the caller calls n.
    """
    most = n_layers - 1 if most is None else most
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most:
        raise ShortGPTError(
            f"{name} = {n!r}; the model has {n_layers} layers: expected 1 to {most}"
        )


def span(layers: Sequence[int]) -> str:
    """Layer numbers in short: ``0..20, 30, 31``."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:  # the run goes on
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = (f"{r[0]}..{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
    return ", ".join(parts)


def runs(layers: Iterable[int], present: Sequence[int]) -> list[tuple[int, int]]:
    """Places of the first and the last layer of every run, ascending.

    Args:
        layers: numbers to remove, in any order.
        present: the numbers of the layers that the model has, ascending.
    """
    found: list[tuple[int, int]] = []
    for place in sorted(list(present).index(layer) for layer in layers):
        if found and found[-1][1] == place - 1:  # the run goes on
            found[-1] = (found[-1][0], place)
        else:
            found.append((place, place))
    return found


def layer_numbers(layers: Sequence[int] | None) -> list[int]:
    """Layers as plain numbers, also those of numpy and torch; True is left to be refused."""
    if isinstance(layers, int):
        raise ShortGPTError(f"expected a list of layers, got {layers}: pass it in a list")
    if layers is None or len(layers) == 0:  # an array has no truth value
        return []
    return [i if isinstance(i, bool) else operator.index(i) for i in layers]
