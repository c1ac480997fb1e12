"""What transformers' own cache holds for each layer of a model; T tokens of a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import evaluating

CACHES = ("cache", "past_key_values", "cache_params")  # of an output, by version and family


class LayerCache(NamedTuple):
    """What a cache holds for one layer and one text."""

    per_token: int = 0  # numbers, such as keys and values
    most: int | None = None  # tokens that it holds at most, as of a sliding window; None is all
    state: int = 0  # bytes that do not depend on the length, as of linear attention

    def size(self, tokens: int, itemsize: int) -> int:
        """Bytes for a text of so many tokens, at so many a number."""
        held = tokens if self.most is None else min(tokens, self.most)
        return self.per_token * held * itemsize + self.state


@torch.no_grad()
def layer_caches(model: nn.Module, count: int, device: torch.device) -> list[LayerCache]:
    """What a model's cache holds for each of its ``count`` layers: it is filled with few tokens."""
    caches = list[LayerCache]()
    with evaluating(model):
        tokens = torch.zeros(1, 3, dtype=torch.long, device=device)  # (1, T)
        # of one token, some families would take their way with a filled cache
        two, three = (model(input_ids=tokens[:, :T], use_cache=True) for T in (2, 3))
    for before, after in zip(_layers(two, count), _layers(three, count), strict=True):
        per_token = state = 0
        for a, b in zip(_tensors(before), _tensors(after), strict=True):
            per_token += (more := b.numel() - a.numel())
            state += (a.numel() - 2 * more) * a.element_size()
        window = before.get("sliding_window")
        # the next token reads itself, and one less than the window from the cache
        caches.append(LayerCache(per_token, None if window is None else window - 1, state))
    return caches


def _layers(output: Any, count: int) -> list[dict[str, Any]]:
    """What the cache in a model's output has for each layer, by name."""
    cache = next((output[name] for name in CACHES if output.get(name) is not None), None)
    cache = getattr(cache, "self_attention_cache", cache)  # beside an encoder's
    layers: list[dict[str, Any]] = [{} for _ in range(count)]  # the last may read others' keys
    for name, value in getattr(cache, "__dict__", {}).items():
        if name == "layers":
            for layer, own in zip(layers, value, strict=False):
                layer |= vars(own)
        elif isinstance(value, list | dict):  # by layer, in classes of single families
            for i, own in value.items() if isinstance(value, dict) else enumerate(value):
                layers[i][name] = own
    return layers


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, dict):
        for own in value.values():
            yield from _tensors(own)
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value
