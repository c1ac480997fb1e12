"""The `Decoder` protocol, its adapter for Meta's Llama, how exactly it computes, undoable edits.

Shapes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
import re
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llama.formats.safetensors import DTYPES
from short_gpt.models.families import META, Family
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.runtime.memory import free_memory


class Decoder(Protocol):
    """A stack of layers over token ids.

    Scoring reads hidden states by hooks on ``layers``, removal goes through `keep_layers`; a new
    kind of model needs nothing else.
    """

    mixed: bool  # whether `run` and `logits` take matrix products in bfloat16, by `mixed_precision`

    @property
    def module(self) -> nn.Module:
        """The model itself."""

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...

    @property
    def rotary_limits(self) -> Sequence[int]:
        """Lengths beyond which a batch's longest window changes the rotary factors of them all."""

    @property
    def family(self) -> Family:
        """The names of its layers' parts."""

    def run(self, tokens: Tensor) -> None:
        """Reads (B, S) tokens through embeddings and layers; nothing is kept."""

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S) tokens to (B, S, V) float32 logits."""

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        """Keeps only these layers (ascending positions); returns what restores the model."""


def mixed_precision(mixed: bool, device: torch.device) -> AbstractContextManager[object]:
    """Where ``mixed``, autocast: matrix products in bfloat16, weights and the stream in float32."""
    if not mixed:
        return nullcontext()
    # a pass reads each weight once: copies that outlive their product would take half a model more
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@contextmanager
def writing_precision(decoder: Decoder) -> Iterator[None]:
    """`mixed_precision` for writing: on a CPU a pass of few tokens does not round all weights."""
    mixed = mixed_precision(decoder.mixed, decoder.device)
    with rounded_matrices(decoder) if decoder.mixed else nullcontext(), mixed:
        yield


@contextmanager
def rounded_matrices(decoder: Decoder, *, frozen: bool = False) -> Iterator[None]:
    """Copies of a CPU's float32 matrices in bfloat16 take their place inside the block.

    Autocast, which would round them at every pass, gives the same numbers. Nothing changes where
    there is no memory for the copies.

    Args:
        decoder: Its layers' matrices and its head are meant.
        frozen: Leave the matrices that are trained. Default: all are copied.
    """
    named = [*decoder.layers.named_modules()]
    named += [(n, m) for n, m in decoder.module.named_modules() if isinstance(m, nn.Linear)]
    # norms of heads are no products, and a router may multiply with autocast off
    modules = {
        module
        for name, module in named
        if re.search("Linear|Conv1D", type(module).__name__)
        and name.rpartition(".")[2] not in ("gate", "router")
    }
    own = {module: module._parameters.get("weight") for module in modules}
    weights = {m: weight for m, weight in own.items() if _is_matrix(weight)}
    if frozen:
        weights = {m: weight for m, weight in weights.items() if not weight.requires_grad}
    size = sum(2 * weight.numel() for weight in weights.values())  # bytes
    if decoder.device.type != "cpu" or size > free_memory() / 4:
        weights = {}
    try:
        for module, weight in weights.items():
            # the module's alone: an embedding that shares the weight keeps it
            module._parameters["weight"] = nn.Parameter(weight.bfloat16(), requires_grad=False)
        yield
    finally:
        for module, weight in weights.items():
            module._parameters["weight"] = weight


def _is_matrix(weight: nn.Parameter | None) -> TypeGuard[nn.Parameter]:
    return weight is not None and weight.ndim == 2 and weight.dtype is torch.float32


@cache
def multiplies_faster(device: torch.device) -> bool:
    """Whether `mixed_precision` multiplies float32 in two thirds of the time or less.

    Other devices than processors are not asked: there, models are opened in half precision.
    """
    if device.type != "cpu":
        return False
    x, weight = torch.ones(512, 1024), torch.ones(1024, 1024)  # (S, D) and (F, D)
    seconds = {False: math.inf, True: math.inf}
    for mixed in (False, True) * 5:  # in turns, because other programs slow some of them down
        with mixed_precision(mixed, device):
            taken = timeit.repeat(lambda: linear(x, weight), number=1, repeat=2)
        seconds[mixed] = min(seconds[mixed], *taken)
    return seconds[True] <= 2 / 3 * seconds[False]


@contextmanager
def in_own_dtype(decoder: Decoder) -> Iterator[None]:
    """All passes inside the block in the model's own dtype, for what is compared bit for bit."""
    before, decoder.mixed = decoder.mixed, False
    try:
        yield
    finally:
        decoder.mixed = before


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block, products and convolutions are not rounded to less than their own dtype.

    In float32 they take neither TF32 nor bfloat16, and sums of half precision are in float32. The
    switches that allow it are the user's, and are back after the block.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    matmul: Any = cuda.matmul
    with ExitStack() as undo:
        for name in ("fp16", "bf16"):
            name = f"allow_{name}_reduced_precision_reduction"
            undo.callback(setattr, matmul, name, getattr(matmul, name))
            setattr(matmul, name, False)
        # from torch 2.9 on every kind of product has a switch of its own
        kinds: list[Any] = [matmul, *(getattr(mkldnn, name, None) for name in ("matmul", "conv"))]
        kinds.append(getattr(cudnn, "conv", None))
        for kind in [kind for kind in kinds if hasattr(kind, "fp32_precision")]:
            undo.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
            kind.fp32_precision = "ieee"
        if not hasattr(matmul, "fp32_precision"):
            undo.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        with suppress(RuntimeError):  # the common one cannot be read where these differ from it
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")  # sets all of them
        yield


def wait(module: nn.Module) -> None:
    """Returns when the devices of a module's weights have done all that they were asked to."""
    for device in {weight.device for weight in module.parameters() if not weight.is_meta}:
        torch.zeros((), device=device).item()  # a value is read after what was begun before it


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside the block; every part is in its own mode again after it."""
    training = [part for part in module.modules() if part.training]
    try:
        if training:
            module.eval()
        yield
    finally:
        for part in training:
            part.training = True


def remove_layers(decoder: Decoder, drop: Sequence[int]) -> Callable[[], None]:
    """Removes layers in place, by their present positions; returns what puts them back."""
    return decoder.keep_layers(check_layers(drop, range(len(decoder.layers))))


@contextmanager
def without_layers(decoder: Decoder, drop: Sequence[int]) -> Iterator[None]:
    """The model without some layers (or none) inside a ``with`` block, as `remove_layers`."""
    with ExitStack() as stack:
        if drop:
            stack.callback(remove_layers(decoder, drop))
        yield


def same_rotary_groups(windows: Sequence[Sequence[int]], decoder: Decoder) -> list[list[int]]:
    """Indices of the windows, in groups that may share a batch: all, for most models.

    A model with LongRoPE (arXiv:2402.13753) has two sets of rotary factors, and takes the one for
    long texts where its batch's longest window, or that one's padding, is longer than a limit.
    """
    # anything but a list of windows is refused by `pad`
    limits = decoder.rotary_limits
    if not limits or len(windows) == 0 or not _is_window(windows[0]):
        return [[*range(len(windows))]]
    groups: dict[tuple[bool, ...], list[int]] = {}
    for index, window in enumerate(windows):
        key = tuple(len(window) > limit for limit in limits)  # which factors it would take
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def padded(
    windows: Sequence[Sequence[int]], decoder: Decoder
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of windows with the same rotary factors: their indices, tokens and mask, as `pad`."""
    for indices in same_rotary_groups(windows, decoder):
        yield indices, *pad([windows[i] for i in indices], decoder)


def pad(windows: Sequence[Sequence[int]], decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Windows of any lengths as one batch: tokens (B, S) int64, and a mask of the real ones (B, S).

    Padding is token 0 on the right, S the longest window. Under a causal mask no real token sees
    it; the mask only weights the sums. Windows of different rotary factors need `padded`.
    """
    if len(windows) == 0 or not _is_window(windows[0]):  # an array has no truth value
        raise ShortGPTError(
            "expected at least one window of tokens, got none: pass a list of lists"
        )
    lengths = [len(w) for w in windows]
    sizes = f"windows have {min(lengths)} to {max(lengths)} tokens"
    if min(lengths) < 1 or max(lengths) > decoder.max_seq_len:
        raise ShortGPTError(f"{sizes}; this model takes 1 to {decoder.max_seq_len}: set `size`")
    if len(same_rotary_groups(windows, decoder)) > 1:
        limits = list(decoder.rotary_limits)
        raise ShortGPTError(f"{sizes}; rotary factors change beyond {limits}: set `batch_size` 1")
    # token 0 stands for padding, whatever it means: no real token sees it
    tokens = torch.zeros(len(windows), max(lengths), dtype=torch.long)  # (B, S)
    for row, window in enumerate(windows):
        tokens[row, : len(window)] = _ids(window)
    check_token_ids(tokens, decoder)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (S,) < (B, 1)
    return tokens.to(decoder.device), mask.to(decoder.device)


def _is_window(window: object) -> bool:
    # a number of an array or a tensor has no dimension
    return not isinstance(window, int) and getattr(window, "ndim", 1) > 0


def _ids(window: Sequence[int]) -> Tensor:
    # lists, arrays and tensors alike
    try:
        ids = torch.as_tensor(window)  # (S,)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, 0)
    check(ids.dim() == 1 and not ids.is_floating_point(), "window", window, "a list of token ids")
    return ids


def check_token_ids(tokens: Tensor, decoder: Decoder) -> None:
    """Raises ShortGPTError for token ids that the model has no embedding of."""
    # an embedding would fail without a word of which tokens, on CUDA for good
    if tokens.min() < 0 or tokens.max() >= decoder.vocab_size:
        raise ShortGPTError(
            f"token ids {int(tokens.min())}..{int(tokens.max())} are outside the vocabulary "
            f"0..{decoder.vocab_size - 1}; is this the model's tokenizer?"
        )


def damaged_weight(decoder: Decoder, numbers: Sequence[int]) -> str | None:
    """The first weight with NaN or infinite values, by its layer's number; None if there is none.

    Offloaded weights cannot be looked at: their states are, whenever they are read.
    """
    seen: set[nn.Parameter] = set()
    parts = [(f"layer {i} in ", layer) for i, layer in zip(numbers, decoder.layers, strict=True)]
    for part, module in [*parts, ("", decoder.module)]:
        for name, weight in module.named_parameters():
            if weight not in seen and not weight.is_meta and not is_finite(weight):
                return part + name
            seen.add(weight)
    return None


def is_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite; whole numbers are not."""
    if not weight.is_floating_point():  # of a quantization
        return True
    wide = weight if weight.dtype in DTYPES.values() else weight.float()  # float8 has no isfinite
    # the sum is 40 times as fast; it is infinite also where finite values exceed the dtype's range
    return bool(wide.sum().isfinite() or wide.isfinite().all())


class MetaDecoder:
    """A `Decoder` over ``llama.Transformer``, or over the model of Meta's reference package."""

    family = META
    rotary_limits: Sequence[int] = ()
    mixed = False

    def __init__(self, model: Any) -> None:
        self.model = self.module = model

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.model.params.max_seq_len

    @torch.no_grad()
    def run(self, tokens: Tensor) -> None:
        # ours has a way around the output head, the reference's model has none
        with mixed_precision(self.mixed, self.device):
            if hasattr(self.model, "hidden"):
                self.model.hidden(tokens)
            else:
                self.model(tokens, 0)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        # ours takes tokens alone, the reference's a start, too
        ours = hasattr(self.model, "hidden")
        with mixed_precision(self.mixed, self.device):
            return self.model(tokens) if ours else self.model(tokens, 0).float()  # (B, S, V)

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        before = self.layers

        def put(layers: nn.ModuleList) -> None:
            self.model.layers = layers
            # in both places where the model counts them
            self.model.n_layers = self.model.params.n_layers = len(layers)
            for i, layer in enumerate(layers):
                layer.layer_id = i  # type: ignore[assignment]

        try:
            put(nn.ModuleList(before[i] for i in keep))
        except BaseException:
            put(before)
            raise
        return lambda: put(before)


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
