"""Windows on their way through the layers of a streamed model.

Shapes: B windows of a batch, S tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from short_gpt.models.families import META
from short_gpt.scoring.hooks import LayerHooks


class Batch:
    """Windows on their way through the layers.

    Args:
        tokens: (B, S) int64.
        mask: (B, S) bool, True for real tokens.
        watched: whether the layers are scored.
        sublayers: whether their attention and MLP are, too.

    Attributes:
        state: in front of the next layer, (B, S, D) in the machine's memory.
        seen: what the layers so far did to the states, if watched.
    """

    def __init__(
        self, tokens: Tensor, mask: Tensor, *, watched: bool = False, sublayers: bool = False
    ) -> None:
        self.tokens, self.mask = tokens.cpu(), mask.cpu()
        self.sublayers = sublayers
        self.seen = LayerHooks(mask) if watched else None
        self.state = torch.empty(0)

    def embed(self, start: int, rows: Tensor) -> None:
        """Fills in the tokens whose rows of the embedding these are."""
        inside = (self.tokens >= start) & (self.tokens < start + len(rows))  # (B, S)
        self.state[inside] = rows[self.tokens[inside] - start].to(self.state.dtype)

    def through(self, layer: nn.Module, freqs_cis: Tensor) -> Tensor:
        """Runs the layer; returns the sum of all states behind it."""
        pinned = self.state.is_pinned()
        state = self.state.to(freqs_cis.device, non_blocking=pinned)
        hooks = self.seen.on_halves(layer, META) if self.seen and self.sublayers else []
        try:
            result = layer(state, None, freqs_cis[: state.shape[1]], None)
        finally:
            for hook in hooks:
                hook.remove()
        if self.seen is not None:
            self.seen.after(layer, (state,), {}, result)
        if state is self.state:
            self.state = result
        else:  # another device computes, and keeps nothing
            self.state.copy_(result, non_blocking=pinned)
            if self.seen is not None:
                self.seen.forget_state()
        return result.sum(dtype=torch.promote_types(result.dtype, torch.float32))
