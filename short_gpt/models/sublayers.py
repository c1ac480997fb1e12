"""What a layer's sublayers add to the residual stream, and their output projections.

Shapes: B windows, S tokens, N tokens in all, F inputs of a matrix, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from short_gpt.models.families import Family, Names, only_part, part
from short_gpt.models.layer_calls import (
    LayerCalls,
    Output,
    attention_output,
    first,
    mlp_output,
    replaced_output,
    transposed,
)
from short_gpt.runtime.errors import ShortGPTError

Run = Callable[[], Tensor]  # runs a layer, and gives the state leaving it, (B, S, D)
# runs a layer, and gives the stream at some point, then the states that it was computed from
Streams = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class OutputProjection:
    """A module whose output is added to the residual stream, times a factor."""

    module: nn.Module  # such as the `down_proj` of an MLP, or a norm after it
    factor: float  # 1 in most families; another one in Granite
    before: nn.Module | None = None  # the matrix, where a norm follows it, as in Gemma 2

    @property
    def matrix(self) -> nn.Module:
        return self.module if self.before is None else self.before

    @property
    def norm(self) -> nn.Module | None:
        return None if self.before is None else self.module

    @property
    def modules(self) -> list[nn.Module]:
        return [self.module] if self.before is None else [self.before, self.module]

    @property
    def device(self) -> torch.device:
        return next(self.matrix.parameters()).device

    def outputs(self, inputs: Tensor) -> Tensor:
        """Of the matrix, (N, D) float32, for inputs (N, F) float32."""
        # in float32, whatever the model runs in
        weight, bias = self.matrix.weight, getattr(self.matrix, "bias", None)
        assert isinstance(weight, Tensor)
        wide = weight.float() if transposed(self.matrix) else weight.float().T  # (F, D)
        out = inputs @ wide  # (N, D)
        return out + bias.float() if isinstance(bias, Tensor) else out

    def normed(self, outputs: Tensor) -> Tensor:
        """What is added to the stream, except the factor, for outputs of the matrix (N, D)."""
        if self.norm is None:
            return outputs
        weight = self.norm.weight
        assert isinstance(weight, Tensor)
        return self.norm(outputs.to(weight.dtype)).float()


@dataclass(frozen=True)
class Sublayers:
    """A layer as state + factor * attention + factor * MLP, each proved on random numbers."""

    # by part, "attention" and "mlp": those with a single matrix whose output the layer adds
    projections: Mapping[str, OutputProjection]
    refused: Mapping[str, str]  # by part, why it is not among them
    # what the MLP adds: its projection, or the MLP as one module; None if not known
    mlp: OutputProjection | None

    @classmethod
    def of(cls, calls: LayerCalls, index: int, state: Tensor, family: Family) -> Sublayers:
        """Those of the decoder's layer ``index``, proved on a state (B, S, D) such as enters it."""
        layer, run = calls.layer(index), partial(calls.run, index, state)
        projections: dict[str, OutputProjection] = {}
        refused: dict[str, str] = {}
        # the MLP first: the stream before it shows what the attention adds
        mlp: OutputProjection | None = None
        try:
            matrix = mlp_output(layer, family)
            norms = family.mlp_norm_after
            mlp = projections["mlp"] = _end(lambda: [run()], matrix, layer, norms=norms)
        except ShortGPTError as error:
            refused["mlp"] = str(error)
            # as one module, such as a mixture of experts
            module = part(layer, family.mlp)
            factor = None if module is None else _added_by(lambda: [run()], module)
            if module is not None and factor is not None:
                mlp = OutputProjection(module, factor)
        if mlp is None:
            return cls({}, {**refused, "attention": refused["mlp"]}, None)
        try:
            projections["attention"] = _attention(run, layer, family, mlp, state)
        except ShortGPTError as error:
            refused["attention"] = str(error)
        return cls(projections, refused, mlp)


def after_attention(run: Run, mlp: OutputProjection) -> tuple[Tensor, Tensor]:
    """The stream between a layer's sublayers, (B, S, D), and the state leaving the layer.

    ``run`` gives the latter. In a parallel block, whose sublayers read the same state, the stream
    is the sum without the MLP.
    """
    outputs: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Output) -> None:
        outputs.append(first(output).clone())  # some layers write over it

    with mlp.module.register_forward_hook(note):
        leaving = run()  # (B, S, D)
    return leaving - mlp.factor * outputs[-1].view_as(leaving), leaving


def _attention(
    run: Run, layer: nn.Module, family: Family, mlp: OutputProjection, state: Tensor
) -> OutputProjection:
    # only where the stream after it is `state` + attention and nothing else
    matrix, norms = attention_output(layer, family), family.attention_norm_after
    attention = _end(lambda: after_attention(run, mlp), matrix, layer, norms=norms)
    without, _ = after_attention(run, attention)  # (B, S, D): all except what the attention adds
    between, leaving = after_attention(run, mlp)  # (B, S, D) each
    off = (without - leaving + between - state).abs().max()  # what neither sublayer has added
    if not off <= 64 * torch.finfo(state.dtype).eps * _scale(state, leaving):
        raise ShortGPTError(
            f"{type(layer).__name__} adds more than its attention and its MLP to the stream "
            f"(off by {float(off):.2g})"
        )
    return attention


def _end(run: Streams, matrix: nn.Module, layer: nn.Module, *, norms: Names) -> OutputProjection:
    # what the matrix gives to the stream, directly or through one of these norms
    factor = _added_by(run, matrix)
    if factor is not None:
        return OutputProjection(matrix, factor)
    norm = only_part(layer, norms)
    module = matrix if norm is None else norm
    if norm is not None and (factor := _added_by(run, norm)) is not None:
        module = matrix
        if _follows(run, matrix, norm) and _is_rms(norm):
            return OutputProjection(norm, factor, matrix)
    raise ShortGPTError(
        f"{type(layer).__name__} does not add what its {type(module).__name__} gives to the "
        "stream (a norm comes between)"
    )


def _follows(run: Streams, matrix: nn.Module, norm: nn.Module) -> bool:
    # the norm must be given what the matrix gives, as it is
    seen: list[Tensor] = []
    matrix_hook = matrix.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    norm_hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with matrix_hook, norm_hook:
        run()
    return len(seen) == 2 and torch.equal(*seen)


@torch.no_grad()
def _is_rms(norm: nn.Module) -> bool:
    # it must divide by the root mean square alone, and multiply by what it gives of 1;
    # one that takes the mean away, too, gives nothing of 1
    weight = getattr(norm, "weight", None)
    biased = getattr(norm, "bias", None) is not None
    if biased or not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    noise = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))  # (4, D)
    noise = noise.to(weight.device, weight.dtype)
    scaled = noise / noise.float().pow(2).mean(-1, keepdim=True).sqrt() * effective_weight(norm)
    off = (norm(noise).float() - scaled).abs().max()
    return bool(off <= (64 * torch.finfo(weight.dtype).eps + 1e-4) * _scale(scaled))


@torch.no_grad()
def effective_weight(norm: nn.Module) -> Tensor:
    """By what a norm multiplies (D,) float32: its parameter, and one more than that in Gemma's."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return norm(torch.ones_like(weight)[None])[0].float()  # (D,)


@torch.no_grad()
def _added_by(run: Streams, module: nn.Module) -> float | None:
    # the factor by which a module's output is added to the stream; None where it is not added.
    # The layer runs twice, the second time with a random tensor added to the output: the stream
    # must change by a multiple of that tensor, up to 32 units in the last place.
    before, *beside = run()  # (B, S, D) each
    # as large as the stream, so that rounding shows neither in it nor in the noise
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    noise = noise.mul_(float(before.float().pow(2).mean().sqrt()))
    added = noise.to(before.device, before.dtype)

    def disturbed(out: Tensor) -> Tensor:
        # an output of another size is no summand, as where the stream has several parts
        return out + added.view_as(out) if out.numel() == added.numel() else out

    with replaced_output(module, disturbed):
        after, *beside_after = run()  # (B, S, D) each
    eps = torch.finfo(before.dtype).eps
    noise, change = added.cpu().double(), after.cpu().double() - before.cpu().double()
    factor = float((change * noise).sum() / (noise * noise).sum())  # by least squares
    if abs(factor - 1) <= 16 * eps:
        factor = 1.0
    # an attention sink leaves the layer far longer than the stream between its sublayers, which
    # is rounded as that token's state is
    scale = torch.full(change.shape[:-1], _scale(before, added), dtype=change.dtype)  # (B, S)
    for state in (*beside, *beside_after):
        scale = scale.maximum(state.abs().amax(-1).cpu().double())
    off = ((change - factor * noise).abs().amax(-1) / scale).max()
    return factor if float(off) / eps <= 32 and factor else None


def _scale(*tensors: Tensor) -> float:
    return max(float(t.abs().max()) for t in tensors)
