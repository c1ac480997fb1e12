"""What devices do in ways of their own: how exactly they multiply, and when they are done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block, products and convolutions are not rounded to less than their own dtype.

    In float32 they take neither TF32 nor bfloat16, and sums of half precision are in float32. The
    switches that allow it are the user's, and are back after the block.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    matmul: Any = cuda.matmul
    with ExitStack() as undo:
        for name in ("fp16", "bf16"):
            name = f"allow_{name}_reduced_precision_reduction"
            undo.callback(setattr, matmul, name, getattr(matmul, name))
            setattr(matmul, name, False)
        # from torch 2.9 on every kind of product has a switch of its own
        kinds: list[Any] = [matmul, *(getattr(mkldnn, name, None) for name in ("matmul", "conv"))]
        kinds.append(getattr(cudnn, "conv", None))
        for kind in [kind for kind in kinds if hasattr(kind, "fp32_precision")]:
            undo.callback(setattr, kind, "fp32_precision", kind.fp32_precision)
            kind.fp32_precision = "ieee"
        if not hasattr(matmul, "fp32_precision"):
            undo.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            cudnn.allow_tf32 = False
        with suppress(RuntimeError):  # the common one cannot be read where these differ from it
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")  # sets all of them
        yield


def wait(module: nn.Module) -> None:
    """Returns when the devices of a module's weights have done all that they were asked to."""
    for device in {weight.device for weight in module.parameters() if not weight.is_meta}:
        torch.zeros((), device=device).item()  # a value is read after what was begun before it
