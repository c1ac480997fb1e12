"""A model's record as it lies on disk, its entries checked as they are read.

It stands in ``pruning.json``, or in a GGUF file's own metadata, also as earlier versions wrote it.
An entry that is not as expected is refused by the file's name and its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """Block Influence by the numbers of the source's ``count`` layers; NaN for those not kept."""
    found: list[float | None] = [math.nan] * count
    for layer, value in zip(kept, influence, strict=True) if influence else ():
        found[layer] = value
    return found if influence else []


def scored_counts(scored: Mapping[str, object], where: str) -> dict[str, int]:
    counts = {key: scored.get(key) for key in ("windows", "tokens")} if scored else {}
    whole = {key: count for key, count in counts.items() if isinstance(count, int)}
    if len(whole) != len(counts):
        raise refusal(where, "scored", "numbers of windows and tokens", dict(scored))
    return whole


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
    gone, kept = (numbers(record.get(k), k, where) for k in ("removed_layers", "kept_layers"))
    count = len(gone) + len(kept) if before is None else before
    if sorted([*gone, *kept]) != list(range(count)):
        expected = f"with removed_layers {gone} all numbers of 0 to {count - 1}, each once,"
        raise refusal(where, "kept_layers", expected, kept)
    for half, layers in mapping(record, "removed_sublayers", where).items():
        if not {*numbers(layers, half, where)} <= {*kept}:
            raise refusal(where, half, f"some of the kept_layers {kept}", layers)


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
