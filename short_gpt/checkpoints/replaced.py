"""Tensors that a checkpoint is written with in the place of its source's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

# By a tensor's name in the source's files, what reads the new one, when it is to be written.
Replaced = Mapping[str, Callable[[], Tensor]]
