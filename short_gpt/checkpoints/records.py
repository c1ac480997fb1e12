"""What a model's files say of it: the record of its pruning, its licence and its base model.

The record is in ``pruning.json``, or in a GGUF file's own metadata, also as earlier versions wrote
it. An entry that is not as expected is refused by the file's name and its own. Licence and base
model are in the model's card, or in a GGUF file's metadata.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama.formats.gguf_read import part_paths, read_header
from llama.io.json_files import read_json
from llama.io.sources import is_gguf, is_hub_id
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


# What jobs record of a choice and of a healing, as it comes; the model's own record holds it.
EVIDENCE = ("method", "scored_by", "quality_gate", "change", "eval_data", "size")
# The library's own keys. They are made from the model; no caller may contradict them.
KEYS = (
    *EVIDENCE,
    *("removed_layers", "kept_layers", "original_layers", "source", "source_pruning"),
    *("block_influence", "scored", "perplexity", "perplexity_tokens", "perplexity_error"),
    *("healing", "removed_sublayers", "versions", "source_card"),
    "files",  # what the directory holds, listed by whoever replaces it: not part of the history
)
Step = Mapping[str, object]  # one change of weights: "method" and its settings, ready for JSON


@dataclass(frozen=True)
class Measured:
    """A perplexity as it is kept.

    Attributes:
        value: the perplexity.
        tokens: predicted; None in records of versions that did not keep them.
        error: "interval_95", and over how many "windows" and "texts", which are None where they
            are not known; empty where none was kept.
    """

    value: float
    tokens: int | None = None
    error: Mapping[str, object] = field(default_factory=dict)


def healing_steps(healing: object, where: str) -> list[Step]:
    """Steps oldest first: a list, or as earlier versions wrote it the last with those before in it.

    These wrote ``{"method": ..., "earlier": {"method": ..., "earlier": ...}}``.
    """
    if healing is None:
        return []
    if isinstance(healing, list):
        return [step for part in healing for step in healing_steps(part, where)]
    if not isinstance(healing, dict) or not isinstance(healing.get("method"), str):
        raise refusal(where, "healing", "steps that name their method", healing)
    last = {key: value for key, value in healing.items() if key != "earlier"}
    return [*healing_steps(healing.get("earlier"), where), last]


def measured(value: object, tokens: object, error: object, where: str) -> Measured:
    if value is None:  # JSON has no infinity
        value = math.inf
    if not isinstance(value, int | float):
        raise refusal(where, "perplexity", "numbers by name", value)
    if error is not None and not isinstance(error, dict):
        raise refusal(where, "perplexity_error", "an object by name", error)
    return Measured(float(value), tokens if isinstance(tokens, int) else None, error or {})


def measurements(record: Mapping[str, object], where: str) -> dict[str, Measured]:
    keys = ("perplexity", "perplexity_tokens", "perplexity_error")
    values, tokens, errors = (mapping(record, key, where) for key in keys)
    return {n: measured(v, tokens.get(n), errors.get(n), where) for n, v in values.items()}


def influences(record: Mapping[str, object], where: str) -> list[float | None]:
    value = record.get("block_influence") or []
    if not isinstance(value, list):
        raise refusal(where, "block_influence", "a list of numbers", value)
    return value


def spread(
    influence: Sequence[float | None], kept: Sequence[int], count: int
) -> list[float | None]:
    """Block Influence by the source's ``count`` layers; NaN for those not kept."""
    by_layer: list[float | None] = [math.nan] * count
    for layer, value in zip(kept, influence, strict=True) if influence else ():
        by_layer[layer] = value
    return by_layer if influence else []


def scored_counts(scored: Mapping[str, object], where: str) -> dict[str, int]:
    counts = {key: scored.get(key) for key in ("windows", "tokens")} if scored else {}
    known = {key: count for key, count in counts.items() if isinstance(count, int)}
    if len(known) != len(counts):
        raise refusal(where, "scored", "numbers of windows and tokens", dict(scored))
    return known


def numbers(value: object, key: str, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise refusal(where, key, "a list of layer numbers", value)
    return list(value)


def check_numbering(record: Mapping[str, object], before: int | None, where: str) -> None:
    """Raises ShortGPTError unless removed and kept are, together, the layers of one model.

    Args:
        record: whose lists are known to hold numbers.
        before: how many layers the source's own record left; None where it has none.
        where: names the file.
    """
    removed, kept = (numbers(record.get(k), k, where) for k in ("removed_layers", "kept_layers"))
    count = len(removed) + len(kept) if before is None else before
    if sorted([*removed, *kept]) != list(range(count)):
        expected = f"with removed_layers {removed} all numbers of 0 to {count - 1}, each once,"
        raise refusal(where, "kept_layers", expected, kept)
    for kind, layers in mapping(record, "removed_sublayers", where).items():
        if not {*numbers(layers, kind, where)} <= {*kept}:
            raise refusal(where, kind, f"some of the kept_layers {kept}", layers)


def mapping(record: Mapping[str, object], key: str, where: str) -> Mapping[str, object]:
    value = record.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refusal(where, key, "an object", value)
    return value


def refusal(where: str, key: str, expected: str, value: object) -> ShortGPTError:
    return ShortGPTError(
        f"{where} is no record of a pruned model: expected {expected} as {key}, got "
        f"{str(value)[:80]}; mend it, or take it away, and with it the history of the layers"
    )


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
        The licence by the keys `LICENSE`, the base model as `BASE`; what is not known is left out.

    Example:
        >>> source_card("mistralai/Mistral-7B-v0.1")["base_model"]
        'mistralai/Mistral-7B-v0.1'
    """
    if is_gguf(source):
        entries = _card_in_metadata(Path(str(source)))
    else:
        entries = front_matter(_text(directory or source, "README.md"))
    licence = {key: entries[key] for key in LICENSE if key in entries}
    base = _named(source) or entries.get(BASE)
    return {**licence, BASE: base} if base else licence


def front_matter(text: str) -> dict[str, object]:
    """Names and lists of names at the head of a card; what is damaged counts as not there.

    Example:
        >>> front_matter("---\\nlicense: mit\\nbase_model: [a/b]\\n---\\n# A model")
        {'license': 'mit', 'base_model': ['a/b']}
    """
    import yaml

    match = FRONT_MATTER.search(text)
    try:
        entries = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return (
        {str(k): v for k, v in entries.items() if _is_names(v)} if isinstance(entries, dict) else {}
    )


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
    """Whether a value is a name, or several; not a nested object."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value)


def yaml_lines(entries: Mapping[str, object]) -> str:
    """Lines of a card's head from `source_card`; what is not plain is quoted, as JSON is YAML."""
    keys = [key for key in (BASE, *LICENSE) if key in entries]
    return "".join(f"{key}: {_quoted(entries[key])}\n" for key in keys)


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
