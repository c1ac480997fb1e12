"""What running a model one layer at a time takes in memory, before anything is read.

Shapes: B windows of a batch, S tokens, D width, L layers, V vocabulary, F feed-forward width.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from llama.args import ModelArgs
from llama.checkpoint.meta import full_shapes
from llama.ranks import is_distributed
from short_gpt.runtime.errors import ShortGPTError, refused, whole

CPU = torch.device("cpu")
BLOCK_BYTES = 32 * 2**20  # rows of the embedding or the output head that are read at once
# Most windows of a round, and on the CPU tokens too: by then reading a layer takes less time
# than running it, a rule to stop can look again, and a run be saved.
MOST_WINDOWS, MOST_ON_DEVICE, MOST_TOKENS = 32, 256, 8192
UNUSED = 200 * 10**6  # bytes that libraries take at their first use, and that lie between pieces
UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class Plan:
    """Memory of a run, in bytes."""

    host: Mapping[str, int]  # in the machine's memory, by purpose, for any number of windows
    device: Mapping[str, int]  # the same of an accelerator; empty on the CPU
    window: int  # hidden states of one window, in the machine's memory
    windows: int  # of a round, all of which pass a layer before the next one is read

    @property
    def total(self) -> int:
        """The most that the process holds in the machine's memory."""
        return sum(self.host.values()) + self.window * self.windows

    def describe(self) -> str:
        """One line for the user."""
        parts = {**self.host, f"states of {self.windows} windows": self.windows * self.window}
        line = f"one layer at a time, {self.windows} windows a round: {format_bytes(self.total)} = "
        line += " + ".join(f"{format_bytes(size)} {name}" for name, size in parts.items() if size)
        if self.device:
            line += f"; on the device {format_bytes(sum(self.device.values()))}"
        return line


def plan(
    args: ModelArgs,
    *,
    dtype: torch.dtype,
    stored: torch.dtype,
    batch_size: int = 1,
    max_memory: str | int | None = None,
    logits: bool = False,
    on_host: bool = True,
    process: int | None = None,
) -> Plan:
    """Plans a run.

    Args:
        args: the model's shape; ``max_seq_len`` is the longest window, in tokens.
        dtype: of the computation; ``stored`` is that of the weights in the files.
        max_memory: of the process, in bytes or like "3GB"; None takes half of what is free. The
            error for too little names the least.
        logits: Logits of complete windows are computed, as a teacher's.
        on_host: The CPU computes.
        process: Bytes that the process already holds. Default: they are measured.
    """
    shapes = full_shapes(args)
    sizes = [math.prod(s) for n, s in shapes.items() if n.startswith("layers.0.")]
    layer = sum(sizes)
    largest = args.dim * max(args.ffn_dim, 2 * args.dim)  # wq is held twice while it is permuted
    working = _working(args, batch_size, dtype, stored, logits=logits)
    host = {
        "the process itself": resident() if process is None else process,
        "next layer as stored": (layer + largest) * stored.itemsize,
    }
    ours = {"layer": layer * dtype.itemsize, "working memory": working}
    if on_host:
        host |= ours
    else:
        kept = sum(pinned(size * stored.itemsize) for size in sizes)
        host["next layer as stored"] = kept + largest * stored.itemsize
        host["working memory"] = 2 * BLOCK_BYTES
        ours["layer"] += largest * stored.itemsize
    state = batch_size * args.max_seq_len * args.dim * dtype.itemsize
    window = math.ceil((state if on_host else pinned(state)) / batch_size) + 16 * args.max_seq_len
    window += (args.n_layers + 1) * (4 * args.dim + 16 * (args.n_layers + 1) + 64)
    room = free_memory() // 2 if max_memory is None else bytes_of(max_memory)
    room -= sum(host.values())
    parts = {**host, "states of a batch": batch_size * window}
    check_room(parts, max_memory, "one layer at a time, this model")
    on_cpu = min(MOST_WINDOWS, max(MOST_TOKENS // args.max_seq_len, 1))
    most = on_cpu if on_host else MOST_ON_DEVICE
    batches = max(min(room // window, most) // batch_size, 1)
    # a power of two: another run's rounds, with a little more or less memory, begin where these do
    rounded = 1 << (batches.bit_length() - 1)
    return Plan(host, {} if on_host else ours, window, rounded * batch_size)


def check_room(parts: Mapping[str, int], max_memory: str | int | None, what: str) -> None:
    """Raises ShortGPTError where these bytes, by purpose, are more than allowed."""
    least = sum(parts.values())
    if max_memory is not None and least > bytes_of(max_memory):
        listed = ", ".join(f"{format_bytes(size)} {name}" for name, size in parts.items())
        raise ShortGPTError(
            f"{max_memory} of memory are too little: {what} needs at least "
            f"{format_bytes(least, up=True)} ({listed})"
        )


def pinned(size: int) -> int:
    """Bytes that torch takes for a pinned tensor of so many: the next power of two.

    Example:
        >>> pinned(4096), pinned(4097)
        (4096, 8192)
    """
    return 1 << (size - 1).bit_length()


def _working(
    args: ModelArgs, batch_size: int, dtype: torch.dtype, stored: torch.dtype, *, logits: bool
) -> int:
    """The most that a batch needs besides its states: in a layer, in the head, or at the end."""
    tokens, wide = batch_size * args.max_seq_len, max(dtype.itemsize, 4)
    inside = tokens * (3 * args.ffn_dim * dtype.itemsize + 8 * args.dim * wide)
    rows = block_rows(args, stored)
    block = 2 * rows * args.dim * (stored.itemsize + dtype.itemsize)
    head = block + tokens * rows * 4 * wide
    end = 3 * 8 * batch_size * (args.n_layers + 1) * args.dim
    if not logits:
        return max(inside, head, end)
    window = 4 * args.max_seq_len * args.vocab_size
    # a batch's while a block is added, or while a teacher's predictions are taken from a window's
    beside = max(block + tokens * rows * dtype.itemsize, 3 * window)
    return max(inside, head, end, batch_size * window + beside)


def block_rows(args: ModelArgs, stored: torch.dtype) -> int:
    """Rows of the embedding or the head that are read at once."""
    return min(max(BLOCK_BYTES // (args.dim * stored.itemsize), 1), args.vocab_size)


def bytes_of(text: str | int, name: str = "max_memory") -> int:
    """A number of bytes, or of a text like "3GB", "2.5 GiB" or "800MB"; else a ShortGPTError."""
    if type(size := whole(text)) is int and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    if match is None or match[2] not in UNITS:
        raise refused(f"`{name}`", text, "a size with its unit, such as 12GB, 800MB or 2.5GiB")
    return int(float(match[1]) * UNITS[match[2]])


def format_bytes(size: int, *, up: bool = False) -> str:
    """Bytes as a short text, to two digits or more; rounded up where asked."""
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= unit:
            scale = 10 if size < 100 * unit else 1
            rounded = (math.ceil if up else round)(size / unit * scale)
            return f"{rounded / scale:g} {name}"
    return f"{size} B"


def resident() -> int:
    """Bytes of memory that this process holds."""
    return psutil.Process().memory_info().rss


def free_memory(device: torch.device = CPU) -> int:
    """Bytes that a device still gives, 0 where it does not tell, as Apple's GPUs do not.

    Of the CPU: what the machine and control groups give without swapping, of which several ranks
    on the machine get equal parts.
    """
    if device.type != "cpu":
        with suppress(AttributeError, RuntimeError):
            module = torch.get_device_module(device)
            held = module.memory_reserved(device) - module.memory_allocated(device)  # by torch
            return module.mem_get_info(device)[0] + held
        return 0
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed() else 1
    return max(0, min([psutil.virtual_memory().available, *left_in_groups()])) // ranks


def left_in_groups(
    own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes that each limit on this process leaves, as a container or a batch system sets it.

    ``own`` names the control group of Linux (version 2) that the process is in, ``mounted`` holds
    all of them. A missing file limits nothing.
    """
    left: list[int] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            if line.startswith("0::"):
                # a container sees its own group as the root, whatever the name is outside
                group = mounted / line[3:].strip("/")
                left += [room for around in (group, *group.parents) for room in _left(around)]
    return left


def _left(group: Path) -> list[int]:
    """What a group's limit leaves; nothing where it has none."""
    with suppress(OSError, ValueError):  # no such file, or "max"
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # files that were read can be dropped
        return [most - used + int(stat.get("inactive_file", 0))]
    return []
