"""What a source's own card says of its licence and of the model that it was made from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from llama.formats.gguf_header import read_header
from llama.formats.gguf_parts import part_paths
from llama.io.json_files import read_json
from llama.io.sources import is_gguf, is_hub_id
from short_gpt.runtime.errors import ShortGPTError

LICENSE = ("license", "license_name", "license_link")
BASE = "base_model"
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)
PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*")
HUB = re.compile(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")
MOST_BASES = 100
MOST = 2**20  # bytes of a card that are looked at


def source_card(source: str | os.PathLike[str], directory: Path | None = None) -> dict[str, object]:
    """The licence and the base model of a checkpoint, as far as it says.

    The base model is the source itself if that is on the hub, else the name that its config
    remembers, else its card's own base model. A GGUF file says both in its metadata.

    Args:
        source: directory or file of a model, or hub id, of which only what was fetched is read.
        directory: where its files lie, if not at ``source``.

    Returns:
        The licence by the keys `LICENSE`, the base model as `BASE`; what is not said is left out.

    Example:
        >>> source_card("mistralai/Mistral-7B-v0.1")["base_model"]
        'mistralai/Mistral-7B-v0.1'
    """
    if is_gguf(source):
        said = _in_metadata(Path(str(source)))
    else:
        said = front_matter(_text(directory or source, "README.md"))
    found = {key: said[key] for key in LICENSE if key in said}
    base = _named(source) or said.get(BASE)
    return {**found, BASE: base} if base else found


def front_matter(text: str) -> dict[str, object]:
    """Names and lists of names at the head of a card; what is damaged counts as not there.

    Example:
        >>> front_matter("---\\nlicense: mit\\nbase_model: [a/b]\\n---\\n# A model")
        {'license': 'mit', 'base_model': ['a/b']}
    """
    import yaml

    match = FRONT_MATTER.search(text)
    try:
        said = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {str(k): v for k, v in said.items() if _is_said(v)} if isinstance(said, dict) else {}


def _in_metadata(path: Path) -> dict[str, object]:
    """The same of a GGUF file's metadata; a base model that is not on the hub has no name there."""
    try:
        fields = read_header(part_paths(path)[0]).fields
    except (OSError, ShortGPTError):
        return {}
    said = {key: fields.get(f"general.{key.replace('_', '.')}") for key in LICENSE}
    count = fields.get("general.base_model.count")
    addresses = [
        re.fullmatch(HUB, str(fields.get(f"general.base_model.{i}.repo_url")))
        for i in range(count if isinstance(count, int) and count in range(MOST_BASES) else 0)
    ]
    names = [address[1] for address in addresses if address]
    said[BASE] = names[0] if len(names) == 1 else names
    return {key: value for key, value in said.items() if _is_said(value)}


def _is_said(value: object) -> bool:
    """Whether a value is a name, or several; not a nested object."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value)


def yaml_lines(said: Mapping[str, object]) -> str:
    """Lines of a card's head from `source_card`; what is not plain is quoted, as JSON is YAML."""
    keys = [key for key in (BASE, *LICENSE) if key in said]
    return "".join(f"{key}: {_quoted(said[key])}\n" for key in keys)


def _quoted(value: object) -> str:
    plain = isinstance(value, str) and PLAIN.fullmatch(value)
    return str(value) if plain else json.dumps(value)


def _named(source: str | os.PathLike[str]) -> str | None:
    """The hub's name of a model: its own, or what its config remembers."""
    if not Path(source).exists():
        return str(source) if _owned(str(source)) else None
    try:
        name = read_json(Path(source) / "config.json").get("_name_or_path")
    except (OSError, ShortGPTError):
        return None
    return name if isinstance(name, str) and _owned(name) else None


def _owned(name: str) -> bool:
    """Whether a name is one of the hub's, with its owner: others may be of a directory."""
    return "/" in name and is_hub_id(name)


def _text(source: str | os.PathLike[str], name: str) -> str:
    """A file of the model's; empty where there is none, or where it is no text."""
    path = Path(source) / name
    if not Path(source).exists() and is_hub_id(str(source)):
        from huggingface_hub import try_to_load_from_cache

        path = Path(str(try_to_load_from_cache(str(source), name)))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(MOST)
    except (OSError, UnicodeDecodeError):
        return ""
