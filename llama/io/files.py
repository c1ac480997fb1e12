"""Files and directories that appear whole or not at all, and never in the place of others'."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What this library writes: an existing directory with anything else in it is never replaced.
OURS = re.compile(
    r"consolidated\.\d+\.pth|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"tokenizer\.model|(block_influence|angular)\.png|merges\.txt|.+\.jinja|"
    r"(params|config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|"
    r"added_tokens|pruning|conversion|layers)\.json|README\.md|(LICENSE|NOTICE|USE_POLICY).*"
)


def check_new(path: Path, *, replaces: str | None = None, source: Path | None = None) -> None:
    """Raises FileExistsError or PermissionError where `new_directory` could not go.

    Args:
        path, replaces: as for `new_directory`.
        source: what the new content is made from; it must not lie in the directory replaced.
    """
    if path.exists() and replaces is None:
        raise FileExistsError(f"{path} exists; choose another directory or pass overwrite")
    if path.exists():
        problem = _foreign(path, str(replaces))
        if problem:
            raise FileExistsError(
                f"{path} exists and holds {problem}, so it is not overwritten; choose another "
                "directory"
            )
        if source is not None and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise FileExistsError(f"{path} holds the source {source}; choose another directory")
    check_writable(path)


def _foreign(path: Path, marker: str) -> str | None:
    """What in a directory is not ours or, like the marker of its kind, not there; else None."""
    entries = {p.name: p for p in path.iterdir()} if path.is_dir() else {}
    if marker not in entries:
        return f"no {marker}"
    for name, entry in sorted(entries.items()):
        if name == "pruned" and marker == "layers.json" and entry.is_dir():
            inside = _foreign(entry, "pruning.json")
            if inside:
                return f"{inside} in {name}"
        elif not OURS.fullmatch(name) or not entry.is_file():
            return name
    return None


def check_writable(path: Path) -> None:
    """Raises PermissionError if ``path`` could not be created; for a check before long work."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {parent} is no writable directory")


@contextmanager
def new_directory(path: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    Gives a sibling to write into; it takes its place when the block ends well and is deleted
    when it does not.

    Args:
        path: the new directory.
        replaces: name of a file; an existing directory that holds it is replaced. None replaces
            nothing.

    Raises:
        FileExistsError: ``path`` exists and is not to be replaced.
    """
    path = path.resolve()
    check_new(path, replaces=replaces)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    partial = work / "new"
    partial.mkdir()
    try:
        yield partial
        check_new(path, replaces=replaces)  # somebody else may have made it meanwhile
        _swap(partial, path, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(partial: Path, path: Path, old: Path) -> None:
    """Puts ``partial`` in the place of ``path``, which stays as it was if that fails."""
    if not path.exists():
        partial.rename(path)
        return
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as JSON, lists of numbers on one line.

    Numbers keep their last digit; NaN and infinities, which JSON lacks, become null.
    """
    path.write_text(_json(content, "\n") + "\n", encoding="utf-8")


def _json(value: Any, line: str) -> str:
    """``line`` is the line break with the indentation of the place."""
    inner = line + " "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(k))}: {_json(v, inner)}" for k, v in value.items()]
        return "{" + inner + ("," + inner).join(items) + line + "}" if items else "{}"
    if isinstance(value, list | tuple):
        items = [_json(v, inner) for v in value]
        if any(isinstance(v, Mapping | list | tuple) for v in value):
            return "[" + inner + ("," + inner).join(items) + line + "]"
        return "[" + ", ".join(items) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value)
