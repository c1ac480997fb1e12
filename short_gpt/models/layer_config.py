"""What a config of transformers says of layers: its entries, and the proof that it makes the model.

The proof is a twin: a model made from the config on the meta device, which costs no memory.
Where it differs from the model at hand, a saved copy would come back as another model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from short_gpt.runtime.errors import ShortGPTError

# Config entries that list layers by number. Entries with one value a layer need no list: they
# are known by their length.
NUMBERED = (
    *("mlp_only_layers", "moe_layers", "full_attn_idxs"),
    *("attn_layer_indices", "rope_scaling_layers"),
)
# Config entries that count the first layers, which are of another kind than those after them.
LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Config entries that count the layers beside the usual one, in BART's decoders and xLSTM.
SECOND = ("decoder_layers", "num_blocks")
# Config entries with the period of a layer kind: the list that they generate where it is not
# given, and its value for that kind.
EVERY = {
    "sliding_window_pattern": ("layer_types", "full_attention"),
    "_sliding_window_pattern": ("layer_types", "full_attention"),
    "no_rope_layer_interval": ("no_rope_layers", 0),
}
# Layers after the last, of those who predict several tokens: transformers runs and saves none.
FURTHER = "num_nextn_predict_layers"
# What transformers 5 keeps of `per_layer_config`: settings of single layers, by number.
PER_LAYER = "_heterogeneity_spec"
Traits = dict[str, object]  # kinds, settings and shapes by name


def layer_entries(config: Any, count: int) -> dict[str, Any]:
    """The config's entries that list or count its ``count`` layers, by its own names."""
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    entries: dict[str, Any] = {}
    for name, value in vars(config).items():
        # as many ends of text (eos_token_id) as layers are not a list of layers
        listed = isinstance(value, list | tuple) and "token" not in name
        leading = name in LEADING and isinstance(value, int) and value < count
        total = name == count_name or (name in SECOND and value == count)
        counted = isinstance(value, int) and (total or leading)
        if (
            counted
            or name in (PER_LAYER, FURTHER)
            or (listed and (name in NUMBERED or len(value) == count))
        ):
            entries[name] = value
    if "attention_layers" in entries:  # GPT Neo's list, and the runs of it that make the list
        entries |= {k: v for k, v in vars(config).items() if k == "attention_types"}
    every = {k: v for k, v in vars(config).items() if k in EVERY and isinstance(v, int)}
    return entries | {k: v for k, v in every.items() if EVERY[k][0] in entries and _kept(config, k)}


def _kept(config: Any, name: str) -> bool:
    # whether a config that is read again has what was written:
    # some classes put their own there, as of `_sliding_window_pattern` in transformers 4
    if not name.startswith("_"):
        return True
    written = {**config.to_dict(), name: None}
    return getattr(type(config).from_dict(written), name, None) is None


def pruned_entries(
    entries: dict[str, Any], keep: Sequence[int], *, declared: Collection[str] = ()
) -> dict[str, Any]:
    """The entries of `layer_entries` for a model with only the layers ``keep``, ascending.

    The config checks the types of those ``declared``: one that no number says any more stays, and
    the list that it would make goes before it; the others become None.
    """
    new_number = {old: new for new, old in enumerate(keep)}  # layers are numbered from 0 again
    pruned: dict[str, Any] = {}
    # each kind of entry by its own rule; what is none of these has one value a layer
    for name, value in entries.items():
        if name in EVERY:
            listed, other = EVERY[name]
            every = _period([entries[listed][i] == other for i in keep], value)
            pruned[name] = value if every is None and name in declared else every
        elif name == PER_LAYER:
            before = value.per_layer_overrides
            kept = {new: before[old] for old, new in new_number.items() if old in before}
            differing = {key for settings in kept.values() for key in settings} - {"skip"}
            pruned[name] = replace(value, per_layer_overrides=kept, per_layer_attributes=differing)
        elif name == FURTHER:
            pruned[name] = 0
        elif name in LEADING:
            pruned[name] = sum(i < value for i in keep)  # of the leading ones, those that stay
        elif isinstance(value, int):
            pruned[name] = len(keep)
        elif name == "attention_types":
            pruned[name] = [[[entries["attention_layers"][i] for i in keep], 1]]
        elif name in NUMBERED:
            pruned[name] = type(value)(new_number[i] for i in value if i in new_number)
        else:
            pruned[name] = type(value)(value[i] for i in keep)
    return pruned


def _period(other: Sequence[bool], before: int) -> int | None:
    # the period with which the other kind occurs: ``before`` if it still fits, None if none does
    for period in (before, *range(1, len(other) + 2)):
        if period and list(other) == [(i + 1) % period == 0 for i in range(len(other))]:
            return period
    return None


def caches_keys(kind: str) -> bool:
    """Whether layers of a kind, by its name in transformers, cache keys and values."""
    return (kind.endswith("attention") and kind != "linear_attention") or "hybrid" in kind


def longrope_limits(config: Any) -> list[int]:
    """Lengths beyond which LongRoPE (arXiv:2402.13753) takes its factors for long texts."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(settings, dict):
        return []
    # one set for all layers, or one for each kind of layer (Gemma 3)
    kinds = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    name = "original_max_position_embeddings"
    default: Any = getattr(config, name, None) or getattr(config, "max_position_embeddings", 0)
    longrope = [kind for kind in kinds if kind.get("rope_type", kind.get("type")) == "longrope"]
    return sorted({kind.get(name) or default for kind in longrope})


class Outline(NamedTuple):
    """Kinds, settings and shapes of all that a config decides, by name; no weights."""

    layers: list[Traits]  # of each layer
    rest: Traits  # of what is around them

    def with_layers(self, keep: Sequence[int]) -> Outline:
        """The outline with only these of its layers."""
        return Outline([self.layers[i] for i in keep if i < len(self.layers)], self.rest)


def outline(model: nn.Module, layers_path: str) -> Outline:
    """The outline of a model, whose layers are at ``layers_path``."""
    layers = model.get_submodule(layers_path)
    inside = {id(module) for module in layers.modules()}  # the list itself, too
    rest = _traits((name, m) for name, m in model.named_modules() if id(m) not in inside)
    return Outline([_traits(layer.named_modules()) for layer in layers.children()], rest)


def twin_outline(model: Any, layers_path: str) -> Outline:
    """The outline of the model that the saved config would make; ShortGPTError if it makes none."""
    config = model.config
    try:
        # as it would be saved and read; of a copy, because it keeps lists of what it is given
        again = type(config).from_dict(copy.deepcopy(config.to_dict()))
        with torch.device("meta"):
            return outline(type(model)(again), layers_path)
    except Exception as error:  # whatever a family's constructor stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ShortGPTError(f"its config would make no model: {reason}") from None


def differences(ours: Outline, theirs: Outline) -> list[str]:
    """How the twin would differ from the model at hand, in the twin's terms."""
    if len(ours.layers) != len(theirs.layers):
        return [f"{len(theirs.layers)} layers, not {len(ours.layers)}"]
    result = [f"{text} around the layers" for text in _differing(ours.rest, theirs.rest)]
    for index, pair in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        result += [f"layer {index} of the rest with {text}" for text in _differing(*pair)]
    return result


def _traits(modules: Iterable[tuple[str, nn.Module]]) -> Traits:
    # kind, plain settings and own shapes of some modules
    traits: Traits = {}
    for name, module in modules:
        prefix = f"{name}." if name else ""
        traits[f"{prefix}kind"] = type(module).__name__
        for key, value in vars(module).items():
            # a layer whose keys others may read: that none does is seen by `_why_fixed`
            if (
                _plain(value)
                and key not in ("training", "store_full_length_kv")
                and not key.startswith("_")
            ):
                traits[prefix + key] = value
        for key, weight in module.named_parameters(recurse=False):
            traits[prefix + key] = weight.shape
    return traits


def _plain(value: object) -> bool:
    # functions and modules are not settings
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _differing(ours: Traits, theirs: Traits) -> list[str]:
    # settings that ours lacks do not count, shapes that the twin lacks do
    shapes = (n for n, v in ours.items() if isinstance(v, torch.Size) and n not in theirs)
    result = [f"no {name}" for name in shapes]
    for name, value in theirs.items():
        absent = isinstance(value, torch.Size) and name not in ours
        if absent or ours.get(name, value) != value:
            shown = list(value) if isinstance(value, torch.Size) else value
            result.append(f"{name} = {shown!r}")
    return result
