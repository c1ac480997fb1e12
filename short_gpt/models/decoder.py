"""What the method needs to know of a model; B sequences, S tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from llama.formats.safetensors import DTYPES
from short_gpt.models.families import Family
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError


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
def in_own_dtype(decoder: Decoder) -> Iterator[None]:
    """All passes inside the block in the model's own dtype, for what is compared bit for bit."""
    before, decoder.mixed = decoder.mixed, False
    try:
        yield
    finally:
        decoder.mixed = before


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
    if len(windows) == 0:  # an array has no truth value
        raise ShortGPTError("expected at least one window of tokens, got none")
    if not _is_window(windows[0]):
        raise ShortGPTError(
            "expected a list of windows, each a list of token ids, got one: pass [it]"
        )
    lengths = [len(w) for w in windows]
    if min(lengths) < 1 or max(lengths) > decoder.max_seq_len:
        raise ShortGPTError(
            f"windows have {min(lengths)} to {max(lengths)} tokens; this model takes 1 to "
            f"{decoder.max_seq_len} (max_seq_len): give a `size` in that range"
        )
    if len(same_rotary_groups(windows, decoder)) > 1:
        raise ShortGPTError(
            f"windows have {min(lengths)} to {max(lengths)} tokens; this model's rotary factors "
            f"change beyond {list(decoder.rotary_limits)}: read those on either side apart, as "
            "with batch_size 1"
        )
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
    if ids.dim() != 1 or ids.is_floating_point():
        raise ShortGPTError(
            f"expected token ids, whole numbers below 2**63, got a window of {str(window)[:60]}"
        )
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
    parts = [(f"layer {i} in ", own) for i, own in zip(numbers, decoder.layers, strict=True)]
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
