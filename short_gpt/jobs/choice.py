"""Which layers a job removes: named, chosen by saved scores, or as many as quality allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from short_gpt.checkpoints.provenance import Provenance
from short_gpt.data.disjoint import overlapping
from short_gpt.data.texts import texts
from short_gpt.data.windows import at_least
from short_gpt.jobs.choice_settings import Choice, PerplexityLimit
from short_gpt.jobs.inputs import Cut, TextSource
from short_gpt.jobs.scores import Scores
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.selection.perplexity_budget import Budget
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_model import ShortModel


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
    model: str, choice: Choice, limit: PerplexityLimit, *, opening: OpenOptions | None = None
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
    short = open_model(model, opening or OpenOptions(), max_seq_len=limit.size)
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
    scores, ratio, data = _scores(choice), limit.max_perplexity_ratio, limit.eval_data
    if scores is None:
        raise ShortGPTError("`max_perplexity_ratio` chooses from `scores`, not from `layers`")
    if ratio is None or data is None or choice.n is not None:
        raise ShortGPTError("`max_perplexity_ratio` needs `eval_data`, and no `n`")
    return scores, ratio, data


def _lines(*remarks: str | None) -> str | None:
    return "\n".join(remark for remark in remarks if remark) or None


def _check_some(budget: Budget, data: str, first: list[int]) -> None:
    if not budget.layers:
        rise = budget.tried[1].value / budget.tried[0].value
        raise ShortGPTError(
            f"not even one layer may go: without {first} the perplexity on {data} rises by a "
            f"factor of {rise:.4f}, {budget.verdict(1)}; more `eval_windows` or texts tell more"
        )


def _scores(choice: Choice) -> Scores | None:
    choice.check()
    return None if choice.scores is None else Scores.read(choice.scores, choice.by)


def check_names(eval_data: str, scored_by: Mapping[str, object]) -> None:
    """Raises ShortGPTError where the two texts are one, or part of each other, by their names.

    Args:
        eval_data: names the text to evaluate on.
        scored_by: arguments that `rank` was given.
    """
    data = scored_by.get("data")
    same = eval_data == data
    if data is not None and Path(eval_data).exists() and Path(str(data)).exists():
        ours, theirs = Path(eval_data).resolve(), Path(str(data)).resolve()
        same = ours.is_relative_to(theirs) or theirs.is_relative_to(ours)
    if same:
        raise ShortGPTError(f"`eval_data` {eval_data} is what the scores were measured on")


def check_apart(
    held: Sequence[Sequence[int]], eval_data: str, scored_by: Mapping[str, Any], short: ShortModel
) -> str | None:
    """Compares the text itself, whatever its files are called.

    The text of the scores is read again, and cut as it was then.

    Args:
        held: windows of token ids to evaluate on.
        eval_data, scored_by: as in `check_names`.
        short: the model.

    Returns:
        None, or in a sentence why the texts could not be compared.

    Raises:
        ShortGPTError: they have text in common, by the rule of `overlapping`.
    """
    try:
        scored = _windows(scored_by, short)
    except (OSError, KeyError, ShortGPTError) as error:
        return f"not compared with the text that the scores were measured on: {error}"
    if shared := overlapping(held, scored):
        raise ShortGPTError(
            f"`eval_data` {eval_data} holds text that the scores were measured on, "
            f"{scored_by['data']}: {len(shared)} of its {len(held)} windows share a run of tokens "
            "with that; give another text"
        )
    return None


def _windows(scored_by: Mapping[str, Any], short: ShortModel) -> list[list[int]]:
    """The windows that scores were measured on, or of which they were the first."""
    source = TextSource(*(scored_by[name] for name in ("data", "split", "column", "max_texts")))
    names = ("size", "max_windows", "seed", "stride")
    cut = Cut(**{name: scored_by[name] for name in names}, bos=scored_by.get("bos"))
    return list(cut.windows(source.read(), short.encode, short.bos))
