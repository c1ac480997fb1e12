"""The README of a pruned model: what went, by which scores, at what cost, how it was healed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama.io.json_files import write_json
from short_gpt.checkpoints.provenance import PROVENANCE, Measured, Provenance
from short_gpt.checkpoints.records import yaml_lines
from short_gpt.evaluation.sampling import SamplingError
from short_gpt.runtime.errors import one_line

TEMPLATE = """---
{head}library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name} without {count} of its {total} layers{healed}

Removed layers, in the original model's numbering from 0 and in the order of removal:

    {removed}

{scores}
{quality}
Made with ShortGPT ({versions}). {changed} `pruning.json` holds
this in numbers, with the original number of every layer that stayed.
"""
IN_WORDS = {"linear patch": "a linear patch"}  # methods of healing in a sentence, if not as named


def write_provenance(directory: Path, record: Provenance, *, card: bool) -> None:
    """Writes ``pruning.json``, and ``README.md`` where the format has one.

    Args:
        directory: of the checkpoint.
        record: what was done.
        card: whether it is a directory of Hugging Face's format, which a model card introduces.
    """
    write_json(directory / PROVENANCE, record.to_dict())
    if card:
        (directory / "README.md").write_text(model_card(record), encoding="utf-8")


def model_card(record: Provenance) -> str:
    """The text of a ``README.md`` for a pruned or healed model, all of it from its record.

    Example:
        >>> card = model_card(Provenance([3], [0, 1, 2, 4], "dense"))
        >>> "# dense without 1 of its 5 layers" in card
        True
    """
    removed = record.all_removed
    source = record.source or "a model"
    tags = ["pruned", "depth-pruning", *(["healed"] if record.steps else []), "short-gpt"]
    return TEMPLATE.format(
        head=yaml_lines(record.source_card),
        tags=", ".join(tags),
        name=_name(record.first_source or source),
        count=len(removed),
        total=len(removed) + len(record.kept_layers),
        healed=", healed" if record.steps else "",
        removed=removed,
        scores=_scores(record),
        quality=_table(record.quality) + "\n",
        versions=", ".join(f"{package} {version}" for package, version in record.versions.items()),
        changed=_changed(record),
    )


def _name(source: str) -> str:
    return one_line(source if _hub_id(source) else Path(source).name)


def _hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not Path(source).exists()


def _scores(record: Provenance) -> str:
    method = record.evidence.get("method")
    if not record.scored:  # a search by loss keeps no scores
        return "They were chosen by hand." if method is None else f"Method: {method}."
    by = record.evidence.get("scored_by")
    # a healing's data need not be the scores'
    name = (by.get("data") if isinstance(by, Mapping) else None) or record.facts.get("data")
    data = f" of {one_line(str(name))}" if name else ""
    method = method or "Block Influence and angular distance"
    windows, tokens = record.scored["windows"], record.scored["tokens"]
    return f"Scores: {method}, on {tokens:,} tokens{data} in {windows:,} windows."


def _table(quality: Mapping[str, Measured]) -> str:
    if not quality:
        return "Its quality was not measured."
    rows = ["| model | perplexity | 95% | tokens |", "| --- | --- | --- | --- |"]
    for name, measured in quality.items():
        tokens = "" if measured.tokens is None else f"{measured.tokens:,}"
        rows.append(
            f"| {one_line(name)} | {measured.value:.3f} | {_interval(measured)} | {tokens} |"
        )
    over = dict.fromkeys(_over(measured) for measured in quality.values() if measured.error)
    return "\n".join([*rows, *(["", f"Over {'; '.join(over)}."] if over else [])])


def _interval(measured: Measured) -> str:
    ends = measured.error.get("interval_95")
    known = isinstance(ends, list) and all(isinstance(end, float) for end in ends)
    return " to ".join(f"{end:.3f}" for end in ends) if known and isinstance(ends, list) else ""


def _over(measured: Measured) -> str:
    """The samples of an interval, and what it does not cover."""
    windows, texts = (measured.error.get(name) for name in ("windows", "texts"))
    known = texts if isinstance(texts, int) else None
    return SamplingError(math.nan, int(str(windows or 0)), known).over


def _changed(record: Provenance) -> str:
    """What was done to the weights of the layers that stayed, in order."""
    sublayers = _sublayers_gone(record.all_sublayers)
    if record.steps:
        names = [str(step["method"]) for step in record.steps]
        how = ", then ".join(IN_WORDS.get(name, name) for name in names)
        return f"{sublayers}Weights of the kept layers were changed by {how}."
    return f"{sublayers}No {'other ' if sublayers else ''}weight of the kept layers was changed."


def _sublayers_gone(sublayers: Mapping[str, Sequence[int]]) -> str:
    """A sentence on removed attention and MLP sublayers; empty if there are none."""
    by_kind = {"attention": sublayers.get("attention"), "MLP": sublayers.get("mlp")}
    parts = [f"the {kind} of layers {layers}" for kind, layers in by_kind.items() if layers]
    if not parts:
        return ""
    return f"Taken out by a zero output projection: {' and '.join(parts)}. "
