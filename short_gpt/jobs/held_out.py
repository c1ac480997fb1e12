"""Whether a text to evaluate on is apart from the text that scores were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from short_gpt.data.disjoint import overlapping
from short_gpt.jobs.inputs import StridedCut, TextSource
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel


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
    cut = StridedCut(**{name: scored_by[name] for name in names}, bos=scored_by.get("bos"))
    return list(cut.windows(source.read(), short.encode, short.bos))
