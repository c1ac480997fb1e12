"""What was done to the weights of kept layers: which parameters, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The original number of a layer, and a parameter's name inside it: (11, "mlp.down_proj.weight").
Parameter = tuple[int, str]


@dataclass(frozen=True)
class WeightChange:
    """One change of a model's weights."""

    how: Mapping[str, object]  # its "method" and the settings, ready for JSON
    parameters: frozenset[Parameter]  # all that have other values than before, and no others


def parameters_of(number: int, layer: nn.Module, modules: Iterable[nn.Module]) -> set[Parameter]:
    """The parameters of some modules inside a layer, by the layer's original number."""
    # by identity: a tensor may equal another
    inside = {id(p) for module in modules for p in module.parameters()}
    return {(number, name) for name, p in layer.named_parameters() if id(p) in inside}


def keep_values(parameters: Iterable[Tensor]) -> Callable[[], None]:
    """Copies values to the CPU; what is returned puts them back."""
    # on the CPU: an accelerator may have no room for them
    before = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]

    @torch.no_grad()
    def restore() -> None:
        for parameter, value in before:
            parameter.copy_(value)

    return restore


@contextmanager
def restored_on_error(parameters: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Parameters that have their values again after an error in the block; yields what does it."""
    restore = keep_values(parameters)
    try:
        yield restore
    except BaseException:  # Ctrl-C too
        restore()
        raise
