"""What a refit continues from: the states in front of a layer, and the matrices solved before it.

Places are those of the layers that stay, in their order; files of states take turns, so that those
of the last whole layer are there whenever the process ends.

Shapes: B windows of a batch, S tokens, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.formats.safetensors import SafetensorsFile
from llama.io.outputs import new_file
from llama.io.swap import tidy
from short_gpt.healing.states import States
from short_gpt.models.weight_changes import Parameter
from short_gpt.runtime.digest import files_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.lock import hold
from short_gpt.runtime.state import StateFile, check_saved, damaged, missing

NAMES = ("whole", "left")
ALONE = ("between", "inputs of ")  # states that one layer alone needs
STATE, VALUES = "refit.json", "values."  # the first is written behind all that it speaks of


@dataclass(frozen=True)
class Fit:
    """How the end of a half was solved.

    Attributes:
        layer: its layer, in the original model's numbering.
        part: "attention" or "mlp".
        ridge: of the matrix, the candidate that restores most on the windows kept apart; None where
            each of them does harm there, or nothing is missing, and the matrix stays as it is.
        restored: the share of what was missing at its target, in weighted squares over the tokens
            that it was fitted on, that the change gives back: 1 is all, 0 is nothing.
        restored_held: the same on the windows kept apart.
        norm_ridge: of the weight of a norm behind the matrix; None where there is none, or it
            stays as it is.
    """

    layer: int
    part: str
    ridge: float | None
    restored: float
    restored_held: float
    norm_ridge: float | None = None

    @property
    def changed(self) -> bool:
        """Whether anything is another than before."""
        return self.ridge is not None or self.norm_ridge is not None


class StoredValues(Mapping[Parameter, Tensor]):
    """New values of parameters, in files of which one tensor at a time is read."""

    def __init__(self) -> None:
        self._places: dict[Parameter, SafetensorsFile] = {}

    def read(self, path: Path) -> None:
        """Counts a file in."""
        file = SafetensorsFile(path)
        for name in file.entries:
            number, parameter = name.split(" ", 1)
            self._places[int(number), parameter] = file

    def __getitem__(self, key: Parameter) -> Tensor:
        return self._places[key].read(f"{key[0]} {key[1]}")

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class RefitState:
    """A refit under way, in memory or in a folder from which it can be continued.

    Args:
        folder: where files go; None holds all in memory, but for states where there is `scratch`.
        identity: what the refit depends on, by the names that an error shows.

    Attributes:
        done: how many of the layers that stay are behind it.
        fits: of the matrices solved so far.
        scratch: where states go that are not to be continued from.

    Raises:
        ShortGPTError: the folder holds another refit, and the message names what differs; or
            another process works there.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, object]) -> None:
        self.folder, self.done, self.fits = folder, 0, list[Fit]()
        self.scratch: Path | None = None
        self._values: dict[Parameter, Tensor] = {}
        self._stored, self._files = StoredValues(), dict[str, str]()  # digests by their names
        self._digests: dict[str, str] = {}  # of the states in front, by theirs
        self._pairs: dict[str, list[States]] = {}
        if folder is not None:
            lock = hold(folder)
            _sweep(folder)
            _check_own(folder)
            self._file = StateFile(folder / STATE, identity, lock=lock)
            self._continue()

    def _continue(self) -> None:
        found = self._file.content
        if found is None:
            return
        self.done = cast(int, found["done"])
        self.fits = [_fit(fit) for fit in cast("list[dict[str, object]]", found["fits"])]
        self._files = cast("dict[str, str]", found["values"])
        self._digests = cast("dict[str, str]", found["states"])
        for name, digest in self._files.items():
            assert self.folder is not None
            check_saved(self.folder / name, digest, whole=self.folder)
            self._stored.read(self.folder / name)

    @property
    def values(self) -> Mapping[Parameter, Tensor]:
        """The new values so far, by a layer's original number and a parameter's name in it."""
        return self._values if self.folder is None else self._stored

    def open(self, shapes: Sequence[tuple[int, int]], width: int, dtype: torch.dtype) -> None:
        """Makes room for the states of batches of these shapes (B, S), in front of a layer.

        Raises:
            ShortGPTError: files that the refit would go on from are gone, or others.
        """
        folder = self._place
        if folder is None:
            self._pairs = {name: [States(shapes, width, dtype)] * 2 for name in NAMES}
            return
        folder.mkdir(parents=True, exist_ok=True)
        hashed = self.folder is not None  # else there is nothing to continue from
        for name in NAMES:
            paths = [folder / f"{name}.{turn}" for turn in range(2)]
            path, digest = paths[self.done % 2], self._digests.get(name)
            if digest and not path.is_file():
                raise missing(path, folder)
            pair = [States(shapes, width, dtype, path, hashed=hashed) for path in paths]
            if digest and pair[self.done % 2].read_digest() != digest:
                raise damaged(path, folder)
            self._pairs[name] = pair

    def before(self, name: str) -> States:
        """The states "whole" or "left", in front of the layer that is next."""
        return self._pairs[name][self.done % 2]

    def behind(self, name: str) -> States:
        """The states behind it; in memory they are written over those in front."""
        return self._pairs[name][(self.done + 1) % 2]

    def path(self, name: str) -> Path | None:
        """Where states that no continued run needs go; None is in memory."""
        return None if self._place is None else self._place / name

    @property
    def _place(self) -> Path | None:
        """Where states go; None is in memory."""
        return self.scratch if self.folder is None else self.folder

    def advance(
        self,
        fits: Sequence[Fit] = (),
        values: Mapping[Parameter, Tensor] | None = None,
        *,
        states: Sequence[str] = NAMES,
    ) -> None:
        """Puts a layer behind it, with what was solved of it.

        Args:
            fits, values: of the layer's matrices.
            states: that the next layer is to read.
        """
        fits, done, values = [*self.fits, *fits], self.done + 1, values or {}
        if self.folder is None:
            self._values |= values
        else:
            if values:
                path = self.folder / f"{VALUES}{done}"
                tensors = {f"{number} {name}": v for (number, name), v in values.items()}
                with new_file(path, overwrite=True, ours=lambda _: True) as partial:
                    save_file({key: t.contiguous() for key, t in tensors.items()}, partial)
                self._stored.read(path)
                self._files = {**self._files, path.name: files_digest([path])}
            digests = {name: self.behind(name).digest for name in states}
            told = {"done": done, "fits": [asdict(fit) for fit in fits]}
            self._file.save({**told, "values": self._files, "states": digests})
        self.done, self.fits = done, fits

    def finish(self) -> None:
        """Removes the states, which are not needed any more; what was solved stays."""
        self._pairs = {}
        if self.folder is not None:
            for path in self.folder.glob("*"):
                if is_own(path) and path.name != STATE and not path.name.startswith(VALUES):
                    path.unlink()

    def clear(self) -> None:
        """Removes all of it."""
        self._pairs = {}
        if self.folder is not None:
            _sweep(self.folder)
            # first, so that nothing continues from what a kill here may leave
            (self.folder / STATE).unlink(missing_ok=True)
            for path in filter(is_own, self.folder.glob("*")):
                path.unlink()
            with suppress(OSError):  # of a folder that holds something else, or that is not there
                self.folder.rmdir()


def is_own(path: Path) -> bool:
    """Whether a refit wrote this file."""
    return path.is_file() and _is_name(path.name)


def _is_name(name: str) -> bool:
    return name.startswith((STATE, VALUES, *(f"{n}." for n in NAMES), *ALONE))


def _sweep(folder: Path) -> None:
    """Removes the hidden folders of files that a killed refit was writing."""
    for path in folder.glob(".*.writing-*"):
        name = path.name[1:].rpartition(".writing-")[0]
        if _is_name(name):
            tidy(folder / name)


def _check_own(folder: Path) -> None:
    """Raises ShortGPTError for a folder that a refit would share with other files."""
    for path in folder.glob("*"):
        if not is_own(path):
            raise ShortGPTError(
                f"{folder} holds {path.name}, which is none of this refit's files: name a folder "
                "of its own, or delete that one"
            )


def _fit(told: Mapping[str, object]) -> Fit:
    """As `asdict` has told it."""
    ridge, norm_ridge = (cast("float | None", told[name]) for name in ("ridge", "norm_ridge"))
    restored, held = (cast(float, told[name]) for name in ("restored", "restored_held"))
    layer, part = cast(int, told["layer"]), cast(str, told["part"])
    return Fit(layer, part, ridge, restored, held, norm_ridge)
