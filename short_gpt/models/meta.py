"""Meta's Llama, ours or the reference package's, seen as a `Decoder`; B, S and V as there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import mixed_precision
from short_gpt.models.families import META


class MetaDecoder:
    """A `Decoder` over ``llama.Transformer``, or over the model of Meta's reference package."""

    family = META
    rotary_limits: Sequence[int] = ()
    mixed = False

    def __init__(self, model: Any) -> None:
        self.model = self.module = model

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

    @torch.no_grad()
    def run(self, tokens: Tensor) -> None:
        # ours has a way around the output head, the reference's model has none
        with mixed_precision(self.mixed, self.device):
            if hasattr(self.model, "hidden"):
                self.model.hidden(tokens)
            else:
                self.model(tokens, 0)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        # ours takes tokens alone, the reference's a start, too
        ours = hasattr(self.model, "hidden")
        with mixed_precision(self.mixed, self.device):
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
