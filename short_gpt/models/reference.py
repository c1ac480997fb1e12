"""The surface of Meta's reference package that this library calls, as types.

`llama.Llama` has it, and so has an instance of Meta's own ``Llama``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn


class ReferenceTokenizer(Protocol):
    """Texts to token ids and back; an id is -1 where the tokenizer has no such token."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ReferenceLlama(Protocol):
    """A Llama with its tokenizer."""

    @property
    def model(self) -> nn.Module:
        """Has ``layers``, ``params``, ``vocab_size``; a call is (B, S) tokens, start to logits."""

    @property
    def tokenizer(self) -> ReferenceTokenizer: ...

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = ...,
        top_p: float = ...,
        logprobs: bool = ...,
        echo: bool = ...,
    ) -> tuple[Sequence[Sequence[int]], object]:
        """Continuations of prompts, and their log probabilities if asked for."""

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = ...,
        top_p: float = ...,
        max_gen_len: int | None = ...,
    ) -> Sequence[Mapping[str, object]]:
        """Continuations of texts, each under "generation"."""
