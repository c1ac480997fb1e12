"""A linear map put into the weights of the module whose output it is of.

Shapes: D width of the output, F of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from short_gpt.models.layer_hooks import transposed
from short_gpt.runtime.errors import ShortGPTError


@torch.no_grad()
def put_map(module: nn.Module, linear_map: Tensor, number: int) -> None:
    """Makes a linear module give its output times a map, and proves it on random inputs.

    A module whose ``forward`` does more than a product with these (an adapter) shows here.

    Args:
        module: with ``weight`` and maybe ``bias``, in whose dtypes the result is rounded once.
        linear_map: T, (D, D) float64.
        number: of the layer, for what is raised.

    Raises:
        ShortGPTError: the output is zero, or no product with the parameters, which are then set.
    """
    probe = _probe(module)  # (1, 16, F)
    expected = module(probe).cpu().double() @ linear_map  # (1, 16, D)
    if not expected.any():
        raise ShortGPTError(
            f"layer {number}'s MLP gives nothing, its last matrix is zero: no map of it restores "
            "the layers behind; remove others"
        )
    for parameter, value in _mapped(module, linear_map):
        parameter.copy_(value)
    off = float((module(probe).cpu().double() - expected).norm() / expected.norm())
    if not off <= 16 * torch.finfo(probe.dtype).eps:  # NaN is refused, too
        raise ShortGPTError(f"layer {number}'s MLP took the map only to {off:.2g}: not a plain map")


def _weight(module: nn.Module) -> Tensor:
    """Its matrix (D, F), or (F, D) of a Conv1D; an adapter shows that of the map it wraps."""
    return module.weight  # type: ignore[return-value]


def _mapped(module: nn.Module, linear_map: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The parameters that change, with their new values: the output becomes itself times T."""
    weight = _weight(module)
    bias: Tensor | None = getattr(module, "bias", None)
    exact = weight.detach().cpu().double()
    # the output is x W^T, and (x W^T) T = x (T^T W)^T; a Conv1D gives x W, and (x W) T = x (W T)
    new = exact @ linear_map if transposed(module) else linear_map.T @ exact
    pairs = [(weight, new.to(weight.dtype))]
    if isinstance(bias, Tensor):  # a row (D): it is added to x W^T, so the map takes it along
        pairs.append((bias, (bias.detach().cpu().double() @ linear_map).to(bias.dtype)))
    return pairs


def _probe(module: nn.Module) -> Tensor:
    """Random inputs (1, 16, F) of a linear map."""
    weight = _weight(module)
    width = weight.shape[0 if transposed(module) else 1]
    inputs = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0))
    return inputs.to(weight.device, weight.dtype)
