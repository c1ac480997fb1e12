"""What training is surrounded by: no remarks, the same result every time, the config as it was."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks to developers; what users must know is raised or reported."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            # peft looks for a config beside GGUF files; no embedding changes its size here
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms inside the block."""
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@contextmanager
def kept_config(adapted: PeftModel) -> Iterator[None]:
    """The model's config as it was behind the block: the Trainer turns the cache off in it."""
    config = vars(adapted.get_base_model().config)
    before = dict(config)
    try:
        yield
    finally:
        config.clear()
        config.update(before)
