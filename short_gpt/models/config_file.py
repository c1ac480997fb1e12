"""Configs: the shape they say, a digest of what counts, errors of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from llama.args import ModelArgs
from llama.checkpoint.meta import Checkpoint
from llama.sources import find_source, hub_failure, reach
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError, check, without_password

TRUST = "trust_remote_code"  # an option, and in errors: a model comes with Python code
# The entries by which a Llama is known.
SHAPE = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
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
    """The config of a model of transformers."""
    from transformers import AutoConfig

    # False and not None, with which transformers asks on the terminal
    options = {TRUST: False, **(options or {})}
    if not Path(source).exists():
        reach(source, options)
    return AutoConfig.from_pretrained(source, **options)


def shape_of(source: str, *, trust_remote_code: bool = False) -> ModelArgs:
    """The shape of a Meta or Hugging Face directory, or of a model on the hub by its config.

    Of a config, the width of the feed-forward layers is not read.
    """
    kind = find_source(source).kind
    check(kind != "gguf", "format of the model", kind, "Meta's or Hugging Face's")
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
    sizes = [getattr(text, name, None) for name in SHAPE]
    check(None not in sizes, "model_type", text.model_type, f"a Llama, with {SHAPE}")
    dim, layers, heads, words = (int(size) for size in sizes if size is not None)
    # without an entry every query has keys of its own
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelArgs(dim, layers, heads, kv_heads, words)


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
