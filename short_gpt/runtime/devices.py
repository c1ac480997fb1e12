"""What devices do in ways of their own: how exactly they multiply, and when they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block, products of float32 matrices are not rounded to TF32 or bfloat16.

    The switches that allow it are the user's, and are back after the block. Those of half precision
    stay: no sum of ours has it.
    """
    with ExitStack() as undo:
        for backend in (torch.backends.cuda, torch.backends.mkldnn):
            matmul: Any = getattr(backend, "matmul", None)
            if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on every backend has its own
                undo.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
        with suppress(RuntimeError):  # the common one cannot be read where these differ from it
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")  # sets all of them
        yield


def wait(module: nn.Module) -> None:
    """Returns when the devices of a module's weights have done all that they were asked to."""
    for device in {weight.device for weight in module.parameters() if not weight.is_meta}:
        torch.zeros((), device=device).item()  # a value is read after what was begun before it
