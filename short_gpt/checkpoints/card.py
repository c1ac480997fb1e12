"""The README of a pruned model: what went, by which scores, at what cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.runtime.results import versions
from short_gpt.short_model import ShortModel
from short_gpt.surgery.sublayers import REMOVED_SUBLAYERS

TEMPLATE = """---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [pruned, depth-pruning, short-gpt]
---

# {name} without {count} of its {total} layers

Removed layers, in the original model's numbering from 0 and in the order of removal:

    {removed}

{scores}
{quality}
Made with ShortGPT ({versions}). {changed} `pruning.json` holds
this in numbers, with the original number of every layer that stayed.
"""


def provenance(short: ShortModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a pruned model, ready for JSON.

    Args:
        short: the model, layers removed.
        facts: what the caller adds, such as the data's name.
    """

    record: dict[str, Any] = {"removed_layers": short.removed, "kept_layers": short.kept}
    if short.n_windows:
        record["block_influence"] = short.importances.tolist()
        record["scored"] = {"windows": short.n_windows, "tokens": short.n_tokens}
    if _quality(short):
        record["perplexity"] = {f"{n} layers": p.value for n, p in _quality(short).items()}
    return {**record, **changes(short), **facts, "versions": versions()}


def changes(short: ShortModel) -> dict[str, Any]:
    """How the layers that a model has differ from the source's, ready for JSON."""
    steps = [dict(c.how) for c in short.changes if c.how["method"] != REMOVED_SUBLAYERS]
    found: dict[str, Any] = {"healing": {**steps[-1], "earlier": steps[:-1]}} if steps else {}
    gone = {k: [i for i in v if i in short.kept] for k, v in short.removed_sublayers.items()}
    return found | ({"removed_sublayers": gone} if any(gone.values()) else {})


def sublayers_gone(record: Mapping[str, Any]) -> str:
    """A sentence on the halves of layers that were taken out; nothing if none was."""
    gone = record.get("removed_sublayers", {})
    halves = {"attention": gone.get("attention"), "MLP": gone.get("mlp")}
    parts = [f"the {half} of layers {layers}" for half, layers in halves.items() if layers]
    if not parts:
        return ""
    return f"Taken out by a zero output projection: {' and '.join(parts)}. "


def _changed(record: Mapping[str, Any]) -> str:
    gone = sublayers_gone(record)
    if "healing" in record:
        return f"{gone}Weights of the kept layers were changed by {record['healing']['method']}."
    return f"{gone}No {'other ' if gone else ''}weight of the kept layers was changed."


def card_of(short: ShortModel, source: str, facts: Mapping[str, Any]) -> str:
    """The text of a ``README.md``; arguments as in `provenance`, ``source`` names the original."""
    return model_card(provenance(short, facts), source, _quality(short))


def model_card(
    record: Mapping[str, Any], source: str, measured: Mapping[int, Perplexity] | None = None
) -> str:
    """The text of a ``README.md`` for a pruned model.

    Args:
        record: what `provenance` gives, or the content of another ``pruning.json``.
        source: names the original.
        measured: perplexities, by the number of layers.
    """

    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not Path(source).exists()
    scores = "They were chosen by hand."
    if "scored" in record:
        windows, tokens = record["scored"]["windows"], record["scored"]["tokens"]
        data = f" of {record['data']}" if "data" in record else ""
        method = record.get("method", "Block Influence and angular distance")
        scores = f"Scores: {method}, on {tokens:,} tokens{data} in {windows:,} windows."
    quality = "Its quality was not measured."
    if measured:
        rows = (f"| {n} | {p.value:.3f} | {p.tokens:,} |" for n, p in measured.items())
        quality = "| layers | perplexity | tokens |\n| --- | --- | --- |\n" + "\n".join(rows)
    removed = list(record["removed_layers"])
    made = record.get("versions") or versions()
    return TEMPLATE.format(
        base=f"base_model: {source}\n" if hub_id else "",
        name=source if hub_id else Path(source).name,
        count=len(removed),
        total=len(removed) + len(record["kept_layers"]),
        removed=removed,
        scores=scores,
        quality=quality + "\n",
        changed=_changed(record),
        versions=", ".join(f"{k} {v}" for k, v in made.items()),
    )


def _quality(short: ShortModel) -> dict[int, Perplexity]:
    """What was measured of the whole model and of the one that is left, by number of layers."""
    states = (tuple(range(short.n_layers)), tuple(short.kept))
    return {len(layers): short.quality[layers] for layers in states if layers in short.quality}
