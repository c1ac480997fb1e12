"""The README of a pruned model: what went, by which scores, at what cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from short_gpt.evaluate import Perplexity
from short_gpt.short_model import ShortModel

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
Made with ShortGPT ({versions}). No weight of the kept layers was changed. `pruning.json` holds
this in numbers, with the original number of every layer that stayed.
"""


def provenance(short: ShortModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a pruned model, ready for JSON.

    Args:
        short: the model, layers removed.
        facts: what the caller adds, such as the data's name.
    """
    from short_gpt.record import versions

    record: dict[str, Any] = {"removed_layers": short.removed, "kept_layers": short.kept}
    if short.n_windows:
        record["block_influence"] = short.importances.tolist()
        record["scored"] = {"windows": short.n_windows, "tokens": short.n_tokens}
    if _quality(short):
        record["perplexity"] = {f"{n} layers": p.value for n, p in _quality(short).items()}
    return {**record, **facts, "versions": versions()}


def model_card(short: ShortModel, source: str, facts: Mapping[str, Any]) -> str:
    """The text of a ``README.md``; arguments as in `provenance`, ``source`` names the original."""
    record = provenance(short, facts)
    hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    scores = "They were chosen by hand."
    if "scored" in record:
        windows, tokens = record["scored"]["windows"], record["scored"]["tokens"]
        data = f" of {facts['data']}" if "data" in facts else ""
        method = facts.get("method", "Block Influence and angular distance")
        scores = f"Scores: {method}, on {tokens:,} tokens{data} in {windows:,} windows."
    quality = "Its quality was not measured."
    measured = _quality(short)
    if measured:
        rows = (f"| {n} | {p.value:.3f} | {p.tokens:,} |" for n, p in measured.items())
        quality = "| layers | perplexity | tokens |\n| --- | --- | --- |\n" + "\n".join(rows)
    return TEMPLATE.format(
        base=f"base_model: {source}\n" if hub_id else "",
        name=source if hub_id else Path(source).name,
        count=len(short.removed),
        total=short.n_layers,
        removed=short.removed,
        scores=scores,
        quality=quality + "\n",
        versions=", ".join(f"{k} {v}" for k, v in record["versions"].items()),
    )


def _quality(short: ShortModel) -> dict[int, Perplexity]:
    """What was measured of the whole model and of the one that is left, by number of layers."""
    states = (tuple(range(short.n_layers)), tuple(short.kept))
    return {len(layers): short.quality[layers] for layers in states if layers in short.quality}
