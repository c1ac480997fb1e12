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
from short_gpt.models.layer_hooks import attention_output, mlp_output
from short_gpt.models.numbering import check_exist
from short_gpt.models.weight_changes import Parameter, parameters_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.hooks import score


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
    ends = _ends(decoder, attention, mlp)
    _check_halves(decoder, {i for i, _, _ in ends})
    undo = _zero([module for _, _, module in ends])
    try:
        left = _halves(decoder)
        for i, half, _ in ends:
            if not left[half, i].abs() < 1e-6:
                raise ShortGPTError(
                    f"the {['attention', 'MLP'][half]} of layer {i} adds more than its "
                    "output projection gives; it cannot be taken out alone"
                )
    except BaseException:
        undo()
        raise
    return undo


def sublayer_parameters(
    decoder: Decoder, numbers: Sequence[int], *, attention: Sequence[int], mlp: Sequence[int]
) -> set[Parameter]:
    """The parameters that `remove_sublayers` makes zero.

    Args:
        numbers: the layers' original numbers.
        attention, mlp: positions, as for `remove_sublayers`.
    """
    parameters: set[Parameter] = set()
    for place, _, end in _ends(decoder, attention, mlp):
        parameters |= parameters_of(numbers[place], decoder.layers[place], [end])
    return parameters


def _ends(
    decoder: Decoder, attention: Sequence[int], mlp: Sequence[int]
) -> list[tuple[int, int, nn.Module]]:
    """The layer, the half (0 attention, 1 MLP) and the last map of all that are to go."""
    family = decoder.family
    ends = [(i, 0, attention_output(decoder.layers[i], family)) for i in attention]
    return ends + [(i, 1, mlp_output(decoder.layers[i], family)) for i in mlp]


def _halves(decoder: Decoder) -> torch.Tensor:
    """Mean 1 - cos around both halves of every layer, (2, L), on a few tokens."""
    window = [i % decoder.vocab_size for i in range(8)]
    scores = score(decoder, [window], layers=range(len(decoder.layers)), sublayers=True)
    return scores.halves[0].cpu() / len(window)


def _check_halves(decoder: Decoder, layers: set[int]) -> None:
    whole = _halves(decoder).isfinite().all(0)
    if odd := sorted(i for i in layers if not whole[i]):
        kind = type(decoder.layers[odd[0]]).__name__
        raise ShortGPTError(
            f"layers {odd} are not x + attention, then + MLP (or {kind} names them otherwise); "
            "half of them cannot be taken out"
        )


def _zero(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Puts zeros in the place of all parameters; the old tensors stay as they are for the undo."""
    before = [dict(module.named_parameters(recurse=False)) for module in modules]
    zeros = [{n: torch.zeros_like(value) for n, value in each.items()} for each in before]
    for module, parameters in zip(modules, zeros, strict=True):
        for name, zero in parameters.items():
            setattr(module, name, nn.Parameter(zero, requires_grad=False))

    def undo() -> None:
        for module, parameters in zip(modules, before, strict=True):
            for name, value in parameters.items():
                setattr(module, name, value)

    return undo
