"""Results on disk: what was computed, from what, with which versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from llama.io.files import new_file
from llama.io.json_files import JsonObject, json_text, read_json, write_json
from short_gpt.runtime.digest import Digest
from short_gpt.runtime.errors import ShortGPTError

ABOUT = ("versions", "machine")  # entries of every record
CHECKED = "sha256"  # the entry with the digest of all others but those
PACKAGES = ("short-gpt", "torch", "fairscale", "datasets", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, object]:
    """The system, processor, cores, threads and CUDA device that numbers were computed with."""
    import torch

    found: dict[str, object] = {"system": f"{platform.system()} {platform.machine()}"}
    found |= {"processor": processor(), "cores": os.cpu_count()}
    found["torch_threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    return found


def environment() -> str:
    """`machine` and `versions` in two lines, as a notebook shows them.

    Example:
        >>> print(environment())  # doctest: +SKIP
        Linux x86_64, Intel(R) Xeon(R) CPU @ 2.80GHz, 2 cores, 2 torch_threads
        python 3.11.7, short-gpt 0.1.0, torch 2.13.0, ...
    """
    counted = [f"{v} {k}" if isinstance(v, int) else str(v) for k, v in machine().items() if v]
    return ", ".join(counted) + "\n" + ", ".join(f"{k} {v}" for k, v in versions().items())


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_record(
    path: str | os.PathLike[str], content: Mapping[str, object], *, overwrite: bool = False
) -> Path:
    """Writes ``content``, its digest, `versions` and `machine` as a JSON file, whole or not at all.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is not set, or it is no such record.
    """
    target = Path(str(path))
    with new_file(target, overwrite=overwrite, ours=is_record) as partial:
        checked = {**content, CHECKED: content_digest(content)}
        write_json(partial, {**checked, "versions": versions(), "machine": machine()})
    return target


def content_digest(content: Mapping[str, object]) -> str:
    """The digest of a record's own entries, as they are written or as they are read again."""
    own = {name: content[name] for name in content if name not in (CHECKED, *ABOUT)}
    return Digest(json_text(own).encode()).whole


def is_record(path: Path) -> bool:
    """Whether a file is one that `write_record` wrote for a run, in this version or before."""
    try:
        content = read_json(path)
    except (OSError, ShortGPTError):
        return False
    return "versions" in content and not content.keys().isdisjoint(("machine", "command", "run"))


def read_record(path: str | os.PathLike[str]) -> JsonObject:
    """What `write_record` wrote.

    Raises:
        FileNotFoundError, ShortGPTError: no such file, or not a JSON object.
    """
    source = Path(str(path))
    if not source.is_file():
        what = "is no file" if source.exists() else "does not exist"
        raise FileNotFoundError(f"{source} {what}")
    return read_json(source)
