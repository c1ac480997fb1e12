"""How transformers reads a GGUF file: its header once, each tensor by itself, and all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llama.formats.gguf import ROPE_FACTORS
from llama.formats.gguf_read import STRING, GGUFParts, Header
from llama.formats.tokenizers import DIGITS
from short_gpt.models.pretrained import PretrainedTokenizer
from short_gpt.models.weights_report import some
from short_gpt.runtime.errors import ShortGPTError

LOADS = "load_gguf_checkpoint"  # transformers' own: configuration, tokenizer and weights of a file
# Modules of transformers 5 that hold its function for the metadata; version 4 has none of them.
METADATA = "read_gguf_metadata"
WITH_METADATA = (
    "transformers.integrations.gguf",
    "transformers.integrations.gguf.reader",
    "transformers.quantizers.quantizer_gguf",
)


@contextmanager
def reading_gguf(parts: GGUFParts) -> Iterator[list[str]]:
    """Gives transformers what was read of a GGUF file, and notes which tensors it leaves out.

    It walks through the header itself in Python for the config, twice for the tokenizer, and for
    the weights, which takes seconds each for a large vocabulary; the package gguf makes an array
    of every token, and several copies of a tensor to dequantize it, and transformers makes two
    more. Tensors of names that it does not know transformers passes over.

    Args:
        parts: the file.

    Returns:
        The names of those, filled while the file is read.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    left_out: list[str] = []
    fields = {key: _field(value) for key, value in parts.fields.items()}
    tensors = [SimpleNamespace(name=name) for name in parts.tensors]
    loads = partial(_load, getattr(reading, LOADS), parts, left_out)
    patches: list[tuple[ModuleType, str, object]] = [
        (gguf, "GGUFReader", lambda _: SimpleNamespace(fields=fields, tensors=tensors)),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),  # asked for every module
        (reading, "_gguf_parse_value", lambda value, _: value),
        (reading, LOADS, loads),
    ]
    patches += [(module, METADATA, partial(_metadata, parts)) for module in _with_metadata()]
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, ours in patches:
        setattr(module, name, ours)
    try:
        yield left_out
    finally:
        for module, name, theirs in before:
            setattr(module, name, theirs)


def _field(value: object) -> SimpleNamespace:
    """A key as the package gguf's reader has it, but that values stand for themselves."""
    values: Sequence[object] = value if isinstance(value, list) else [value]
    return SimpleNamespace(parts=values, data=range(len(values)), types=())


def _load(
    plain: Callable[..., dict[str, Any]],
    parts: GGUFParts,
    left_out: list[str],
    path: str,
    return_tensors: bool = False,
    model_to_load: Any = None,
    torch_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """What transformers' ``load_gguf_checkpoint`` gives, with one tensor at a time beside it.

    Args:
        plain: that function.
        parts: the file.
        left_out: takes the names of tensors that the model lacks.
        path, return_tensors, model_to_load, torch_dtype: as transformers has them.
    """
    from transformers import modeling_gguf_pytorch_utils as reading

    found = plain(path)
    if not return_tensors:
        return found
    _check_size(parts, model_to_load)
    kinds, architecture = reading.TENSOR_PROCESSORS, str(parts.fields["general.architecture"])
    processor = kinds.get(architecture, reading.TensorProcessor)(config=found["config"])
    names = reading.get_gguf_hf_weights_map(model_to_load, processor)
    weights: dict[str, Tensor] = {}
    found["tensors"] = weights
    told = {"tensor_key_mapping": names, "parsed_parameters": found}
    for name in parts.tensors:
        if _stays(processor, name, names):
            if name in names:
                weights[names[name]] = parts.read(name, torch_dtype)
            else:
                left_out.append(name)
            continue
        result = processor.process(weights=parts.read(name).numpy(), name=name, **told)
        if result.name in names:
            weights[names[result.name]] = torch.from_numpy(result.weights)
        elif result.name is not None:  # None: a tensor of all experts, which was cut up
            left_out.append(result.name)
        for key, weight in weights.items():  # of experts there may be several
            weights[key] = weight.to(torch_dtype or weight.dtype)
    return found


def _stays(processor: Any, name: str, names: dict[str, str]) -> bool:
    """Whether transformers takes a tensor as it is, which a stand-in shows that allows nothing."""
    stand_in, told = object(), {"tensor_key_mapping": names, "parsed_parameters": {"tensors": {}}}
    try:
        result = processor.process(weights=stand_in, name=name, **told)
    except (AttributeError, TypeError):
        return False
    return result.weights is stand_in


def _with_metadata() -> Iterator[ModuleType]:
    for name in WITH_METADATA:
        with suppress(ImportError):
            if hasattr(module := import_module(name), METADATA):
                yield module


def _metadata(
    parts: GGUFParts, _: object, string_arrays: Collection[str] = ()
) -> tuple[dict[str, object], tuple[str, ...]]:
    """What transformers' ``read_gguf_metadata`` gives: of texts not asked for, how many there are.

    Args:
        parts: the file.
        string_arrays: keys whose texts are asked for.
    """
    records, fields = parts.headers[0].records, dict[str, Any](parts.fields)
    counted = {k for k, r in records.items() if r.element == STRING} - {*string_arrays}
    return {k: len(v) if k in counted else v for k, v in fields.items()}, tuple(parts.tensors)


def _check_size(parts: GGUFParts, model: Any) -> None:
    """Refuses a model that is far larger than the file, of whose metadata it was made.

    Weights that a file lacks are made before they are refused. A tied output head counts twice.

    Args:
        parts: the file.
        model: on the meta device; or a part of it.

    Raises:
        ShortGPTError: it is.
    """
    made = sum(weight.numel() for weight in model.state_dict().values())
    there = sum(prod(place.shape) for place in parts.tensors.values())
    if made > 2 * there:
        raise ShortGPTError(
            f"its metadata are those of a model of {made:,} weights, and its tensors have {there:,}"
        )


def check_left_out(name: str, left_out: list[str]) -> None:
    """Refuses a GGUF file of which tensors would be left out.

    Args:
        name: of the file.
        left_out: as `reading_gguf` found them. Llama's divisors of the rotary frequencies count as
            known.

    Raises:
        ShortGPTError: there are any; it names them.
    """
    if others := set(left_out) - {ROPE_FACTORS}:
        raise ShortGPTError(
            f"{name} cannot be loaded: it holds {some(others)}, which transformers' model of its "
            "kind lacks and would leave out; open the model that it was made from"
        )


def mend_tokenizer(tokenizer: PretrainedTokenizer, header: Header) -> None:
    """Puts back the cut around digits that transformers drops of SmolLM2's tokenizer.

    Args:
        tokenizer: as transformers made it of a GGUF file; changed in place.
        header: of the file.
    """
    from tokenizers import pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or header.fields.get("tokenizer.ggml.pre") != DIGITS:
        return
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
