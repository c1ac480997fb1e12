"""The settings of `shrink`: how small the model becomes, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from short_gpt.jobs.inputs import Windows
from short_gpt.runtime.errors import ShortGPTError, at_least, check, check_numbers
from short_gpt.runtime.settings import CHOOSE, RUN, Settings, setting

SIZES = ("ratio", "n", "params", "memory", "max_perplexity_ratio")  # one of these is set
RATIO = 0.25
SHRUNK = Windows("self", size=None).without("column", "stride")  # what is read by default
A_YEAR = 365 * 24 * 60  # minutes
PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Shrinking(Settings):
    """How small a model becomes, and how.

    Example:
        >>> Shrinking(n=8).count([100] * 30, 500), Shrinking(params="3k").count([100] * 30, 500)
        (8, 5)
    """

    HEADING: ClassVar = CHOOSE
    ratio: float | None = setting(
        None, "Share of the layers to remove. Default: 0.25, unless another size is given."
    )
    n: int | None = setting(None, "Number of layers to remove; two at least stay.")
    params: str | int | None = setting(
        None, "Maximum parameter count, as in 6B or 750M.", value="SIZE", rare=True
    )
    memory: str | int | None = setting(
        None, "Maximum memory, as in 12GB, for the weights and a KV cache.", value="SIZE"
    )
    max_perplexity_ratio: float | None = setting(
        None,
        "Factor by which the perplexity of the refitted model may rise, as in 1.2: as many layers "
        "go as it allows, on windows of data that nothing is fitted on.",
        rare=True,
    )
    context: int = setting(
        4096, "Tokens of the KV cache in all, of memory and of the printed table.", rare=True
    )
    method: str | None = setting(
        None,
        "Method that chooses the layers: auto, which refits the sets of several methods and takes "
        "the one of lowest held-out loss, or another of rank. Default: auto, or bi with stream.",
    )
    minutes: float | None = setting(
        None, "Minutes of distillation after the refit. Default: none.", heading=RUN
    )
    prompt: str | None = setting(
        None,
        "Prompt that the original, the pruned and the healed model answer, or continue where they "
        "have no chat template. Default: one of ours.",
        heading=RUN,
        value="TEXT",
        rare=True,
    )

    @property
    def size_flag(self) -> str:
        """The setting that says how small, as a flag."""
        name = next((name for name in SIZES if getattr(self, name) is not None), "ratio")
        return f"--{name} {getattr(self, name) or RATIO}"

    @property
    def target(self) -> int | None:
        """The most parameters, or bytes of memory; None where neither is set."""
        from short_gpt.runtime.memory import bytes_of

        if self.params is None:
            return None if self.memory is None else bytes_of(self.memory, "memory")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(self.params).strip().lower())
        if match is None:
            raise ShortGPTError(f"`params` {self.params}: expected a number as in 6B or 750M")
        return int(float(match[1]) * PARAMETERS[match[2]])

    def check(self) -> None:
        """Raises ShortGPTError for a setting that is refused, before a model is loaded."""
        from short_gpt.selection.methods import check_method

        if len(both := [name for name in SIZES if getattr(self, name) is not None]) > 1:
            raise ShortGPTError(
                f"`{both[0]}` and `{both[1]}` both say how small the model becomes: give one"
            )
        ratio, rise, minutes = self.ratio, self.max_perplexity_ratio, self.minutes
        check_numbers(ratio=ratio, max_perplexity_ratio=rise, minutes=minutes)
        check(ratio is None or 0 < ratio < 1, "`ratio`", ratio, "above 0 and below 1")
        in_range = rise is None or 1 < rise < math.inf
        check(in_range, "`max_perplexity_ratio`", rise, "above 1, as in 1.2")
        in_range = minutes is None or 0 < minutes <= A_YEAR
        check(in_range, "`minutes`", minutes, f"above 0 and at most {A_YEAR:,}, a year")
        at_least(1, optional=True, n=self.n, context=self.context)
        if self.method is not None:
            check_method(self.method)
        _ = self.target  # raises for an invalid size

    def count(self, layers: Sequence[int], rest: int) -> int:
        """How many layers must go for the target to hold, whichever these are.

        Args:
            layers: Parameters of every layer; for ``memory`` its bytes, with its KV cache.
            rest: The same of all that belongs to no layer.
        """
        from short_gpt.models.numbering import check_count
        from short_gpt.runtime.memory import format_bytes

        total, most = len(layers), len(layers) - 2
        n = self.n or math.floor((self.ratio or RATIO) * total + 0.5)
        if self.ratio is not None and most > 0 and not 1 <= n <= most:
            raise ShortGPTError(
                f"`ratio` {self.ratio} of {total} layers is {n}, but 1 to {most} may go: expected "
                f"{0.5 / total:.2g} to {most / total:.2g}"
            )
        if self.target is not None:
            removed = accumulate(sorted(layers), initial=0)  # the smallest may be the removed ones
            sizes = [sum(layers) + rest - size for size in removed]
            n = next((i for i, size in enumerate(sizes) if size <= self.target), total)
            if not n:
                raise ShortGPTError(f"{self.size_flag}: the model is small enough already")
            if n > most:
                least = format_bytes(sizes[most])
                least = f"{sizes[most]:,} parameters" if self.params is not None else least
                raise ShortGPTError(
                    f"{self.size_flag}: with 2 of its {total} layers it still has {least}; name "
                    "that or more"
                )
        return check_count(n, total, most=most)
