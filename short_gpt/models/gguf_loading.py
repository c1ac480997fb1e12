"""GGUF architectures, and how transformers reads their files: the header once, tensors one by one.

A row of `ARCHITECTURES`, by llama.cpp's name, says which layers can be removed, whether changed
weights can be written back, and what transformers gets wrong. Without a row all layers are alike:
any can be removed, none be healed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from llama.formats.gguf import ROPE_FACTORS, llama3_factor
from llama.formats.gguf_read import STRING, GGUFParts, Header
from llama.formats.hf import LLAMA3_SCALING
from llama.tokenizer import DIGITS
from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp and transformers make of a file of this architecture."""

    # Layers i with i % every == at are of another kind: (every, at), from llama.cpp's code.
    period: tuple[int, int] | None = None
    # Only with a window: without the key all layers are of one kind.
    needs_window: bool = False
    # llama.cpp since September 2026 (https://github.com/ggml-org/llama.cpp/pull/29042) takes a list
    # of kinds from the file, seen to work here; before, it ignored the list.
    reads_list: bool = False
    # llama.cpp takes the kinds from a list alone; what it makes of one number changed.
    needs_list: bool = False
    # llama.cpp aborts where all layers have a sliding window, as it does where none has.
    needs_both_kinds: bool = False
    # llama.cpp computes otherwise for another number of layers.
    by_count: bool = False
    # Of so many layers it is another variant: of 27B, with another scale of attention; with a
    # window.
    variant: int | None = None
    # Later layers take values of the first.
    reads_first: bool = False

    # Changed weights can be written: they are in transformers as in the file, except that
    healed: bool = False
    # a file has rows of queries and keys in the order of Meta's format,
    permuted: bool = False
    # and norms plus one.
    norms_plus_one: bool = False

    # One number for the kinds is a period, whose last layer has no window; transformers has its own
    # period.
    period_in_file: bool = False
    # llama.cpp derives the scale of attention from sizes and `variant`; transformers has a default.
    scaled_by_size: bool = False
    # transformers knows its rotary positions, whatever the file says.
    own_rotary: bool = False


ALIKE = Architecture()
EVERY_4TH = Architecture((4, 3))
LISTED = Architecture(needs_list=True)
COUNTED = Architecture(by_count=True)
GEMMA = Architecture(
    reads_list=True, healed=True, norms_plus_one=True, period_in_file=True, scaled_by_size=True
)

ARCHITECTURES: dict[str, Architecture] = {
    "afmoe": Architecture((4, 3), needs_window=True),
    "arwkv7": Architecture(reads_first=True),
    "baichuan": COUNTED,
    "cohere2": Architecture((4, 3), reads_list=True),
    "cohere2moe": Architecture((4, 0)),
    "deepseek2": COUNTED,
    "deepseek32": COUNTED,
    "dots3note": LISTED,
    "exaone-moe": EVERY_4TH,
    "exaone4": Architecture((4, 3), needs_window=True, variant=64),
    "gemma-embedding": Architecture((6, 5), reads_list=True, needs_both_kinds=True),
    "gemma-embedding2": Architecture((6, 5)),
    "gemma2": replace(GEMMA, period=(2, 1), variant=46),
    "gemma3": replace(GEMMA, period=(6, 5), needs_window=True, variant=62),
    "gemma3n": Architecture((5, 4)),
    "gemma4": Architecture(needs_list=True, own_rotary=True),
    "gemma4-assistant": LISTED,
    "gpt-oss": Architecture((2, 1), reads_list=True, period_in_file=True, own_rotary=True),
    "granite_swa": LISTED,
    "laguna": Architecture((4, 0)),
    "llama": Architecture(healed=True, permuted=True),
    "llama4": EVERY_4TH,
    "maple": LISTED,
    "mellum": Architecture((4, 3), needs_window=True),
    "mimo2": LISTED,
    "minicpm": COUNTED,
    "minicpm3": COUNTED,
    "modern-bert": Architecture((3, 0), needs_window=True, reads_list=True, needs_both_kinds=True),
    "muse-glimmer": Architecture((4, 3), reads_list=True),
    "olmo2": Architecture((4, 3), needs_window=True, reads_list=True, healed=True),
    "onyx": EVERY_4TH,
    "phi3": Architecture(healed=True),
    "plamo3": Architecture((8, 7)),
    "qwen2": Architecture(healed=True),
    "qwen3": Architecture(healed=True),
    "qwen35": EVERY_4TH,
    "qwen35moe": EVERY_4TH,
    "qwen3next": EVERY_4TH,
    "rwkv7": Architecture(reads_first=True),
    "smallthinker": Architecture((4, 0), needs_window=True),
    "smollm3": EVERY_4TH,
    "spark2_5": LISTED,
    "starcoder2": Architecture(healed=True),
    "step35": LISTED,
}


def architecture(name: str) -> Architecture:
    """The row of an architecture; a variant of one that counts its layers has that one's."""
    counted = (
        row for known, row in ARCHITECTURES.items() if row.by_count and name.startswith(known)
    )
    return ARCHITECTURES.get(name) or next(counted, ALIKE)


LOADS = "load_gguf_checkpoint"  # transformers' own: configuration, tokenizer and weights of a file
# Modules of transformers 5 that hold its function for the metadata; version 4 has none of them.
METADATA = "read_gguf_metadata"
WITH_METADATA = (
    "transformers.integrations.gguf",
    "transformers.integrations.gguf.reader",
    "transformers.quantizers.quantizer_gguf",
)
PATTERN = "attention.sliding_window_pattern"  # the key of the layers' kinds
# Bounds of logits, which a file says and transformers takes from its own defaults.
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ORIGINAL_CONTEXT = "original_context_length"
# What is known of YaRN; with other keys llama.cpp scales attention, or other frequencies.
YARN = {"type", "factor", "finetuned", ORIGINAL_CONTEXT}


def complete_config(parts: GGUFParts, config: Any) -> bool:
    """Adds what transformers leaves out of a GGUF file's metadata; whether there was anything.

    Raises:
        ShortGPTError: the file scales rotary positions in a way that is not known here.
    """
    # the language model's config is the whole one in all GGUF files
    fields, arch = parts.fields, str(parts.fields["general.architecture"])
    values = {name: fields[key] for name in CAPS if (key := f"{arch}.{name}") in fields}
    row = architecture(arch)
    if row.scaled_by_size:  # there is no key for it
        each = config.hidden_size // config.num_attention_heads
        is_variant = fields[f"{arch}.block_count"] == row.variant
        values["query_pre_attn_scalar"] = each if is_variant else config.head_dim
    if kinds := gguf_layer_types(fields, config):
        values["layer_types"] = kinds
    values = {name: value for name, value in values.items() if hasattr(config, name)}
    vars(config).update(values)
    if not (scaling := _rotary_scaling(parts)):
        return bool(values)
    if isinstance(rotary := getattr(config, "rope_parameters", None), dict):
        rotary.get("full_attention", rotary).update(scaling)  # Gemma 3 has one for each kind
    else:  # version 4
        config.rope_scaling = scaling
    return True


def is_scaled(parts: GGUFParts) -> bool:
    """Whether a file scales rotary positions, which plain transformers ignores."""
    try:
        return _rotary_scaling(parts) is not None
    except ShortGPTError:  # by a way that is not known here either
        return True


def _rotary_scaling(parts: GGUFParts) -> dict[str, object] | None:
    """How a file scales rotary positions, as a config says it; None if there is nothing to add."""
    fields, arch = parts.fields, str(parts.fields["general.architecture"])
    if architecture(arch).own_rotary:
        return None
    names = ("scaling.type", "scaling.factor", "scale_linear")
    kind, factor, older = (fields.get(f"{arch}.rope.{name}") for name in names)
    factor = 1.0 if kind == "none" else factor or older or 1.0  # without a type it is linear
    if ROPE_FACTORS in parts.tensors and kind in (None, "none"):
        theta = float(cast("float", fields.get(f"{arch}.rope.freq_base", 10000.0)))
        divisors = parts.read(ROPE_FACTORS)  # (head size / 2,)
        if (scale := llama3_factor(divisors, 2 * len(divisors), theta)) is not None:
            return {"rope_type": "llama3", "factor": scale, **LLAMA3_SCALING}
    elif ROPE_FACTORS not in parts.tensors and kind in (None, "none", "linear"):
        return None if factor == 1 else {"rope_type": "linear", "factor": factor}
    elif ROPE_FACTORS not in parts.tensors and kind == "yarn":
        scaling = f"{arch}.rope.scaling."
        others = {key.removeprefix(scaling) for key in fields if key.startswith(scaling)} - YARN
        context = fields.get(scaling + ORIGINAL_CONTEXT) or fields.get(f"{arch}.context_length")
        if context and not others:
            scaled = {"rope_type": kind, "factor": factor}
            return {**scaled, "original_max_position_embeddings": context}
    raise ShortGPTError(
        f"it scales rotary positions ({kind or ROPE_FACTORS}) in a way that its config in "
        "transformers would leave out; open the model that it was made from"
    )


def gguf_layer_types(fields: Mapping[str, object], config: Any) -> list[str] | None:
    """The kinds of a GGUF file's layers, by its metadata, for the config that transformers made.

    None if it has none, or all layers of the config are of one kind.
    """
    # transformers takes them from the layers' positions by periods of its own; a file may differ
    arch = str(fields["general.architecture"])
    key = f"{arch}.{PATTERN}"
    slides, layers = fields.get(key), fields.get(f"{arch}.block_count")
    has_kinds = hasattr(config, "layer_types")
    if isinstance(slides, int) and isinstance(layers, int) and architecture(arch).period_in_file:
        slides = [not slides or (i + 1) % slides for i in range(layers)]
    if slides is None or not (isinstance(slides, list) or has_kinds):
        return None
    # the size of the window is an entry of its own
    windows = has_kinds and getattr(config, "sliding_window", None)
    if not isinstance(slides, list) or (any(slides) and not windows):
        raise ShortGPTError(
            f"{key} names layers with a sliding window, which transformers' {config.model_type} "
            "does not have here; open the model that it was made from"
        )
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return kinds if has_kinds else None


@contextmanager
def reading_gguf(parts: GGUFParts) -> Iterator[list[str]]:
    """Gives transformers what was read of a GGUF file; yields the names of tensors that it skips.

    By itself it walks through the header in Python four times, which takes seconds each for a large
    vocabulary, it and the package gguf copy a tensor several times to dequantize it, and of a model
    in several files it reads one.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    skipped: list[str] = []
    # keys as the package gguf's reader has them, except that values stand for themselves
    values = {k: v if isinstance(v, list) else [v] for k, v in parts.fields.items()}
    fields = {k: SimpleNamespace(parts=v, data=range(len(v)), types=()) for k, v in values.items()}
    header = SimpleNamespace(
        fields=fields, tensors=[SimpleNamespace(name=name) for name in parts.tensors]
    )
    patches: list[tuple[ModuleType, str, object]] = [
        (gguf, "GGUFReader", lambda _: header),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),  # asked for every module
        (reading, "_gguf_parse_value", lambda value, _: value),
        (reading, LOADS, partial(_load, getattr(reading, LOADS), parts, skipped)),
    ]
    # modules that import the function hold it under their own names
    for name in WITH_METADATA:
        with suppress(ImportError):
            if hasattr(module := import_module(name), METADATA):
                patches.append((module, METADATA, partial(_metadata, parts)))
    # whatever happens inside, transformers has its own functions again after it
    with ExitStack() as stack:
        for module, name, ours in patches:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, ours)
        yield skipped


def _load(
    plain: Callable[..., dict[str, Any]],
    parts: GGUFParts,
    skipped: list[str],
    path: str,
    return_tensors: bool = False,
    model_to_load: Any = None,
    torch_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """As ``plain``, transformers' own, does with the last four; tensors are read one at a time."""
    from transformers import modeling_gguf_pytorch_utils as reading

    result = plain(path)
    if not return_tensors:
        return result
    kinds, architecture = reading.TENSOR_PROCESSORS, str(parts.fields["general.architecture"])
    processor = kinds.get(architecture, reading.TensorProcessor)(config=result["config"])
    named: Any = reading.get_gguf_hf_weights_map
    takes_processor = "processor" in signature(named).parameters  # not in version 4
    names = named(model_to_load, *[processor] * takes_processor)
    weights: dict[str, Tensor] = {}
    result["tensors"] = weights
    options = {"tensor_key_mapping": names, "parsed_parameters": result}
    for name in parts.tensors:
        if _is_unchanged(processor, name, names):
            if name in names:
                weights[names[name]] = parts.read(name, torch_dtype)
            else:
                skipped.append(name)
            continue
        # the processor turns rows, or splits experts: it needs all numbers
        done = processor.process(weights=parts.read(name).numpy(), name=name, **options)
        if done.name in names:
            weights[names[done.name]] = torch.from_numpy(done.weights)
        elif done.name is not None:  # None: a tensor of all experts, which was cut up
            skipped.append(done.name)
        for key, weight in weights.items():  # of experts there may be several
            weights[key] = weight.to(torch_dtype or weight.dtype)
    return result


def _is_unchanged(processor: Any, name: str, names: dict[str, str]) -> bool:
    # whether transformers returns a tensor unchanged, tried with a placeholder: any access to its
    # shape or values would raise
    stand_in, parsed = object(), dict[str, object](tensors={})
    options = {"tensor_key_mapping": names, "parsed_parameters": parsed}
    try:
        result = processor.process(weights=stand_in, name=name, **options)
    except (AttributeError, TypeError):
        return False
    return result.weights is stand_in


def _metadata(
    parts: GGUFParts, _: object, string_arrays: Collection[str] = ()
) -> tuple[dict[str, object], tuple[str, ...]]:
    # as transformers' own; of texts that are not asked for by their key, how many there are
    records, fields = parts.headers[0].records, dict[str, Any](parts.fields)
    counted = {k for k, r in records.items() if r.element == STRING} - {*string_arrays}
    return {k: len(v) if k in counted else v for k, v in fields.items()}, tuple(parts.tensors)


def mend_tokenizer(tokenizer: Any, header: Header) -> None:
    """Puts back in place the split at digits that transformers drops of SmolLM2's tokenizer."""
    from tokenizers import pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or header.fields.get("tokenizer.ggml.pre") != DIGITS:
        return
    # each digit by itself, before all else
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
