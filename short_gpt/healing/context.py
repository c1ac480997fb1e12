"""What the steps of a healing share: windows that have no text in common, and the model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from short_gpt.data.disjoint import without_overlap
from short_gpt.data.texts import OWN, evaluation_texts, read_kinds, source_names
from short_gpt.data.windows import mix
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.own_text import Write, split_own_text
from short_gpt.wrappers.scored_model import ScoredModel

TokenWindows = Sequence[Sequence[int]]  # of token ids
VALIDATE = 16  # most windows to choose the training step by
# Heals the model; returns how, ready for JSON, and what undoes it.
Heal = Callable[[], tuple[dict[str, object], Callable[[], object]]]


@dataclass(frozen=True)
class HealingWindows:
    """Windows of token ids that share no text with each other."""

    training: TokenWindows  # to learn from
    validation: TokenWindows  # to choose the training step by; none for a patch
    evaluation: TokenWindows  # to evaluate on
    left_out: str | None = None  # in words, how many windows were dropped for shared text
    kinds: Sequence[str] = ()  # of each window of ``evaluation``: the name of its source


@dataclass(frozen=True)
class HealingContext:
    """What all steps of one healing share."""

    short: ScoredModel  # with all its layers while steps are prepared
    windows: HealingWindows
    layers: Sequence[int]  # to remove after the steps are prepared, original numbers
    folder: Path | None = None  # what steps keep, until the healing ends or to be continued
    lasting: bool = False  # the folder outlives the healing
    calibration: TokenWindows = ()  # training windows, from the first, that the closed form reads
    teacher: Callable[[], ScoredModel] | None = None  # opens it; None: the model with all layers
    progress: bool = True  # show bars


class Step(NamedTuple):
    """A way to heal. One that trains follows those that do not, which are closed forms."""

    settings: type  # a dataclass; its fields are what the step can be told
    # reads what the step needs of the model with all its layers; the settings None are the default
    prepare: Callable[[HealingContext, Any], Heal]
    trains: bool = False


def writes_nothing(chat: bool | None, count: int) -> list[list[int]]:
    raise ShortGPTError("self: expected what writes it, as in write=own_text_writer(short, size)")


def healing_windows(
    data: str,
    encode: Callable[[str], list[int]],
    size: int,
    *,
    eval_data: str | None = None,
    column: str | None = None,
    seed: int = 0,
    bos: str = "first",
    limit: int | None = None,
    eval_windows: int = 32,
    validate: bool = False,
    write: Write = writes_nothing,
) -> HealingWindows:
    """Windows to learn from and others to evaluate on; the former share no text with the latter.

    Args:
        data: Texts to learn from: a local file or folder, pg19, a hub data set's name, self, or
            several with commas between, which give as many windows each where there is a limit.
        encode: Makes token ids of a text.
        size: Tokens in a window.
        eval_data: Texts to evaluate on, as in ``data``. Default: a tenth of ``data`` is held out.
        column: Column of the texts, see `data.read_texts`. Default: "text", else "messages".
        seed: Seed of the choice of texts and windows. Default: 0.
        bos: Windows that begin with it, see `data.windows`; such as ``short.bos``.
        limit: Most windows to learn from. Default: all.
        eval_windows: Most windows to evaluate on. Default: 32.
        validate: Hold out up to 16 windows to choose the training step by. Default: no.
        write: Writes the text of ``self``, as `own_text_writer(short, size)`.
    """
    cut = partial(mix, encode=encode, size=size, stride=size, seed=seed, bos=bos)
    kinds, judges = read_kinds(data, column), evaluation_texts(eval_data, column)
    held = [[*kind] for kind in judges.values()]
    training_texts, held_out = split_own_text(kinds, held, write, limit, seed)
    cuts = list(cut(held_out, limit=eval_windows))
    evaluation: list[list[int]] = [*cuts]
    every = source_names(data)  # own text judges only where there is no other
    names = [*judges] or [name for name in every if name not in OWN] or every
    ends = [*accumulate(map(len, held_out))]  # of each kind, in texts
    of_windows = [names[bisect_right(ends, window.text)] for window in cuts]
    training: list[list[int]] = list(cut(training_texts, limit=limit))
    before = len(training)
    training = _apart(training, evaluation)
    validation: list[list[int]] = []
    if validate:
        count = max(1, min(len(training) // 10, VALIDATE))
        if len(training) <= count:
            raise ShortGPTError(
                "expected at least 2 windows, one to learn from and one to choose the training "
                f"step by, got {len(training)}; give more text"
            )
        training, validation = training[:-count], training[-count:]
        training = _apart(training, validation)
    gone = before - len(training) - len(validation)
    words = f"left out {gone} of {before} windows that share text with held-out ones"
    return HealingWindows(training, validation, evaluation, words if gone else None, of_windows)


def _apart(training: list[list[int]], others: list[list[int]]) -> list[list[int]]:
    """The training windows that share no text with others; ShortGPTError if there are none."""
    kept, _ = without_overlap(training, others)
    if not kept:
        raise ShortGPTError(
            f"all {len(training)} windows to learn from share text with held-out ones: give "
            "other texts, or more"
        )
    return kept
