"""Models of any format, opened by their path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import nn

from llama.parallel import choose_device, choose_dtype, initialize, is_distributed
from llama.sources import Source, find_source
from short_gpt.data.windows import windows
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.perplexity import perplexity as perplexity_of_decoder
from short_gpt.models.decoder import Decoder
from short_gpt.models.loading import TRUST
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama
from short_gpt.wrappers.short_model import ShortModel
from short_gpt.wrappers.streamed_llama import StreamedLlama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULTS = OpenOptions()


@overload
def open_model(
    source: str | Source | PreTrainedModel,
    options: OpenOptions = ...,
    *,
    stream: Literal[False] = ...,
    tokenizer: PreTrainedTokenizerBase | None = ...,
    **changes: Any,
) -> ShortModel: ...


@overload
def open_model(
    source: str | Source,
    options: OpenOptions = ...,
    *,
    stream: bool | str | int | None,
    **changes: Any,
) -> ScoredModel: ...


def open_model(
    source: str | Source | PreTrainedModel,
    options: OpenOptions = DEFAULTS,
    *,
    stream: bool | str | int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **changes: Any,
) -> ScoredModel:
    """Opens a checkpoint for scoring and removal; as a `StreamedLlama` with ``stream``.

    Args:
        source: Meta directory (a `ShortLlama`), Hugging Face directory, hub id or GGUF file; or a
            model of transformers that is loaded.
        tokenizer: Tokenizer of transformers; a loaded model has none of its own. Default: the one
            beside the model.
        stream: One layer at a time in memory, of a Llama in Meta's format or in safetensors; or
            the memory of the whole process, as in "12GB". Default: the options'.
        changes: Single options by their names, as in ``max_seq_len=1024``.

    Example:
        >>> short = open_model("llama-2-7b", max_seq_len=1024)  # doctest: +SKIP
        >>> short = open_model("llama-2-70b", stream="12GB")  # doctest: +SKIP
    """
    options = replace(options, **changes, stream=options.stream if stream is None else stream)
    if not isinstance(source, str | PathLike | Source):
        return open_trainable(source, options, tokenizer)
    if not options.stream:
        source = find_source(source)
        if source.kind != "meta":
            return open_trainable(source, options, tokenizer)
    if tokenizer is not None:
        raise ShortGPTError(f"{source} is read with tokenizer_path=, a file: pass its path")
    if options.stream:
        names = ("n_prune_layers", "tokenizer_path", "max_seq_len", "batch_size", "device", "dtype")
        entries = {name: getattr(options, name) for name in (*names, TRUST)}
        short = StreamedLlama(source, max_memory=options.max_memory, **entries)
        return short.in_precision(options.precision)
    entries = {field.name: getattr(options, field.name) for field in fields(OpenOptions)}
    return ShortLlama.from_checkpoint(source, **entries)


def as_short(
    model: object, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> ScoredModel:
    """An opened model as it is; a name or a loaded model of transformers by `open_model`."""
    if isinstance(model, ScoredModel):
        return model
    return open_model(model, tokenizer=tokenizer, **options)  # type: ignore[call-overload]


def as_windows(
    texts: Iterable[str | Sequence[int]], short: ScoredModel, *, size: int = 1024
) -> list[Sequence[int]]:
    """Windows of token ids as they are; texts cut into windows of ``size`` that do not overlap."""
    texts = [texts] if isinstance(texts, str) else [*texts]
    cut = [text for text in texts if not isinstance(text, str)]
    if strings := [text for text in texts if isinstance(text, str)]:
        size = min(size, short.decoder.max_seq_len)
        how: Any = {"size": size, "stride": size, "bos": short.bos, "tail": "keep"}
        cut += [*windows(strings, short.encode, **how)]
    return cut


def perplexity(
    model: ScoredModel | Decoder | str | PathLike[str] | PreTrainedModel,
    texts: Iterable[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    size: int = 1024,
    batch_size: int = 1,
    progress: bool = False,
    total: int | None = None,
) -> Perplexity:
    """Perplexity of a model on texts: exp(nats / predicted tokens), each window read on its own.

    Args:
        model: Opened model, loaded model of transformers, or name of a checkpoint; or a `Decoder`.
        texts: Strings, or windows of token ids; for a `Decoder`, lists of windows.
        tokenizer: Tokenizer of a loaded model.
        size: Tokens in a window of a string. Default: 1024.
        batch_size: Windows read at once. Default: 1.
        progress: Show a bar.
        total: Number of windows to come, for the bar.

    Raises:
        ShortGPTError: no window has two tokens.
        NotFiniteError: a logit of a predicted token is NaN or infinite.

    Example:
        >>> perplexity("llama-2-7b", ["It was the best of times, ..."]).value  # doctest: +SKIP
        5.47
    """
    if isinstance(model, str | PathLike | ScoredModel | nn.Module):
        short = as_short(model, tokenizer)
        read = as_windows(texts, short, size=size)
        return short.perplexity(read, batch_size=batch_size, total=total, progress=progress)
    return perplexity_of_decoder(model, texts, total=total, progress=progress)


def open_trainable(
    source: str | Source | PreTrainedModel,
    options: OpenOptions = DEFAULTS,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ShortHFModel:
    """Opens a model of any format, or a loaded one, through transformers, as training needs it.

    Arguments are as in `open_model`. A loaded model takes no option of loading.
    """
    count = options.n_prune_layers
    if not isinstance(source, str | PathLike | Source):
        for field in fields(OpenOptions):
            known = field.name in ("device", "n_prune_layers", "precision", "seed")
            if not known and getattr(options, field.name) != field.default:
                raise ShortGPTError(
                    f"`{field.name}` is for loading, and this is loaded: leave it out"
                )
        short = ShortHFModel(source, None, count, tokenizer=tokenizer, device=options.device)
        return short.in_precision(options.precision)
    source, device = find_source(source), choose_device(options.device)
    if source.kind == "meta":
        how: Any = {"tokenizer_path": options.tokenizer_path, "dtype": options.dtype}
        short = ShortHFModel.from_meta(source, device=device, **how)
        return short.in_precision(options.precision)
    own = f"None: the tokenizer of {source} is read"
    check(options.tokenizer_path is None, "tokenizer_path", options.tokenizer_path, own)
    if options.model_parallel_size not in (None, 1):
        raise ShortGPTError(
            f"model_parallel_size = {options.model_parallel_size}: only Meta's format is split "
            "over ranks; convert the model, or leave it out, so that every rank reads its share "
            "of the windows"
        )
    # before the model is loaded: the group decides this rank's device
    grouped = dist.is_initialized() and dist.get_world_size() > 1  # by the caller
    if is_distributed() or (grouped and options.model_parallel_size == 1):
        initialize(1, device=device)
    torch.manual_seed(options.seed)
    how = {"dtype": choose_dtype(options.dtype, device), TRUST: options.trust_remote_code}
    short = ShortHFModel(source, None, count, tokenizer=tokenizer, device=device, **how)
    return short.in_precision(options.precision)
