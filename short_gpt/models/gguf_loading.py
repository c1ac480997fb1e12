"""How transformers reads a GGUF file: its header once, and nothing of it left out in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

from llama.formats.gguf import ROPE_FACTORS
from llama.formats.gguf_header import STRING, Header
from llama.formats.gguf_parts import GGUFParts
from llama.formats.tokenizers import DIGITS
from short_gpt.models.pretrained import PretrainedTokenizer
from short_gpt.models.weights_report import some
from short_gpt.runtime.errors import ShortGPTError

MAPPED = "get_gguf_hf_weights_map"  # transformers' own: from names of tensors to those of weights
# Modules of transformers 5 that hold its function for the metadata; version 4 has none of them.
METADATA = "read_gguf_metadata"
WITH_METADATA = (
    "transformers.integrations.gguf",
    "transformers.integrations.gguf.reader",
    "transformers.quantizers.quantizer_gguf",
)


class _Asked(dict[str, str]):
    """A mapping that notes which names it was asked for and lacks."""

    def __init__(self, mapping: dict[str, str], left_out: list[str]) -> None:
        super().__init__(mapping)
        self._left_out = left_out

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if not found and isinstance(name, str):  # none: a tensor of all experts, which was cut up
            self._left_out.append(name)
        return found


@contextmanager
def reading_gguf(parts: GGUFParts) -> Iterator[list[str]]:
    """Gives transformers what was read of a GGUF file, and notes which tensors it leaves out.

    It walks through the header itself in Python for the config, twice for the tokenizer, and for
    the weights, which takes seconds each for a large vocabulary; the package gguf makes an array
    of every token, and several copies of a tensor to dequantize it. Tensors of names that it does
    not know transformers passes over.

    Args:
        parts: the file.

    Returns:
        The names of those, filled while the file is read.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    left_out: list[str] = []
    fields = {key: _field(value) for key, value in parts.fields.items()}
    tensors = [SimpleNamespace(name=n, data=n, tensor_type=None) for n in parts.tensors]
    patches: list[tuple[ModuleType, str, object]] = [
        (gguf, "GGUFReader", lambda _: SimpleNamespace(fields=fields, tensors=tensors)),
        (gguf, "dequantize", lambda name, _: parts.read(name).numpy()),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),  # asked for every module
        (reading, "_gguf_parse_value", lambda value, _: value),
        (reading, MAPPED, _noting(getattr(reading, MAPPED), parts, left_out)),
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


def _noting(
    mapped: Callable[..., dict[str, str]], parts: GGUFParts, left_out: list[str]
) -> Callable[..., dict[str, str]]:
    def noting(model: Any, *args: object, **options: object) -> dict[str, str]:
        _check_size(parts, model)
        return _Asked(mapped(model, *args, **options), left_out)

    return noting


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
