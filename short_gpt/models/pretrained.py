"""The part of transformers' models and tokenizers that this library calls, as types."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

Path = str | os.PathLike[str]
Self = TypeVar("Self", bound="PretrainedModel")


class PretrainedTokenizer(Protocol):
    """A tokenizer as ``AutoTokenizer.from_pretrained`` gives it."""

    def __call__(self, text: str, *, verbose: bool = ...) -> Mapping[str, list[int]]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def save_pretrained(self, directory: Path) -> object: ...


class PretrainedConfig(Protocol):
    """A model's config."""

    @property
    def name_or_path(self) -> str | None: ...


class PretrainedModel(Protocol):
    """A ``PreTrainedModel`` with a language-model head."""

    @property
    def config(self) -> PretrainedConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @classmethod
    def from_pretrained(cls: type[Self], source: Path, **options: object) -> Self: ...

    def save_pretrained(self, directory: Path) -> object: ...

    def generate(self, **options: object) -> Tensor:
        """(B, S) prompt tokens, ``input_ids``, to (B, S + new) tokens."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def eval(self: Self) -> Self: ...

    def to(self: Self, device: torch.device) -> Self: ...
