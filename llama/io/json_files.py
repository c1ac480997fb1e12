"""JSON files that hold one object: the one reader and the one writer."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama.errors import InputError

JsonObject = dict[str, Any]  # what a file holds is known only once it is looked at


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file; InputError if it holds no JSON, or not one object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    return json_object(path.read_bytes(), str(path))


def json_object(text: str | bytes, where: str) -> JsonObject:
    """The JSON object that a text ``where`` holds; InputError if it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}; fetch or write it again") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{where} must hold one JSON object, got a {type(content).__name__}; fetch or write it "
            "again"
        )
    return content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes an object as `json_text`."""
    path.write_text(json_text(content), encoding="utf-8")


def json_text(content: Mapping[str, object]) -> str:
    """An object as JSON, lists of numbers on one line; NaN and infinities become null."""
    return _json(content, "\n") + "\n"


def _json(value: object, line: str) -> str:
    """``line`` is the line break with the indentation."""
    inner = line + " "
    if isinstance(value, Mapping):
        items = [f"{json.dumps(str(k))}: {_json(v, inner)}" for k, v in value.items()]
        return "{" + inner + ("," + inner).join(items) + line + "}" if items else "{}"
    if isinstance(value, list | tuple):
        if any(isinstance(v, Mapping | list | tuple) for v in value):
            return "[" + inner + ("," + inner).join(_json(v, inner) for v in value) + line + "]"
        with suppress(ValueError):  # of a NaN or an infinity
            return json.dumps(value, allow_nan=False, default=operator.index)
        return "[" + ", ".join(_json(v, inner) for v in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value, default=operator.index)  # whole numbers of numpy
