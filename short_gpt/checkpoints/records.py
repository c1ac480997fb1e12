"""What a model's files say of it: the record of its pruning, its licence and its base model.

These are in ``pruning.json`` and the model's card, or in a GGUF file's metadata.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from llama.files import json_object, read_json
from llama.formats.gguf_read import part_paths, read_header
from llama.sources import is_gguf, is_hub_id
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import read_record

PROVENANCE = "pruning.json"
RECORD = "short_gpt.pruning"  # a key of GGUF, whose value is the text of that file
NAME = "general.name"  # another, the model's name
# What jobs record of a choice and of a healing, as it comes; the model's own record holds it.
EVIDENCE = ("method", "scored_by", "change", "eval_data", "size", "precision")
# The library's own keys. They are made from the model; no caller may contradict them.
KEYS = (
    *EVIDENCE,
    *("removed_layers", "kept_layers", "original_layers", "source", "source_pruning"),
    *("block_influence", "scored", "perplexity", "perplexity_tokens", "perplexity_error"),
    *("healing", "versions", "source_card"),
    "files",  # what the directory holds, listed by its writer: not part of the history
)
LICENSE = ("license", "license_name", "license_link")
BASE = "base_model"
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)
UNQUOTED = re.compile(r"[A-Za-z0-9][\w./-]*")
HUB = re.compile(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")
MOST_BASES = 100
MAX_CARD_BYTES = 2**20  # bytes of a card that are looked at
T = TypeVar("T")
Step = Mapping[str, object]  # one change of weights: "method" and its settings, ready for JSON


@dataclass(frozen=True)
class Measured:
    """A perplexity as it is kept."""

    value: float
    tokens: int | None = None  # predicted; None where the record does not say
    # "interval_95", and the numbers of "windows" and "texts", None where unknown; may be empty
    error: Mapping[str, object] = field(default_factory=dict)


def record_of(source: str | os.PathLike[str]) -> Entries | None:
    """The record of a checkpoint directory or a GGUF file; None if it has none."""
    path = Path(str(source))
    if not is_gguf(path):
        path = path / PROVENANCE
        return Entries(read_record(path), str(path)) if path.is_file() else None
    text = read_header(part_paths(path)[0]).fields.get(RECORD) if path.is_file() else None
    if text is None:
        return None
    where = f"{RECORD} in {path}"
    return Entries(json_object(str(text), where), where)


class Entries:
    """A record as a file holds it, whose entries are checked when read; ``where`` is the file."""

    def __init__(self, content: Mapping[str, object], where: str) -> None:
        self.content, self.where = content, where

    def refused(self, key: str, expected: str, value: object) -> ShortGPTError:
        return ShortGPTError(
            f"{self.where} is not a record of a pruned model: expected {expected} as {key}, got "
            f"{str(value)[:80]}; correct it, or delete it and with it the history of the layers"
        )

    def mapping(self, key: str) -> Mapping[str, object]:
        """An object; empty where there is none."""
        return self.entry(key, "an object", {})

    def entry(self, key: str, expected: str, default: T) -> T:
        """A value of the type of ``default``, which it is where there is none."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, type(default)):
            raise self.refused(key, expected, value)
        return default if value is None else value

    def layers(self, earlier: int | None) -> tuple[list[int], list[int]]:
        """The removed layers and those kept.

        ``earlier`` is how many layers the source's own record kept; None where it has none.
        """
        keys = ("removed_layers", "kept_layers")
        removed, kept = (self._numbers(key, self.content.get(key)) for key in keys)
        count = len(removed) + len(kept) if earlier is None else earlier
        if sorted([*removed, *kept]) != list(range(count)):
            expected = f"with removed_layers {removed} all numbers of 0 to {count - 1}, each once,"
            raise self.refused("kept_layers", expected, kept)
        return removed, kept

    def _numbers(self, key: str, value: object) -> list[int]:
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise self.refused(key, "a list of layer numbers", value)
        return list(value)

    def scored(self) -> dict[str, int]:
        """Numbers of windows and tokens scored; empty where there are none."""
        scored = self.mapping("scored")
        known = {k: n for k in ("windows", "tokens") if isinstance(n := scored.get(k), int)}
        if scored and len(known) < 2:
            raise self.refused("scored", "numbers of windows and tokens", dict(scored))
        return known

    def quality(self) -> dict[str, Measured]:
        """The perplexities by name."""
        quality: dict[str, Measured] = {}
        tokens, errors = self.mapping("perplexity_tokens"), self.mapping("perplexity_error")
        for name, stored in self.mapping("perplexity").items():
            value = math.inf if stored is None else stored  # JSON has no infinity
            if not isinstance(value, int | float):
                raise self.refused("perplexity", "numbers by name", value)
            count, error = tokens.get(name), errors.get(name)
            if error is not None and not isinstance(error, dict):
                raise self.refused("perplexity_error", "an object by name", error)
            count = count if isinstance(count, int) else None
            quality[name] = Measured(float(value), count, error or {})
        return quality

    def steps(self, healing: object) -> list[Step]:
        """Changes of weights, oldest first."""
        steps = [] if healing is None else healing
        if not isinstance(steps, list) or not all(map(_is_step, steps)):
            raise self.refused("healing", "steps that name their method", healing)
        return steps


def _is_step(step: object) -> bool:
    return isinstance(step, dict) and isinstance(step.get("method"), str)


def source_card(source: str | os.PathLike[str], directory: Path | None = None) -> dict[str, object]:
    """The licence, by the keys `LICENSE`, and `BASE` of a checkpoint, as far as its files tell.

    The base model is the source itself if that is on the hub, else the name that its config
    remembers, else its card's own. ``directory`` is where its files are, if not ``source``.
    """
    if is_gguf(source):
        entries = _card_in_metadata(Path(str(source)))
    else:
        entries = front_matter(_readme(directory or source))
    licence = {key: entries[key] for key in LICENSE if key in entries}
    base = _hub_name(source) or entries.get(BASE)
    return {**licence, BASE: base} if base else licence


def front_matter(text: str) -> dict[str, object]:
    """Names and lists of names at the head of a card; what is damaged counts as missing."""
    import yaml

    match = FRONT_MATTER.search(text)
    try:
        entries = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    known = entries.items() if isinstance(entries, dict) else ()
    return {str(key): value for key, value in known if _is_names(value)}


def _card_in_metadata(path: Path) -> dict[str, object]:
    """The same of a GGUF file's metadata; a base model that is not on the hub has no name there."""
    try:
        fields = read_header(part_paths(path)[0]).fields
    except (OSError, ShortGPTError):
        return {}
    entries = {key: fields.get(f"general.{key.replace('_', '.')}") for key in LICENSE}
    count = fields.get("general.base_model.count")
    addresses = [
        re.fullmatch(HUB, str(fields.get(f"general.base_model.{i}.repo_url")))
        for i in range(count if isinstance(count, int) and count in range(MOST_BASES) else 0)
    ]
    names = [address[1] for address in addresses if address]
    entries[BASE] = names[0] if len(names) == 1 else names
    return {key: value for key, value in entries.items() if _is_names(value)}


def _is_names(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value)


def yaml_lines(entries: Mapping[str, object]) -> str:
    """Lines of a card's head from `source_card`; what is not plain is quoted, as JSON is YAML."""
    lines = ""
    for key in (BASE, *LICENSE):
        if key in entries:
            value = entries[key]
            plain = isinstance(value, str) and UNQUOTED.fullmatch(value)
            lines += f"{key}: {value if plain else json.dumps(value)}\n"
    return lines


def _hub_name(source: str | os.PathLike[str]) -> str | None:
    """The hub's name of a model, with its owner: its own, or what its config remembers."""
    name: object = str(source)
    if Path(source).exists():
        try:
            name = read_json(Path(source) / "config.json").get("_name_or_path")
        except (OSError, ShortGPTError):
            return None
    # without an owner it may be a directory's
    return name if isinstance(name, str) and "/" in name and is_hub_id(name) else None


def _readme(source: str | os.PathLike[str]) -> str:
    path = Path(source) / "README.md"
    if not Path(source).exists() and is_hub_id(str(source)):
        from huggingface_hub import try_to_load_from_cache

        path = Path(str(try_to_load_from_cache(str(source), path.name)))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(MAX_CARD_BYTES)
    except (OSError, UnicodeDecodeError):
        return ""
