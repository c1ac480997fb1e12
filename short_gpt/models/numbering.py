"""Layer numbers, the original model's from 0: which exist, and how many may be removed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence

from short_gpt.runtime.errors import ShortGPTError, whole


def check_exist(layers: Sequence[int], present: Sequence[int]) -> None:
    """Raises ShortGPTError unless ``layers`` are different numbers of those ``present``."""
    # True is an int, and would be layer 1
    unknown = [i for i in layers if type(i) is not int or i not in present]
    if unknown:
        raise ShortGPTError(f"layers {unknown} do not exist; the model has {span(present)}")
    if len(set(layers)) != len(layers):
        raise ShortGPTError(f"layers {[*layers]} name a layer twice")


def check_layers(drop: Sequence[int], present: Sequence[int]) -> list[int]:
    """The layers of ``present`` that stay; ShortGPTError unless ``drop`` names some, not all."""
    check_exist(drop, present)
    check_count(len(drop), len(present), name="number of layers to remove")
    return [i for i in present if i not in set(drop)]


def check_count(n: object, n_layers: int, *, most: int | None = None, name: str = "n") -> int:
    """n as an int; ShortGPTError, which calls it ``name``, unless 1 <= n <= ``most`` (L - 1)."""
    most, number = n_layers - 1 if most is None else most, whole(n)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
        expected = f"expected 1 to {most}" if most > 0 else "too few to remove any"
        raise ShortGPTError(f"{name} = {n!r}; the model has {n_layers} layers: {expected}")
    return number


def grouped(numbers: Collection[int]) -> list[range]:
    """Ascending numbers as runs of consecutive ones.

    Example:
        >>> grouped([0, 1, 5])
        [range(0, 2), range(5, 6)]
    """
    starts = [i for i in numbers if i - 1 not in numbers]
    ends = [i + 1 for i in numbers if i + 1 not in numbers]
    return list(map(range, starts, ends))


def span(layers: Sequence[int]) -> str:
    """Layer numbers in short: ``0..20, 30, 31``."""
    groups = grouped(sorted(layers))
    parts = (f"{r[0]}..{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in groups)
    return ", ".join(parts)


def runs(layers: Iterable[int], present: Sequence[int]) -> list[tuple[int, int]]:
    """Positions of the first and the last of every run of ``layers`` among those ``present``."""
    positions = sorted(list(present).index(layer) for layer in layers)
    return [(run[0], run[-1]) for run in grouped(positions)]


def layer_numbers(layers: Iterable[int] | None) -> list[int]:
    """Layers as plain numbers, also those of numpy and torch; ShortGPTError for anything else."""
    if layers is None:
        return []
    try:
        # True stays what it is, and is refused by `check_exist`
        return [i if isinstance(i, bool) else operator.index(i) for i in layers]
    except TypeError:
        raise ShortGPTError(f"expected a list of layer numbers, got {layers!r}") from None
