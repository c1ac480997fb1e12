"""Digests by which weights, windows and settings are told from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn


def windows_digest(windows: Iterable[Sequence[int]]) -> str:
    """A digest of token ids, window by window."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{list(window)}".encode())
    return digest.hexdigest()[:16]


def texts_digest(texts: Iterable[str]) -> str:
    """A digest of texts, one by one."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:16]


def weights_digest(model: nn.Module, samples: int = 64) -> str:
    """A digest of names, shapes, dtypes and a sample of the values of all parameters."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        few = flat[:: max(1, len(flat) // samples)][:samples].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(few.numpy().tobytes())
    return digest.hexdigest()[:16]


def json_digest(content: object) -> str:
    """A digest of windows, settings or whatever else JSON can hold, by its content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def files_digest(files: Iterable[Path], samples: int = 4096) -> str:
    """A digest of files' names and sizes and of samples spread evenly over their bytes.

    Args:
        files: in their order, which counts.
        samples: of 1 KiB, at most so many of each file.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb", buffering=0) as file:
            for place in range(0, size, max(size // samples, 1024)):
                file.seek(place)
                digest.update(file.read(1024))
    return digest.hexdigest()[:16]
