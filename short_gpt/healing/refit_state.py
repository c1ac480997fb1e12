"""What a refit holds between layers, in memory or on disk, and how much of both it needs.

With a folder, hidden states and solved matrices are files. Files of states take turns, so that
those entering the next layer exist whenever the process ends.

Shapes: B windows of a batch, S tokens, N = B S, D width of the stream, F inputs of a matrix, W
width of a hidden state (D or F).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.files import JsonObject, new_file, tidy
from llama.formats.safetensors import SafetensorsFile
from short_gpt.healing.solver import COLUMNS, ROWS, Fit, Unsolved
from short_gpt.models.decoder import Parameter
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import bytes_of, check_room, format_bytes, free_memory, resident
from short_gpt.runtime.state import StateFile, check_saved, damaged_run, hold
from short_gpt.wrappers.scored_model import ScoredModel

ORIGINAL, PRUNED = "original", "pruned"  # the models whose hidden states are kept
MODELS = (ORIGINAL, PRUNED)
OF_A_LAYER = ("between", "inputs of attention", "inputs of mlp")  # one layer alone needs them
STATE, VALUES = "refit.json", "values."  # the first is written after all that it names
# with the number of a layer, or of one of two turns
FILE = re.compile(
    rf"{re.escape(STATE)}|{re.escape(VALUES)}\d+|({'|'.join(MODELS)})\.[01]|{'|'.join(OF_A_LAYER)}"
)
UNUSED = 200 * 10**6  # bytes that libraries take at their first use, and that lie between pieces


class HiddenStates:
    """A state (B, S, W) for each of some batches, on the CPU: in memory, or in a file."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        width: int,
        dtype: torch.dtype,
        path: Path | None = None,
        *,
        hashed: bool = False,
    ) -> None:
        self._shapes = [(*shape, width) for shape in shapes]
        self._dtype, self._path, self._hashed = dtype, path, hashed
        self._held: dict[int, Tensor] = {}
        self._digests: dict[int, bytes] = {}  # of the latest states
        if path is not None:
            sizes = [B * S * width * dtype.itemsize for B, S in shapes]
            self._starts = list(accumulate(sizes, initial=0))
            path.touch()
            if path.stat().st_size != self._starts[-1]:
                with open(path, "r+b") as file:
                    file.truncate(self._starts[-1])

    def __len__(self) -> int:
        return len(self._shapes)

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
        content = _bytes_of(state.contiguous())
        if self._hashed:
            self._digests[batch] = sha256(content).digest()
        with open(self._path, "r+b") as file:
            file.seek(self._starts[batch])
            file.write(content)

    @property
    def digest(self) -> str | None:
        """A digest of all batches, each hashed when written; None where one of them was not."""
        if len(self._digests) < len(self):
            return None
        return sha256(b"".join(self._digests[i] for i in range(len(self)))).hexdigest()

    def read_digest(self) -> str:
        """As `digest`, of the file's present content."""
        digests = (sha256(_bytes_of(self[i])).digest() for i in range(len(self)))
        return sha256(b"".join(digests)).hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


class StoredValues(Mapping[Parameter, Tensor]):
    """New values of parameters, in files that are read one tensor at a time."""

    def __init__(self) -> None:
        self._files: dict[Parameter, SafetensorsFile] = {}

    def read(self, path: Path) -> None:
        file = SafetensorsFile(path)
        for name in file.entries:
            layer, parameter = name.split(" ", 1)
            self._files[int(layer), parameter] = file

    def __getitem__(self, key: Parameter) -> Tensor:
        return self._files[key].read(f"{key[0]} {key[1]}")

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class RefitState:
    """A refit under way: in memory, or in a folder from which one process can continue it."""

    def __init__(self, folder: Path | None, identity: Mapping[str, object]) -> None:
        self.folder, self.done, self.fits = folder, 0, list[Fit]()  # finished layers, their fits
        self.unsolved = list[Unsolved]()  # of these layers
        self.scratch: Path | None = None  # for states that are not to be continued from
        self._values: dict[Parameter, Tensor] = {}
        self._stored, self._files = StoredValues(), dict[str, str]()  # digests by their names
        self._digests: dict[str, str] = {}  # of the states entering the next layer, by model
        self._turns: dict[str, list[HiddenStates]] = {}
        if folder is not None:
            lock = hold(folder)
            _sweep(folder)
            self._file = StateFile(folder / STATE, identity, lock=lock)
            if self._file.content is not None:
                content: JsonObject = self._file.content
                self.done, self.fits = content["done"], [Fit(**fit) for fit in content["fits"]]
                self.unsolved = [Unsolved(**one) for one in content["unsolved"]]
                self._files, self._digests = content["values"], content["states"]
            for name, digest in self._files.items():
                check_saved(folder / name, digest, folder=folder)
                self._stored.read(folder / name)

    @property
    def values(self) -> Mapping[Parameter, Tensor]:
        """The new values so far, by a layer's original number and a parameter's name in it."""
        return self._values if self.folder is None else self._stored

    def open(self, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype) -> None:
        """Makes room for the states of batches of these shapes (B, S), entering a layer."""
        folder = self._folder_of_states
        if folder is None:  # in memory what leaves a layer overwrites what entered it
            self._turns = {model: [HiddenStates(shapes, width, dtype)] * 2 for model in MODELS}
            return
        folder.mkdir(parents=True, exist_ok=True)
        hashed = self.folder is not None  # else there is nothing to continue from
        for model in MODELS:
            paths = [folder / f"{model}.{turn}" for turn in range(2)]
            path, digest = paths[self.done % 2], self._digests.get(model)
            if digest and not path.is_file():
                raise damaged_run(path, folder)
            turns = [HiddenStates(shapes, width, dtype, path, hashed=hashed) for path in paths]
            if digest and turns[self.done % 2].read_digest() != digest:
                raise damaged_run(path, folder)
            self._turns[model] = turns

    def entering(self, model: str) -> HiddenStates:
        """The states of a model that enter the next layer."""
        return self._turns[model][self.done % 2]

    def leaving(self, model: str) -> HiddenStates:
        """The states that leave it; in memory they overwrite those that enter."""
        return self._turns[model][(self.done + 1) % 2]

    def path(self, name: str) -> Path | None:
        folder = self._folder_of_states
        return None if folder is None else folder / name

    @property
    def _folder_of_states(self) -> Path | None:
        return self.scratch if self.folder is None else self.folder

    def advance(
        self,
        fits: Sequence[Fit] = (),
        values: Mapping[Parameter, Tensor] | None = None,
        unsolved: Sequence[Unsolved] = (),
        *,
        models: Sequence[str] = MODELS,
    ) -> None:
        """Finishes a layer and keeps its solutions; the next one reads the states of ``models``."""
        fits, done, values = [*self.fits, *fits], self.done + 1, values or {}
        unsolved = [*self.unsolved, *unsolved]
        if self.folder is None:
            self._values |= values
        else:
            path = self.folder / f"{VALUES}{done}"
            if values:
                tensors = {f"{n} {name}": v.contiguous() for (n, name), v in values.items()}
                with new_file(path, overwrite=True, replaces=lambda _: True) as partial:
                    save_file(tensors, partial)
                self._files = {**self._files, path.name: files_digest([path])}
            content: dict[str, object] = {"done": done, "fits": [asdict(fit) for fit in fits]}
            content |= {"unsolved": [asdict(one) for one in unsolved], "values": self._files}
            content["states"] = {model: self.leaving(model).digest for model in models}
            self._file.save(content)
            if values:
                self._stored.read(path)
        self.done, self.fits, self.unsolved = done, fits, unsolved

    def finish(self) -> None:
        """Removes the states, which are no longer needed; the solutions stay."""
        self._turns = {}
        if self.folder is not None:
            for path in self.folder.glob("*"):
                if is_own(path) and path.name != STATE and not path.name.startswith(VALUES):
                    path.unlink()

    def clear(self) -> None:
        """Removes all that the folder holds of this refit."""
        self._turns = {}
        if self.folder is not None:
            _sweep(self.folder)
            # before the others: nothing may continue from what a kill here leaves
            (self.folder / STATE).unlink(missing_ok=True)
            for path in filter(is_own, self.folder.glob("*")):
                path.unlink()
            with suppress(OSError):  # the folder holds something else, or is missing
                self.folder.rmdir()


def is_own(path: Path) -> bool:
    return path.is_file() and is_name(path.name)


def is_name(name: str) -> bool:
    """Whether a refit gives a file this name."""
    return FILE.fullmatch(name) is not None


def _sweep(folder: Path) -> None:
    """Removes the hidden folders of files that a killed refit was writing."""
    for path in folder.glob(".*.writing-*"):
        name = path.name[1:].rpartition(".writing-")[0]
        if is_name(name):
            tidy(folder / name)


class RefitPlan(NamedTuple):
    """Memory and disk of a refit, in bytes."""

    host: Mapping[str, int]  # in the machine's memory, by purpose
    disk: int  # of the files of states while it runs; 0 where memory holds them
    room: int  # for the states of one layer; more go into a file
    windows: int  # how many are read

    @property
    def total(self) -> int:
        """The most that the process holds, without ``room``."""
        return sum(self.host.values())

    def describe(self) -> str:
        """One line for the user."""
        parts = [f"{format_bytes(size)} {name}" for name, size in self.host.items() if size]
        line = f"refit: {format_bytes(self.total)} = {' + '.join(parts)}"
        if self.disk:
            line += f"; states of {self.windows} windows: {format_bytes(self.disk)} on disk"
        return line


def plan_of(
    short: ScoredModel,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 1,
    folder: Path | None = None,
) -> RefitPlan:
    """Plans a refit in the memory allowed for the model, or half of what is free.

    With a ``folder`` all states and the solutions go there.
    """
    calls, max_memory = short.layer_calls(), short.max_memory
    width, inputs, itemsize = calls.widths()
    every, tokens = sum(map(len, windows)), batch_size * max(map(len, windows))
    own = replicas.current().own_items(windows)  # states of others are theirs
    states = sum(map(len, own)) * width * itemsize
    host = {"the process itself": resident() + UNUSED, **_peak_memory(calls, tokens)}
    solved = calls.count * (inputs + width) * width * itemsize
    if folder is None:
        host["what is solved"] = solved
    room = (free_memory() // 2 if max_memory is None else bytes_of(max_memory)) - sum(host.values())
    spilled = folder is not None or room < 3 * states
    if not spilled:
        host[f"states of {len(own)} windows"] = 3 * states
        room -= 3 * states
    check_room(host, max_memory, "the refit of this model")
    # states of both models entering and leaving a layer, and of the original between sublayers
    disk = (5 * width + 2 * inputs) * every * itemsize
    disk += solved if folder is not None else 0
    if spilled:
        _check_disk(folder, disk)
    return RefitPlan(host, disk * spilled, max(room, 0), len(windows))


def _peak_memory(calls: LayerCalls, tokens: int) -> Mapping[str, int]:
    """Memory while a layer is read, while N tokens are summed, and while its MLP is solved."""
    width, inputs, itemsize = calls.widths()
    attention, mlp = width**2 * itemsize, inputs * width * itemsize  # of their matrices
    read, sums = calls.memory(), 8 * inputs * (inputs + width)
    # rows of a product are in memory twice, in float32 and while they are added; an attention that
    # was solved before has freed more than the copies of its matrix take
    summed = {"layer": read.get("layer", 0), "sums": sums}
    summed["working memory"] = 4 * tokens * (4 * inputs + 10 * width) + 12 * ROWS * inputs
    # only the output projections of the layer are loaded: both and a copy of each as it was, one of
    # the attention's as solved, and for the MLP's the solver's copy and the best so far
    solved = {"layer": (attention + mlp) * bool(read), "sums": sums}
    solved["copies of matrices"] = 2 * attention + 3 * mlp
    wide = 4 * inputs * width * (itemsize < 4)  # of a matrix that is multiplied in float32
    solved["working memory"] = max(
        4 * tokens * (2 * inputs + 8 * width) + wide, 3 * 8 * COLUMNS * inputs
    )
    return max((read, summed, solved), key=lambda moment: sum(moment.values()))


def _check_disk(folder: Path | None, needed: int) -> None:
    target = Path(tempfile.gettempdir()) if folder is None else folder
    # what a refit wrote is written again, and counts as free
    own = () if folder is None else filter(is_own, folder.rglob("*"))
    there = next(above for above in (target, *target.absolute().parents) if above.is_dir())
    held, free = sum(path.stat().st_size for path in own), shutil.disk_usage(there).free
    if needed > free + held:
        raise ShortGPTError(
            f"{there} has {format_bytes(free)} free, the states of the refit need "
            f"{format_bytes(needed - held, up=True)}; make room, or read fewer windows"
        )
