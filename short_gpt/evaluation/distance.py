"""How far a model's predictions are from the original's, token by token.

The two measures are those of llama.cpp's ``--kl-divergence``: the mean of KL(original || model)
over tokens, in nats, and the share of tokens whose likeliest successor is the same. llama.cpp
counts the second half of every chunk; here every predicted token of a window counts.

The original's logits would take V numbers a token. What is kept is the hidden state that leaves its
last layer, D numbers: no method here changes the final norm and the output head, so that these make
the same logits of it again.

Shapes: B windows, S tokens, D width, V vocabulary, N predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from short_gpt.models.decoder import Decoder, padded
from short_gpt.models.layer_calls import PartialRun
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar


def kl_divergence(logits: Tensor, original: Tensor) -> Tensor:
    """KL(original || model) of every prediction over the whole vocabulary, in nats: (N,), >= 0.

    Both are logits (N, V). It is sum p (log p - log q), p the original's probabilities.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.], dtype=torch.float64)
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS lacks
    least = torch.finfo(logits.dtype).min  # else a token that both exclude would add a NaN
    own, other = (x.clamp_min(least) - x.amax(-1, keepdim=True) for x in (logits, original))
    total, totals = (x.exp().sum(-1, dtype=wide) for x in (own, other))  # (N,) each
    # sums over so many tokens in float32 would be 3e-6 too large
    mean = (other.exp() * (other - own)).sum(-1, dtype=wide) / totals  # (N,)
    return mean - totals.log() + total.log()


class Reference:
    """What the original model predicts after the tokens of some windows.

    Args:
        decoder: The original model, with all its layers. Layers may be removed from it later; its
            final norm and its output head must stay as they are.
        room: Bytes that `logits` may keep, so that the same windows need the head once. Default: 0.
    """

    def __init__(self, decoder: Decoder, room: int = 0) -> None:
        self._decoder, self._head, self.room = decoder, PartialRun(decoder), room
        self.vocab_size = decoder.vocab_size
        self._states: dict[tuple[int, ...], Tensor] = {}  # of each window, (S, D)
        self._logits: dict[tuple[object, ...], Tensor] = {}  # of some batches, (B, S, V)
        self._awaited: set[tuple[int, ...]] = set()

    def read(self, windows: Iterable[Sequence[int]], *, progress: bool = False) -> None:
        """Reads windows with the original model; those that it knows are not read again."""
        new = [one for one in {tuple(window): window for window in windows}.values()]
        new = [window for window in new if tuple(window) not in self._states]
        every = [*range(len(self._decoder.layers))]
        with bar("original", total=len(new), unit="window", show=progress) as shown:
            for window in new:
                for _, tokens, _ in padded([window], self._decoder):  # (1, S)
                    (state,) = self._head.advance(tokens, every, None)  # (S, D)
                    self._states[tuple(window)] = state.cpu()
                shown.update()

    def expect(self, windows: Iterable[Sequence[int]]) -> None:
        """Leaves the reading of windows to the first `perplexity`, which must be the original's."""
        self._awaited |= {*map(tuple, windows)} - self._states.keys()

    def awaits(self, windows: Sequence[Sequence[int]]) -> bool:
        """Whether one of the windows is expected and was not read yet."""
        return not self._awaited.isdisjoint(map(tuple, windows))

    def predict(self, windows: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
        """The original's logits (B, S, V) for windows padded to tokens (B, S), read with it now."""
        every, leaving = [*range(len(self._decoder.layers))], list[Tensor]()
        logits = self._head.logits(tokens, every, None, leaving)
        for window, state in zip(windows, leaving[-1], strict=True):  # (S, D)
            self._states[tuple(window)] = state[: len(window)].cpu()
        self._awaited -= self._states.keys()
        return logits

    def logits(self, windows: Sequence[Sequence[int]], length: int) -> Tensor:
        """The original's logits (B, S, V) after all tokens of windows that were read.

        S is ``length``; what stands after a window's last token means nothing.
        """
        key = (self._decoder.mixed, length, *map(tuple, windows))
        if key in self._logits:
            return self._logits[key].float()
        states = [self._states[tuple(window)] for window in windows]
        batch = torch.zeros(len(states), length, states[0].shape[-1], dtype=states[0].dtype)
        for row, state in enumerate(states):
            batch[row, : len(state)] = state
        tokens = torch.zeros(batch.shape[:2], dtype=torch.long)  # (B, S), which no layer reads
        device = self._decoder.device
        logits = self._head.logits(tokens.to(device), [], batch.to(device))
        if self.room:
            half = logits.bfloat16()  # holds all digits of a product in bfloat16
            kept = half if torch.equal(half.float(), logits) else logits
            if kept.nbytes <= self.room:
                self.room -= kept.nbytes
                self._logits[key] = kept
        return logits

    def through(self, decoder: Decoder) -> Reference:
        """The same by another model, whose final norm and output head are the original's."""
        other = Reference(decoder)
        other._states = self._states
        return other

    def keep_head(self) -> None:
        """Drops all layers except one of a model that is not needed otherwise."""
        with suppress(ShortGPTError):  # of a model whose layers cannot be removed
            self._decoder.keep_layers([0])
