"""A decoder's layers called one at a time, each as the decoder calls it.

Shapes: B windows of one length, S tokens, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder
from short_gpt.models.families import only_part
from short_gpt.models.layer_hooks import Arguments, Call, first, state_in, transposed
from short_gpt.runtime.errors import ShortGPTError


class LayerCalls:
    """What a decoder hands to its layers beside the state; with it others can call them.

    What it hands over (positions, rotary factors, masks) may depend on the shape of the tokens,
    not on the tokens themselves, which is proved once.

    Args:
        decoder: in evaluation mode.

    Attributes:
        family: of the decoder.
        count: of its layers.

    Raises:
        ShortGPTError: layers are given something that depends on the tokens.

    Example:
        >>> calls = LayerCalls(decoder)  # doctest: +SKIP
        >>> state = calls.run(0, calls.embed(tokens))  # doctest: +SKIP
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.family, self.count = decoder.family, len(decoder.layers)
        self._calls: dict[torch.Size, list[Call]] = {}  # by (B, S), one for each layer
        self._check_independent()

    @contextmanager
    def loaded(self, place: int) -> Iterator[nn.Module]:
        """A layer with its weights inside the block, where it can be called."""
        yield self._decoder.layers[place]

    def keep_only(self, place: int, modules: Sequence[nn.Module]) -> None:
        """Lets go of the weights that a loaded layer has beside these modules."""

    def close(self) -> None:
        """Lets go of weights that were read for `loaded`."""

    def memory(self) -> dict[str, int]:
        """Bytes that the weights of a layer take where they come and go, by what they are for."""
        return {}

    def widths(self) -> tuple[int, int, int]:
        """D, the most inputs of a matrix at the end of a half, and bytes of a number of a state.

        Without such a matrix both are 1.
        """
        names = (self.family.attention_output, self.family.mlp_output)
        shapes, size = [(1, 1)], 1
        for place in range(self.count):
            for found in (only_part(self.layer(place), name) for name in names):
                weight = getattr(found, "weight", None)
                if found is not None and isinstance(weight, Tensor) and weight.dim() == 2:
                    ends = (weight.shape[0], weight.shape[1])
                    shapes.append(ends[::-1] if transposed(found) else ends)  # (D, F)
                    size = weight.dtype.itemsize
        return max(d for d, _ in shapes), max(f for _, f in shapes), size

    def embed_all(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """What `embed` gives of tokens (B, S), one batch after the other."""
        for tokens in batches:
            yield self.embed(tokens.to(self._decoder.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """The state (B, S, D) entering the first layer, of tokens (B, S)."""
        states: list[Tensor] = []  # a list, as the hook cannot return what it sees

        def stop(_: nn.Module, args: Arguments, kwargs: dict[str, object]) -> NoReturn:
            states.append(state_in(args, kwargs).clone())
            raise _Enough

        self._stopped(self._decoder.layers[0], stop, lambda: self._decoder.run(tokens))
        return states[0]

    @torch.no_grad()
    def run(self, place: int, state: Tensor) -> Tensor:
        """The state leaving a layer, (B, S, D), from the one that enters it, which is not changed.

        Args:
            place: of the layer in the decoder.
            state: (B, S, D).
        """
        args, kwargs = self.call(place, state.clone())  # a layer may write over it
        return first(self.layer(place)(*args, **kwargs))

    @torch.no_grad()
    def until(self, place: int, state: Tensor, module: nn.Module) -> Tensor:
        """What a layer hands to a module inside it, (B, S, ...); it goes no further."""
        inputs: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> NoReturn:
            inputs.append(args[0].clone())
            raise _Enough

        self.call(place, state)  # seen first, because the hook would end that pass, too
        self._stopped(module, stop, lambda: self.run(place, state), kwargs=False)
        return inputs[0]

    def layer(self, place: int) -> nn.Module:
        """The layer at a place."""
        return self._decoder.layers[place]

    def call(self, place: int, state: Tensor) -> Call:
        """The arguments of a layer's call, with this state (B, S, D)."""
        args, kwargs = self._of_shape(state.shape[:2])[place]
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def _of_shape(self, shape: torch.Size) -> list[Call]:
        """The calls of all layers for tokens of a shape, their states left out."""
        if shape not in self._calls:  # what the tokens are does not matter: `_check_independent`
            self._calls[shape] = self._seen(torch.zeros(shape, dtype=torch.long))
        return self._calls[shape]

    @torch.no_grad()
    def _seen(self, tokens: Tensor) -> list[Call]:
        found: list[Call] = []

        def note(_: nn.Module, args: Arguments, kwargs: dict[str, object]) -> None:
            named = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            found.append(((None, *args[1:]) if args else (), named))

        with ExitStack() as stack:
            for layer in self._decoder.layers:
                hook = layer.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            self._decoder.run(tokens.to(self._decoder.device))
        return found

    def _check_independent(self) -> None:
        """Raises ShortGPTError where two texts make for other arguments beside the states."""
        tokens = torch.arange(8).remainder(self._decoder.vocab_size)[None]  # (1, 8)
        for ours, theirs in zip(self._seen(tokens), self._seen(tokens.flip(1)), strict=True):
            if not _equal(ours, theirs):
                raise ShortGPTError(
                    f"the layers of {type(self._decoder.module).__name__} take more than the state "
                    "in front of them: they cannot be run one at a time"
                )

    @torch.no_grad()
    def _stopped(
        self,
        module: nn.Module,
        hook: Callable[..., NoReturn],
        run: Callable[[], object],
        *,
        kwargs: bool = True,
    ) -> None:
        """Runs until a module is called, where ``hook`` ends it."""
        handle = module.register_forward_pre_hook(hook, with_kwargs=kwargs)
        try:
            run()
        except _Enough:
            pass
        finally:
            handle.remove()


class _Enough(Exception):
    """Ends a pass from within, where all that was wanted is known."""


def _equal(ours: object, theirs: object) -> bool:
    """Whether two arguments are the same, tensors by their values."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)
    return type(ours) is type(theirs)
