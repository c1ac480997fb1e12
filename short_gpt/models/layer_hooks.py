"""Inside a layer: the output projections of its sublayers, and hooks around it.

Shapes: B windows, S tokens, D width of the stream, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import Decoder
from short_gpt.models.families import ANY, Family, only_part
from short_gpt.runtime.errors import ShortGPTError

# What a layer returns: its state (B, S, D), by itself or before others in a tuple.
Output = Tensor | tuple[Tensor, ...] | list[Tensor]
Arguments = tuple[Any, ...]
Call = tuple[Arguments, dict[str, object]]  # what a layer was called with, by position and by name
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mlp_output(layer: nn.Module, family: Family = ANY) -> nn.Module:
    """The output projection of a layer's MLP; ShortGPTError unless a plain matrix in memory."""
    linear, kind = only_part(layer, family.mlp_output), type(layer).__name__
    if linear is None:
        raise ShortGPTError(
            f"{kind} has no single linear map at the end of its MLP (looked for "
            f"{', '.join(family.mlp_output or ANY.mlp_output)}; mixtures of experts have many)"
        )
    weight = getattr(linear, "weight", None)
    _check_in_memory(weight)
    # an adapter has the matrix inside, a quantized matrix another dtype or shape
    wrapped = any(True for _ in linear.children())
    plain = isinstance(weight, Tensor) and weight.dim() == 2 and weight.dtype in FLOATS
    if wrapped or not plain:
        have = f"{type(linear).__name__} of {getattr(weight, 'dtype', 'no weight')}"
        raise ShortGPTError(
            f"the map at the end of {kind}'s MLP is {have}; expected one plain matrix: load the "
            "model unquantized and without adapters"
        )
    return linear


def attention_output(layer: nn.Module, family: Family = ANY) -> nn.Module:
    """The output projection of a layer's attention; arguments and errors as in `mlp_output`."""
    linear = only_part(layer, family.attention_output)
    weight = getattr(linear, "weight", None)
    _check_in_memory(weight)
    if linear is None or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ShortGPTError(
            f"{type(layer).__name__} has no plain matrix at the end of its attention (looked for "
            f"{', '.join(family.attention_output or ANY.attention_output)})"
        )
    return linear


def _check_in_memory(weight: object) -> None:
    # a streamed model has weights only while their layer runs
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ShortGPTError(
            "the weights are not in memory: open the model without stream or offloading"
        )


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
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
