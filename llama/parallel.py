"""Process group, fairscale's model-parallel groups, and the choice of device and dtype.

One process needs no launcher: it is a group of one on a store of its own. Under torchrun the
groups come from the launcher's environment.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout, suppress
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as groups

from llama.errors import check, check_file, refused, short_repr
from llama.files import JsonObject
from llama.ranks import environment, is_distributed

# what weights are computed and stored in, by the names that users and configs have for them
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOATS |= {"float16": torch.float16, "float64": torch.float64}


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, or CUDA, Apple's MPS, CPU in this order; InputError if it is not there.

    It is any that PyTorch has memory on here, such as ``"xpu"``. Under torchrun a bare ``"cuda"``
    means the card of the process's ``LOCAL_RANK``.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    count = torch.cuda.device_count()
    with suppress(Exception):  # each kind of device has errors of its own
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is None:
            rank = int(os.environ.get("LOCAL_RANK", "0"))
            if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:  # a launcher shows each its own
                rank = 0
            chosen = torch.device("cuda", rank)
        torch.empty(1, device=chosen)
        if chosen.type != "meta":
            return chosen
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    raise refused("device", device, f"one of {there} or another that PyTorch has memory on here")


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The given dtype, or float32 on CPU, bfloat16 on CUDA that has it, float16 elsewhere."""
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        if device.type != "cuda":
            return torch.float16
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    name = str(dtype).removeprefix("torch.")
    ok = name in FLOATS and (name != "float64" or has_float64(device))
    check(ok, "dtype", name, f"one of {', '.join(FLOATS)} (the last where {device} has it)")
    return FLOATS[name]


def config_dtype(config: JsonObject, directory: Path) -> torch.dtype | None:
    """The dtype in a ``config.json``, None without one; InputError if no model computes in it."""
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(name), None)  # which knows "half", too
    problem = f"it has the dtype {short_repr(name)}, expected one of {', '.join(FLOATS)}"
    check_file(name is None or dtype in FLOATS.values(), directory / "config.json", problem)
    return dtype


@lru_cache
def has_float64(device: torch.device) -> bool:
    """Whether a device multiplies in float64, tried once; Apple's GPUs and some of Intel's do not.

    Example:
        >>> has_float64(torch.device("cpu"))
        True
    """
    try:
        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        return (one @ one).item() == 1
    except (TypeError, RuntimeError):  # MPS raises the former, others the latter
        return False


def initialize(model_parallel_size: int | None = None, *, device: torch.device) -> None:
    """Makes the process group and fairscale's groups, unless the process has them already.

    ``model_parallel_size`` ranks share one model; None means all (WORLD_SIZE of torchrun, else 1)
    or what is already set up. Several ranks on CUDA talk by nccl, others by gloo.
    """
    if not dist.is_initialized():
        _make_process_group(device)
    if groups.model_parallel_is_initialized():
        current = groups.get_model_parallel_world_size()
        same = model_parallel_size in (None, current)
        check(same, "model_parallel_size", model_parallel_size, f"{current}, as before here")
        return
    world = dist.get_world_size()
    size = world if model_parallel_size is None else model_parallel_size
    divides = size >= 1 and not world % size
    check(divides, "model_parallel_size", size, f"a divisor of the {world} running rank(s)")
    # fairscale prints three lines about the sizes, but stdout belongs to the caller's own output
    with redirect_stdout(io.StringIO()):
        groups.initialize_model_parallel(size)


def _make_process_group(device: torch.device) -> None:
    if is_distributed():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return
    # A group of one talks to nobody; on the loopback it needs neither a network nor a host name.
    name, loopback = "GLOO_SOCKET_IFNAME", {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    hook = sys.excepthook
    with environment(name, loopback or os.environ.get(name)):
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        finally:
            sys.excepthook = hook  # torch's own puts "[rank0]:" before every line of a traceback


def model_parallel_rank() -> int:
    """This process's rank among those that share one model; 0 for a single process."""
    if not groups.model_parallel_is_initialized():
        initialize(device=choose_device())
    return groups.get_model_parallel_rank()


def model_parallel_size() -> int:
    """How many ranks share one model; 1 for a single process."""
    model_parallel_rank()  # makes the groups where there are none
    return groups.get_model_parallel_world_size()
