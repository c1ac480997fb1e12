"""What a config of transformers holds of single layers, and what is left of it with fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Config entries that list layers by number. Entries with one value a layer need no list: they
# are known by their length.
NUMBERED = ("mlp_only_layers", "moe_layers")
# Config entries that count the first layers, which are of another kind than those behind them.
LEADING = ("first_k_dense_replace", "num_dense_layers")


def layer_entries(config: Any, count: int) -> dict[str, Any]:
    """What the config holds of single layers, by the names of its own attributes."""
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    entries: dict[str, Any] = {}
    for name, value in vars(config).items():
        # as many ends of text (eos_token_id) as layers are no list of layers
        listed = isinstance(value, list | tuple) and "token" not in name
        counted = name in (count_name, *LEADING) and isinstance(value, int)
        if counted or (listed and (name in NUMBERED or len(value) == count)):
            entries[name] = value
    if "attention_layers" in entries:  # GPT Neo's list, and the runs of it that make the list
        entries |= {k: v for k, v in vars(config).items() if k == "attention_types"}
    return entries


def cut_entries(entries: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """The same entries for a model with only these layers (ascending)."""
    new_number = {old: new for new, old in enumerate(keep)}
    cut: dict[str, Any] = {}
    for name, value in entries.items():
        if name in LEADING:
            cut[name] = sum(i < value for i in keep)
        elif isinstance(value, int):
            cut[name] = len(keep)
        elif name == "attention_types":
            cut[name] = [[[entries["attention_layers"][i] for i in keep], 1]]
        elif name in NUMBERED:
            cut[name] = type(value)(new_number[i] for i in value if i in new_number)
        else:
            cut[name] = type(value)(value[i] for i in keep)
    return cut
