"""The card of a pruned model: the ``README.md`` of Hugging Face's format, made from its record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.files import write_json
from short_gpt.checkpoints.provenance import BASE, LICENSE, PROVENANCE, Provenance
from short_gpt.data.texts import OWN
from short_gpt.evaluation.perplexity import SamplingError
from short_gpt.runtime.errors import one_line

TEMPLATE = """---
{head}
---

# {name} without {count} of its {total} layers{healed}

Removed layers, in the original model's numbering from 0 and in the order of removal:

    {removed}

{scores}
{quality}
Made with ShortGPT ({versions}). {changed} `pruning.json` holds
this in numbers, with the original number of every layer that stayed.
"""


def write_provenance(directory: Path, record: Provenance, *, card: bool) -> None:
    """Writes ``pruning.json``, and with ``card`` the ``README.md`` of Hugging Face's format."""
    write_json(directory / PROVENANCE, record.to_dict())
    if card:
        (directory / "README.md").write_text(model_card(record), encoding="utf-8")


def model_card(record: Provenance) -> str:
    """The text of a ``README.md`` for a pruned or healed model, all of it from its record."""
    from huggingface_hub import ModelCardData

    removed = record.all_removed
    source = record.first_source or "a model"
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not Path(source).exists()
    tags = ["pruned", "depth-pruning", *(["healed"] if record.steps else []), "short-gpt"]
    licence: Any = {key: record.source_card.get(key) for key in (BASE, *LICENSE)}
    head = ModelCardData(
        **licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return TEMPLATE.format(
        head=head.to_yaml(),
        name=_in_markdown(source if on_hub else Path(source).name),
        count=len(removed),
        total=len(removed) + len(record.kept_layers),
        healed=", healed" if record.steps else "",
        removed=removed,
        scores=_scores(record),
        quality=_table(record) + _own(record) + "\n",
        versions=", ".join(f"{package} {version}" for package, version in record.versions.items()),
        changed=_changed(record),
    )


def _in_markdown(name: str) -> str:
    """A name of the user's as a card shows it: no HTML, link or cell of a table."""
    return re.sub(r"[&<>\[\]|`]", lambda match: f"&#{ord(match[0])};", one_line(name))


def _scores(record: Provenance) -> str:
    method = record.evidence.get("method")
    if not record.scored:  # a search by loss keeps no scores
        return "They were chosen by hand." if method is None else f"Method: {method}."
    by = record.evidence.get("scored_by")
    # a healing's data need not be the scores'
    name = (by.get("data") if isinstance(by, Mapping) else None) or record.facts.get("data")
    data = f" of {_in_markdown(str(name))}" if name else ""
    method = method or "Block Influence and angular distance"
    windows, tokens = record.scored["windows"], record.scored["tokens"]
    return f"Scores: {method}, on {tokens:,} tokens{data} in {windows:,} windows."


def _table(record: Provenance) -> str:
    if not record.perplexity:
        return "Its quality was not measured."
    rows = ["", "| model | perplexity | 95% | tokens |", "| --- | --- | --- | --- |"]
    samples: list[str] = []  # of the intervals, and what these do not cover
    for name, value in record.perplexity.items():
        error: Any = record.perplexity_error.get(name, {})
        interval = " to ".join(
            f"{math.inf if end is None else end:.3f}" for end in error.get("interval_95", ())
        )
        tokens = f"{count:,}" if (count := record.perplexity_tokens.get(name)) else ""
        rows.append(f"| {_in_markdown(name)} | {value:.3f} | {interval} | {tokens} |")
        if error:
            samples.append(SamplingError(math.nan, error["windows"], error.get("texts")).over)
    over = ["", f"Over {'; '.join(dict.fromkeys(samples))}."] if samples else []
    return "\n".join([*rows, *over])


def _own(record: Provenance) -> str:
    """The remark where text that the model itself wrote was all that judged it."""
    data, judge = record.facts.get("data"), record.evidence.get("eval_data", "")
    if not record.perplexity or judge is not None or not isinstance(data, str):
        return ""
    if not {name.strip() for name in data.split(",")} <= {*OWN}:
        return ""
    return "\nThe model itself wrote the text that judged it: this perplexity is not quality."


def _changed(record: Provenance) -> str:
    """What was done to the weights of the layers that stayed, in order."""
    if record.steps:
        how = ", then ".join(str(step["method"]) for step in record.steps)
        return f"Weights of the kept layers were changed by {how}."
    return "No weight of the kept layers was changed."
