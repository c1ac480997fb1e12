"""Digests by which weights, windows and settings are told from others: SHA-256 over all of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

PIECE = 2**23  # bytes of a file that one thread holds at once


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


def weights_digest(model: nn.Module) -> str:
    """A digest of names, shapes, dtypes and all bytes of all parameters."""
    named = dict(model.named_parameters())
    said = [f"{name} {tuple(w.shape)} {w.dtype}".encode() for name, w in named.items()]
    return _together(said, [partial(_tensor_bytes, weight) for weight in named.values()])


def json_digest(content: object) -> str:
    """A digest of windows, texts, settings or whatever else JSON can hold, by its content.

    Example:
        >>> json_digest([[1, 2]]) == json_digest([(1, 2)]) != json_digest([[1], [2]])
        True
    """
    return Digest(json.dumps(content).encode()).short


def files_digest(files: Iterable[Path]) -> str:
    """A digest of files' sizes and all of their bytes, read once as long as they stay as they are.

    Args:
        files: in their order, which counts; their names do not.
    """
    states = [(path, path.stat()) for path in files]
    return _files_digest(tuple((p, s.st_size, s.st_mtime_ns, s.st_ino) for p, s in states))


@lru_cache(maxsize=16)
def _files_digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    said = [f"{size}".encode() for _, size, _, _ in files]
    pieces = [
        partial(_piece, path, place) for path, size, *_ in files for place in range(0, size, PIECE)
    ]
    return _together(said, pieces)


def _together(said: Iterable[bytes], parts: Iterable[Callable[[], bytes]]) -> str:
    """A digest of what is said of some parts and of each part's own, made by several threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        return Digest(*said, *threads.map(lambda part: part(), parts)).short


def _piece(path: Path, place: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(place)
        return hashlib.sha256(file.read(PIECE)).digest()


def _tensor_bytes(weight: Tensor) -> bytes:
    """The digest of a tensor's bytes."""
    flat = weight.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
