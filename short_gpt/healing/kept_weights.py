"""The weights that a closed form changed, on disk for what continues from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from safetensors.torch import load_file, save_file
from torch import Tensor

from llama.io.outputs import new_file
from short_gpt.models.weight_changes import Parameter
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.lock import hold
from short_gpt.runtime.state import StateFile, check_saved
from short_gpt.wrappers.scored_model import ScoredModel


class KeptWeights:
    """One step's result in a folder: the weights, and a JSON file that is written after them.

    Args:
        folder: where they are kept.
        name: of the step.
        identity: what the step depends on.

    Attributes:
        there: whether the folder holds the result.

    Raises:
        ShortGPTError: it holds that of another model, text or setting; the message names which.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, object]) -> None:
        self._weights = folder / f"{name}.safetensors"
        self._state = StateFile(folder / f"{name}.json", identity, lock=hold(folder))
        self.there = self._state.content is not None

    def save(self, short: ScoredModel) -> None:
        """Keeps what the model's last change has changed."""
        change, every = short.changes[-1], _parameters(short)
        ends = sorted(change.parameters)
        tensors = {f"{i} {name}": every[i, name].detach().cpu() for i, name in ends}
        with new_file(self._weights, overwrite=True, ours=lambda _: True) as path:
            save_file({key: t.contiguous() for key, t in tensors.items()}, path)
        self._state.save({"how": change.how, "weights": files_digest([self._weights])})

    def put_into(self, short: ScoredModel) -> tuple[dict[str, object], Callable[[], None]]:
        """Sets the weights as the step did; returns how they came about, and the undo.

        Raises:
            ShortGPTError: the file of the weights is gone, or not what was saved.
        """
        assert self._state.content is not None
        digest = cast(str, self._state.content["weights"])
        check_saved(self._weights, digest, whole=self._state.path)
        how = cast("dict[str, object]", self._state.content["how"])
        kept = {_parameter(key): tensor for key, tensor in load_file(self._weights).items()}
        return how, short.change_weights(how, kept)


def _parameters(short: ScoredModel) -> dict[Parameter, Tensor]:
    """All parameters of the layers at hand, by the original model's numbers."""
    layers = zip(short.present, short.decoder.layers, strict=True)
    return {(i, name): p for i, layer in layers for name, p in layer.named_parameters()}


def _parameter(key: str) -> Parameter:
    number, name = key.split(" ", 1)
    return int(number), name
