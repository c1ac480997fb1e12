"""The texts of healing: windows to learn from, and others that are kept apart from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from short_gpt.cli.shared import say
from short_gpt.data.disjoint import check_disjoint, hold_out, without_overlap
from short_gpt.data.texts import read_texts, texts
from short_gpt.data.windows import windows
from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class Learning:
    """Windows of token ids."""

    training: list[list[int]]
    validation: list[list[int]]  # of lora
    evaluation: list[list[int]]


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
        chosen = _apart(chosen, evaluation, drop=drop)
        if not lora:
            return Learning(chosen, [], evaluation)
        count = max(1, min(len(chosen) // 10, 16))
        validation = chosen[-count:]
        chosen = _apart(chosen[:-count], validation, drop=True)
        return Learning(chosen, validation, evaluation)


def _apart(training: list[list[int]], others: list[list[int]], *, drop: bool) -> list[list[int]]:
    """The windows that share no text with the others."""
    if not drop:
        check_disjoint(training, others)
        return training
    kept, gone = without_overlap(training, others)
    if not kept:
        raise ShortGPTError(
            f"all {len(training)} windows to learn from share text with those kept apart from "
            "them: give other texts, or more"
        )
    if gone:
        say(f"left out {gone} of {len(training)} windows: text kept apart from learning")
    return kept
