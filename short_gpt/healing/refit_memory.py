"""What a refit takes in memory and on disk, before it begins.

Shapes: N tokens of a batch, F inputs of a matrix, D width of the stream.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from short_gpt.healing.refit_state import is_own
from short_gpt.healing.solver import COLUMNS, ROWS
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import bytes_of, free_memory, resident, shown
from short_gpt.wrappers.scored_model import ScoredModel

UNUSED = 200 * 10**6  # what libraries that were not used yet take, and what lies between pieces


@dataclass(frozen=True)
class RefitPlan:
    """Memory and disk of a refit, in bytes.

    Attributes:
        host: what the machine's memory holds, by what it is for.
        disk: what the files of states take while it runs; 0 where memory holds them.
        room: left for what one layer alone needs of the windows; the rest goes into a file.
        windows: that are read.
    """

    host: Mapping[str, int]
    disk: int
    room: int
    windows: int

    @property
    def total(self) -> int:
        """The most that the process holds, except what there is room for."""
        return sum(self.host.values())

    def describe(self) -> str:
        """One line for the user.

        Example:
            >>> RefitPlan({"process": 2 * 10**8, "layer": 10**9}, 10**9, 0, 8).describe()
            'refit: 1.2 GB = 200 MB process + 1 GB layer; states of 8 windows: 1 GB on disk'
        """
        parts = [f"{shown(size)} {name}" for name, size in self.host.items() if size]
        line = f"refit: {shown(self.total)} = {' + '.join(parts)}"
        if self.disk:
            line += f"; states of {self.windows} windows: {shown(self.disk)} on disk"
        return line


def plan(
    calls: LayerCalls,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 1,
    max_memory: str | int | None = None,
    folder: Path | None = None,
    fits: int = 1,
) -> RefitPlan:
    """Plans a refit.

    Args:
        calls: of the model.
        windows: token ids, those to choose ridges by among them.
        batch_size: windows read at once.
        max_memory: of the process, in bytes or like "3GB"; None takes half of what is free.
        folder: where states go in any case; None keeps them in memory where they fit.
        fits: one after the other, whose solutions are all kept there.

    Raises:
        ShortGPTError: ``max_memory`` or the disk is too little; the message says the least.
    """
    width, inputs, itemsize = calls.widths()
    every, tokens = sum(map(len, windows)), batch_size * max(map(len, windows))
    states = every * width * itemsize
    host = {"the process itself": resident() + UNUSED, **_fullest(calls, tokens)}
    solved = calls.count * (inputs + width) * width * itemsize
    if folder is None:
        host["what is solved"] = solved
    room = (free_memory() // 2 if max_memory is None else bytes_of(max_memory)) - sum(host.values())
    spilled = folder is not None or room < 3 * states
    if not spilled:
        host[f"states of {len(windows)} windows"] = 3 * states
        room -= 3 * states
    if max_memory is not None and room < 0:
        least, parts = sum(host.values()), ", ".join(f"{shown(v)} {k}" for k, v in host.items())
        raise ShortGPTError(
            f"max_memory {max_memory} is too little: the refit of this model needs at least "
            f"{shown(least, up=True)} ({parts})"
        )
    # states of both models entering and leaving a layer, and of the original between sublayers
    disk = 5 * states + 2 * every * inputs * itemsize
    disk += fits * solved if folder is not None else 0
    if spilled:
        _check_disk(folder, disk)
    return RefitPlan(host, disk * spilled, max(room, 0), len(windows))


def _fullest(calls: LayerCalls, tokens: int) -> Mapping[str, int]:
    """What a layer takes while it is read, its sums are made, or its MLP's matrix is solved.

    Args:
        calls: of the model.
        tokens: N.
    """
    width, inputs, itemsize = calls.widths()
    attention, mlp = width**2 * itemsize, inputs * width * itemsize  # what their matrices take
    read, sums = calls.memory(), 8 * inputs * (inputs + width)
    # rows of a product are there in float32, and as they are added; of an attention that was solved
    # before, more has gone than the copies of its matrix take
    summed = {"layer": read.get("layer", 0), "sums": sums}
    summed["working memory"] = 4 * tokens * (4 * inputs + 10 * width) + 12 * ROWS * inputs
    # the last matrices are left of the layer; of both there is a copy as they were, of the
    # attention's one as it became, of the MLP's the solver's own and the best so far
    solved = {"layer": (attention + mlp) * bool(read), "sums": sums}
    solved["copies of matrices"] = 2 * attention + 3 * mlp
    wide = 4 * inputs * width * (itemsize < 4)  # of a matrix that is multiplied in float32
    solved["working memory"] = max(
        4 * tokens * (2 * inputs + 8 * width) + wide, 3 * 8 * COLUMNS * inputs
    )
    return max((read, summed, solved), key=lambda moment: sum(moment.values()))


def plan_of(
    short: ScoredModel,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 1,
    folder: Path | None = None,
    fits: int = 1,
) -> RefitPlan:
    """`plan` of a model, in the memory that it was opened with."""
    calls, most = short.layer_calls(), short.max_memory
    return plan(calls, windows, batch_size=batch_size, max_memory=most, folder=folder, fits=fits)


def _check_disk(folder: Path | None, needed: int) -> None:
    """Raises ShortGPTError where a folder cannot take so many bytes.

    Those of its files that a refit wrote are to be written again, and count as free.

    Args:
        folder: need not be there yet; None is that of temporary files.
        needed: bytes.
    """
    target = Path(tempfile.gettempdir()) if folder is None else folder
    own = () if folder is None else filter(is_own, folder.rglob("*"))
    there = next(above for above in (target, *target.absolute().parents) if above.is_dir())
    held, free = sum(path.stat().st_size for path in own), shutil.disk_usage(there).free
    if needed > free + held:
        raise ShortGPTError(
            f"{there} has {shown(free)} free, the states of the refit need "
            f"{shown(needed - held, up=True)}; make room, or read fewer windows"
        )
