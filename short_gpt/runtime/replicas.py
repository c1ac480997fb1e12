"""Copies of a model that share the windows: each reads its part, and their sums are added up.

Under torchrun, R ranks with model parallelism of N are R / N replicas. All replicas go through
the same windows in the same order and take their own, and so they reach every sum at the same
step. `end_all` ends all ranks with one message when one of them fails.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups
from torch import Tensor

from llama.parallel import choose_device, initialize, is_distributed
from short_gpt.runtime.errors import ShortGPTError

T = TypeVar("T")


@dataclass(frozen=True)
class Replicas:
    """This process's replica among all."""

    rank: int = 0  # number of the replica, from 0; equal on the ranks that share its model
    count: int = 1  # how many there are; 1 communicates nothing

    def step(self, batch_size: int) -> int:
        """How many windows all replicas read in one step: one or two batches each."""
        return batch_size if self.count == 1 else self.count * self._part(batch_size)

    def share(self, step: Sequence[T], batch_size: int) -> list[list[T]]:
        """This replica's batches of a step's windows: as many as the others', some maybe empty.

        A replica's part begins at an even number and is even in length (except the last), so that
        windows fall into the same halves of `Importance` as if one process read them all.
        """
        part = self._part(batch_size)
        start = self.rank * part
        return [list(step[i : i + batch_size]) for i in range(start, start + part, batch_size)]

    def _part(self, batch_size: int) -> int:
        return batch_size * (1 + (batch_size % 2 and self.count > 1))

    def own_items(self, items: Sequence[T], *, first: int = 0) -> Sequence[T]:
        """This replica's items: every ``count``-th, where the first item has number ``first``."""
        every = range((self.rank - first) % self.count, len(items), self.count)
        return items if self.count == 1 else [items[i] for i in every]

    def merged(self, own: Sequence[T]) -> list[T]:
        """All items in order, from each replica's values for its `own_items` (first = 0)."""
        parts = self.gather(own)
        total = sum(map(len, parts))
        return [parts[i % self.count][i // self.count] for i in range(total)]

    def summed(self, values: Tensor) -> Tensor:
        """The sum of all replicas' tensors, where they are. All ranks must call it."""
        if self.count == 1:
            return values
        total = values.contiguous().to(_device(), copy=True)
        dist.all_reduce(total, group=groups.get_data_parallel_group())
        if groups.get_model_parallel_world_size() > 1:  # all ranks of a model act on the same bits
            source = groups.get_model_parallel_src_rank()
            dist.broadcast(total, source, group=groups.get_model_parallel_group())
        return total.to(values.device)

    def gather(self, value: T) -> list[T]:
        """The value of each replica, in order. All ranks must call it."""
        return [value] if self.count == 1 else _gather(value, groups.get_data_parallel_group())

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank of any replica. All ranks must call it."""
        if not _several():
            return flag
        highest = torch.tensor(float(flag), device=_device())
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(highest)


def current(device: torch.device | None = None) -> Replicas:
    """The replicas that this process belongs to; ranks that share one model are one replica.

    Where nothing has made groups of ranks yet, each becomes a replica; ``device`` computes.
    """
    if is_distributed() and not dist.is_initialized():
        initialize(1, device=device or choose_device())
    if not _several() or not groups.model_parallel_is_initialized():
        return Replicas()  # the caller divides the windows
    return Replicas(groups.get_data_parallel_rank(), groups.get_data_parallel_world_size())


def of_model(value: T) -> list[T]:
    """The value of each rank that shares this one's model, in order. All must call it."""
    if not _several() or not groups.model_parallel_is_initialized():
        return [value]
    return _gather(value, groups.get_model_parallel_group())


def require_whole_model(what: str) -> None:
    """Raises ShortGPTError unless each of several ranks is known to hold a whole model."""
    ranks = 1
    if _several():  # where only torch's group was made, all may share the model
        made = groups.model_parallel_is_initialized()
        ranks = groups.get_model_parallel_world_size() if made else dist.get_world_size()
    if ranks > 1:
        raise ShortGPTError(
            f"{what} needs the whole model on every rank, got {ranks} model-parallel ranks: open "
            "the model with model_parallel_size=1, and the ranks share the windows"
        )


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _gather(value: T, group: dist.ProcessGroup) -> list[T]:
    values = [value] * group.size()  # each is overwritten
    dist.all_gather_object(values, value, group=group)
    return values


def _device() -> torch.device:
    """Where tensors must be to be communicated."""
    on_card = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_card else torch.device("cpu")


def end_all(error: BaseException, *, line: str | None, code: int) -> NoReturn:
    """Ends this process, whatever its peers are waiting for; the launcher then ends them.

    It prints why, as ``line`` or with the traceback. All ranks may fail alike, or because one was
    lost: only the first rank with an error of its own prints at once, and before another one does,
    the launcher has ended it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ["RANK"] != "0" or lost(error):
        time.sleep(2)
    if line is None and not lost(error):
        traceback.print_exception(error)
    else:
        reason = str(error).split("\n")[0]
        line = line or f"short-gpt: a rank was lost, or cannot be reached: {reason}"
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost(error: BaseException) -> bool:
    """Whether communication with the other ranks failed."""
    kinds = (dist.DistBackendError, dist.DistStoreError, dist.DistNetworkError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "gloo" in str(error))
