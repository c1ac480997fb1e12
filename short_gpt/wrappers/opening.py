"""Checkpoints of either format by their path: which it is, and opened as a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from llama import Llama
from llama.checkpoint.meta import args_of_params, read_params
from llama.formats.gguf_parts import part_paths
from llama.io.hub import resolve
from llama.io.sources import is_meta, kind_of
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
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama
from short_gpt.wrappers.short_model import ShortModel
from short_gpt.wrappers.streamed_llama import StreamedLlama


@dataclass(frozen=True)
class OpenOptions:
    """How a checkpoint is opened; what a format does not know is without effect on it.

    Attributes:
        n_prune_layers: how many layers `remove_layers` takes out; may be set later.
        tokenizer_path: tokenizer file of Meta's format or of a streamed model; None looks beside
            the checkpoint. Other models bring their own, and refuse one.
        max_seq_len: longest window in tokens, of Meta's format or streamed.
        max_batch_size: most windows read at once, of Meta's format or streamed.
        seed: of what a model samples.
        device: None takes CUDA, MPS or CPU, the first there is.
        dtype: of weights and states; None is float32 on CPU, bfloat16 on CUDA, else float16.
        model_parallel_size: ranks that share one model under torchrun; None is all of them for
            Meta's format and 1 for others, which cannot be shared.
        max_memory: of a streamed model's process, in bytes or like "3GB"; None takes half of what
            is free.
        trust_remote_code: whether the Python files that come with a Hugging Face model are run.
    """

    n_prune_layers: int | None = None
    tokenizer_path: str | None = None
    max_seq_len: int = 2048
    max_batch_size: int = 1
    seed: int = 1
    device: str | None = None
    dtype: str | None = None
    model_parallel_size: int | None = None
    max_memory: str | int | None = None
    trust_remote_code: bool = False


DEFAULTS = OpenOptions()


@overload
def open_model(
    source: str, options: OpenOptions = ..., *, stream: Literal[False] = ..., **changes: object
) -> ShortModel: ...


@overload
def open_model(
    source: str, options: OpenOptions = ..., *, stream: bool, **changes: object
) -> ScoredModel: ...


def open_model(
    source: str, options: OpenOptions = DEFAULTS, *, stream: bool = False, **changes: Any
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
    return _open_meta(source, options) if is_meta(source) else open_hf(source, options)


def _open_streamed(source: str, options: OpenOptions) -> StreamedLlama:
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


def _open_meta(source: str, options: OpenOptions) -> ShortLlama:
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


def open_hf(source: str, options: OpenOptions = DEFAULTS) -> ShortHFModel:
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
    place = choose_device(options.device)
    if several_ranks():  # before the model is loaded: the group decides this rank's device
        initialize(1, device=place)
    torch.manual_seed(options.seed)
    kind = choose_dtype(options.dtype, place)
    return ShortHFModel(
        source,
        None,
        options.n_prune_layers,
        device=place,
        dtype=kind,
        trust_remote_code=options.trust_remote_code,
    )


def reads_tokenizer(source: str, *, stream: bool = False) -> bool:
    """Whether a model is read with a tokenizer file that is named; others bring their own.

    Raises:
        FileNotFoundError: as that of `is_meta`.
    """
    return stream or is_meta(source)


def check_tokenizer(tokenizer_path: str | None, *models: str, stream: bool = False) -> None:
    """Raises ShortGPTError where a tokenizer is named that none of these models is read with."""
    if tokenizer_path is None or any(reads_tokenizer(name, stream=stream) for name in models):
        return
    names = " and ".join(dict.fromkeys(models))
    raise ShortGPTError(
        f"`tokenizer_path` {tokenizer_path} has no effect on {names}, "
        "whose own tokenizer is read; Meta's format and streamed models take another: leave it out"
    )


def open_trainable(source: str, options: OpenOptions = DEFAULTS) -> ShortHFModel:
    """Opens a checkpoint of any format through transformers, as training needs it.

    Args:
        source: as for `open_model`.
        options: how to open it; of these, Meta's format reads ``tokenizer_path``, ``device`` and
            ``dtype``.

    Raises:
        OSError, ShortGPTError: as those of `open_hf` and ``ShortHFModel.from_meta``.
    """
    if not is_meta(source):
        return open_hf(source, options)
    place = {"device": options.device, "dtype": options.dtype}
    return ShortHFModel.from_meta(source, tokenizer_path=options.tokenizer_path, **place)


def layers_of(source: str) -> int | None:
    """How many layers a checkpoint has, by its params.json or config.json; None if not local.

    Raises:
        FileNotFoundError, ShortGPTError: as those of `is_meta` and ``ModelArgs.from_params``.
    """
    kind = kind_of(source)
    if kind == "meta":
        return args_of_params(Path(source), read_params(Path(source))).n_layers
    if kind != "hf":
        return None
    try:
        if (count := said_layers(Path(source))) is not None:
            return count
        config = read_config(source)
    except Exception as error:
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    return config.get_text_config(decoder=True).num_hidden_layers


def weights_of(source: str) -> str | None:
    """A digest of a checkpoint's files of weights: another one for other weights.

    The same weights in another format, or in other shards, have another one too.

    Args:
        source: directory in either format, GGUF file or hub id, which is fetched. Of a GGUF model
            in several files any of them stands for all.

    Returns:
        None where there are none of a known format. All bytes are read, once in a process.
    """
    kind = kind_of(source)
    if kind == "gguf":
        return files_digest(part_paths(Path(source)))
    folder = resolve(source)
    for pattern in ("consolidated.*.pth",) if kind == "meta" else ("*.safetensors", "*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files_digest(files)
    return None


def same_model(
    source: str,
    pruned: str,
    drop: list[int],
    *,
    tokenizer_path: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    dtype: str | None = None,
) -> str:
    """Proves that a checkpoint is the source without some layers; one is loaded at a time.

    Args:
        source, pruned: the two checkpoints.
        drop: the layers that the second lacks; none compares two that are to be the same.
        tokenizer_path: tokenizer of a source in Meta's format; None looks beside it.
        trust_remote_code: whether Python files that come with the model may run.
        name: of the second one in what is raised; None is its path.
        dtype: that the second one's weights were rounded to; None if they were not.

    Returns:
        A sentence that says what was compared.

    Raises:
        RuntimeError: the logits or the generation with the cache differ.
    """
    kind = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    options = OpenOptions(device="cpu", trust_remote_code=trust_remote_code)

    def of_source() -> Fingerprint:
        whole = open_model(source, options, tokenizer_path=tokenizer_path)
        if drop:
            whole.remove_layers(drop)
        return fingerprint_aligned(whole, dtype=kind)

    exact = check_same(
        *one_by_one(of_source, lambda: fingerprint_aligned(open_model(pruned, options))),
        rounding=ROUNDING if is_meta(source) != is_meta(pruned) else 0.0,
        names=(f"{source} without {drop}" if drop else source, name or pruned),
    )
    which = " without these layers" if drop else ""
    rounded = f" in {dtype}" if dtype else ""
    return (
        f"verified: the logits are those of the source{which}{rounded}, {exact}, and generation "
        "with the cache is that without it"
    )
