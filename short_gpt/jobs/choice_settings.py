"""What a user sets of the choice of layers: what a ranking answers, what a checkpoint loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from short_gpt.jobs.inputs import SIZE
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import CHOOSE, READ, WRITE, Needs, Values, needs_one_of, setting

if TYPE_CHECKING:
    from short_gpt.scoring.stopping import Stop

LIMIT = needs_one_of("`max_perplexity_ratio`", "max_perplexity_ratio")
SEED, CONFIDENCE = needs_one_of("a `seed`", "seed"), needs_one_of("a `confidence`", "confidence")
SETTLED = Needs(
    "`n`, a `seed` and `method` bi or angular",
    lambda v: None not in (v["n"], v["seed"]) and v["method"] in ("bi", "angular"),
)


def _scores(values: Values) -> bool:
    from short_gpt.selection.methods import BY_LOSS

    return values.get("method") not in BY_LOSS


SLEB = Needs("`method` sleb", lambda v: v["method"] == "sleb")
SCORES = Needs("a `method` that scores (not perplexity or sleb)", _scores)


@dataclass(frozen=True)
class Answer:
    """What a ranking is to answer.

    Args:
        n: also print which so many layers the methods would remove.
        method: bi, angular, angular_all, deepest, relative_magnitude, norm, sequential, reverse,
            random, perplexity or sleb.
        candidates: sleb only tries the so many layers of lowest Block Influence; all if not
            given.
        confidence: of all runs, at most 1 - confidence end early with another answer than that of
            all windows, unless windows decide that make up less than rare of all; of those that
            end early, more may be wrong. none reads all windows.
        rare: share of all windows that a kind of windows must make up to be guarded against by
            that; the smaller, the more is read.
        sublayers: also score the attention and the MLP of every layer.

    Raises:
        ShortGPTError: there is no such method, or it needs a number of layers.
    """

    HEADING: ClassVar = CHOOSE

    n: int | None = None
    method: str = "bi"
    candidates: int | None = setting(None, needs=SLEB)
    confidence: float | None = setting(0.99, needs=SETTLED)
    rare: float = setting(0.02, needs=(SETTLED, CONFIDENCE))
    sublayers: bool = setting(False, needs=SCORES)

    def __post_init__(self) -> None:
        if self.method != Answer.method:  # the default is known to be right, without an import
            from short_gpt.selection.methods import check_method

            check_method(self.method)
            if self.by_loss and self.n is None:
                raise ShortGPTError(f"`method` {self.method} needs `n`")

    @property
    def by_loss(self) -> bool:
        """Whether the method runs the model without layers."""
        from short_gpt.selection.methods import BY_LOSS

        return self.method in BY_LOSS

    def rule(self, seed: int | None) -> Stop | None:
        """The rule that ends a run early, where the answer can be settled.

        That takes a method that chooses its n layers by means over windows, in one pass, and
        windows in random order.
        """
        from short_gpt.scoring.stopping import Stop

        if self.confidence is None:
            return None
        rule = Stop(self.n or 1, self.method == "angular", self.confidence, rare=self.rare)
        can = self.n is not None and seed is not None and self.method in ("bi", "angular")
        return rule if can else None


@dataclass(frozen=True)
class Paper:
    """What is compared with the paper, and how surely.

    Args:
        paper_model: which of the paper's models this is; by its shape if not given.
        confidence: of all runs, at most 1 - confidence end early with another answer than that of
            all windows, unless windows decide that make up less than rare of all; of those that
            end early, more may be wrong. none reads all windows.
        rare: share of all windows that a kind of windows must make up to be guarded against by
            that; the smaller, the more is read.
    """

    HEADING: ClassVar = CHOOSE

    paper_model: str | None = None
    confidence: float | None = setting(0.99, needs=SEED)
    rare: float = setting(0.02, needs=(SEED, CONFIDENCE))


@dataclass(frozen=True)
class Choice:
    """Layers to remove from a checkpoint: named, or chosen by the scores of `rank`.

    Args:
        layers: numbers of the layers to remove, as in 21,22,23; or choose them by scores.
        scores: JSON file that rank wrote.
        n: how many layers to remove by the scores.
        angular: remove the best block of consecutive layers, short for the method angular.
        method: by which method of rank; the one that the scores were ranked by if not given.

    Example:
        >>> Choice([21, 22]).check().named
        [21, 22]
    """

    HEADING: ClassVar = CHOOSE

    layers: object = setting(None, value="N,N")
    scores: str | None = setting(None, value="FILE")
    n: int | None = None
    angular: bool = False
    method: str | None = setting(None, commands=("prune",))

    def check(self) -> Choice:
        """Itself, if it names its layers or the scores to choose them by, and not both.

        Raises:
            ShortGPTError: neither or both are there, or they contradict each other.
        """
        from short_gpt.selection.methods import check_method

        if (self.layers is None) == (self.scores is None):
            raise ShortGPTError("expected either `layers`, as in 21,22,23, or `scores` and `n`")
        if self.by is not None:
            check_method(self.by)
        if self.layers is not None and self.by is not None:
            raise ShortGPTError("`method` chooses from `scores`, not from `layers`")
        return self

    @property
    def by(self) -> str | None:
        """The method to choose by; None takes the one that ranked."""
        if self.angular and self.method not in (None, "angular"):
            raise ShortGPTError(f"`angular` and `method` {self.method} contradict each other")
        return "angular" if self.angular else self.method

    @property
    def named(self) -> list[int] | None:
        """The layers that are named; None where scores choose."""
        return None if self.layers is None else layer_list(self.layers)


@dataclass(frozen=True)
class PerplexityLimit:
    """How far the perplexity on held-out text may rise.

    Args:
        max_perplexity_ratio: remove as many layers as the perplexity on eval_data allows, which
            may rise by this factor, as in 1.1; the model is loaded for that.
        eval_data: text for max_perplexity_ratio, which the scores were not measured on: a file or
            folder.
        eval_windows: windows of eval_data to read at most.
        size: tokens in a window of eval_data.
        confidence: that the perplexity of text like eval_data rises by no more; texts are the
            samples, or windows where eval_data is one text.
        bos: as rank's; which windows of eval_data begin with it.
    """

    HEADING: ClassVar = CHOOSE

    max_perplexity_ratio: float | None = None
    eval_data: str | None = setting(None, heading=READ, value="TEXTS", needs=LIMIT)
    eval_windows: int = setting(32, heading=READ, needs=LIMIT)
    size: int = setting(SIZE, heading=READ, needs=LIMIT)
    confidence: float = setting(0.95, needs=LIMIT)
    bos: str | None = setting(None, needs=LIMIT)


@dataclass(frozen=True)
class Written:
    """How a pruned checkpoint is written.

    Args:
        recipe: also write a mergekit passthrough recipe to this file.
        to: the format to write: meta or gguf (a Llama only, except from GGUF to GGUF) or hf. If not
            given, gguf where OUT ends with .gguf, else the source's, or hf from GGUF. From GGUF,
            Meta's is in float32, which holds what quantized weights stand for exactly.
        verify: whether to prove the result: the same logits as the source with the layers removed
            in memory, and the same greedy generation with and without the cache. If not given, yes
            where Hugging Face's format is read or written, whose config can fail to say which
            layers remain, and no from Meta's to Meta's and to GGUF, which is read again and
            compared in any case.
        overwrite: replace an earlier pruned checkpoint.
    """

    HEADING: ClassVar = WRITE

    recipe: str | None = setting(None, value="FILE")
    to: str | None = None
    verify: bool | None = None
    overwrite: bool = False


def layer_list(layers: object, name: str = "layers") -> list[int]:
    """Layer numbers as a list: one, several, or none.

    Args:
        layers: the numbers.
        name: of the setting, for the message.

    Raises:
        ShortGPTError: anything else.
    """
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, Sequence) or any(type(i) is not int for i in numbers):
        raise ShortGPTError(f"expected layer numbers as in `{name}` 21,22,23, got {layers!r}")
    return list(numbers)
