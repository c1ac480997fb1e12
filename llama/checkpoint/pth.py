"""One ``.pth`` file of a checkpoint, as ``torch.save`` writes it: read and written by tensor.

Files are memory-mapped and opened with ``weights_only=True``: nothing in them is ever executed, and
what is not touched is not read. Writing is our own, because ``torch.save`` needs all tensors at
once. ``torch.serialization.skip_data`` writes by tensor too, but with wrong checksums.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from llama.errors import InputError, check_file, damaged

STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor; tensors with the same ``storage`` share their bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: object

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class Shard:
    """One ``.pth`` file of tensors by name, of which only the pickle is read; else InputError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, Tensor] | None = None
        self.infos = {name: self._describe(t, name) for name, t in self.load().items()}

    def load(self) -> dict[str, Tensor]:
        """All tensors, mapped from the file: a tensor's bytes are read when it is used."""
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise damaged(self.path, "its pickle holds more than tensors") from None
        except Exception as error:  # a damaged file can make the unpickler raise anything
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise InputError(f"{self.path} does not fit the free memory") from None
            raise damaged(self.path, "expected a complete zip file of torch.save") from None
        kind = type(content).__name__
        check_file(isinstance(content, dict), self.path, f"it holds a {kind}, not tensors by name")
        return content

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from the file; the mapping goes when the tensor does.

        A transposed or expanded one is copied: where elements share memory none can be written.
        """
        if self._mapped is None:
            return self.load()[name].contiguous()
        if not self._mapped:
            self._mapped.update(self.load())
        return self._mapped[name].contiguous()

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Inside, `read` maps the file once; pages read count as memory until the block ends."""
        self._mapped = {}
        try:
            yield
        finally:
            self._mapped = None

    def _describe(self, tensor: object, name: str) -> TensorInfo:
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(tensor, Tensor) or not dense or tensor.is_meta:
            raise damaged(self.path, f"its {name} is no dense tensor with values")
        kinds = f"expected one of {', '.join(str(t) for t in STORAGES)}"
        check_file(tensor.dtype in STORAGES, self.path, f"its {name} is {tensor.dtype}; {kinds}")
        owner = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # tied weights are one storage under two names; a view of a part counts as its own
        storage = tensor.data_ptr() if owner else name
        return TensorInfo(tuple(tensor.shape), tensor.dtype, storage)


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    numel: int


class _Pickler(pickle.Pickler):
    """Writes ``torch.save``'s pickle of a dict of tensors from the tensors' descriptions."""

    def __init__(self, file: IO[bytes], storages: Mapping[object, _Storage]) -> None:
        super().__init__(file, protocol=2)  # the protocol of torch.save
        self.storages = storages

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        """A storage is named in the pickle; its bytes are a record of the archive."""
        if isinstance(obj, _Storage):
            return ("storage", STORAGES[obj.dtype], obj.key, "cpu", obj.numel)
        return None

    def reducer_override(self, obj: object) -> Any:  # NotImplemented has no public type
        """A tensor's description becomes the call by which torch makes the tensor."""
        if not isinstance(obj, TensorInfo):
            return NotImplemented
        stride = torch.empty(obj.shape, device="meta").stride()
        no_hooks: OrderedDict[str, object] = OrderedDict()
        args = (self.storages[obj.storage], 0, obj.shape, stride, False, no_hooks)
        return torch._utils._rebuild_tensor_v2, args


def write_shard(path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
    """Writes a file that ``torch.load`` reads (mapped too), holding one tensor at a time.

    The layout is that of ``torch.save``: a zip archive of stored records, aligned at 64 bytes.
    Tensors of equal ``storage`` are written once; ``read`` is called once for each storage. The
    file is read again: OSError if a record has another checksum (CRC-32) than when written.
    """
    write_shards([path], infos, read, lambda _, tensor, __: tensor)


def write_shards(
    paths: Sequence[Path],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    part: Callable[[str, Tensor, int], Tensor],
) -> None:
    """`write_shard` for several files at once: every tensor is read once and written in parts.

    ``part`` gives the part of a tensor of this name, for the file of this number.
    """
    # Every entry is a ZipInfo, whose date is fixed: the same tensors give the same bytes.
    storages: dict[object, _Storage] = {}
    sources: dict[str, str] = {}
    for name, info in infos.items():
        if info.storage not in storages:
            storages[info.storage] = _Storage(str(len(storages)), info.dtype, info.numel)
            sources[name] = storages[info.storage].key
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(path, "w")) for path in paths]
        for archive in archives:
            with archive.open(zipfile.ZipInfo("archive/data.pkl"), "w") as file:
                _Pickler(file, storages).dump(dict(infos))
            archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        for name, key in sources.items():
            info = infos[name]
            full = rounded(name, read(name).detach(), info.dtype)
            for number, archive in enumerate(archives):
                tensor = part(name, full, number).contiguous()
                assert tuple(tensor.shape) == info.shape, name
                _write_record(archive, f"archive/data/{key}", tensor)
        for archive in archives:
            archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")
    for path in paths:
        with zipfile.ZipFile(path) as again:
            if (other := again.testzip()) is not None:
                raise OSError(f"{path}, read again, holds another {other}: check the disk")


def rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in this dtype on the CPU; InputError if a finite value exceeds float16's."""
    new = weight.to("cpu", dtype)
    if dtype != torch.float16 or weight.dtype == dtype or not (infinite := new.isinf()).any():
        return new
    if weight.cpu()[infinite].isfinite().any():
        raise InputError(f"{name} has values beyond float16's: write bfloat16 or float32")
    return new


def _write_record(archive: zipfile.ZipFile, name: str, tensor: Tensor) -> None:
    record = zipfile.ZipInfo(name)
    assert archive.fp is not None
    # local header 30 bytes + name + zip64 field 20 + our padding field, whose head takes 4
    start = archive.fp.tell() + 30 + len(name) + 20 + 4
    padding = -start % 64
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(record, "w", force_zip64=True) as file:
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
