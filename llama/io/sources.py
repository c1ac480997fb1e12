"""What a source of weights is, told by its name and by what lies there."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Literal

Kind = Literal["meta", "hf", "gguf", "hub"]


def kind_of(source: str | PathLike[str]) -> Kind:
    """What a source of weights is.

    Args:
        source: a path, or the name of a model on the hub.

    Returns:
        ``"meta"``: a directory in Meta's format (``params.json``, which wins where both lie).
        ``"hf"``: a directory in Hugging Face's format (``config.json``).
        ``"gguf"``: a GGUF file.
        ``"hub"``: nothing here, but a name like ``owner/name`` that the hub may know. A bare name
        is taken for a mistyped directory.

    Raises:
        FileNotFoundError: it looks like a path and does not exist, or a directory is no model.
    """
    path = Path(str(source))
    if is_gguf(source):
        if not path.is_file():
            raise FileNotFoundError(f"GGUF file {source} does not exist")
        return "gguf"
    if path.is_dir():
        return _kind_of_directory(path)
    return _kind_of_name(str(source))


def _kind_of_directory(path: Path) -> Literal["meta", "hf"]:
    if (path / "params.json").is_file():
        return "meta"
    if (path / "config.json").is_file():
        return "hf"
    raise FileNotFoundError(
        f"{path} has no params.json (Meta's format) and no config.json (Hugging Face's); "
        "is it a checkpoint?"
    )


def _kind_of_name(name: str) -> Literal["hub"]:
    """That of a name on the hub; FileNotFoundError for what looks like a path."""
    if Path(name).exists():
        raise FileNotFoundError(f"{Path(name)} is a file; expected a checkpoint directory or .gguf")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"checkpoint directory {name} does not exist")
    return "hub"


def is_gguf(source: str | PathLike[str]) -> bool:
    """Whether a name is that of a GGUF file, which need not be there."""
    return str(source).endswith(".gguf") and not Path(str(source)).is_dir()


def is_meta(source: str | PathLike[str]) -> bool:
    """Whether a source is a directory in Meta's format; errors as of `kind_of`."""
    return kind_of(source) == "meta"


def is_hub_id(name: str) -> bool:
    """Whether a name could be that of a model on the hub, with its owner in front or without."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()
