"""What a config alone makes of a model: the proof that a removal can be saved and loaded.

A twin is a model made anew from the config, on the meta device: it has no weights and costs no
memory. Where it differs from the model at hand, a saved copy would come back as another model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from short_gpt.runtime.errors import ShortGPTError

Traits = dict[str, object]  # kinds, settings and shapes by name


class Outline(NamedTuple):
    """Kinds, settings and shapes of all that a config decides, by name; no weights.

    ``layers`` holds one mapping for each layer, ``rest`` what is around them.
    """

    layers: list[Traits]
    rest: Traits


def outline(model: nn.Module, layers_path: str) -> Outline:
    """The outline of a model, whose layers are at ``layers_path``."""
    layers = model.get_submodule(layers_path)
    inside = {id(module) for module in layers.modules()}
    own = [(name, module) for name, module in model.named_modules() if id(module) not in inside]
    rest: Traits = {}
    for name, module in own:
        rest |= _traits(name, module)
    return Outline([_whole(layer) for layer in layers.children()], rest)


def part(whole: Outline, keep: Sequence[int]) -> Outline:
    """The outline with only these of its layers."""
    return Outline([whole.layers[i] for i in keep if i < len(whole.layers)], whole.rest)


def twin_outline(model: Any, layers_path: str) -> Outline:
    """The outline of the model that the saved config would make.

    Raises:
        ShortGPTError: the config makes none; the message says why.
    """
    config = model.config
    try:
        again = type(config).from_dict(copy.deepcopy(config.to_dict()))
        with torch.device("meta"):
            return outline(type(model)(again), layers_path)
    except Exception as error:  # whatever a family's constructor stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ShortGPTError(f"its config would make no model: {reason}") from None


def differences(ours: Outline, theirs: Outline) -> list[str]:
    """How the twin would differ from ours, in the twin's terms; none if in nothing."""
    if len(ours.layers) != len(theirs.layers):
        return [f"{len(theirs.layers)} layers, not {len(ours.layers)}"]
    result = [f"{text} around the layers" for text in _differing(ours.rest, theirs.rest)]
    for place, pair in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        result += [f"layer {place} of the rest with {text}" for text in _differing(*pair)]
    return result


def _whole(layer: nn.Module) -> Traits:
    traits: Traits = {}
    for name, module in layer.named_modules():
        traits |= _traits(name, module)
    return traits


def _traits(name: str, module: nn.Module) -> Traits:
    """Kind, plain settings and own shapes of one module."""
    front = f"{name}." if name else ""
    traits: Traits = {f"{front}kind": type(module).__name__}
    for key, value in vars(module).items():
        if _plain(value) and key != "training" and not key.startswith("_"):
            traits[front + key] = value
    for key, weight in module.named_parameters(recurse=False):
        traits[front + key] = weight.shape
    return traits


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _differing(ours: Traits, theirs: Traits) -> list[str]:
    """Settings that ours lacks do not count, shapes that the twin lacks do."""
    shapes = (n for n, v in ours.items() if isinstance(v, torch.Size) and n not in theirs)
    result = [f"no {name}" for name in shapes]
    for name, value in theirs.items():
        absent = isinstance(value, torch.Size) and name not in ours
        if absent or ours.get(name, value) != value:
            shown = list(value) if isinstance(value, torch.Size) else value
            result.append(f"{name} = {shown!r}")
    return result
