"""A decoder's layers run in part: from a stored state, or without some.

Shapes: B windows, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from short_gpt.evaluation.perplexity import batch_nats
from short_gpt.models.decoder import Decoder
from short_gpt.models.layer_hooks import (
    Arguments,
    Call,
    first,
    output_form,
    patched_forward,
    state_in,
)


class PartialRun:
    """A decoder's layers, run from a stored hidden state or only in part.

    Layers that are not to run return the state that enters them. None is taken out of the model, so
    that positions, masks and settings of the other layers stay theirs.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        state, self._form = output_form(decoder)
        self.bytes_per_token = state.numel() * state.element_size()

    def advance(self, tokens: Tensor, run: Sequence[int], state: Tensor | None) -> Tensor:
        """The hidden state (B, S, D) leaving the layers ``run``, from the one that enters them.

        Args:
            tokens: (B, S).
            run: positions, ascending; none gives ``state`` back.
            state: entering the first of them; None starts from the embeddings.
        """
        if not run and state is not None:
            return state
        leaving: list[Tensor] = []
        with self._only(run, state, leaving):
            self._decoder.run(tokens)
        return leaving[-1]

    def nats(self, tokens: Tensor, mask: Tensor, run: Sequence[int], state: Tensor | None) -> float:
        """Summed loss of the predicted tokens, with the layers ``run`` alone after ``state``."""
        with self._only(run, state, None):
            return batch_nats(self._decoder, tokens, mask)

    @contextmanager
    def _only(
        self, run: Sequence[int], state: Tensor | None, leaving: list[Tensor] | None
    ) -> Iterator[None]:
        """The model with the layers ``run`` alone; ``leaving`` gets the state that leaves them."""
        layers = self._decoder.layers
        # if none runs, the last returns what the head reads
        start = min(run, default=len(layers) - 1)
        with ExitStack() as stack:
            for i, layer in enumerate(layers):
                if i not in run:
                    forward = self._passing(state if i == start else None)
                    stack.enter_context(patched_forward(layer, forward))
            if state is not None and run:
                enter = layers[start].register_forward_pre_hook(
                    _entered_by(state), with_kwargs=True
                )
                stack.callback(enter.remove)
            if leaving is not None:
                keep = layers[max(run, default=0)].register_forward_hook(
                    lambda module, args, output: leaving.append(first(output))
                )
                stack.callback(keep.remove)
            yield

    def _passing(self, state: Tensor | None) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            return self._form(state_in(args, kwargs) if state is None else state)

        return forward


def _entered_by(state: Tensor) -> Callable[..., Call]:
    def hook(module: nn.Module, args: Arguments, kwargs: dict[str, object]) -> Call:
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    return hook
