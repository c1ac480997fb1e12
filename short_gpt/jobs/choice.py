"""Which layers a job removes: named, chosen by saved scores, or as many as quality allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama.io.hub import resolve
from llama.io.sources import is_meta
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.data.texts import texts
from short_gpt.jobs.inputs import Cut, Opening
from short_gpt.jobs.scores_file import importance_of, no_scores, object_in
from short_gpt.opening import layers_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import read_record
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import METHODS, check_method, choose
from short_gpt.selection.perplexity_budget import Budget


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
    """

    max_perplexity_ratio: float | None = None
    eval_data: str | None = None
    eval_windows: int = 32
    size: int = 1024


@dataclass(frozen=True)
class Scores:
    """What a file of `rank` says of the layers to remove.

    Attributes:
        file: its name.
        method: a name of `METHODS`.
        arguments: those that the ranking was made with.
        importance: the scores; None where a search by loss found the layers.
        searched: these layers, in order of removal.
    """

    file: str
    method: str
    arguments: Mapping[str, object]
    importance: Importance | None = None
    searched: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, file: str, method: str | None = None) -> Scores:
        """The scores of a file; ``method`` takes the place of the one that ranked.

        Raises:
            FileNotFoundError, ShortGPTError: no such file, no scores in it, or those of another
                method, which cannot be chosen by.
        """
        record = read_record(file)
        ranked = object_in(record, "arguments", file)
        if "chosen" not in record:
            by = method or ranked.get("method") or "bi"
            if not isinstance(by, str) or type(ranked.get("seed") or 0) is not int:
                raise no_scores(file, "a method's name and a whole number as seed")
            return cls(file, by, ranked, importance_of(record, file))
        searched = object_in(record, "chosen", file)
        found, layers = searched.get("method"), searched.get("layers")
        if not isinstance(found, str) or found not in METHODS or not isinstance(layers, list):
            raise no_scores(file, "a method and its layers as chosen")
        if method not in (None, found):
            raise ShortGPTError(f"{file} holds the layers of {found}, not of {method}")
        return cls(file, found, ranked, searched=layer_list(layers))

    def check_model(self, model: str) -> None:
        """Raises ShortGPTError if the scores are of another number of layers than the model's."""
        if self.importance is None:
            return
        count = layers_of(model if is_meta(model) else str(resolve(model)))
        if count is not None and self.importance.layers != list(range(count)):
            raise ShortGPTError(
                f"{self.file} scores {len(self.importance.layers)} layers, {model} has {count}; "
                "they do not belong together"
            )

    def layers(self, n: int) -> list[int]:
        """The n layers that the method removes; raises ShortGPTError for too many."""
        if self.importance is not None:
            seed = self.arguments.get("seed") or 0
            assert isinstance(seed, int)  # by `read`
            return choose(self.importance, n, method=self.method, seed=seed)
        if not 1 <= n <= len(self.searched):
            raise ShortGPTError(
                f"n = {n}; {self.file} holds {len(self.searched)} layers that {self.method} chose"
            )
        return self.searched[:n]

    def record(self, **evidence: object) -> Provenance:
        """How the layers were chosen, and what else tells for them, to be kept with the result."""
        how = {"method": METHODS[self.method], "scored_by": self.arguments, **evidence}
        data = self.arguments.get("data")
        facts = {"data": data} if data else None
        return Provenance.of_scores(self.importance, evidence=how, facts=facts)


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
            raise ShortGPTError("expected either --layers 21,22,23 or --scores FILE --n N")
        if self.wanted is not None:
            check_method(self.wanted)
        if self.layers is not None and self.wanted is not None:
            raise ShortGPTError("--method chooses from --scores, not from --layers")
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
            raise ShortGPTError(f"--angular and --method {self.method} contradict each other")
        return "angular" if self.angular else self.method


@dataclass(frozen=True)
class Chosen:
    """Layers to remove, and what is kept of how they were chosen.

    Attributes:
        layers: original numbers, in order of removal.
        record: of the choice, which a cut completes.
        budget: what was tried, where the perplexity decided.
        importance: the scores of one pass that they were chosen by; None where they were not.
    """

    layers: list[int]
    record: Provenance
    budget: Budget | None = None
    importance: Importance | None = None


def chosen(model: str, choice: Choice) -> Chosen:
    """The layers of a choice.

    Raises:
        ShortGPTError: the choice contradicts itself, or the scores are of another model.
        FileNotFoundError: the scores or the model do not exist.
    """
    scores = _scores(model, choice)
    if scores is None:
        if choice.n is not None:
            raise ShortGPTError("--n chooses from --scores, not from --layers")
        return Chosen(choice.named or [], Provenance())
    if choice.n is None:
        raise ShortGPTError("with --scores, say how many layers to remove: --n N")
    return Chosen(scores.layers(choice.n), scores.record(), importance=scores.importance)


def chosen_within(
    model: str, choice: Choice, limit: PerplexityLimit, *, opening: Opening | None = None
) -> Chosen:
    """As many layers as the perplexity on held-out text allows, with the evidence.

    Raises:
        ShortGPTError: as `chosen`; not even one layer may go; or the text is not held out.
    """
    scores, ratio, data = _scores(model, choice), limit.max_perplexity_ratio, limit.eval_data
    if scores is None:
        raise ShortGPTError("--max_perplexity_ratio chooses from --scores, not from --layers")
    if ratio is None or data is None or choice.n is not None:
        raise ShortGPTError("--max_perplexity_ratio needs --eval_data, and no --n")
    if _same_texts(data, scores.arguments.get("data")):
        raise ShortGPTError(f"--eval_data {data} is what the scores were measured on")
    short = (opening or Opening()).whole(model, size=limit.size)
    cut = Cut(limit.size, limit.eval_windows)
    held = list(cut.windows(texts(data), short.encode))
    most = len(scores.searched) or None  # a search found no more
    budget = short.layers_within(held, ratio, choose=scores.layers, most=most)
    _check_some(budget, data, scores.layers(1))
    evidence = {"eval_data": data, **budget.to_dict()}
    record = scores.record(quality_gate=evidence)
    return Chosen(budget.layers, record, budget, scores.importance)


def _check_some(budget: Budget, data: str, first: list[int]) -> None:
    """Raises ShortGPTError where the limit leaves no layer to remove."""
    if not budget.layers:
        rise = budget.tried[1].value / budget.tried[0].value
        raise ShortGPTError(
            f"not even one layer may go: without {first} the perplexity on {data} rises by a "
            f"factor of {rise:.4f}, above {budget.ratio}"
        )


def _scores(model: str, choice: Choice) -> Scores | None:
    """The scores that a choice names, which are the model's; None where layers are named."""
    choice.check()
    if choice.scores is None:
        return None
    scores = Scores.read(choice.scores, choice.wanted)
    scores.check_model(model)
    return scores


def _same_texts(eval_data: str, data: object) -> bool:
    """Whether texts to evaluate on are, hold or are part of those that the scores come from."""
    if data is None or not (Path(eval_data).exists() and Path(str(data)).exists()):
        return eval_data == data
    ours, theirs = Path(eval_data).resolve(), Path(str(data)).resolve()
    return ours.is_relative_to(theirs) or theirs.is_relative_to(ours)


def layer_list(layers: object) -> list[int]:
    """Layer numbers as they are given: one number, or several.

    Raises:
        ShortGPTError: anything else.
    """
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, Sequence) or not all(type(i) is int for i in numbers):
        raise ShortGPTError(f"expected layer numbers as in --layers 21,22,23, got {layers!r}")
    return list(numbers)
