"""The state between a layer's attention and its MLP, and the products that score both halves.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from short_gpt.models.families import Family, part
from short_gpt.models.layer_hooks import Output, first
from short_gpt.scoring.metrics import norms, widen

PROVED = 8  # tokens of each window on which the halves are seen to add up to the layer


class Middle:
    """The state between the two halves of a layer, while the layer runs.

    What a half adds is copied, since the layer may go on writing in that tensor.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None  # (B, S, D) in front of the MLP's norm
        self.attention: Tensor | None = None  # (B, PROVED, D) that the attention adds
        self.mlp: Tensor | None = None  # (B, PROVED, D) that the MLP adds

    def hooks(self, layer: nn.Module, family: Family) -> list[RemovableHandle]:
        """Hooks on the halves of a layer; none if it has no such parts."""
        attention, mlp = part(layer, family.attention), part(layer, family.mlp)
        norm = part(layer, family.mlp_norm)
        if attention is None or mlp is None or norm is None:
            return []

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.state = args[0]

        def attended(module: nn.Module, args: object, output: Output) -> None:
            self.attention = first(output)[:, :PROVED].clone()

        def mapped(module: nn.Module, args: object, output: Output) -> None:
            self.mlp = first(output)[:, :PROVED].clone()

        hooks = [attention.register_forward_hook(attended), mlp.register_forward_hook(mapped)]
        return [norm.register_forward_pre_hook(enter), *hooks]

    def products(self, state: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State . middle, norm of the middle, middle . y, (B, S) each; NaN where unknown.

        Args:
            state: (B, S, D) in front of the layer.
            y: (B, S, D) behind it, float32 or wider.
        """
        middle = self._proved(state, y)
        if middle is None:
            unknown = torch.full(y.shape[:2], math.nan, dtype=y.dtype, device=y.device)
            return unknown, unknown, unknown
        m = widen(middle)
        return torch.linalg.vecdot(widen(state), m), norms(m), torch.linalg.vecdot(m, y)

    def _proved(self, state: Tensor, y: Tensor) -> Tensor | None:
        """The state between the halves, if they add up to the layer on the first tokens."""
        middle, attention, mlp = self.state, self.attention, self.mlp
        self.state = self.attention = self.mlp = None
        if middle is None or attention is None or mlp is None or middle.shape != state.shape:
            return None
        x, m = state[:, :PROVED], middle[:, :PROVED]
        if attention.shape != x.shape or mlp.shape != x.shape:  # experts may flatten the windows
            return None
        whole = torch.equal(x + attention, m) and torch.equal(widen(m + mlp), y[:, :PROVED])
        return middle if whole else None
