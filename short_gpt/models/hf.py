"""Causal language models of transformers as a `Decoder`, and what their caches hold.

Shapes: B sequences, S tokens, V vocabulary, T tokens of a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from short_gpt.models.decoder import evaluating, mixed_precision
from short_gpt.models.families import FAMILIES, Family, family_of
from short_gpt.models.layer_config import (
    Outline,
    caches_keys,
    differences,
    layer_entries,
    longrope_limits,
    outline,
    pruned_entries,
    twin_outline,
)
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules' attributes that hold the number of their layer.
NUMBERS = ("layer_idx", "layer_id", "layer_number")
# What names of layers for images and sounds contain.
TOWERS = ("vision", "visual", "audio")
# Config entries by which layers compute with their own number.
BY_NUMBER = ("scale_attn_by_inverse_layer_idx", "rescale_every")
# What names and patterns in the settings of a quantization contain that mean single layers, as
# model.layers.2.mlp, or .*\.[3-5]\..* of GPTQ.
SINGLE_LAYERS = re.compile(r"\S*(layers|blocks|h|\\)\.[\d\[]\S*")
# the attributes that are edited, their old values, their new values
Edit = tuple[dict[str, object], dict[str, object], dict[str, object]]


class HFDecoder:
    """A `Decoder` over a ``transformers`` model with a language-model head.

    A removed layer is four edits: the list, ``num_hidden_layers``, every module's ``layer_idx``
    and every per-layer entry of the config. Whether they suffice is checked at once: a model
    made from the edited config must have the same layers, or nothing is removed.

    ``layers_path`` is where its layers are, as in ``"model.layers"``; None finds them.
    """

    mixed = False

    def __init__(self, model: Any, layers_path: str | None = None) -> None:
        kind = type(model).__name__
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise ShortGPTError(
                f"{kind} has no language-model head of transformers; load the model with "
                "AutoModelForCausalLM"
            )
        if getattr(model.config, "is_encoder_decoder", False):
            raise ShortGPTError(
                f"{kind} is not a causal language model: it has an encoder and a decoder"
            )
        self.model = self.module = model
        self.layers_path = find_layers(model) if layers_path is None else str(layers_path)
        owner, _, self._name = self.layers_path.rpartition(".")
        try:
            self._owner = model.get_submodule(owner)
            layers = self.layers
        except AttributeError:
            layers = nn.ModuleList()
        count = getattr(self.config, "num_hidden_layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) != count:
            raise ShortGPTError(
                f"{self.layers_path} is not a list of layers of {kind}, {count} long"
            )
        if any(getattr(layer, "is_decoder", True) is False for layer in layers):  # such as BERT's
            raise ShortGPTError(
                f"{kind} is an encoder, whose tokens see those after them; if it was trained as a "
                "decoder, set `is_decoder=True` in its config"
            )
        # around the list: in BERT an encoder owns it, which reads the embeddings' output
        body = owner
        while body and "input_ids" not in signature(model.get_submodule(body).forward).parameters:
            body = body.rpartition(".")[0]
        self._body = model.get_submodule(body)
        self._twins: dict[str, Outline] = {}  # by the config's JSON

    @property
    def config(self) -> Any:
        """The config of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self._owner, self._name)

    @property
    def device(self) -> torch.device:
        # where the embedding runs, also while its weights are offloaded
        embedding = self.model.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)
        if embedding.weight.is_meta and hook is not None:
            return torch.device(hook.execution_device)
        return embedding.weight.device

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def max_seq_len(self) -> int:
        # without such an entry (a state space, ALiBi) nothing limits it
        limit = getattr(self.config, "max_position_embeddings", None) or 0
        return limit if limit > 0 else 2**31 - 1  # XLNet's is -1

    @property
    def rotary_limits(self) -> Sequence[int]:
        # the factors of "dynamic" change beyond `max_seq_len` alone
        return longrope_limits(self.config)

    @property
    def family(self) -> Family:
        return family_of(self.config.model_type)

    @torch.no_grad()
    def run(self, tokens: Tensor) -> None:
        # the module around the layers has embeddings and layers, and no head
        with evaluating(self.model), mixed_precision(self.mixed, self.device):
            self._body(input_ids=tokens, **_uncached(self._body))

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        # (B, S, V), float32: a loss in bfloat16 would keep three digits
        with evaluating(self.model), mixed_precision(self.mixed, self.device):
            return self.model(input_ids=tokens, **_uncached(self.model)).logits.float()

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        before = self.layers
        if reason := self._why_fixed():
            raise ShortGPTError(
                f"layers of this {type(self.model).__name__} cannot be removed: {reason}"
            )
        kept = nn.ModuleList(before[i] for i in keep)  # the layers themselves, no copies
        edits, attended = self._edits(keep), self._attends()

        def prune() -> None:
            setattr(self._owner, self._name, kept)
            for target, _, new in edits:
                target.update(new)

        def undo() -> None:
            setattr(self._owner, self._name, before)
            for target, old, _ in edits:
                target.update(old)

        try:
            if reason := self._missing_dependency(keep):
                raise ShortGPTError(reason)
            prune()
            if attended and not self._attends():
                raise ShortGPTError(
                    "no layer with attention would be left, and transformers' cache needs one to "
                    "count tokens"
                )
            ours, twin = self._outlines()
            if differences(ours, twin):
                undo()  # a model may differ from its twin with all layers, too: that is allowed
                old, settings = self._without_removal(keep, twin)
                edits += settings
                prune()
                new = [d for d in differences(*self._outlines()) if d not in old]
                if new:
                    raise ShortGPTError(f"its config would make {new[0]}")
        except ValueError as error:  # `ShortGPTError` is one, and so are transformers' own
            undo()
            kind = type(self.model).__name__
            raise NotRemovableError(f"these layers of {kind} cannot be removed: {error}") from None
        except BaseException:
            undo()
            raise
        return undo

    def _attends(self) -> bool:
        return any(map(caches_keys, getattr(self.config, "layer_types", None) or ()))

    def _why_fixed(self) -> str | None:
        # reasons that no outline shows
        if entries := [name for name in BY_NUMBER if getattr(self.config, name, False)]:
            return f"they compute with their own number ({entries[0]})"
        if getattr(self.config, "num_kv_shared_layers", 0):
            return "the last read keys and values of others (num_kv_shared_layers)"
        settings = str(getattr(self.model.config, "quantization_config", None))
        if match := SINGLE_LAYERS.search(settings):
            return f"it is quantized with settings for single layers ({match[0]}), by their numbers"
        owners: dict[int, int] = {}  # by the id of a weight
        for number, layer in enumerate(self.layers):
            for weight in layer.parameters():
                # a file holds shared weights with one layer alone
                if (owner := owners.setdefault(id(weight), number)) != number:
                    return f"{owner} and {number} share weights"
        return None

    def _missing_dependency(self, keep: Sequence[int]) -> str | None:
        # why a kept layer cannot do without one that goes, where no outline shows it
        kinds = list(getattr(self.config, "indexer_types", None) or ())
        for layer in keep if len(kinds) == len(self.layers) else ():
            selects = [i for i in range(layer) if kinds[i] == "full"][-1:]
            if kinds[layer] == "shared" and not {*selects} <= {*keep}:
                return f"layer {layer} reads the tokens that layer {selects[0]} selects"
        return None

    def _without_removal(self, keep: Sequence[int], after: Outline) -> tuple[list[str], list[Edit]]:
        # differences without a removal, and settings around the layers that follow the config
        ours, before = self._outlines()
        # a quantized model differs from the one of its config anyway: in the kind of its weights
        differing = differences(ours.with_layers(keep), before.with_layers(keep))
        edits: list[Edit] = []
        for name, value in after.rest.items():
            owner, _, key = name.rpartition(".")
            target = vars(self.model.get_submodule(owner))
            old: Any = before.rest.get(name)
            # follows the config with all layers, and would be another with fewer
            if key in target and ours.rest.get(name) == old != value:
                listed = isinstance(old, list | tuple) and len(old) == len(self.layers)
                if listed and value != type(old)(old[i] for i in keep):
                    raise ShortGPTError(f"its config would make {key} {value}")
                edits.append((target, {key: old}, {key: value}))
        return differing, edits

    def _edits(self, keep: Sequence[int]) -> list[Edit]:
        # all that counts or lists layers: configs, modules' numbers, modules' copies of both
        edits: list[Edit] = []
        # parts of the model go by copies of the language model's config
        parts = [getattr(module, "config", None) for module in self._body.modules()]
        configs = [self.config, *(c for c in parts if type(c) is type(self.config))]
        for config in {id(config): config for config in configs}.values():
            entries = layer_entries(config, len(self.layers))
            # transformers 5 checks the types of these, None included
            declared = getattr(type(config), "__dataclass_fields__", ())
            pruned = pruned_entries(entries, keep, declared=declared)
            edits.append((vars(config), entries, pruned))
        _, entries, pruned = edits[0]
        for module in self._body.modules():  # such as a model's own list of layer types
            old = {k: v for k, v in entries.items() if vars(module).get(k) == v}
            if old:
                edits.append((vars(module), old, {key: pruned[key] for key in old}))
        for new, number in enumerate(keep):
            for module in self.layers[number].modules():  # attention picks its cache by it
                old = {k: number for k in NUMBERS if vars(module).get(k) == number}
                if old:
                    edits.append((vars(module), old, dict.fromkeys(old, new)))
        return edits

    def _outlines(self) -> tuple[Outline, Outline]:
        # of the model, and of the model which its config would make;
        # a twin is made once for each config: hundreds of trials of a plain model share one
        key = self.model.config.to_json_string(use_diff=False)
        if key not in self._twins:
            self._twins[key] = twin_outline(self.model, self.layers_path)
        return outline(self.model, self.layers_path), self._twins[key]


def _uncached(module: nn.Module) -> dict[str, bool]:
    # the argument that keeps no cache, where a module knows of one
    parameters = signature(module.forward).parameters.values()
    takes = any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in parameters)
    return {"use_cache": False} if takes else {}


def find_layers(model: PreTrainedModel) -> str:
    """The path of the list of layers: the family's, or the only one as long as the config says."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    row = FAMILIES.get(config.model_type)
    for path in row.layers if row else ():
        if path in lists and len(lists[path]) == count:
            return path
    paths = [name for name, module in lists.items() if len(module) == count]
    # a list inside another, such as a layer's experts, is not a list of layers
    outer = [p for p in paths if not any(p.startswith(f"{q}.") for q in paths)]
    # of the text, where images and sounds have layers of their own
    outer = [p for p in outer if not any(tower in p for tower in TOWERS)]
    # a BERT that is a decoder calls its layers an encoder's
    decoder = [p for p in outer if "encoder." not in p.replace("decoder.", "")] or outer
    if len(decoder) != 1:
        raise ShortGPTError(
            f"{type(model).__name__} has {len(decoder)} lists of {count} layers {decoder}; name "
            "one with layers_path, as in 'model.layers'"
        )
    return decoder[0]


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
            for layer, cached in zip(layers, value, strict=False):
                layer |= vars(cached)
        elif isinstance(value, list | dict):  # by layer, in classes of single families
            for i, cached in value.items() if isinstance(value, dict) else enumerate(value):
                layers[i][name] = cached
    return layers


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value
