"""ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819), by least squares, as a baseline.

For the layer before a run of removed layers, with M its MLP's outputs, H the state leaving it and
L that after the run, of the original model and as rows, T = argmin ||H - M + M T - L||^2. T goes
into down_proj, so that no parameter is added. The library's patch solves down_proj itself, which
has more columns, and weighs tokens.

Shapes: S tokens, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from short_gpt.models.decoder import pad
from short_gpt.models.layer_calls import Output, first, mlp_output
from short_gpt.models.numbering import runs
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel

RIDGE = 1e-9  # of the mean eigenvalue: no penalty, except for tokens that are fewer than inputs


@torch.no_grad()
def heal(short: ShortModel, layers: Sequence[int], windows: Sequence[Sequence[int]]) -> None:
    """Removes layers of a Llama-like model, and puts T into the layer before every run of them.

    Raises:
        ShortGPTError: the first layer is to go, or as in `layer_hooks.mlp_output`.
    """
    gaps = runs(layers, short.kept)
    if any(start == 0 for start, _ in gaps):
        raise ShortGPTError("expected sets without the first layer")
    places = short.decoder.layers
    ends = {start: mlp_output(places[start - 1], short.decoder.family) for start, _ in gaps}
    modules = {*ends.values(), *(places[p] for gap in gaps for p in (gap[0] - 1, gap[1]))}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    seen: dict[object, Tensor] = {}

    def keep(module: object, _: object, output: Output) -> None:
        seen[module] = first(output)[0].double()  # (S, D)

    hooks = [module.register_forward_hook(keep) for module in modules]
    for window in windows:
        short.decoder.run(pad([window], short.decoder)[0])
        for start, end in gaps:
            m, h, later = (seen[x] for x in (ends[start], places[start - 1], places[end]))
            gram, cross = sums.get(start, (0, 0))
            sums[start] = gram + m.T @ m, cross + m.T @ (later - h + m)
    for hook in hooks:
        hook.remove()
    for start, (gram, cross) in sums.items():
        solved = least_squares(gram, cross)  # T, (D, D)
        for parameter in ends[start].parameters():  # weight (D, F) and, if there is one, bias (D,)
            parameter.copy_(solved.T @ parameter.double())
    short.remove_layers(list(layers))


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """The solution (F, D) from X^T X (F, F) and X^T Y (F, D)."""
    ridged = gram + RIDGE * gram.trace() / len(gram) * torch.eye(len(gram)).to(gram)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(ridged))
