"""Which layers a job removes: named, chosen by saved scores, or as many as quality allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.checkpoints.provenance import Provenance
from short_gpt.data.texts import texts
from short_gpt.data.windows import at_least
from short_gpt.jobs.held_out import check_apart, check_names
from short_gpt.jobs.inputs import Cut, Opening
from short_gpt.jobs.scores import Scores
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import check_method
from short_gpt.selection.perplexity_budget import CONFIDENCE, Budget


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

    max_perplexity_ratio: float | None = None
    eval_data: str | None = None
    eval_windows: int = 32
    size: int = 1024
    confidence: float = CONFIDENCE
    bos: str | None = None


@dataclass(frozen=True)
class Choice:
    """Layers to remove from a checkpoint: named, or chosen by the scores of `rank`.

    Args:
        layers: numbers of the layers to remove, as in 21,22,23; or choose them by scores.
        scores: JSON file that rank wrote.
        n: how many layers to remove by the scores.
        angular: remove the best block of consecutive layers, short for the method angular.

    Example:
        >>> Choice([21, 22]).check().named
        [21, 22]
    """

    layers: object = None
    scores: str | None = None
    n: int | None = None
    angular: bool = False

    def check(self) -> Choice:
        """Itself, if it names its layers or the scores to choose them by, and not both.

        Raises:
            ShortGPTError: neither or both are given, or they contradict each other.
        """
        if (self.layers is None) == (self.scores is None):
            raise ShortGPTError("expected either `layers`, as in 21,22,23, or `scores` and `n`")
        if self.wanted is not None:
            check_method(self.wanted)
        if self.layers is not None and self.wanted is not None:
            raise ShortGPTError("`method` chooses from `scores`, not from `layers`")
        return self

    @property
    def wanted(self) -> str | None:
        """The method to choose by; None takes the one that ranked."""
        return "angular" if self.angular else None

    @property
    def named(self) -> list[int] | None:
        """The layers that are named; None where scores choose."""
        return None if self.layers is None else layer_list(self.layers)


@dataclass(frozen=True)
class MethodChoice(Choice):
    """Layers to remove from a checkpoint, chosen by any method of `rank`.

    Args:
        method: by which method of rank; the one that the scores were ranked by if not given.
    """

    method: str | None = None

    @property
    def wanted(self) -> str | None:
        if self.angular and self.method not in (None, "angular"):
            raise ShortGPTError(f"`angular` and `method` {self.method} contradict each other")
        return "angular" if self.angular else self.method


@dataclass(frozen=True)
class Chosen:
    """Layers to remove, and what is kept of how they were chosen.

    Attributes:
        layers: original numbers, in order of removal.
        record: of the choice, which a cut completes.
        budget: what was tried, where the perplexity decided.
        importance: the scores of one pass that they were chosen by; None where they were not.
        unsure: why the text of the budget may be that of the scores; None if it is not.
        unchecked: what could not be checked of the scores, or they do not settle; None if nothing.
    """

    layers: list[int]
    record: Provenance
    budget: Budget | None = None
    importance: Importance | None = None
    unsure: str | None = None
    unchecked: str | None = None


def chosen(model: str, choice: Choice) -> Chosen:
    """The layers of a choice.

    Raises:
        ShortGPTError: the choice contradicts itself, or the scores are of another model.
        FileNotFoundError: the scores or the model do not exist.
    """
    scores = _scores(choice)
    if scores is None:
        if choice.n is not None:
            raise ShortGPTError("`n` chooses from `scores`, not from `layers`")
        return Chosen(choice.named or [], Provenance())
    if choice.n is None:
        raise ShortGPTError("with `scores`, say how many layers to remove: `n`")
    unchecked = scores.check_model(model)
    layers, record = scores.layers(choice.n), scores.record()
    remarks = _lines(unchecked, scores.about(choice.n))
    return Chosen(layers, record, importance=scores.importance, unchecked=remarks)


def chosen_within(
    model: str, choice: Choice, limit: PerplexityLimit, *, opening: Opening | None = None
) -> Chosen:
    """As many layers as the perplexity on held-out text allows, with the evidence.

    Raises:
        ShortGPTError: as `chosen`; not even one layer may go; or the text is not held out.
    """
    scores, ratio, data = _limited(choice, limit)
    check_names(data, scores.arguments)
    unchecked = scores.check_model(model)
    at_least(1, "eval_windows", limit.eval_windows)
    cut = Cut(limit.size, limit.eval_windows, bos=limit.bos)
    cut.check()
    short = (opening or Opening()).whole(model, size=limit.size)
    held = list(cut.windows(texts(data), short.encode, short.bos))
    unsure = check_apart(held, data, scores.arguments, short)
    most = len(scores.searched) or None  # a search found no more
    budget = short.layers_within(
        held, ratio, choose=scores.layers, most=most, confidence=limit.confidence
    )
    _check_some(budget, data, scores.layers(1))
    gate = {"quality_gate": {"eval_data": data, "not_compared": unsure, **budget.to_dict()}}
    remarks = _lines(unchecked, scores.about(len(budget.layers)))
    return Chosen(budget.layers, scores.record(**gate), budget, scores.importance, unsure, remarks)


def _limited(choice: Choice, limit: PerplexityLimit) -> tuple[Scores, float, str]:
    """The scores, the ratio and the text, which have to be there."""
    scores, ratio, data = _scores(choice), limit.max_perplexity_ratio, limit.eval_data
    if scores is None:
        raise ShortGPTError("`max_perplexity_ratio` chooses from `scores`, not from `layers`")
    if ratio is None or data is None or choice.n is not None:
        raise ShortGPTError("`max_perplexity_ratio` needs `eval_data`, and no `n`")
    return scores, ratio, data


def _lines(*remarks: str | None) -> str | None:
    return "\n".join(remark for remark in remarks if remark) or None


def _check_some(budget: Budget, data: str, first: list[int]) -> None:
    """Raises ShortGPTError where the limit leaves no layer to remove."""
    if not budget.layers:
        rise = budget.tried[1].value / budget.tried[0].value
        raise ShortGPTError(
            f"not even one layer may go: without {first} the perplexity on {data} rises by a "
            f"factor of {rise:.4f}, {budget.verdict(1)}; more `eval_windows` or texts tell more"
        )


def _scores(choice: Choice) -> Scores | None:
    """The scores that a choice names; None where layers are named."""
    choice.check()
    return None if choice.scores is None else Scores.read(choice.scores, choice.wanted)


def layer_list(layers: object, name: str = "layers") -> list[int]:
    """Layer numbers as they are given: one number, or several.

    Args:
        layers: the numbers.
        name: of the setting, for the message.

    Raises:
        ShortGPTError: anything else.
    """
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, Sequence) or not all(type(i) is int for i in numbers):
        raise ShortGPTError(f"expected layer numbers as in `{name}` 21,22,23, got {layers!r}")
    return list(numbers)
