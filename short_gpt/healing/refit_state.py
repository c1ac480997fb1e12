"""What a refit holds between layers, in memory or on disk, and how much memory it needs.

With a folder, hidden states and solved matrices are files. Files of states take turns, so that
those entering the next layer exist whenever the process ends.

Shapes: B windows of a batch, S tokens, N = B S, D width of the stream, F inputs of a matrix, W
width of a hidden state (D or F).
"""

from __future__ import annotations

import shutil
from collections import UserDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.files import JsonObject, follow_umask
from llama.formats.safetensors import SafetensorsFile
from short_gpt.healing.solver import COLUMNS, ROWS, Fit, working_memory
from short_gpt.models.decoder import Decoder, Parameter
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.runtime import replicas
from short_gpt.runtime.memory import UNUSED, bytes_of, check_room, free_memory, resident
from short_gpt.runtime.state import StateFile, damaged_run, hold
from short_gpt.wrappers.scored_model import ScoredModel

ORIGINAL, PRUNED = "original", "pruned"  # the models whose hidden states are kept
MODELS = (ORIGINAL, PRUNED)
# in a refit's folder; the first is written after all that it names
STATE, STATES, VALUES = "refit.json", "states", "values."
MOST_AT_ONCE = 4096  # tokens that pass a layer together on an accelerator: more are no faster


class HiddenStates:
    """A state (B, S, W) for each of some batches, on the CPU: in memory, or in a file."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        width: int,
        dtype: torch.dtype,
        path: Path | None = None,
    ) -> None:
        self._shapes = [(*shape, width) for shape in shapes]
        self._dtype, self._path = dtype, path
        self._held: dict[int, Tensor] = {}
        if path is not None:
            sizes = [B * S * width * dtype.itemsize for B, S in shapes]
            self._starts = list(accumulate(sizes, initial=0))
            path.touch()

    def __getitem__(self, batch: int) -> Tensor:
        if self._path is None:
            return self._held[batch]
        state = torch.empty(self._shapes[batch], dtype=self._dtype)  # (B, S, W)
        with open(self._path, "rb") as file:
            file.seek(self._starts[batch])
            file.readinto(_bytes_of(state))
        return state

    def __setitem__(self, batch: int, state: Tensor) -> None:
        state = state.detach().to("cpu", self._dtype).reshape(self._shapes[batch])  # (B, S, W)
        if self._path is None:
            self._held[batch] = state
            return
        with open(self._path, "r+b") as file:
            file.seek(self._starts[batch])
            file.write(_bytes_of(state.contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


class StoredValues(UserDict[Parameter, Any]):
    """New values of parameters, whose files are read one tensor at a time, when it is asked for."""

    def read(self, path: Path) -> None:
        file = SafetensorsFile(path)
        for name in file.entries:
            layer, parameter = name.split(" ", 1)
            self[int(layer), parameter] = file

    def __getitem__(self, key: Parameter) -> Tensor:
        return self.data[key].read(f"{key[0]} {key[1]}")


class RefitState:
    """A refit under way: in memory, or in a folder from which one process can continue it."""

    def __init__(self, folder: Path | None, identity: Mapping[str, object]) -> None:
        self.folder, self.done, self.fits = folder, 0, list[Fit]()  # finished layers, their fits
        # the folder of the files of states; None holds them in memory
        self.states = None if folder is None else folder / STATES
        # the new values so far, by a layer's original number and a parameter's name in it
        self.values: Mapping[Parameter, Tensor] = {}
        self._stored, self._files = StoredValues(), list[str]()  # and the names of its files
        self._turns: dict[str, list[HiddenStates]] = {}
        if folder is not None:
            self._file = StateFile(folder / STATE, identity, lock=hold(folder), folder=folder)
            if self._file.content is not None:
                content: JsonObject = self._file.content
                self.done, self.fits = content["done"], [Fit(**fit) for fit in content["fits"]]
                self._files = [*content["values"]]
            self.values = self._stored
            for name in self._files:
                self._stored.read(folder / name)

    def open(self, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype) -> None:
        """Makes room for the states of batches of these shapes (B, S), entering a layer."""
        if self.states is None:  # in memory what leaves a layer overwrites what entered it
            self._turns = {model: [HiddenStates(shapes, width, dtype)] * 2 for model in MODELS}
            return
        self.states.mkdir(parents=True, exist_ok=True)
        for model in MODELS:
            paths = [self.states / f"{model}.{turn}" for turn in range(2)]
            if self.done and not paths[self.done % 2].is_file():  # else zeros would be read
                raise damaged_run(paths[self.done % 2], self.states.parent)
            self._turns[model] = [HiddenStates(shapes, width, dtype, path) for path in paths]

    def entering(self, model: str) -> HiddenStates:
        """The states of a model that enter the next layer."""
        return self._turns[model][self.done % 2]

    def leaving(self, model: str) -> HiddenStates:
        """The states that leave it; in memory they overwrite those that enter."""
        return self._turns[model][(self.done + 1) % 2]

    def advance(
        self, fits: Sequence[Fit] = (), values: Mapping[Parameter, Tensor] | None = None
    ) -> None:
        """Finishes a layer and keeps its solutions."""
        fits, done, values = [*self.fits, *fits], self.done + 1, values or {}
        if self.folder is None:
            self.values = {**self.values, **values}
        else:
            path = self.folder / f"{VALUES}{done}"
            if values:
                save_file({f"{n} {name}": v.contiguous() for (n, name), v in values.items()}, path)
                follow_umask(self.folder)
                self._files = [*self._files, path.name]
            content: dict[str, object] = {"done": done, "fits": [asdict(fit) for fit in fits]}
            self._file.save(content | {"values": self._files})
            if values:
                self._stored.read(path)
        self.done, self.fits = done, fits

    def finish(self) -> None:
        """Removes the states, which are no longer needed; the solutions stay."""
        self._turns = {}
        if self.folder is not None:
            shutil.rmtree(self.folder / STATES, ignore_errors=True)

    def clear(self) -> None:
        """Removes all that the folder holds of this refit."""
        if self.folder is not None:
            # before the others: nothing may continue from what a kill here leaves
            (self.folder / STATE).unlink(missing_ok=True)
            self.finish()
            for path in self.folder.glob(f"{VALUES}*"):
                path.unlink()
            with suppress(OSError):  # the folder holds something else, or is missing
                self.folder.rmdir()


class RefitPlan(NamedTuple):
    """Memory of a refit, in bytes."""

    host: Mapping[str, int]  # by purpose, at most, without ``room``
    room: int  # for the states of one layer; more go into a file
    spilled: bool  # whether the states of both models are files, for which there is no room
    at_once: int  # tokens of windows of one length that pass a layer together; 0: of one window


def plan_of(
    short: ScoredModel, windows: Sequence[Sequence[int]], *, folder: Path | None = None
) -> RefitPlan:
    """Plans a refit in the memory allowed for the model, or half of what is free.

    With a ``folder`` all states and the solutions go there.
    """
    calls, max_memory = short.layer_calls(), short.max_memory
    width, inputs, itemsize = calls.widths()
    at_once = _at_once(short.decoder, calls)
    # of what passes a layer elsewhere, the machine holds less than half as much
    tokens = max(*map(len, windows), at_once // 2)
    own = replicas.current().own_items(windows)  # states of others are theirs
    states = sum(map(len, own)) * width * itemsize
    host = {"the process itself": resident() + UNUSED, **_peak_memory(calls, tokens)}
    if folder is None:
        host["what is solved"] = calls.count * (inputs + width) * width * itemsize
    room = (free_memory() // 2 if max_memory is None else bytes_of(max_memory)) - sum(host.values())
    spilled = folder is not None or room < 3 * states
    if not spilled:
        host[f"states of {len(own)} windows"] = 3 * states
        room -= 3 * states
    check_room(host, max_memory, "the refit of this model")
    return RefitPlan(host, max(room, 0), spilled, at_once)


def _at_once(decoder: Decoder, calls: LayerCalls) -> int:
    """Tokens that fill an accelerator, in half of its memory that a layer and its sums leave."""
    devices = {p.device for p in decoder.layers.parameters() if not p.is_meta} or {decoder.device}
    if any(device.type == "cpu" for device in devices):
        return 0
    width, inputs, _ = calls.widths()
    room = min(map(free_memory, devices)) - sum(_peak_memory(calls, 0).values())
    most = max(room, 0) // 2 // working_memory(1, inputs, width)
    # a power of two: a run that is continued with a little more or less memory rounds alike
    return min(MOST_AT_ONCE, 1 << most.bit_length() >> 1)


def _peak_memory(calls: LayerCalls, tokens: int) -> Mapping[str, int]:
    """Memory while a layer is read, while N tokens are summed, and while its MLP is solved."""
    width, inputs, itemsize = calls.widths()
    attention, mlp = width**2 * itemsize, inputs * width * itemsize  # of their matrices
    read, sums = calls.memory(), 8 * inputs * (inputs + width)
    # rows of a product are in memory twice, in float32 and while they are added; of an attention
    # that was solved before there are a copy of its matrix as it was, and one as solved
    summed = {"layer": read.get("layer", 0), "sums": sums, "copies of matrices": 2 * attention}
    summed["working memory"] = working_memory(tokens, inputs, width) + 12 * ROWS * inputs
    # only the output projections of the layer are loaded: both and a copy of each as it was, one of
    # the attention's as solved, and for the MLP's the solver's copy and the best so far
    solved = {"layer": (attention + mlp) * bool(read), "sums": sums}
    solved["copies of matrices"] = 2 * attention + 3 * mlp
    wide = 4 * inputs * width * (itemsize < 4)  # of a matrix that is multiplied in float32
    solved["working memory"] = max(
        4 * tokens * (2 * inputs + 8 * width) + wide, 3 * 8 * COLUMNS * inputs
    )
    return max((read, summed, solved), key=lambda moment: sum(moment.values()))
