"""Removing a layer's attention or MLP sublayer, by zeroing its output projection.

A layer adds two residual branches to the stream, attention and MLP. With a zero output projection
a branch adds nothing: that is the model without it. The file keeps its size and its shape, and so
the result loads wherever the model does; no config can say that a sublayer is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    """Removes attention and MLP sublayers from a live model.

    Args:
        decoder: the model.
        attention: positions of the layers that lose their attention.
        mlp: positions of the layers that lose their MLP.

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
    sublayers = _sublayers(decoder, attention, mlp)
    _check_separable(decoder, {one.position for one in sublayers})
    undo = _zero([one.output for one in sublayers])
    try:
        left = _influence(decoder)
        for one in sublayers:
            if not left[one.kind, one.position].abs() < 1e-6:
                raise ShortGPTError(
                    f"the {['attention', 'MLP'][one.kind]} of layer {one.position} adds more than "
                    "its output projection gives; it cannot be removed alone"
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
        attention: positions, as for `remove_sublayers`.
        mlp: positions, as for `remove_sublayers`.
    """
    parameters: set[Parameter] = set()
    for one in _sublayers(decoder, attention, mlp):
        layer = decoder.layers[one.position]
        parameters |= parameters_of(numbers[one.position], layer, [one.output])
    return parameters


class _Sublayer(NamedTuple):
    """One to remove: its layer's position, its kind (0 attention, 1 MLP), its output projection."""

    position: int
    kind: int
    output: nn.Module


def _sublayers(decoder: Decoder, attention: Sequence[int], mlp: Sequence[int]) -> list[_Sublayer]:
    layers, family = decoder.layers, decoder.family
    removed = [_Sublayer(i, 0, attention_output(layers[i], family)) for i in attention]
    return removed + [_Sublayer(i, 1, mlp_output(layers[i], family)) for i in mlp]


def _influence(decoder: Decoder) -> torch.Tensor:
    """Mean 1 - cos around attention and MLP of every layer, (2, L), on a few tokens."""
    window = [i % decoder.vocab_size for i in range(8)]
    scores = score(decoder, [window], layers=range(len(decoder.layers)), sublayers=True)
    return scores.sublayers[0].cpu() / len(window)


def _check_separable(decoder: Decoder, layers: set[int]) -> None:
    known = _influence(decoder).isfinite().all(0)
    if odd := sorted(i for i in layers if not known[i]):
        kind = type(decoder.layers[odd[0]]).__name__
        raise ShortGPTError(
            f"layers {odd} are not x + attention, then + MLP (or {kind} names them otherwise); "
            "their sublayers cannot be removed alone"
        )


def _zero(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Replaces all parameters by zeros; the old tensors stay as they are for the undo."""
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
