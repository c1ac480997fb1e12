"""Digests that tell weights, files, windows and settings apart: 16 hex digits of a SHA-256."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from torch import Tensor, nn

PIECE = 2**23  # bytes of a file that one thread holds at once


def weights_digest(model: nn.Module) -> str:
    """A digest of names, shapes, dtypes and all bytes of all parameters.

    Buffers that a file would hold count, too: some quantizations have no other weights.
    """
    named: dict[str, Tensor] = dict(model.named_parameters())
    kept = model.state_dict().keys()
    named |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    if offloaded := [name for name, weight in named.items() if weight.is_meta]:
        raise ShortGPTError(
            f"{offloaded[0]} is offloaded, and so nothing identifies the model, as a run that can "
            "be continued needs it: open the model without a device_map"
        )
    about = [f"{name} {tuple(w.shape)} {w.dtype}".encode() for name, w in named.items()]
    return _digest(about, [partial(_tensor, weight) for weight in named.values()])


def json_digest(content: object) -> str:
    """A digest of windows, texts, settings or whatever else JSON can hold, by its content.

    Example:
        >>> json_digest([[1, 2]]) == json_digest([(1, 2)]) != json_digest([[1], [2]])
        True
    """
    return sha256(json.dumps(content, default=operator.index).encode()).hexdigest()[:16]


def windows_digest(windows: Iterable[Sequence[int]]) -> str:
    """A digest of the token ids of windows."""
    return json_digest([[int(token) for token in window] for window in windows])


Stamps = tuple[tuple[Path, int, int, int], ...]  # files, sizes, times of change, inodes


def stamps(files: Iterable[Path]) -> Stamps:
    """What shows whether files change, without reading them."""
    stats = [(path, path.stat()) for path in files]
    return tuple((path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in stats)


def check_unchanged(opened: Stamps, *, mapped: bool = False) -> None:
    """Raises ShortGPTError for a file that is another one now, or has other content.

    ``mapped``: the content is in memory, where a new file of the same name does not change it.
    """
    for path, *stamp in opened:
        now = [*stamps([path])[0][1:]] if path.is_file() else [-1]
        if now != stamp and not (mapped and now[-1] != stamp[-1]):
            raise ShortGPTError(
                f"{path} has changed since the model was opened: expected the same content until "
                "the end; open the model again"
            )


def files_digest(files: Iterable[Path]) -> str:
    """A digest of files' sizes and bytes in this order; unchanged files are read once."""
    return _files_digest(stamps(files))


@lru_cache(maxsize=16)
def _files_digest(files: Stamps) -> str:
    sizes = [f"{size}".encode() for _, size, _, _ in files]
    pieces = [partial(_piece, f, start) for f, size, *_ in files for start in range(0, size, PIECE)]
    return _digest(sizes, pieces)


def _digest(about: Iterable[bytes], parts: Iterable[Callable[[], bytes]]) -> str:
    """A digest of descriptions and then of each part's own digest, made by several threads."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        joined = b"".join([*about, *threads.map(lambda part: part(), parts)])
    return sha256(joined).hexdigest()[:16]


def _piece(path: Path, start: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        return sha256(file.read(PIECE)).digest()


def _tensor(weight: Tensor) -> bytes:
    import torch

    flat = weight.detach().cpu().contiguous().flatten()
    return sha256(flat.view(torch.uint8).numpy().data).digest()
