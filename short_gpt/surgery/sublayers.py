"""Taking out half a layer: its attention or its MLP, by zeroing the map that ends it.

A layer adds two things to the stream, attention and MLP. With a zero output projection a half adds
nothing: that is the model without it. The file keeps its size and its shape, so that the result
loads wherever the model does; a config has no way to say that half a layer is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from short_gpt.models.decoder import Decoder
from short_gpt.models.layer_hooks import mlp_output
from short_gpt.models.numbering import check_exist
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.hooks import score
from short_gpt.surgery.changes import Parameter, parameters_of

REMOVED_SUBLAYERS = "removed sublayers"  # the method that a WeightChange names
ATTENTION_OUTPUTS = (
    "attention.wo",  # Meta's Llama
    "self_attn.o_proj",  # llama, mistral, qwen2, qwen3, phi3, gemma, granite, ...
    "self_attn.dense",  # phi
    "self_attn.out_proj",  # opt
    "attn.c_proj",  # gpt2
)


def remove_sublayers(
    decoder: Decoder, *, attention: Sequence[int] = (), mlp: Sequence[int] = ()
) -> Callable[[], None]:
    """Takes attentions and MLPs out of a live model.

    Args:
        decoder: the model.
        attention, mlp: positions of the layers that lose this half.

    Returns:
        A function that puts them back.

    Raises:
        ShortGPTError: a layer does not exist or is named twice, none is named, or a layer is not
            x + attention, then + MLP, each ended by one plain matrix. The model is unchanged.
    """
    count = len(decoder.layers)
    for layers in (attention, mlp):
        check_exist(layers, range(count))
    if not attention and not mlp:
        raise ShortGPTError("expected layers whose attention or MLP is to go, got none")
    ends = [(i, 0, attention_output(decoder.layers[i])) for i in attention]
    ends += [(i, 1, mlp_output(decoder.layers[i])) for i in mlp]
    _check(decoder, {i for i, _, _ in ends})
    undo = _zero([module for _, _, module in ends])
    left = _halves(decoder)
    for i, half, _ in ends:
        if not left[half, i].abs() < 1e-6:
            undo()
            raise ShortGPTError(
                f"the {['attention', 'MLP'][half]} of layer {i} adds more than its "
                "output projection gives; it cannot be taken out alone"
            )
    return undo


def sublayer_parameters(
    decoder: Decoder, numbers: Sequence[int], *, attention: Sequence[int], mlp: Sequence[int]
) -> set[Parameter]:
    """The parameters that `remove_sublayers` makes zero.

    Args:
        numbers: the layers' original numbers.
        attention, mlp: positions, as for `remove_sublayers`.
    """
    found: set[Parameter] = set()
    for places, end in ((attention, attention_output), (mlp, mlp_output)):
        for place in places:
            layer = decoder.layers[place]
            found |= parameters_of(numbers[place], layer, [end(layer)])
    return found


def attention_output(layer: nn.Module) -> nn.Module:
    """The linear map that ends a layer's attention; ShortGPTError if none of a known name does."""
    modules = dict(layer.named_modules())
    found = [modules[name] for name in ATTENTION_OUTPUTS if name in modules]
    weight = getattr(found[0], "weight", None) if len(found) == 1 else None
    if isinstance(weight, torch.Tensor) and weight.is_meta:
        raise ShortGPTError("the weights are not in memory: open the model whole, not streamed")
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise ShortGPTError(
            f"{type(layer).__name__} has no plain matrix at the end of its attention (looked for "
            f"{', '.join(ATTENTION_OUTPUTS)})"
        )
    return found[0]


def _halves(decoder: Decoder) -> torch.Tensor:
    """Mean 1 - cos around both halves of every layer, (2, L), on a few tokens."""
    window = [i % decoder.vocab_size for i in range(8)]
    found = score(decoder, [window], layers=range(len(decoder.layers)), sublayers=True)
    return found.halves[0].cpu() / len(window)


def _check(decoder: Decoder, layers: set[int]) -> None:
    whole = _halves(decoder).isfinite().all(0)
    if odd := sorted(i for i in layers if not whole[i]):
        kind = type(decoder.layers[odd[0]]).__name__
        raise ShortGPTError(
            f"layers {odd} are not x + attention, then + MLP (or {kind} names them otherwise); "
            "half of them cannot be taken out"
        )


def _zero(modules: Sequence[nn.Module]) -> Callable[[], None]:
    before = [dict(module._parameters) for module in modules]
    for module, parameters in zip(modules, before, strict=True):
        for name, value in parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.zeros_like(value), False)

    def undo() -> None:
        for module, parameters in zip(modules, before, strict=True):
            module._parameters.update(parameters)

    return undo
