"""Taking layers out of a live model, for good or for a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from short_gpt.decoder import Decoder


def remove_layers(decoder: Decoder, drop: Sequence[int]) -> Callable[[], None]:
    """Removes layers from the model in place.

    Args:
        decoder: the model.
        drop: positions in the model as it is now, in any order.

    Returns:
        A function that puts them back.

    Raises:
        ValueError: a layer does not exist or is named twice, or none would stay; the model is
            unchanged.
    """
    count = len(decoder.layers)
    check_layers(drop, range(count))
    return decoder.keep_layers([i for i in range(count) if i not in set(drop)])


@contextmanager
def without_layers(decoder: Decoder, drop: Sequence[int]) -> Iterator[None]:
    """The model without some layers inside a ``with`` block, whole again after it.

    Args and errors as in `remove_layers`; an empty ``drop`` changes nothing.
    """
    if not drop:
        yield
        return
    undo = remove_layers(decoder, drop)
    try:
        yield
    finally:
        undo()


def output_form(decoder: Decoder) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """What the decoder's layers return, told by running one token.

    Returns:
        A state (1, 1, D) as the first layer gives it, and a function that puts a state into the
        form that the model takes: itself, or a tuple in some families and versions.
    """
    seen: list[Any] = []
    layer = decoder.layers[0]
    handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        decoder.run(torch.zeros(1, 1, dtype=torch.long, device=decoder.device))
    finally:
        handle.remove()
    if not isinstance(seen[0], tuple | list):
        return seen[0], lambda state: state
    rest = (None,) * (len(seen[0]) - 1)
    return seen[0][0], lambda state: (state, *rest)


@contextmanager
def patched_forward(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A layer that does something else inside a ``with`` block."""
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def check_layers(drop: Sequence[int], present: Sequence[int]) -> None:
    """Raises ValueError unless ``drop`` names different layers of ``present``, but not all."""
    unknown = [i for i in drop if i not in present]
    if unknown:
        raise ValueError(f"layers {unknown} do not exist; the model has {span(present)}")
    if len(set(drop)) != len(drop):
        raise ValueError(f"layers {list(drop)} name a layer twice")
    if not 0 < len(drop) < len(present):
        raise ValueError(
            f"{len(drop)} layers to remove; the model has {len(present)}: "
            f"expected 1 to {len(present) - 1}"
        )


def span(layers: Sequence[int]) -> str:
    """Layer numbers in short: ``0..20, 30, 31``."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = (f"{r[0]}..{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
    return ", ".join(parts)
