"""The settings of `shrink`: how small, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from short_gpt.runtime.errors import ShortGPTError, at_least, check_numbers
from short_gpt.runtime.settings import CHOOSE, RUN, WRITE, Settings, setting

DIALS = ("ratio", "n", "params", "memory", "max_perplexity_ratio")
RATIO = 0.25
MOST_MINUTES = 365 * 24 * 60
PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Dial(Settings):
    """How small a model becomes: one of the first five, a ratio of 0.25 if none is set.

    Example:
        >>> Dial(n=8).count([100] * 30, 500), Dial(params="3k").count([100] * 30, 500)
        (8, 5)
    """

    HEADING: ClassVar = CHOOSE
    ratio: float | None = setting(
        None, "Share of the layers to remove; 0.25 if none of the five is given."
    )
    n: int | None = setting(None, "How many layers to remove; two at least stay.")
    params: str | int | None = setting(
        None, "Maximum parameter count, as in 6B or 750M.", value="SIZE"
    )
    memory: str | int | None = setting(
        None, "Maximum memory, as in 12GB, for the weights and a KV cache.", value="SIZE"
    )
    max_perplexity_ratio: float | None = setting(
        None,
        "Remove as many layers as the perplexity allows, which may rise by this factor once the "
        "model is refitted, as in 1.2. Windows of data that nothing is fitted on tell how many.",
    )
    context: int = setting(
        4096, "Tokens of each text in the KV cache, of memory and of the printed table."
    )
    batch: int = setting(1, "Texts in that KV cache.")

    def __post_init__(self) -> None:
        if len(both := [name for name in DIALS if getattr(self, name) is not None]) > 1:
            raise ShortGPTError(
                f"`{both[0]}` and `{both[1]}` both say how small the model becomes: give one"
            )
        check_numbers(ratio=self.ratio, max_perplexity_ratio=self.max_perplexity_ratio)
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ShortGPTError(f"`ratio` {self.ratio}: expected above 0 and below 1, as in 0.25")
        rise = self.max_perplexity_ratio
        if rise is not None and not 1 < rise < math.inf:
            raise ShortGPTError(f"`max_perplexity_ratio` {rise}: expected above 1, as in 1.2")

    @property
    def name(self) -> str:
        """What is set, as a flag."""
        name = next((name for name in DIALS if getattr(self, name) is not None), "ratio")
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

    def _format_size(self, size: int) -> str:
        from short_gpt.runtime.memory import format_bytes

        return f"{size:,} parameters" if self.params is not None else format_bytes(size)

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        at_least(1, optional=True, n=self.n, context=self.context, batch=self.batch)
        _ = self.target  # raises for an invalid size

    def count(self, layers: Sequence[int], rest: int) -> int:
        """How many layers must go for the target to hold, whichever these are.

        Args:
            layers: parameters of every layer; for ``memory`` its bytes, with its KV cache.
            rest: the same of all that belongs to no layer.
        """
        from short_gpt.models.numbering import check_count

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
                raise ShortGPTError(f"{self.name}: the model is no larger, so no layer has to go")
            if n > most:
                raise ShortGPTError(
                    f"{self.name}: with 2 of its {total} layers this model still has "
                    f"{self._format_size(sizes[most])}; name that or more"
                )
        return check_count(n, total, most=most)


@dataclass(frozen=True)
class Shrinking(Settings):
    """How a model is shrunk."""

    HEADING: ClassVar = RUN
    method: str | None = setting(
        None,
        "That chooses the layers: auto, which refits the sets of several methods and takes the "
        "one of lowest held-out loss, or another of rank; auto if not given, bi with stream.",
        heading=CHOOSE,
    )
    minutes: float | None = setting(
        None, "Distill after the refit, for this many minutes; not at all if not given."
    )
    prompt: str | None = setting(
        None,
        "What the original, the pruned and the healed model answer, or continue where they have "
        "no chat template; one of ours if not given.",
        value="TEXT",
    )
    to: str | None = setting(
        None,
        "The format to write: hf, meta or gguf (a Llama only, except from GGUF to GGUF). If not "
        "given, gguf where OUT ends with .gguf, else hf.",
        heading=WRITE,
    )
    dry_run: bool = setting(False, "Only say what would be done, in time and memory.")

    def check(self) -> None:
        """Raises ShortGPTError for an unknown method, or minutes that are none."""
        from short_gpt.selection.methods import check_method

        if self.method is not None:
            check_method(self.method)
        check_numbers(minutes=self.minutes)
        if self.minutes is not None and not 0 < self.minutes <= MOST_MINUTES:
            most = f"at most {MOST_MINUTES:,}, a year"
            raise ShortGPTError(f"`minutes` {self.minutes}: expected above 0 and {most}")
