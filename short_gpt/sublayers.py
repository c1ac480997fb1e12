"""Taking out half a layer: its attention or its MLP, by zeroing the map that ends it.

A layer adds two things to the stream, attention and MLP. With a zero output projection a half adds
nothing: that is the model without it. The file keeps its size and its shape, so that the result
loads wherever the model does; a config has no way to say that half a layer is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from short_gpt.decoder import Decoder
from short_gpt.mlp_output import mlp_output
from short_gpt.watch import score

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
        ValueError: a layer does not exist or is named twice, none is named, or a layer is not
            x + attention, then + MLP, each ended by one plain matrix. The model is unchanged.
    """
    count = len(decoder.layers)
    for name, layers in (("attention", attention), ("mlp", mlp)):
        if unknown := [i for i in layers if not 0 <= i < count]:
            raise ValueError(f"layers {unknown} do not exist; the model has 0..{count - 1}")
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} {list(layers)} names a layer twice")
    if not attention and not mlp:
        raise ValueError("expected layers whose attention or MLP is to go, got none")
    ends = [(i, 0, attention_output(decoder.layers[i])) for i in attention]
    ends += [(i, 1, mlp_output(decoder.layers[i])) for i in mlp]
    _check(decoder, {i for i, _, _ in ends})
    undo = _zero([module for _, _, module in ends])
    left = _halves(decoder)
    for i, half, _ in ends:
        if not left[half, i].abs() < 1e-6:
            undo()
            raise ValueError(
                f"the {['attention', 'MLP'][half]} of layer {i} adds more than its "
                "output projection gives; it cannot be taken out alone"
            )
    return undo


def attention_output(layer: nn.Module) -> nn.Module:
    """The linear map that ends a layer's attention; ValueError if none of a known name does."""
    modules = dict(layer.named_modules())
    found = [modules[name] for name in ATTENTION_OUTPUTS if name in modules]
    weight = getattr(found[0], "weight", None) if len(found) == 1 else None
    if isinstance(weight, torch.Tensor) and weight.is_meta:
        raise ValueError("the weights are not in memory: open the model whole, not streamed")
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise ValueError(
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
        raise ValueError(
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
