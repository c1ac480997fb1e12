"""What a layer's sublayers add to the residual stream, and their output projections.

Shapes: B windows, S tokens, N tokens in all, F inputs of a matrix, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from short_gpt.models.families import Family, Names, only_part, part
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.layer_hooks import (
    Output,
    attention_output,
    first,
    mlp_output,
    replaced_output,
    transposed,
)
from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class OutputProjection:
    """A module whose output is added to the residual stream.

    Attributes:
        module: such as the `down_proj` of an MLP, or a norm after it.
        factor: by which its output is multiplied on the way, as in Granite; 1 in most families.
        before: the matrix, where a norm follows it, as in Gemma 2; None elsewhere.
    """

    module: nn.Module
    factor: float
    before: nn.Module | None = None

    @property
    def matrix(self) -> nn.Module:
        """The last matrix of the sublayer."""
        return self.module if self.before is None else self.before

    @property
    def norm(self) -> nn.Module | None:
        """The norm after the matrix, if there is one."""
        return None if self.before is None else self.module

    @property
    def modules(self) -> list[nn.Module]:
        """The matrix, and the norm."""
        return [self.matrix, *([] if self.norm is None else [self.norm])]

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return next(self.matrix.parameters()).device

    def outputs(self, inputs: Tensor) -> Tensor:
        """Of the matrix, (N, D) float32, for inputs (N, F) float32."""
        weight, bias = self.matrix.weight, getattr(self.matrix, "bias", None)
        assert isinstance(weight, Tensor)
        wide = weight.float() if transposed(self.matrix) else weight.float().T  # (F, D)
        out = inputs @ wide
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
    """A layer as state + factor * attention + factor * MLP, each proved on random numbers.

    Attributes:
        projections: by part, "attention" and "mlp"; a sublayer without a single matrix whose output
            the layer adds to the stream is left out.
        refused: by part, why it is left out.
        mlp: what the MLP as a whole adds, also where no matrix ends it; None if that is not known.
    """

    projections: Mapping[str, OutputProjection]
    refused: Mapping[str, str]
    mlp: OutputProjection | None

    @classmethod
    def of(cls, calls: LayerCalls, place: int, state: Tensor, family: Family) -> Sublayers:
        """Those of a layer.

        Args:
            calls: of the decoder.
            place: of the layer.
            state: (B, S, D), such as the layer meets.
            family: of the decoder.
        """
        layer, norms = calls.layer(place), family.mlp_norm_behind
        projections: dict[str, OutputProjection] = {}
        refused: dict[str, str] = {}

        def note(part_name: str, find: Callable[[], OutputProjection]) -> OutputProjection | None:
            try:
                return projections.setdefault(part_name, find())
            except ShortGPTError as error:
                refused[part_name] = str(error)
                return None

        def run() -> Tensor:
            return calls.run(place, state)

        mlp = note("mlp", lambda: _end(run, mlp_output(layer, family), layer, behind=norms))
        if mlp is None:
            mlp = _whole_mlp(run, layer, family)
        if mlp is not None:
            end = mlp
            note("attention", lambda: _attention(run, layer, family, end, state))
        else:
            refused["attention"] = refused["mlp"]
        return cls(projections, refused, mlp)


def behind_attention(run: Callable[[], Tensor], mlp: OutputProjection) -> tuple[Tensor, Tensor]:
    """The stream between a layer's sublayers, (B, S, D), and after the layer.

    In a parallel block, whose sublayers read the same state, it is the sum without the MLP.

    Args:
        run: gives the state behind the layer.
        mlp: what its MLP adds.
    """
    given: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Output) -> None:
        given.append(first(output).clone())  # some layers write over it

    handle = mlp.module.register_forward_hook(note)
    try:
        behind = run()
    finally:
        handle.remove()
    return behind - mlp.factor * given[-1].view_as(behind), behind


def _whole_mlp(
    run: Callable[[], Tensor], layer: nn.Module, family: Family
) -> OutputProjection | None:
    """The MLP as one module, such as a mixture of experts; None where its output is not added."""
    module = part(layer, family.mlp)
    try:
        return None if module is None else _added(run, module, layer)
    except ShortGPTError:
        return None


def _attention(
    run: Callable[[], Tensor],
    layer: nn.Module,
    family: Family,
    mlp: OutputProjection,
    state: Tensor,
) -> OutputProjection:
    """The last matrix of a layer's attention, where the stream behind it is state + attention."""
    module, norms = attention_output(layer, family), family.attention_norm_behind
    found = _end(lambda: behind_attention(run, mlp)[0], module, layer, behind=norms)
    without, _ = behind_attention(run, found)
    between, behind = behind_attention(run, mlp)
    off = (without - behind + between - state).abs().max()  # what neither sublayer has added
    if not off <= 64 * torch.finfo(state.dtype).eps * _scale(state, behind):
        raise ShortGPTError(
            f"{type(layer).__name__} adds more than its attention and its MLP to the stream "
            f"(off by {float(off):.2g})"
        )
    return found


def _end(
    run: Callable[[], Tensor], matrix: nn.Module, layer: nn.Module, *, behind: Names
) -> OutputProjection:
    """What a matrix at the end of a sublayer gives to the stream, by way of a norm or without.

    Args:
        run: gives the stream after the sublayer.
        matrix: at its end.
        layer: of both.
        behind: names that a norm behind it may have.

    Raises:
        ShortGPTError: something else comes between the matrix and the stream.
    """
    try:
        return _added(run, matrix, layer)
    except ShortGPTError:
        norm = only_part(layer, behind)
        if norm is None:
            raise
        found = _added(run, norm, layer)
        if not (_follows(run, matrix, norm) and _is_rms(norm)):
            raise
        return OutputProjection(norm, found.factor, matrix)


def _follows(run: Callable[[], Tensor], matrix: nn.Module, norm: nn.Module) -> bool:
    """Whether a norm is given what a matrix gives, as it is."""
    given: list[Tensor] = []
    handles = [
        matrix.register_forward_hook(lambda _, __, out: given.append(out.clone())),
        norm.register_forward_pre_hook(lambda _, args: given.append(args[0].clone())),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return len(given) == 2 and torch.equal(*given)


@torch.no_grad()
def _is_rms(norm: nn.Module) -> bool:
    """Whether a norm divides by the root mean square alone, and multiplies by what it gives of 1.

    One that takes the mean away, too, gives nothing of 1.
    """
    weight = getattr(norm, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 1
        or getattr(norm, "bias", None) is not None
    ):
        return False
    noise = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    noise = noise.to(weight.device, weight.dtype)
    scaled = noise / noise.float().pow(2).mean(-1, keepdim=True).sqrt() * effective_weight(norm)
    off = (norm(noise).float() - scaled).abs().max()
    return bool(off <= (64 * torch.finfo(weight.dtype).eps + 1e-4) * _scale(scaled))


@torch.no_grad()
def effective_weight(norm: nn.Module) -> Tensor:
    """By what a norm multiplies what it has divided by its root mean square, (D,) float32.

    It is the norm's parameter in most families, and one more than that in Gemma's.
    """
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return norm(torch.ones_like(weight)[None])[0].float()


def _added(run: Callable[[], Tensor], module: nn.Module, layer: nn.Module) -> OutputProjection:
    """The module with its factor; raises ShortGPTError where its output is not simply added."""
    factor, off = factor_of(run, module)
    if not off <= 32 or not factor:
        raise ShortGPTError(
            f"{type(layer).__name__} does not add what its {type(module).__name__} gives to the "
            "stream (a norm comes between)"
        )
    return OutputProjection(module, factor)


@torch.no_grad()
def factor_of(run: Callable[[], Tensor], module: nn.Module) -> tuple[float, float]:
    """By which factor what a module gives is added to the stream, and how far that is off.

    The layer runs twice, the second time with a random tensor added to what the module gives: the
    stream must change by a multiple of that tensor.

    Args:
        run: gives the stream behind the module, (B, S, D).
        module: called once in it.

    Returns:
        The factor by least squares, and the largest deviation, in units of the last place.
    """
    before = run()
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    noise = noise.mul_(float(before.float().pow(2).mean().sqrt()))
    added = noise.to(before.device, before.dtype)
    with replaced_output(module, lambda out: out + added.view_as(out)):
        after = run()
    noise, change = added.cpu().double(), after.cpu().double() - before.cpu().double()
    factor = float((change * noise).sum() / (noise * noise).sum())
    if abs(factor - 1) <= 16 * torch.finfo(before.dtype).eps:
        factor = 1.0
    off = (change - factor * noise).abs().max() / _scale(before, added)
    return factor, float(off) / torch.finfo(before.dtype).eps


def _scale(*tensors: Tensor) -> float:
    """The largest absolute value."""
    return max(float(t.abs().max()) for t in tensors)
