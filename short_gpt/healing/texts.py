"""The texts of healing: windows to learn from, and others that are kept apart from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from short_gpt.data.disjoint import SPAN, check_disjoint, hold_out, overlapping
from short_gpt.data.texts import read_texts, texts
from short_gpt.data.windows import windows
from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class Learning:
    """Windows of token ids."""

    training: list[list[int]]
    validation: list[list[int]]  # of lora
    evaluation: list[list[int]]
    left_out: str | None = None  # what was left out of training, in words


@dataclass(frozen=True)
class Source:
    """Where the texts come from."""

    data: str
    eval_data: str | None
    split: str
    column: str
    max_texts: int | None
    seed: int

    def windows(
        self,
        short: Any,
        size: int,
        limit: int | None,
        eval_windows: int,
        drop_overlap: bool | None,
        *,
        lora: bool,
    ) -> Learning:
        """Windows to learn from and others to evaluate on, which share no text."""
        training = list(read_texts(self.data, self.split, self.column, self.max_texts))
        if self.eval_data is None:
            training, held = hold_out(training, seed=self.seed)
        else:
            held = list(texts(self.eval_data, column=self.column))

        def cut(found: list[str], count: int | None) -> list[list[int]]:
            options = {"size": size, "stride": size, "seed": self.seed, "limit": count}
            return list(windows(found, short.encode, **options))  # type: ignore[arg-type]

        evaluation = cut(held, eval_windows)
        chosen = cut(training, limit)
        drop = self.eval_data is None if drop_overlap is None else drop_overlap
        notes: list[str] = []
        chosen = _apart(chosen, evaluation, min(SPAN, size), notes, drop=drop)
        if not lora:
            return Learning(chosen, [], evaluation, "\n".join(notes) or None)
        count = max(1, min(len(chosen) // 10, 16))
        validation = chosen[-count:]
        chosen = _apart(chosen[:-count], validation, min(SPAN, size), notes, drop=True)
        return Learning(chosen, validation, evaluation, "\n".join(notes) or None)


def _apart(
    training: list[list[int]],
    others: list[list[int]],
    span: int,
    notes: list[str],
    *,
    drop: bool,
) -> list[list[int]]:
    """The windows that share no text with the others."""
    if not drop:
        check_disjoint(training, others, span=span)
        return training
    shared = overlapping(training, others, span=span)
    kept = [w for i, w in enumerate(training) if i not in shared]
    if not kept:
        raise ShortGPTError(
            f"all {len(training)} windows to learn from share text with those kept apart from "
            "them: give other texts, or more"
        )
    if shared:
        count = f"{len(shared)} of {len(training)} windows"
        notes.append(f"left out {count}: text kept apart from learning")
    return kept
