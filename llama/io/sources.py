"""What a source of weights is."""

from __future__ import annotations

from pathlib import Path


def is_meta(source: str) -> bool:
    """Whether a path is a Meta checkpoint directory; any other source is for transformers.

    Raises:
        FileNotFoundError: it looks like a path and does not exist, or a directory is no model.
    """
    path = Path(source)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("params.json", "config.json")):
            raise FileNotFoundError(
                f"{path} has no params.json (Meta's format) and no config.json (Hugging Face's); "
                "is it a checkpoint?"
            )
        return (path / "params.json").is_file()
    if path.is_file() and path.suffix != ".gguf":
        raise FileNotFoundError(f"{path} is a file; expected a checkpoint directory or .gguf")
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"checkpoint directory {source} does not exist")
    return False
