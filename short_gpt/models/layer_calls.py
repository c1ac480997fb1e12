"""A decoder's layers one at a time: their output projections, hooks on them, and calls of them.

Shapes: B windows of one length, S tokens, D width of the stream, F inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder, evaluating, mixed_precision
from short_gpt.models.families import ANY, Family, Names, only_part
from short_gpt.runtime.errors import ShortGPTError

# What a layer returns: its state (B, S, D), by itself or before others in a tuple.
Output = Tensor | tuple[Tensor, ...] | list[Tensor]
Arguments = tuple[Any, ...]
Call = tuple[Arguments, dict[str, object]]  # what a layer was called with, by position and by name
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mlp_output(layer: nn.Module, family: Family = ANY) -> nn.Module:
    """The output projection of a layer's MLP; ShortGPTError unless a plain matrix in memory."""
    return _plain_matrix(layer, family.mlp_output, "MLP")


def attention_output(layer: nn.Module, family: Family = ANY) -> nn.Module:
    """The output projection of a layer's attention; arguments and errors as in `mlp_output`."""
    return _plain_matrix(layer, family.attention_output, "attention")


def _plain_matrix(layer: nn.Module, names: Names, sublayer: str) -> nn.Module:
    linear = only_part(layer, names)
    weight = getattr(linear, "weight", None)
    # a streamed model has weights only while their layer runs
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ShortGPTError("the weights are not in memory: open the model without stream")
    # experts have many; an adapter has it inside, a quantized one another dtype or shape
    plain = isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in FLOATS
    if linear is None or any(True for _ in linear.children()) or not plain:
        dtype = getattr(weight, "dtype", "no weight")
        other = "" if linear is None else f", but {type(linear).__name__} of {dtype}"
        raise ShortGPTError(
            f"{type(layer).__name__} has no plain matrix at the end of its {sublayer}{other}: load "
            "the model unquantized and without adapters; experts are not supported"
        )
    return linear


def transposed(linear: nn.Module) -> bool:
    """Whether its weight is (F, D), as in GPT-2's Conv1D, and not (D, F)."""
    return type(linear).__name__ == "Conv1D"


def first(output: Output) -> Tensor:
    """The state (B, S, D) in what a layer returns."""
    return output[0] if isinstance(output, tuple | list) else output


def state_in(args: Arguments, kwargs: Mapping[str, Any]) -> Tensor:
    """The state (B, S, D) that a layer is called with: by position, in some families by name."""
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def replaced_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A module whose output goes through ``change`` inside the block; a tuple's first entry."""

    def hook(_: nn.Module, __: object, output: Output) -> Output:
        # what a hook returns takes the output's place
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    with module.register_forward_hook(hook):
        yield


def output_form(decoder: Decoder) -> tuple[Tensor, Callable[[Tensor], object]]:
    """What the decoder's layers return, known from running one token.

    A state (1, 1, D) as the first layer gives it, and a function that puts a state into the form
    that the model takes: itself, or a tuple in some families and versions.
    """
    seen: list[Output] = []
    with decoder.layers[0].register_forward_hook(lambda _, __, output: seen.append(output)):
        decoder.run(torch.zeros(1, 1, dtype=torch.long, device=decoder.device))
    state = first(seen[0])  # (1, 1, D)
    if state is seen[0]:
        return state, lambda state: state
    rest = (None,) * (len(seen[0]) - 1)  # such as attention weights, which nobody asked for
    return state, lambda state: (state, *rest)


@contextmanager
def patched_forward(layer: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """A layer that does something else inside a ``with`` block."""
    # of the instance, such as one patched before; else the class has it
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


class PartialRun:
    """A decoder's layers, run from a stored hidden state or only in part.

    Layers that must not run return the state that enters them. None leaves the model, and so the
    others keep their positions, masks and settings.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        state, self._form = output_form(decoder)
        self.bytes_per_token = state.numel() * state.element_size()

    def advance(self, tokens: Tensor, run: Sequence[int], state: Tensor | None) -> Tensor:
        """The hidden state (B, S, D) leaving the layers ``run``, from the one that enters them.

        Args:
            tokens: (B, S).
            run: positions, ascending; none returns ``state``.
            state: entering the first of them; None starts from the embeddings.
        """
        if not run and state is not None:
            return state
        leaving: list[Tensor] = []
        with self._only(run, state, leaving):
            self._decoder.run(tokens)
        return leaving[-1]

    def logits(
        self,
        tokens: Tensor,
        run: Sequence[int],
        state: Tensor | None,
        leaving: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, S, V) with only the layers ``run`` after ``state``; the rest as `advance`.

        ``leaving`` gets the state that leaves these layers.
        """
        with self._only(run, state, leaving):
            return self._decoder.logits(tokens)

    @contextmanager
    def _only(
        self, run: Sequence[int], state: Tensor | None, leaving: list[Tensor] | None
    ) -> Iterator[None]:
        """The model with only the layers ``run``; ``leaving`` gets the state that leaves them."""
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
                    lambda _, args, kwargs: _with_state(args, kwargs, state), with_kwargs=True
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


def _with_state(args: Arguments, kwargs: dict[str, object], state: Tensor | None) -> Call:
    # the state comes by position, or by its name in some families
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})


class LayerCalls:
    """What a decoder hands to its layers beside the state, so that others can; without dropout.

    It (positions, rotary factors, masks) may depend on the shape of the tokens, not on the tokens
    themselves; otherwise a ShortGPTError is raised.
    """

    mixed = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.mixed = decoder, decoder.mixed
        self.family, self.count = decoder.family, len(decoder.layers)
        self._calls: dict[torch.Size, list[Call]] = {}  # by (B, S), one for each layer
        # two texts must make for the same arguments beside the states
        tokens = torch.arange(8).remainder(decoder.vocab_size)[None]  # (1, 8)
        for ours, theirs in zip(self._seen(tokens), self._seen(tokens.flip(1)), strict=True):
            if not _equal(ours, theirs):
                raise ShortGPTError(
                    f"the layers of {type(decoder.module).__name__} take more than the hidden "
                    "state entering them: they cannot be run one at a time"
                )

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A layer with its weights inside the block, where it can be called."""
        yield self.layer(index)

    def keep_only(self, index: int, modules: Sequence[nn.Module]) -> None:
        """Lets go of the weights that a loaded layer has beside these modules."""

    def close(self) -> None:
        """Lets go of weights that were read for `loaded`."""

    def memory(self) -> dict[str, int]:
        """Bytes that the weights of a layer take where they come and go, by what they are for."""
        return {}

    def widths(self) -> tuple[int, int, int]:
        """D, the most inputs F of an output projection, bytes of a number; 1 without a matrix."""
        shapes, itemsize = [(1, 1)], 1
        for index in range(self.count):
            for names in (self.family.attention_output, self.family.mlp_output):
                matrix = only_part(self.layer(index), names)
                weight = getattr(matrix, "weight", None)
                if matrix is not None and isinstance(weight, Tensor) and weight.dim() == 2:
                    rows, columns = weight.shape
                    shapes.append((columns, rows) if transposed(matrix) else (rows, columns))
                    itemsize = weight.dtype.itemsize
        return max(d for d, _ in shapes), max(f for _, f in shapes), itemsize

    def embed(self, tokens: Tensor) -> Tensor:
        """The state (B, S, D) entering the first layer, of tokens (B, S)."""
        tokens = tokens.to(self._decoder.device)
        return self._input_of(self.layer(0), lambda: self._decoder.run(tokens))

    @torch.no_grad()
    def run(self, index: int, state: Tensor) -> Tensor:
        """The state (B, S, D) leaving a layer, from the one entering it, which is not changed."""
        args, kwargs = self.call(index, state.clone())  # a layer may write over it
        layer = self.layer(index)
        with evaluating(layer), mixed_precision(self.mixed, state.device):
            return first(layer(*args, **kwargs))

    def until(self, index: int, state: Tensor, module: nn.Module) -> Tensor:
        """What a layer hands to a module inside it, (B, S, ...); it goes no further."""
        self.call(index, state)  # seen first, because the hook would end that pass, too
        return self._input_of(module, lambda: self.run(index, state))

    def layer(self, index: int) -> nn.Module:
        """The layer at a position in the decoder."""
        return self._decoder.layers[index]

    def call(self, index: int, state: Tensor) -> Call:
        """The arguments of a layer's call, with this state (B, S, D)."""
        shape = state.shape[:2]
        if shape not in self._calls:  # which tokens they are does not matter, as was proved
            self._calls[shape] = self._seen(torch.zeros(shape, dtype=torch.long))  # (B, S)
        return _with_state(*self._calls[shape][index], state)

    @torch.no_grad()
    def _seen(self, tokens: Tensor) -> list[Call]:
        # the calls of all layers for tokens (B, S), their states left out
        calls: list[Call] = []

        def note(_: nn.Module, args: Arguments, kwargs: dict[str, object]) -> None:
            calls.append(_with_state(args, kwargs, None))

        # one pass shows the calls of all layers
        with ExitStack() as stack:
            for layer in self._decoder.layers:
                stack.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            self._decoder.run(tokens.to(self._decoder.device))
        return calls

    @torch.no_grad()
    def _input_of(self, module: nn.Module, run: Callable[[], object]) -> Tensor:
        # a copy of what ``run`` hands to a module, where it ends
        inputs: list[Tensor] = []  # a list, because the hook cannot return what it sees

        def stop(_: nn.Module, args: Arguments, kwargs: dict[str, object]) -> NoReturn:
            inputs.append(state_in(args, kwargs).clone())
            raise _Enough

        with module.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Enough):
            run()
        return inputs[0]


# Ends a pass from within, where all that it was run for is known.
class _Enough(Exception):
    pass


def _equal(ours: object, theirs: object) -> bool:
    # tensors by their values, containers by their entries, anything else by its kind
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, tuple | list) and isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)
    return type(ours) is type(theirs)
