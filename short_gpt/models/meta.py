"""Meta's Llama, ours or the reference package's: what is called of it, and seen as a `Decoder`.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from short_gpt.models.families import META, Family


class ReferenceTokenizer(Protocol):
    """Texts to token ids and back; an id is -1 where the tokenizer has no such token."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class ReferenceLlama(Protocol):
    """What `llama.Llama` and Meta's own ``Llama`` share: a model with its tokenizer."""

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


class MetaDecoder:
    """A `Decoder` over ``llama.Transformer``, or over the model of Meta's reference package."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def module(self) -> nn.Module:
        return self.model

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.model.params.max_seq_len

    @property
    def rotary_limits(self) -> Sequence[int]:
        return ()

    @property
    def family(self) -> Family:
        return META

    @torch.no_grad()
    def run(self, tokens: Tensor) -> None:
        # ours has a way around the output head, the reference's model has none
        if hasattr(self.model, "hidden"):
            self.model.hidden(tokens)
        else:
            self.model(tokens, 0)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        # ours takes tokens alone, the reference's a start, too
        ours = hasattr(self.model, "hidden")
        return self.model(tokens) if ours else self.model(tokens, 0).float()  # (B, S, V)

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        before = self.layers

        def put(layers: nn.ModuleList) -> None:
            self.model.layers = layers
            # in both places where the model counts them
            self.model.n_layers = self.model.params.n_layers = len(layers)
            for i, layer in enumerate(layers):
                layer.layer_id = i  # type: ignore[assignment]

        try:
            put(nn.ModuleList(before[i] for i in keep))
        except BaseException:
            put(before)
            raise
        return lambda: put(before)
