"""What was done to the weights of layers that stayed: which parameters, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

# The original number of a layer, and a parameter's name inside it: (11, "mlp.down_proj.weight").
Parameter = tuple[int, str]


@dataclass(frozen=True)
class WeightChange:
    """One change of a model's weights.

    Attributes:
        how: what did it and with which settings, ready for JSON; "method" names it.
        parameters: all that have other values than before, and no others.
    """

    how: Mapping[str, object]
    parameters: frozenset[Parameter]


def parameters_of(number: int, layer: nn.Module, modules: Iterable[nn.Module]) -> set[Parameter]:
    """The parameters of some modules inside a layer, by the layer's original number."""
    wanted = {id(p) for module in modules for p in module.parameters()}
    return {(number, name) for name, p in layer.named_parameters() if id(p) in wanted}
