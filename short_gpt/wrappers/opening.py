"""Checkpoints of either format by their path: which it is, and opened as a model."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import torch

from llama import Llama
from llama.checkpoint.meta import args_of_params, read_params
from llama.formats.gguf_read import part_paths
from llama.io.sources import Source, find_source, resolve
from llama.parallel import choose_device, choose_dtype, initialize, several_ranks
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.verify import (
    ROUNDING,
    Fingerprint,
    check_same,
    fingerprint_aligned,
    one_by_one,
)
from short_gpt.models.config_file import read_config, said_layers
from short_gpt.models.loading import explained
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama
from short_gpt.wrappers.short_model import ShortModel
from short_gpt.wrappers.streamed_llama import StreamedLlama

DEFAULTS = OpenOptions()


@overload
def open_model(
    source: str | Source,
    options: OpenOptions = ...,
    *,
    stream: Literal[False] = ...,
    **changes: object,
) -> ShortModel: ...


@overload
def open_model(
    source: str | Source, options: OpenOptions = ..., *, stream: bool, **changes: object
) -> ScoredModel: ...


def open_model(
    source: str | Source, options: OpenOptions = DEFAULTS, *, stream: bool = False, **changes: Any
) -> ScoredModel:
    """Opens a checkpoint of any format for scoring and removal.

    Args:
        source: Meta directory, Hugging Face directory, hub id or GGUF file.
        options: how to open it.
        stream: whether to hold one layer at a time in memory, of a Llama in Meta's format or in
            safetensors.
        changes: single options by their names, as in ``max_seq_len=1024``.

    Returns:
        A `ShortLlama` for Meta's format, a `StreamedLlama` with ``stream``, else a `ShortHFModel`.

    Raises:
        OSError, ShortGPTError: as those of ``Llama.build`` or ``from_pretrained``; or options
            that do not go together.
        TypeError: there is no such option.

    Example:
        >>> short = open_model("llama-2-7b", max_seq_len=1024)  # doctest: +SKIP
        >>> short = open_model("llama-2-70b", stream=True, max_memory="12GB")  # doctest: +SKIP
    """
    options = replace(options, **changes)
    if not -(2**63) <= options.seed < 2**63:
        raise ShortGPTError(f"seed = {options.seed}: expected a whole number below 2**63")
    if stream:
        return _open_streamed(source, options)
    if options.max_memory is not None:
        raise ShortGPTError(
            f"max_memory {options.max_memory} bounds a streamed model; pass stream as well, or "
            "leave it out"
        )
    source = find_source(source)
    return _open_meta(source, options) if source.kind == "meta" else open_hf(source, options)


def _open_streamed(source: str | Source, options: OpenOptions) -> StreamedLlama:
    if options.model_parallel_size is not None:
        raise ShortGPTError(
            f"model_parallel_size {options.model_parallel_size}: a streamed model holds one layer "
            "on one rank; leave one of them out"
        )
    return StreamedLlama(
        source,
        options.n_prune_layers,
        tokenizer_path=options.tokenizer_path,
        max_seq_len=options.max_seq_len,
        batch_size=options.max_batch_size,
        device=options.device,
        dtype=options.dtype,
        max_memory=options.max_memory,
        trust_remote_code=options.trust_remote_code,
    )


def _open_meta(source: str | Source, options: OpenOptions) -> ShortLlama:
    llama = Llama.build(
        source,
        options.tokenizer_path or find_tokenizer(source),
        options.max_seq_len,
        options.max_batch_size,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        model_parallel_size=options.model_parallel_size,
    )
    return ShortLlama(llama, options.n_prune_layers)


def open_hf(source: str | Source, options: OpenOptions = DEFAULTS) -> ShortHFModel:
    """Opens a model of transformers; arguments and errors as in `open_model`.

    A directory in Meta's format is none: `open_model` tells the formats apart.
    """
    check_tokenizer(options.tokenizer_path, source)
    if options.model_parallel_size not in (None, 1):
        raise ShortGPTError(
            f"model_parallel_size {options.model_parallel_size}: only Meta's format is split over "
            "ranks; convert the model, or leave it out, so that every rank reads its share of the "
            "windows"
        )
    device = choose_device(options.device)
    if several_ranks():  # before the model is loaded: the group decides this rank's device
        initialize(1, device=device)
    torch.manual_seed(options.seed)
    return ShortHFModel(
        source,
        None,
        options.n_prune_layers,
        device=device,
        dtype=choose_dtype(options.dtype, device),
        trust_remote_code=options.trust_remote_code,
    )


def reads_tokenizer(source: str | Source, *, stream: bool = False) -> bool:
    """Whether a model is read with a tokenizer file that is named; others bring their own.

    Raises:
        FileNotFoundError: as that of `find_source`.
    """
    return stream or find_source(source).kind == "meta"


def check_tokenizer(
    tokenizer_path: str | None, *models: str | Source, stream: bool = False
) -> None:
    """Raises ShortGPTError where a tokenizer is named that none of these models is read with."""
    if tokenizer_path is None or any(reads_tokenizer(name, stream=stream) for name in models):
        return
    names = " and ".join(dict.fromkeys(map(str, models)))
    raise ShortGPTError(
        f"`tokenizer_path` {tokenizer_path} has no effect on {names}, "
        "whose own tokenizer is read; Meta's format and streamed models take another: leave it out"
    )


def of_source(options: OpenOptions, source: str | Source, *, stream: bool = False) -> OpenOptions:
    """The options for one of several models: a tokenizer only where one is read."""
    if options.tokenizer_path is None or reads_tokenizer(source, stream=stream):
        return options
    return replace(options, tokenizer_path=None)


def open_trainable(source: str | Source, options: OpenOptions = DEFAULTS) -> ShortHFModel:
    """Opens a checkpoint of any format through transformers, as training needs it.

    Args:
        source: as for `open_model`.
        options: how to open it; of these, Meta's format reads ``tokenizer_path``, ``device`` and
            ``dtype``.

    Raises:
        OSError, ShortGPTError: as those of `open_hf` and ``ShortHFModel.from_meta``.
    """
    source = find_source(source)
    if source.kind != "meta":
        return open_hf(source, options)
    return ShortHFModel.from_meta(
        source,
        tokenizer_path=options.tokenizer_path,
        device=options.device,
        dtype=options.dtype,
    )


def layers_of(source: str | PathLike[str]) -> int | None:
    """How many layers a checkpoint has, by its params.json or config.json; None if not local.

    Raises:
        FileNotFoundError, ShortGPTError: as those of `find_source` and ``ModelArgs.from_params``.
    """
    source = find_source(source)
    if source.kind == "meta":
        return args_of_params(source.path, read_params(source.path)).n_layers
    if source.kind != "hf":
        return None
    try:
        if (count := said_layers(source.path)) is not None:
            return count
        config = read_config(str(source))
    except Exception as error:
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    return config.get_text_config(decoder=True).num_hidden_layers


def weights_of(source: str | Source) -> str | None:
    """A digest of a checkpoint's files of weights, which differs for other weights.

    It differs also for the same weights in another format, or in other shards.

    Args:
        source: directory in either format, GGUF file or hub id, which is fetched. Of a GGUF model
            in several files any of them stands for all.

    Returns:
        None where there are none of a known format. All bytes are read, once in a process.
    """
    kind = find_source(source).kind
    if kind == "gguf":
        return files_digest(part_paths(Path(source)))
    folder = resolve(source)
    for pattern in ("consolidated.*.pth",) if kind == "meta" else ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files_digest(files)
    return None


def same_model(
    source: str | Source,
    pruned: str | Source,
    drop: list[int],
    *,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    dtype: str | None = None,
) -> str:
    """Proves that a checkpoint is the source with some layers removed; one is loaded at a time.

    Args:
        source: the original checkpoint.
        pruned: the pruned checkpoint.
        drop: the layers that the second lacks; none compares two that must be the same.
        tokenizer_path: tokenizer of a source in Meta's format; None looks beside it.
        trust_remote_code: whether Python files that come with the model may run.
        name: of the second one in what is raised; None is its path.
        dtype: that the second one's weights were rounded to; None if they were not.

    Returns:
        A sentence that says what was compared.

    Raises:
        RuntimeError: the logits or the generation with the cache differ.
    """
    source, pruned = find_source(source), find_source(pruned)
    rounded_to = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    options = OpenOptions(device="cpu", trust_remote_code=trust_remote_code)

    def of_source() -> Fingerprint:
        short = open_model(source, options, tokenizer_path=tokenizer_path)
        if drop:
            short.remove_layers(drop)
        return fingerprint_aligned(short, dtype=rounded_to)

    exact = check_same(
        *one_by_one(of_source, lambda: fingerprint_aligned(open_model(pruned, options))),
        rounding=ROUNDING if (source.kind == "meta") != (pruned.kind == "meta") else 0.0,
        names=(f"{source} without {drop}" if drop else str(source), name or str(pruned)),
    )
    which = " without these layers" if drop else ""
    rounded = f" in {dtype}" if dtype else ""
    return (
        f"verified: the logits are those of the source{which}{rounded}, {exact}, and generation "
        "with the cache is that without it"
    )
