"""A layer run again behind an attention whose matrix was solved, which need not be computed anew.

Shapes: B windows, S tokens, D width of the stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from short_gpt.models.families import Family, part
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.layer_hooks import Output, first, patched_forward
from short_gpt.models.summands import Summand


class KnownAttention:
    """Has a layer take what its attention's last matrix makes of inputs that are known.

    Args:
        calls: of the decoder.
        place: of the layer.
        end: of its attention.
        family: of the decoder.
        state: (B, S, D), such as the layer meets.

    Attributes:
        attention: the module, of which the last matrix alone is used so.
        proved: whether the layer gives the same bits so, on ``state``; else it has to run whole.
    """

    def __init__(
        self, calls: LayerCalls, place: int, end: Summand, family: Family, state: Tensor
    ) -> None:
        self._matrix = end.matrix
        self.attention = found = part(calls.layer(place), family.attention)
        self.proved = False
        if found is None:
            return
        given: list[Output] = []
        handle = found.register_forward_hook(lambda _, __, output: given.append(output))
        try:
            expected = calls.run(place, state)
        finally:
            handle.remove()
        self._rest = None if isinstance(given[0], Tensor) else len(given[0]) - 1
        with self.takes(calls.until(place, state, end.matrix).view(*state.shape[:2], -1)):
            self.proved = torch.equal(calls.run(place, state), expected)

    @contextmanager
    def takes(self, inputs: Tensor) -> Iterator[None]:
        """The layer's attention gives what its matrix makes of (B, S, F), inside the block."""

        def forward(*_: object, **__: object) -> object:
            out = first(self._matrix(inputs))
            # beside it, such as attention weights, which nobody asked for
            return out if self._rest is None else (out, *[None] * self._rest)

        assert self.attention is not None
        with patched_forward(self.attention, forward):
            yield
