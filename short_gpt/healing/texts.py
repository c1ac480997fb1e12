"""The texts of healing: windows to learn from, held-out ones, and both as the Trainer reads them.

Shapes: B windows of a batch, S tokens of the longest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypedDict

import torch
from torch import Tensor

from short_gpt.data.disjoint import check_disjoint, without_overlap
from short_gpt.data.texts import OWN, evaluation_texts, read_kinds, source_names
from short_gpt.data.windows import mix
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.own_text import Write, split_own_text

IGNORED = -100  # a label that cross entropy passes over


def writes_nothing(chat: bool, count: int) -> list[list[int]]:
    raise ShortGPTError("self: expected what writes it, as in write=own_text_writer(short, size)")


@dataclass(frozen=True)
class Learning:
    """Windows of token ids that share no text with each other."""

    training: Sequence[Sequence[int]]  # to learn from
    validation: Sequence[Sequence[int]]  # to choose the training step by; none for a patch
    evaluation: Sequence[Sequence[int]]  # to evaluate on
    left_out: str | None = None  # in words, how many windows were dropped for shared text
    kinds: Sequence[str] = ()  # of each window of ``evaluation``: the name of its source


@dataclass(frozen=True)
class HealingTexts:
    """Texts to heal by."""

    # a local file or folder, pg19, a hub data set's name, self, or several with commas between: as
    # many windows of each where the number is limited, else all
    data: str
    # to evaluate on, one or several as in ``data``; None holds a tenth of ``data`` out
    eval_data: str | None = None
    split: str = "validation"  # of ``data``, see `data.read_texts`
    column: str | None = None  # of ``data``; None is text, else messages
    max_texts: int | None = None  # of ``data``
    seed: int = 0  # of the choice of texts and windows

    def windows(
        self,
        encode: Callable[[str], list[int]],
        size: int,
        *,
        bos: str = "first",
        limit: int | None = None,
        eval_windows: int = 32,
        drop_overlap: bool | None = None,
        validate: bool = False,
        write: Write = writes_nothing,
    ) -> Learning:
        """Windows to learn from and others to evaluate on, which share no text.

        Args:
            encode: from a text to token ids.
            size: tokens of a window.
            bos: which windows begin with it, as `data.windows` takes it; such as ``short.bos``.
            limit: windows to learn from at most; None takes all.
            eval_windows: windows to evaluate on at most.
            drop_overlap: drop training windows that share text with evaluation, instead of refusing
                them; None does so where ``eval_data`` is not given.
            validate: hold out up to 16 windows to choose the training step by.
            write: what writes the text of ``self``, as `own_text_writer(short, size)`.
        """
        cut = partial(mix, encode=encode, size=size, stride=size, seed=self.seed, bos=bos)
        kinds = read_kinds(self.data, self.split, self.column, self.max_texts)
        judges = evaluation_texts(self.eval_data, self.column)
        held = [[*kind] for kind in judges.values()]
        training_texts, held_out = split_own_text(kinds, held, write, limit, self.seed)
        cuts = list(cut(held_out, limit=eval_windows))
        evaluation: list[list[int]] = [*cuts]
        every = source_names(self.data)  # own text judges only where there is no other
        names = [*judges] or [name for name in every if name not in OWN] or every
        ends = [*accumulate(map(len, held_out))]  # of each kind, in texts
        of_windows = [names[bisect_right(ends, window.text)] for window in cuts]
        training: list[list[int]] = list(cut(training_texts, limit=limit))
        before = len(training)
        drop = self.eval_data is None if drop_overlap is None else drop_overlap
        training = _disjoint(training, evaluation, drop=drop)
        validation: list[list[int]] = []
        if validate:
            count = max(1, min(len(training) // 10, 16))
            if len(training) <= count:
                raise ShortGPTError(
                    "expected at least 2 windows, one to learn from and one to choose the training "
                    f"step by, got {len(training)}; give more text"
                )
            training, validation = training[:-count], training[-count:]
            training = _disjoint(training, validation, drop=True)
        gone = before - len(training) - len(validation)
        words = f"left out {gone} of {before} windows that share text with held-out ones"
        return Learning(training, validation, evaluation, words if gone else None, of_windows)


def _disjoint(training: list[list[int]], others: list[list[int]], *, drop: bool) -> list[list[int]]:
    if not drop:
        check_disjoint(training, others, setting="drop_overlap")
        return training
    kept, _ = without_overlap(training, others)
    if not kept:
        raise ShortGPTError(
            f"all {len(training)} windows to learn from share text with held-out ones: give "
            "other texts, or more"
        )
    return kept


class Example(TypedDict):
    """One window, as the Trainer takes it."""

    input_ids: list[int]
    index: int  # among all windows of the run


def examples(windows: Sequence[Sequence[int]], *, first: int = 0) -> list[Example]:
    return [Example(input_ids=[*w], index=i) for i, w in enumerate(windows, start=first)]


def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
    """Windows as one batch (B, S), padded on the right; padding is not a target."""
    longest = max(len(e["input_ids"]) for e in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, S)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(batch):
        ids = torch.tensor(example["input_ids"])
        tokens[row, : len(ids)] = labels[row, : len(ids)] = ids
    return {"input_ids": tokens, "labels": labels}
