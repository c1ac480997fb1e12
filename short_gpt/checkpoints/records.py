"""Where a model's record lies: in ``pruning.json``, or in a GGUF file's own metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from llama.formats.gguf_header import read_header
from llama.formats.gguf_parts import part_paths
from llama.io.sources import is_gguf
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import read_record

PROVENANCE = "pruning.json"
RECORD = "short_gpt.pruning"  # a key of GGUF, whose value is the text of that file


def record_of(source: str | os.PathLike[str]) -> tuple[Mapping[str, object], str] | None:
    """A model's record and a name for it; None if it has none.

    Args:
        source: a checkpoint directory, or a GGUF file.

    Raises:
        ShortGPTError: the record is damaged.
    """
    path = Path(str(source))
    if not is_gguf(path):
        path = path / PROVENANCE
        return (read_record(path), str(path)) if path.is_file() else None
    return _in_metadata(path) if path.is_file() else None


def _in_metadata(path: Path) -> tuple[Mapping[str, object], str] | None:
    text = read_header(part_paths(path)[0]).fields.get(RECORD)
    if text is None:
        return None
    where = f"{RECORD} in {path}"
    try:
        content = json.loads(str(text))
    except ValueError as error:
        raise ShortGPTError(f"{where} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ShortGPTError(f"{where} must hold one JSON object, got {type(content).__name__}")
    return content, where
