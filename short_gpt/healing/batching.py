"""Windows as the Trainer of transformers reads them.

Shapes: B windows of a batch, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

IGNORED = -100  # a label that cross entropy passes over


class Example(TypedDict):
    """One window: its token ids, and its place among all windows of the run."""

    input_ids: list[int]
    place: int


def examples(windows: Sequence[Sequence[int]], *, first: int = 0) -> list[Example]:
    """Windows whose places are counted from ``first``."""
    return [Example(input_ids=[*w], place=i) for i, w in enumerate(windows, start=first)]


def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
    """Windows as one batch (B, S), padded on the right; padding is no target."""
    longest = max(len(e["input_ids"]) for e in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, S)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(batch):
        ids = torch.tensor(example["input_ids"])
        tokens[row, : len(ids)] = labels[row, : len(ids)] = ids
    return {"input_ids": tokens, "labels": labels}
