"""Causal language models of transformers seen as a `Decoder`.

Shapes: B sequences, S tokens, V vocabulary; L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Config entries that list layers by number. Entries with one value a layer need no list: they
# are known by their length.
NUMBERED = ("mlp_only_layers", "moe_layers")


class HFDecoder:
    """A `Decoder` over a ``transformers`` model with a language-model head.

    A removed layer is four edits: the list, ``num_hidden_layers``, every module's ``layer_idx``
    and every per-layer entry of the config. Whether they suffice is proved on the spot: a model
    made anew from the edited config must have the same layers, or nothing is removed.

    Args:
        model: for instance a ``LlamaForCausalLM``.
        layers_path: where its layers are, as in ``"model.layers"``; None finds them.

    Raises:
        ValueError: there are no such layers, or several lists could be them.
    """

    def __init__(self, model: Any, layers_path: str | None = None) -> None:
        self.model = model
        self.layers_path = find_layers(model) if layers_path is None else layers_path
        owner, _, self._name = self.layers_path.rpartition(".")
        try:
            self._owner = model.get_submodule(owner)
            found = self.layers
        except AttributeError:
            found = None
        if not isinstance(found, nn.ModuleList):
            raise ValueError(f"{self.layers_path} is no list of layers of {type(model).__name__}")

    @property
    def config(self) -> Any:
        """The config of the language model, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self._owner, self._name)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def max_seq_len(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 2**31 - 1

    @torch.no_grad()
    def run(self, tokens: Tensor) -> None:
        # the module that owns the layers has embeddings and layers, and no head
        self._owner(input_ids=tokens, use_cache=False)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits.float()

    def keep_layers(self, keep: Sequence[int]) -> Callable[[], None]:
        before, config = self.layers, self.config
        entries = _entries(config, len(before))

        def put(layers: nn.ModuleList, values: dict[str, Any], places: Sequence[int]) -> None:
            setattr(self._owner, self._name, layers)
            for name, value in values.items():
                config.__dict__[name] = value
            for place, layer in zip(places, layers, strict=True):
                for module in _numbered(layer):
                    vars(module)["layer_idx"] = place

        kept = nn.ModuleList(before[i] for i in keep)
        put(kept, _cut(entries, keep), range(len(kept)))

        def undo() -> None:
            put(before, entries, range(len(before)))

        try:
            self._prove()
        except ValueError:
            undo()
            raise
        return undo

    def _prove(self) -> None:
        """Raises ValueError unless the config alone gives layers like those in the model."""
        with torch.device("meta"):
            twin = type(self.model)(self.model.config)
        made = HFDecoder(twin, self.layers_path).layers
        for place, (ours, theirs) in enumerate(zip(self.layers, made, strict=True)):
            for difference in _differences(ours, theirs):
                raise ValueError(
                    f"these layers of {type(self.model).__name__} cannot be removed: its config "
                    f"would make layer {place} of the rest with {difference}"
                )


def find_layers(model: nn.Module) -> str:
    """The path of the decoder's list of layers: as many as its config says, all of one kind.

    Raises:
        ValueError: no list or more than one fits; the message names them.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    count = config.num_hidden_layers
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [p for p in paths if not any(p.startswith(f"{q}.") for q in paths)]
    decoder = [
        p for p in outer if "vision" not in p and "encoder." not in p.replace("decoder.", "")
    ]
    if len(decoder) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(decoder)} lists of {count} layers {decoder}; name "
            "one with layers_path, as in 'model.layers'"
        )
    return decoder[0]


def _numbered(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that know its number."""
    return [m for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)]


def _entries(config: Any, count: int) -> dict[str, Any]:
    """What the config holds of single layers, by the names of its own attributes."""
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    found = {count_name: config.__dict__[count_name]}
    for name, value in config.__dict__.items():
        if isinstance(value, list | tuple) and (name in NUMBERED or len(value) == count):
            found[name] = value
    return found


def _cut(entries: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    new_number = {old: new for new, old in enumerate(keep)}
    cut: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, int):
            cut[name] = len(keep)
        elif name in NUMBERED:
            cut[name] = type(value)(new_number[i] for i in value if i in new_number)
        else:
            cut[name] = type(value)(value[i] for i in keep)
    return cut


def _differences(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """How two layers differ in parameters or in settings; weights do not count."""
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (ours, theirs)]
    found = [f"other parameters ({name})" for name in shapes[0].keys() ^ shapes[1].keys()]
    found += [f"{n} of shape {s}" for n, s in shapes[1].items() if shapes[0].get(n, s) != s]
    others = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        twin = others.get(name)
        if twin is None or type(twin) is not type(module):
            found.append(f"another {name or 'layer'}")
            continue
        for key, value in vars(twin).items():
            plain = isinstance(value, bool | int | float | str | None)
            if plain and key != "training" and getattr(module, key, value) != value:
                found.append(f"{name}.{key} = {value!r}".lstrip("."))
    return found
