"""Configs: sizes checked against the files, a digest of what counts, errors of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from llama.args import MAX_INTEGER, ModelArgs, check_positive
from llama.checkpoint.meta import Checkpoint
from llama.errors import short_repr
from llama.files import read_json
from llama.formats.names import ffn_keys
from llama.formats.safetensors import INDEX, WEIGHTS, SafetensorsFile, open_weights
from llama.parallel import config_dtype
from llama.sources import find_source, hub_failure, reach
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError, required, without_password

TRUST = "trust_remote_code"  # an option, and in errors: a model comes with Python code
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head")
OPTIONAL = ("intermediate_size", "num_key_value_heads", "head_dim", "n_inner")
# Sizes that a model has if its config has these numbers; a weight takes a bit at least.
MATRICES: list[tuple[str, ...]] = [("vocab_size", width) for width in WIDTHS[:3]]
MATRICES += [("hidden_size", "intermediate_size"), ("n_embd", "n_embd"), ("d_model", "d_model")]
MATRICES += [("hidden_size", heads, "head_dim") for heads in ("num_attention_heads", OPTIONAL[1])]
MATRICES += [("hidden_size", "hidden_size"), ("num_attention_heads",), ("num_key_value_heads",)]
BITS = 8
LAYER_BYTES = 1000  # the names and offsets of a layer's tensors alone take more
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in settings of generation
# The entries that a Llama's shape is made of.
SHAPE = ["hidden_size", "num_hidden_layers", "vocab_size"]
SHAPE += ["num_attention_heads", "intermediate_size"]
# Entries of a config.json without effect on a forward pass. dtype: whoever opens a model chooses
# it, and states keep it by itself. Text is encoded by the tokenizer, which has its own bos and eos;
# pad_token_id counts, as RoBERTa numbers its positions from it.
HARMLESS = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "architectures"})
HARMLESS |= {"torch_dtype", "dtype", "use_cache", "return_dict", "initializer_range"}
HARMLESS |= {"output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id"}
HARMLESS |= {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task"}
# Of a Llama in Meta's format: limits of a run, and a size that the weights decide (-1 in files).
LIMITS = frozenset({"max_batch_size", "max_seq_len", "vocab_size"})


def read_config(source: str, options: Mapping[str, object] | None = None) -> Any:
    """The config of a model of transformers; if its files lie here, `check_config` goes first."""
    with required("transformers", by="a Hugging Face model"):
        from transformers import AutoConfig
    # False and not None, with which transformers asks on the terminal
    options = {TRUST: False, **(options or {})}
    directory = Path(source) / str(options.get("subfolder") or "")
    if "gguf_file" not in options and (directory / "config.json").is_file():
        check_config(directory)
    elif not Path(source).exists():
        reach(source, options)
    return AutoConfig.from_pretrained(source, **options)


def layers_in_config(directory: Path) -> int | None:
    """The number of layers in a config with custom code, which is not run; None for others."""
    config = read_json(directory / "config.json")
    if "auto_map" not in config:
        return None
    check_config(directory)
    return next((config[key] for key in LAYERS if key in config), None)


def check_config(directory: Path) -> None:
    """Raises ShortGPTError for damaged safetensors, or entries that weights cannot have."""
    config = read_json(directory / "config.json")
    for path in sorted(directory.glob("model*.safetensors")):  # what transformers reads
        SafetensorsFile(path)  # raises if the file is damaged
    if (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file():
        open_weights(directory)  # raises if the index is damaged
    _check_ids(directory / "config.json", config)
    if (generation := directory / "generation_config.json").is_file():
        _check_ids(generation, read_json(generation))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            config_dtype(part, directory)  # raises for one that no model computes in
    # of a directory with a config alone nothing can be said
    size = sum(p.stat().st_size for p in directory.iterdir() if p.suffix != ".json" and p.is_file())
    # a multimodal model has a config inside for each tower
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        # of a width for each layer (Gemma 3n) the least
        lists = {k: part[k] for k in OPTIONAL if isinstance(part.get(k), list) and part[k]}
        counts = {k: min(v) for k, v in lists.items() if all(type(i) is int for i in v)}
        part = {**part, **counts}
        try:
            check_positive(**{k: part[k] for k in (*LAYERS, *WIDTHS) if k in part})
            check_positive(**{k: part[k] for k in OPTIONAL if part.get(k) is not None})
        except ShortGPTError as error:
            raise ShortGPTError(f"config.json in {directory} is damaged: {error}") from None
        # the least bytes that files of a model with these numbers have
        needed = [part[k] * LAYER_BYTES for k in LAYERS if k in part]
        for names in MATRICES:
            sides = [part.get(k) for k in names]
            needed += [prod(n for n in sides if n) // BITS] if all(sides) else []
        if size and max(needed, default=0) > size:
            numbers = {k: part[k] for k in (*LAYERS, *WIDTHS, *OPTIONAL) if part.get(k)}
            raise ShortGPTError(
                f"config.json in {directory} does not fit its files, which have {size} bytes; it "
                f"has {numbers}: correct it, or fetch the model again"
            )


def _check_ids(path: Path, settings: Mapping[str, object]) -> None:
    for key in IDS:
        ids = settings.get(key)
        each = ids if isinstance(ids, list) and ids else [ids]
        if ids is not None and not all(type(i) is int and -1 <= i <= MAX_INTEGER for i in each):
            raise ShortGPTError(
                f"{path} is damaged: {key} must be a token's number, or a list of them, got "
                f"{short_repr(ids)}; correct it, or fetch it again"
            )


def shape_of(source: str, *, trust_remote_code: bool = False) -> ModelArgs:
    """The shape of a Meta or Hugging Face directory, or of a model on the hub by its config."""
    kind = find_source(source).kind
    if kind == "gguf":
        raise ShortGPTError(
            f"{source} is a GGUF file; expected a model in Meta's or Hugging Face's format"
        )
    if kind == "meta":
        # a Meta checkpoint's vocabulary is in its weights, not in params.json
        return Checkpoint(source).args
    try:
        config = read_config(source, {TRUST: trust_remote_code})
        text = config.get_text_config(decoder=True)
    except Exception as error:
        if kind == "hub" and (failure := hub_failure(source, error)) is not None:
            raise failure from None
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    # a family may have other names for them, and then is not a Llama
    said = {name: getattr(text, name, None) for name in SHAPE}
    if missing := [name for name, value in said.items() if value is None]:
        raise ShortGPTError(
            f"{source} is a {text.model_type}, whose config does not say {', '.join(missing)}; "
            "expected a Llama"
        )
    dim, layers, words, heads, wide = (int(value) for value in said.values() if value is not None)
    # without an entry every query has keys of its own
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelArgs(dim, layers, heads, kv_heads, words, **ffn_keys(dim, wide))


def config_digest(config: Mapping[str, object]) -> str:
    """A digest of all entries of a configuration except `HARMLESS` ones, so none is overlooked."""
    return json_digest(_counting(config))


def config_entries(config: Any) -> dict[str, object]:
    """The entries of a config of transformers in memory."""
    return dict(json.loads(config.to_json_string()))


def params_entries(params: object) -> dict[str, object]:
    """The entries of a Llama's arguments, ours or those of Meta's reference package."""
    return {name: value for name, value in vars(params).items() if name not in LIMITS}


def _counting(value: object) -> object:
    # in a fixed order, ready for JSON
    if isinstance(value, Mapping):
        return {k: _counting(value[k]) for k in sorted(value) if k not in HARMLESS}
    if isinstance(value, list | tuple):
        return [_counting(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def explained(error: BaseException) -> str:
    """Transformers' errors in one line: the first paragraph, of at most 300 characters."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "it does not fit the free memory; free some, or take a smaller dtype or stream"
    if TRUST in str(error):
        return (
            "it comes with Python code of its own, which is not run; look at that code, and pass "
            "`trust_remote_code` to run it"
        )
    if isinstance(error, EOFError | UnpicklingError) or "PytorchStreamReader" in str(error):
        return "its weights are cut off or damaged; fetch it again"
    if isinstance(error, KeyError):
        return f"its config names {error}, which is not known here; try a newer transformers"
    # anything else: its own words, or its class where it has none
    first = without_password(str(error)).strip().split("\n\n")[0]
    text = " ".join(first.split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
