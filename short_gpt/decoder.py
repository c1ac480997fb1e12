"""The little that the method needs to know of a model, and Meta's Llama seen that way.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Decoder(Protocol):
    """A stack of layers over token ids.

    Scoring reads the states from hooks on ``layers``, surgery goes through `keep_layers`; a new
    family needs nothing else.

    Example:
        >>> decoder = MetaDecoder(llama.model)  # doctest: +SKIP
        >>> undo = decoder.keep_layers([0, 1, 3])  # doctest: +SKIP
    """

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...

    def run(self, tokens: Tensor) -> None:
        """Reads (B, S) tokens through embeddings and layers; nothing is kept."""

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S) tokens to (B, S, V) float32 logits."""

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        """Leaves only these layers (ascending positions), everywhere the model counts them.

        Returns:
            A function that restores the model as it was.
        """


class MetaDecoder:
    """A `Decoder` over ``llama.Transformer``, or over the model of Meta's reference package."""

    def __init__(self, model: Any) -> None:
        self.model = model

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
        # The reference's model has no way around its output head.
        read = getattr(self.model, "hidden", None)
        if read is not None:
            read(tokens)
        else:
            self.model(tokens, 0)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        own = hasattr(self.model, "hidden")
        return self.model(tokens) if own else self.model(tokens, 0).float()

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        before = self.layers

        def put(layers: nn.ModuleList) -> None:
            self.model.layers = layers
            self.model.n_layers = self.model.params.n_layers = len(layers)
            for i, layer in enumerate(layers):
                layer.layer_id = i  # type: ignore[assignment]

        put(nn.ModuleList(before[i] for i in keep))
        return lambda: put(before)


def pad(windows: Sequence[Sequence[int]], decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Windows of any lengths as one batch, padded on the right with token 0.

    Under a causal mask no real token sees the padding; the mask only weights the sums.

    Args:
        windows: B lists of token ids.
        decoder: gives the device and the limits.

    Returns:
        tokens (B, S) int64 and mask (B, S) bool, True for real tokens, S the longest window.

    Raises:
        ValueError: no windows, an empty or too long one, or ids outside the vocabulary.
    """
    if not windows:
        raise ValueError("expected at least one window of tokens, got none")
    if isinstance(windows[0], int):
        raise ValueError("expected a list of windows, each a list of token ids, got one: pass [it]")
    lengths = [len(w) for w in windows]
    if min(lengths) < 1 or max(lengths) > decoder.max_seq_len:
        raise ValueError(
            f"windows have {min(lengths)} to {max(lengths)} tokens; this model takes 1 to "
            f"{decoder.max_seq_len} (max_seq_len)"
        )
    tokens = torch.zeros(len(windows), max(lengths), dtype=torch.long)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = torch.as_tensor(window)
    if tokens.min() < 0 or tokens.max() >= decoder.vocab_size:
        raise ValueError(
            f"token ids {int(tokens.min())}..{int(tokens.max())} are outside the vocabulary "
            f"0..{decoder.vocab_size - 1}; is this the model's tokenizer?"
        )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tokens.to(decoder.device), mask.to(decoder.device)
