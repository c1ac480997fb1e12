"""What a config of transformers holds of single layers, and what is left of it with fewer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

# Config entries that list layers by number. Entries with one value a layer need no list: they
# are known by their length.
NUMBERED = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
# Config entries that count the first layers, which are of another kind than those behind them.
LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Config entries that say every how many layers one is of another kind: the list that they make
# where it is not given, and what stands in it for that layer.
EVERY = {
    "sliding_window_pattern": ("layer_types", "full_attention"),
    "_sliding_window_pattern": ("layer_types", "full_attention"),
    "no_rope_layer_interval": ("no_rope_layers", 0),
}


def layer_entries(config: Any, count: int) -> dict[str, Any]:
    """What the config holds of single layers, by the names of its own attributes."""
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    entries: dict[str, Any] = {}
    for name, value in vars(config).items():
        # as many ends of text (eos_token_id) as layers are no list of layers
        listed = isinstance(value, list | tuple) and "token" not in name
        leading = name in LEADING and isinstance(value, int) and value < count
        counted = isinstance(value, int) and (name == count_name or leading)
        if counted or (listed and (name in NUMBERED or len(value) == count)):
            entries[name] = value
    if "attention_layers" in entries:  # GPT Neo's list, and the runs of it that make the list
        entries |= {k: v for k, v in vars(config).items() if k == "attention_types"}
    every = {k: v for k, v in vars(config).items() if k in EVERY and isinstance(v, int)}
    return entries | {k: v for k, v in every.items() if EVERY[k][0] in entries and _kept(config, k)}


def _kept(config: Any, name: str) -> bool:
    """Whether a config that is read again has what was written; some classes put their own there.

    So does `_sliding_window_pattern` of transformers 4, which nothing reads beside the list.
    """
    if not name.startswith("_"):
        return True
    written = {**config.to_dict(), name: None}
    return getattr(type(config).from_dict(written), name, None) is None


def cut_entries(
    entries: dict[str, Any], keep: Sequence[int], *, declared: Collection[str] = ()
) -> dict[str, Any]:
    """The same entries for a model with only these layers.

    Args:
        entries: of `layer_entries`.
        keep: numbers of the layers, ascending.
        declared: entries whose types the config checks: one that no number says any more stays,
            and the list that it would make goes before it; the others become None.
    """
    new_number = {old: new for new, old in enumerate(keep)}
    cut: dict[str, Any] = {}
    for name, value in entries.items():
        if name in EVERY:
            listed, other = EVERY[name]
            every = _every([entries[listed][i] == other for i in keep], value)
            cut[name] = value if every is None and name in declared else every
        elif name in LEADING:
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


def _every(other: Sequence[bool], before: int) -> int | None:
    """Every how many layers one is of the other kind; None where no number says it.

    The number before, if it still holds.
    """
    for period in (before, *range(1, len(other) + 2)):
        if period and list(other) == [(i + 1) % period == 0 for i in range(len(other))]:
            return period
    return None
