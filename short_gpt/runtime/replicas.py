"""Copies of a model that share the windows: each reads its part, and their sums are put together.

Under torchrun, R ranks with model parallelism of N are R / N replicas. All replicas go through
the same windows in the same order and take their own, so that they reach every sum at the same
step without having to agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llama.parallel import choose_device, initialize, several_ranks

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Sums = TypeVar("Sums", bound="DataclassInstance")


@dataclass(frozen=True)
class Replicas:
    """This process's replica among all.

    Attributes:
        rank: number of the replica, from 0; equal on the ranks that share its model.
        count: how many there are; 1 communicates nothing.
    """

    rank: int = 0
    count: int = 1

    def step(self, batch_size: int) -> int:
        """How many windows all replicas read in one step: one or two batches each."""
        return batch_size if self.count == 1 else self.count * self._part(batch_size)

    def share(self, step: Sequence[T], batch_size: int) -> list[list[T]]:
        """This replica's batches of a step.

        A replica's part begins at an even place and is even in number (but for the last), so
        that windows fall into the same halves of `Importance` as if one process read them all.

        Args:
            step: `step` windows in a row, or fewer at the end of all.
            batch_size: windows read at once.

        Returns:
            Equally many batches on every replica, some empty at the end of all windows.
        """
        part = self._part(batch_size)
        start = self.rank * part
        places = range(start, start + part, batch_size)
        return [list(step[i : i + batch_size]) for i in places]

    def _part(self, batch_size: int) -> int:
        return batch_size * (1 + (batch_size % 2 and self.count > 1))

    def sum(self, sums: Sums) -> Sums:
        """The sums of all replicas; the same on every rank. All ranks must call it.

        Args:
            sums: a dataclass whose tensors are this replica's sums; it stays as it is.

        Returns:
            A new one. What is not a tensor is taken from this replica.
        """
        own = {f.name: getattr(sums, f.name) for f in fields(sums)}
        own = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        if self.count == 1:
            total = {name: value.clone() for name, value in own.items()}
        else:
            # one message for all sums, in the dtype that holds them all
            flat = _sum(torch.cat([value.double().flatten() for value in own.values()]))
            parts = flat.split([value.numel() for value in own.values()])
            total = {
                name: part.view(value.shape).to(value.dtype)
                for (name, value), part in zip(own.items(), parts, strict=True)
            }
        return replace(sums, **total)

    def gather(self, value: T) -> list[T]:
        """What each replica gives, in order. All ranks must call it."""
        if self.count == 1:
            return [value]
        from fairscale.nn.model_parallel import initialize as groups

        found = [value] * self.count  # each place is written over
        dist.all_gather_object(found, value, group=groups.get_data_parallel_group())
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank of any replica. All ranks must call it."""
        if not _several():
            return flag
        found = torch.tensor(float(flag), device=_place())
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


def current(device: torch.device | None = None) -> Replicas:
    """The replicas that this process belongs to.

    Ranks that share one model are one replica. Where a launcher started several ranks and nothing
    has made groups of them yet, each is a replica of its own.

    Args:
        device: decides how such new groups communicate; None takes the best there is.
    """
    from fairscale.nn.model_parallel import initialize as groups

    if several_ranks() and not dist.is_initialized():
        initialize(1, device=device or choose_device())
    if not _several() or not groups.model_parallel_is_initialized():
        return Replicas()  # a group that somebody else made shares the windows as they like
    return Replicas(groups.get_data_parallel_rank(), groups.get_data_parallel_world_size())


def of_model(value: T) -> list[T]:
    """What each of the ranks that share this one's model gives, in order. All must call it."""
    from fairscale.nn.model_parallel import initialize as groups

    if not _several() or not groups.model_parallel_is_initialized():
        return [value]
    found = [value] * groups.get_model_parallel_world_size()  # each place is written over
    dist.all_gather_object(found, value, group=groups.get_model_parallel_group())
    return found


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _place() -> torch.device:
    """Where tensors must be to be communicated."""
    on_card = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_card else torch.device("cpu")


def _sum(values: Tensor) -> Tensor:
    """Sums over all replicas, on the CPU."""
    from fairscale.nn.model_parallel import initialize as groups

    there = values.to(_place(), copy=True)
    dist.all_reduce(there, group=groups.get_data_parallel_group())
    if groups.get_model_parallel_world_size() > 1:  # what follows from the sums is followed by all
        source = groups.get_model_parallel_src_rank()
        dist.broadcast(there, source, group=groups.get_model_parallel_group())
    return there.cpu()
