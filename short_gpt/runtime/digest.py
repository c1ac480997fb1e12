"""Digests by which weights, windows and settings are told from others: SHA-256 over what counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn


class Digest:
    """A digest of parts that come one after the other.

    Example:
        >>> Digest(b"a", b"b").short == Digest(b"ab").short
        True
    """

    def __init__(self, *parts: bytes) -> None:
        self._hash = hashlib.sha256(b"".join(parts))

    def add(self, part: bytes) -> None:
        """Counts a part in."""
        self._hash.update(part)

    @property
    def whole(self) -> str:
        """All 64 hexadecimal digits."""
        return self._hash.hexdigest()

    @property
    def short(self) -> str:
        """The first 16, for what only has to be told from its likes."""
        return self.whole[:16]


def weights_digest(model: nn.Module, samples: int = 64) -> str:
    """A digest of names, shapes, dtypes and a sample of the values of all parameters.

    Args:
        samples: values of each parameter, at most, spread evenly: weights that differ only between
            them are not told apart.
    """
    digest = Digest()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        few = flat[:: max(1, len(flat) // samples)][:samples].float().cpu()
        digest.add(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.add(few.numpy().tobytes())
    return digest.short


def json_digest(content: object) -> str:
    """A digest of windows, texts, settings or whatever else JSON can hold, by its content.

    Example:
        >>> json_digest([[1, 2]]) == json_digest([(1, 2)]) != json_digest([[1], [2]])
        True
    """
    return Digest(json.dumps(content).encode()).short


def files_digest(files: Iterable[Path], samples: int = 4096) -> str:
    """A digest of files' names and sizes and of samples spread evenly over their bytes.

    Args:
        files: in their order, which counts.
        samples: of 1 KiB, at most so many of each file.
    """
    digest = Digest()
    for path in files:
        size = path.stat().st_size
        digest.add(f"{path.name} {size}".encode())
        with open(path, "rb", buffering=0) as file:
            for place in range(0, size, max(size // samples, 1024)):
                file.seek(place)
                digest.add(file.read(1024))
    return digest.short
