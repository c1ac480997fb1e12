"""What of a model's configuration changes what it computes, and a digest of that.

Every entry counts except those listed here, so that an entry nobody thought of is never overlooked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from short_gpt.runtime.digest import json_digest

# Entries of a config.json without effect on a forward pass. dtype: whoever opens a model chooses
# it, and states keep it by itself. Text is encoded by the tokenizer, which has its own bos and eos;
# pad_token_id counts, as RoBERTa numbers its positions from it.
HARMLESS = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "architectures"})
HARMLESS |= {"torch_dtype", "dtype", "use_cache", "return_dict", "initializer_range"}
HARMLESS |= {"output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id"}
HARMLESS |= {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task"}
# Of a Llama in Meta's format: limits of a run, and a size that the weights decide (-1 in files).
LIMITS = frozenset({"max_batch_size", "max_seq_len", "vocab_size"})


def config_digest(config: Mapping[str, object]) -> str:
    """A digest of a configuration's entries that change what the model computes.

    Args:
        config: of a config.json, of `config_entries`, or of `params_entries`.

    Example:
        >>> config_digest({"n": 1, "use_cache": True}) == config_digest({"n": 1})
        True
    """
    return json_digest(_counting(config))


def config_entries(config: Any) -> dict[str, object]:
    """The entries of a config of transformers in memory."""
    entries: dict[str, object] = json.loads(config.to_json_string())
    return entries


def params_entries(params: object) -> dict[str, object]:
    """The entries of a Llama's arguments, ours or those of Meta's reference package."""
    return {name: value for name, value in vars(params).items() if name not in LIMITS}


def _counting(value: object) -> object:
    """The same in a fixed order, without the harmless entries, ready for JSON."""
    if isinstance(value, Mapping):
        return {k: _counting(value[k]) for k in sorted(value) if k not in HARMLESS}
    if isinstance(value, list | tuple):
        return [_counting(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)
