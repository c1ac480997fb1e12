"""The settings of `shrink`: how small the model becomes, and how."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from llama.sources import BuiltinName
from short_gpt.jobs.inputs import WindowSettings
from short_gpt.runtime.errors import ShortGPTError, at_least, check
from short_gpt.runtime.settings import CHOOSE, RUN, Settings, count_of, setting, whole_numbers

SIZES = (  # one of these is set
    *("ratio", "n", "params", "memory", "layers", "curve"),
    *("max_kld", "max_perplexity_ratio"),
)
CURVE = (1, 2, 3, 4, 6, 8)  # numbers of layers
MAX_KLD = 0.1  # nats a token: near the original, as the better types of 4 bits
DEMO = BuiltinName("demo")  # the model and the book, also where a folder has that name
SHRUNK = WindowSettings("self", size=None).without(
    "column", "stride", "seed"
)  # what is read by default


@dataclass(frozen=True)
class ShrinkSettings(Settings):
    """How small a model becomes, and how.

    Example:
        >>> ShrinkSettings(memory="3kB").count([100] * 30, 500)
        5
    """

    HEADING: ClassVar = CHOOSE
    ratio: float | None = setting(None, "Share of the layers to remove, as in 0.25.", rare=True)
    n: int | None = setting(None, "Number of layers to remove; two at least stay.")
    params: str | int | None = setting(
        None, "Maximum number of parameters, as in 400M or 1.2B.", value="COUNT", rare=True
    )
    memory: str | int | None = setting(
        None,
        "Maximum memory, as in 12GB, for the weights and a KV cache of 4,096 tokens.",
        value="SIZE",
    )
    layers: object = setting(
        None, "Numbers of the layers to remove, as in 3,12, where they are known.", value="N,N"
    )
    curve: object = setting(
        None,
        "Numbers of layers, as in 1,2,3,4, to compare: size, KLD, answers and speed of each, and "
        "the original in fewer bits; auto: 1, 2, 3, 4, 6 and 8. Nothing is written without pick.",
        value="N,N",
    )
    pick: int | None = setting(
        None,
        "Number of layers of the curve to remove, in the same or in a later run.",
        needs="curve",
    )
    max_kld: float | None = setting(
        None,
        "Mean KL divergence of the refitted model from the original, in nats a token: as many "
        "layers go as greedy_kld can remove within it, both on held-out windows and on what the "
        "original answers; the set of another method may be farther. Default: 0.1, unless another "
        "size is given.",
    )
    max_perplexity_ratio: float | None = setting(
        None,
        "The same limit as the perplexity's rise that it is on the model's own text: exp(max_kld).",
        rare=True,
    )
    method: str | None = setting(
        None,
        "Method that chooses the layers: auto, which refits the sets of several methods and takes "
        "the one nearest to the original, or another of rank. Default: auto, or what fits into "
        "the time: greedy_kld, bi.",
    )
    type: str | None = setting(
        None,
        "GGUF type that the layers' matrices get too, of q8_0, q6_k, q5_k, q4_k, q3_k and q2_k; "
        "the refit answers the rounding. From GGUF to GGUF, with a size such as n. Default: the "
        "source's types.",
        value="NAME",
        rare=True,
    )
    time: str | int | None = setting(
        None,
        "Time of the whole run, as in 30m or 2h: fewer windows, and a cheaper method, where that "
        "is not enough; distillation in what is left, where that is a quarter or more. Default: "
        "at most 30 minutes on a CPU, 15 on a GPU, without distillation.",
        heading=RUN,
        value="TIME",
    )
    heal_by: str = setting(
        "refit",
        "Closed form that heals the sets of layers that are compared, and the result.",
        flag=False,
    )

    def __post_init__(self) -> None:
        for name in ("layers", "curve"):
            if isinstance(value := getattr(self, name), range):  # which JSON does not have
                object.__setattr__(self, name, [*value])

    @property
    def size_flag(self) -> str:
        """The setting that says how small, as a flag."""
        name = next((name for name in SIZES if getattr(self, name) is not None), "max_kld")
        value = MAX_KLD if getattr(self, name) is None else getattr(self, name)
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        return f"--{name} {text}"

    @property
    def most_kld(self) -> float | None:
        """The most divergence, in nats a token; None where another setting says how small."""
        if self.max_perplexity_ratio is not None:
            return math.log(self.max_perplexity_ratio)
        others = all(getattr(self, name) is None for name in SIZES)
        return self.max_kld or (MAX_KLD if others else None)

    @property
    def named(self) -> list[int] | None:
        """The layers to remove, where they are named."""
        if self.layers is None:
            return None
        return whole_numbers(self.layers, "layers", "3,12", what="layer numbers")

    def counts(self, total: int) -> list[int]:
        """The numbers of layers of the curve, for a model of so many."""
        if self.curve == "auto":
            return [n for n in CURVE if n <= total - 2] or [1]
        return sorted({*whole_numbers(self.curve, "curve", "1,2,3,4")})

    @property
    def target(self) -> int | None:
        """The most bytes of memory, or the most parameters; None where neither is set."""
        from short_gpt.runtime.memory import bytes_of

        if self.params is not None:
            return count_of(self.params, "params")
        return None if self.memory is None else bytes_of(self.memory, "memory")

    @property
    def seconds(self) -> float | None:
        """The time of the run; None where that is not set."""
        from short_gpt.runtime.progress import seconds_of

        return None if self.time is None else seconds_of(self.time)

    def check(self) -> None:
        """Raises ShortGPTError for a setting that is refused, before a model is loaded."""
        from short_gpt.checkpoints.gguf import check_type
        from short_gpt.healing.job import CLOSED
        from short_gpt.selection.methods import check_method

        if len(both := [name for name in SIZES if getattr(self, name) is not None]) > 1:
            raise ShortGPTError(
                f"`{both[0]}` and `{both[1]}` both say how small the model becomes: give one"
            )
        ratio, kld = self.ratio, self.max_kld
        check(ratio is None or 0 < ratio < 1, "`ratio`", ratio, "above 0 and below 1")
        check(kld is None or 0 < kld < math.inf, "`max_kld`", kld, "above 0, as in 0.1")
        rise = self.max_perplexity_ratio
        in_range = rise is None or 1 < rise < math.inf
        check(in_range, "`max_perplexity_ratio`", rise, "above 1, as in 1.2")
        at_least(1, optional=True, n=self.n)
        _ = self.target, self.seconds, self.named  # raise for invalid texts
        if self.curve is not None:
            counts = self.counts(sys.maxsize)
            in_curve = self.pick is None or self.pick in counts
            check(in_curve, "`pick`", self.pick, f"one of {', '.join(map(str, counts))}")
            at_least(1, curve=counts[0])
        if self.method is not None and self.layers is not None:
            raise ShortGPTError("`method` chooses layers, and `layers` names them: give one")
        check(self.heal_by in CLOSED, "`heal_by`", self.heal_by, f"one of {', '.join(CLOSED)}")
        if self.method is not None:
            check_method(self.method)
        if self.type is not None:
            check_type(self.type)
            # the search for a distance, and the curve, round nothing
            sized = self.most_kld is None and self.curve is None
            check(sized, "`type`", self.type, "a size with it, as `n`, but no KLD and no curve")
            check(self.heal_by == "refit", "`heal_by`", self.heal_by, "refit with a `type`")

    def count(self, layers: Sequence[int], rest: int) -> int:
        """How many layers must go for the target to hold, whichever these are.

        Args:
            layers: Parameters of every layer, or its bytes with its KV cache.
            rest: Those of all that belongs to no layer.
        """
        from short_gpt.models.numbering import check_count, check_exist
        from short_gpt.runtime.memory import format_bytes

        total, most = len(layers), len(layers) - 2
        check_exist(self.named or [], range(total))
        n = self.n or len(self.named or []) or math.floor((self.ratio or 0.0) * total + 0.5)
        if self.curve is not None:
            check_count(max(self.counts(total)), total, most=most)
            n = self.pick or max(self.counts(total))
        if self.target is not None:
            removed = accumulate(sorted(layers), initial=0)  # the smallest may be the removed ones
            sizes = [sum(layers) + rest - size for size in removed]
            n = next((i for i, size in enumerate(sizes) if size <= self.target), total)
            if not n:
                kept = f" in {self.type}" if self.type else ""
                raise ShortGPTError(f"{self.size_flag}: the model is small enough already{kept}")
            if n > most:
                least = format_bytes(sizes[most]) if self.params is None else f"{sizes[most]:,}"
                raise ShortGPTError(
                    f"{self.size_flag}: with 2 of its {total} layers it still takes {least}; name "
                    "that or more"
                )
        return check_count(n, total, most=most)
