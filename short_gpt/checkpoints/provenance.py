"""What was done to a pruned model, as one record with its weights: ``pruning.json`` and the card.

``removed_layers`` and ``kept_layers`` are numbers of the source that was pruned. If that was itself
pruned it has a record of its own, ``earlier``; ``original_layers`` goes back to the first one.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama.files import write_json
from llama.sources import public_name
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.records import (
    EVIDENCE,
    KEYS,
    PROVENANCE,
    Entries,
    Measured,
    Step,
    record_of,
    source_card,
    yaml_lines,
)
from short_gpt.data.texts import OWN
from short_gpt.evaluation.perplexity import Perplexity, SamplingError
from short_gpt.runtime.errors import ShortGPTError, one_line
from short_gpt.runtime.state import read_record, versions
from short_gpt.scoring.importance import Importance

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


@dataclass(frozen=True)
class Provenance:
    """What is known of a pruned or healed model.

    Attributes:
        removed_layers: the source's numbers of the layers taken out, in order of removal.
        kept_layers: of those that stayed, ascending.
        source: the checkpoint whose layers these numbers count; None where a record does not say.
        earlier: the source's own record, if it was itself pruned or healed.
        block_influence: by the source's layers; NaN or None where one was not scored.
        scored: numbers of "windows" and "tokens" that the scores come from.
        quality: perplexities, by the name of the model's state.
        healing: what changed weights since ``earlier``, oldest first.
        evidence: how the layers were chosen and what a healing brought, by the keys `EVIDENCE`.
        source_card: the source's licence and base model, of `records.source_card`.
        facts: what the caller adds, such as ``{"data": "PG-19"}``.
        versions: of the packages that made it.

    Example:
        >>> Provenance([3, 1], [0, 2, 4], "original").original_layers
        [0, 2, 4]
    """

    removed_layers: Sequence[int] = ()
    kept_layers: Sequence[int] = ()
    source: str | None = None
    earlier: Provenance | None = None
    block_influence: Sequence[float | None] = ()
    scored: Mapping[str, int] = field(default_factory=dict)
    quality: Mapping[str, Measured] = field(default_factory=dict)
    healing: Sequence[Step] = ()
    evidence: Mapping[str, object] = field(default_factory=dict)
    source_card: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        for own in ("source", "evidence", "facts", "healing"):
            object.__setattr__(self, own, _without_folders(getattr(self, own)))
        if reserved := sorted(set(self.facts) & set(KEYS)):
            raise ShortGPTError(
                f"facts name {', '.join(reserved)}, which the library records from the model "
                "itself: leave them out, or call them otherwise"
            )
        count = len(self.removed_layers) + len(self.kept_layers)
        if self.earlier and len(self.earlier.kept_layers) != count:
            raise ShortGPTError(
                f"{self.source} has {count} layers, its {PROVENANCE} tells of "
                f"{len(self.earlier.kept_layers)}: they do not belong together; take the file away"
            )

    @classmethod
    def of(
        cls,
        short: ModelRecord,
        source: str | os.PathLike[str],
        *,
        directory: Path | None = None,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
    ) -> Provenance:
        """The record of a model opened from ``source``, whose own record is taken over.

        ``directory`` is where the source's files are, if not there. ``facts`` are what the caller
        adds; ``measured`` are perplexities by name, None those that the model remembers of itself,
        with all of its layers and with those kept.
        """
        if measured is None:
            states = (tuple(range(short.n_layers)), tuple(short.kept))
            known = {f"{len(layers)} layers": short.quality_of(layers) for layers in states}
            measured = {name: found for name, found in known.items() if found is not None}
        scores = short.importance
        if short.removed and short.chosen_by is not None and short.chosen_by.n_windows:
            scores = short.chosen_by  # the model may have been scored again since
        influence = short.by_layer(scores, "block_influence").tolist() if scores.n_windows else ()
        if str(source) not in short.history:  # which the first save may write over
            earlier = cls.of_checkpoint(directory or source) or cls._at_hub(short, str(source))
            short.history[str(source)] = (earlier, source_card(source, directory))
        earlier, card = short.history[str(source)]
        return cls(
            removed_layers=list(short.removed),
            kept_layers=list(short.kept),
            source=str(source),
            earlier=earlier,
            block_influence=influence,
            scored=_counts(scores),
            quality={name: _measured(perplexity) for name, perplexity in measured.items()},
            healing=[change.how for change in short.changes],
            evidence=dict(short.evidence),
            source_card=card,
            facts=dict(facts or {}),
        )._continued()

    @classmethod
    def _at_hub(cls, short: ModelRecord, name: str) -> Provenance | None:
        """The record of a model opened by its hub id, which transformers does not fetch."""
        config = getattr(getattr(short, "model", None), "config", None)
        commit = getattr(config, "_commit_hash", None)  # that was opened
        if commit is None or Path(name).exists():
            return None
        from huggingface_hub import errors, hf_hub_download

        try:
            return cls.read(hf_hub_download(name, PROVENANCE, revision=commit))
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # of the hub, or of the package that its version connects by
            warnings.warn(
                f"{name} cannot be asked for its {PROVENANCE} ({one_line(str(error))}): if layers "
                "were removed from it before, the new record does not tell",
                stacklevel=4,
            )
            return None

    @classmethod
    def of_scores(
        cls,
        importance: Importance | None = None,
        *,
        evidence: Mapping[str, object] | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> Provenance:
        """The record of a model to be pruned in its files, which `pruned` completes.

        ``evidence`` tells how the layers were chosen, by the keys `EVIDENCE`.
        """
        record = cls(evidence=dict(evidence or {}), facts=dict(facts or {}))
        if importance is None:
            return record
        influence = importance.block_influence.tolist()
        return replace(record, block_influence=influence, scored=_counts(importance))

    def pruned(
        self,
        source: str | os.PathLike[str],
        *,
        removed: Sequence[int],
        kept: Sequence[int],
        directory: Path | None = None,
    ) -> Provenance:
        """The record of a checkpoint pruned in its files.

        ``source`` is the name to keep, ``directory`` where its files are, if not there.
        """
        return replace(
            self,
            removed_layers=list(removed),
            kept_layers=list(kept),
            source=str(source),
            earlier=self.of_checkpoint(directory or source),
            source_card=source_card(source, directory),
        )

    @classmethod
    def of_checkpoint(cls, directory: str | os.PathLike[str]) -> Provenance | None:
        """The record in a checkpoint directory or a GGUF file; None if there is none."""
        entries = record_of(directory)
        return None if entries is None else _read(entries)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Provenance:
        """The record in a ``pruning.json``; ShortGPTError if there is none in it."""
        return _read(Entries(read_record(path), str(path)))

    @property
    def original_layers(self) -> list[int]:
        """The number in the first model of every layer that stayed."""
        return self._original(self.kept_layers)

    @property
    def all_removed(self) -> list[int]:
        """The first model's numbers of all layers taken out, in order of removal."""
        before = self.earlier.all_removed if self.earlier else []
        return [*before, *self._original(self.removed_layers)]

    @property
    def steps(self) -> list[Step]:
        """All that ever changed weights, oldest first."""
        return [*(self.earlier.steps if self.earlier else ()), *self.healing]

    @property
    def first_source(self) -> str | None:
        """The first model, as far back as its records name it."""
        return (self.earlier.first_source if self.earlier else None) or self.source

    def named(self, name: str) -> str:
        """The name of a model with what was removed, once: ``"Qwen, 4 layers removed"``."""
        count, stem = len(self.all_removed), re.sub(r", \d+ layers? removed$", "", name)
        return f"{stem}, {count} layer{'s' * (count > 1)} removed" if count else name

    def to_dict(self) -> dict[str, object]:
        """The content of ``pruning.json``; what is empty is left out."""
        record: dict[str, object] = {
            "removed_layers": list(self.removed_layers),
            "kept_layers": list(self.kept_layers),
            "original_layers": self.original_layers,
        }
        tokens = {name: m.tokens for name, m in self.quality.items() if m.tokens is not None}
        optional: dict[str, object] = {
            "source": self.source,
            "block_influence": list(self.block_influence),
            "scored": dict(self.scored),
            "perplexity": {name: m.value for name, m in self.quality.items()},
            "perplexity_tokens": tokens,
            "perplexity_error": {n: m.error for n, m in self.quality.items() if m.error},
            "healing": [dict(step) for step in self.healing],
            "source_pruning": self.earlier.to_dict() if self.earlier else None,
            "source_card": dict(self.source_card),
        }
        record |= {key: value for key, value in optional.items() if value}
        return {**record, **self.evidence, **self.facts, "versions": dict(self.versions)}

    def _original(self, layers: Iterable[int]) -> list[int]:
        """The first model's numbers of layers of the source."""
        if self.earlier is None:
            return list(layers)
        before = self.earlier.original_layers
        return [before[layer] for layer in layers]

    def _continued(self) -> Provenance:
        """The record; where no layer went since ``earlier``, that one with what is new."""
        before = self.earlier
        if before is None or self.removed_layers:
            return self
        influence = before.block_influence
        if self.block_influence:
            of_kept = dict(zip(before.kept_layers, self.block_influence, strict=True))
            count = len(before.removed_layers) + len(before.kept_layers)
            influence = [of_kept.get(layer, math.nan) for layer in range(count)]
        inherited = dict(before.evidence)
        if self.quality:  # which another text may have judged
            inherited.pop("eval_data", None)
        return replace(
            before,
            block_influence=influence,
            scored=self.scored or before.scored,
            # what was measured before weights changed was another model
            quality=self.quality or ({} if self.healing else before.quality),
            healing=[*before.healing, *self.healing],
            evidence={**inherited, **self.evidence},
            source_card={**before.source_card, **self.source_card},
            facts={**before.facts, **self.facts},
            versions=self.versions,
        )


def _without_folders(value: Any) -> Any:
    """A value of a record whose texts have no absolute paths; see `public_name`."""
    if isinstance(value, str | os.PathLike):
        return public_name(value)
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    return [*map(_without_folders, value)] if isinstance(value, list | tuple) else value


def _read(entries: Entries) -> Provenance:
    content, source_pruning = entries.content, entries.mapping("source_pruning")
    earlier = _read(Entries(source_pruning, entries.where)) if source_pruning else None
    removed, kept = entries.layers(len(earlier.kept_layers) if earlier else None)
    source = content.get("source")
    return Provenance(
        removed_layers=removed,
        kept_layers=kept,
        source=None if source is None else str(source),
        earlier=earlier,
        block_influence=entries.entry("block_influence", "a list of numbers", []),
        scored=entries.scored(),
        quality=entries.quality(),
        healing=entries.steps(content.get("healing")),
        evidence={key: content[key] for key in EVIDENCE if key in content},
        source_card=entries.mapping("source_card"),
        facts={key: value for key, value in content.items() if key not in KEYS},
        versions={name: str(version) for name, version in entries.mapping("versions").items()},
    )


def _counts(importance: Importance) -> dict[str, int]:
    counts = {"windows": importance.n_windows, "tokens": importance.n_tokens}
    return counts if importance.n_windows else {}


def _measured(perplexity: Perplexity) -> Measured:
    error = perplexity.error
    if error is None or not error.known:
        return Measured(perplexity.value, perplexity.tokens)
    kept = {"interval_95": list(perplexity.interval()), "windows": error.windows}
    return Measured(perplexity.value, perplexity.tokens, {**kept, "texts": error.texts})


def write_provenance(directory: Path, record: Provenance, *, card: bool) -> None:
    """Writes ``pruning.json``, and with ``card`` the ``README.md`` of Hugging Face's format."""
    write_json(directory / PROVENANCE, record.to_dict())
    if card:
        (directory / "README.md").write_text(model_card(record), encoding="utf-8")


def model_card(record: Provenance) -> str:
    """The text of a ``README.md`` for a pruned or healed model, all of it from its record."""
    removed = record.all_removed
    source = record.first_source or "a model"
    on_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not Path(source).exists()
    tags = ["pruned", "depth-pruning", *(["healed"] if record.steps else []), "short-gpt"]
    return TEMPLATE.format(
        head=yaml_lines(record.source_card),
        tags=", ".join(tags),
        name=_in_markdown(source if on_hub else Path(source).name),
        count=len(removed),
        total=len(removed) + len(record.kept_layers),
        healed=", healed" if record.steps else "",
        removed=removed,
        scores=_scores(record),
        quality=_table(record.quality) + _own(record) + "\n",
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


def _table(quality: Mapping[str, Measured]) -> str:
    if not quality:
        return "Its quality was not measured."
    rows = ["", "| model | perplexity | 95% | tokens |", "| --- | --- | --- | --- |"]
    samples: list[str] = []  # of the intervals, and what these do not cover
    for name, measured in quality.items():
        ends = measured.error.get("interval_95")
        ends = ends if isinstance(ends, list) and all(isinstance(e, float) for e in ends) else []
        interval = " to ".join(f"{end:.3f}" for end in ends)
        tokens = "" if measured.tokens is None else f"{measured.tokens:,}"
        rows.append(f"| {_in_markdown(name)} | {measured.value:.3f} | {interval} | {tokens} |")
        if measured.error:
            windows, texts = (measured.error.get(key) for key in ("windows", "texts"))
            known = texts if isinstance(texts, int) else None
            samples.append(SamplingError(math.nan, int(str(windows or 0)), known).over)
    over = ["", f"Over {'; '.join(dict.fromkeys(samples))}."] if samples else []
    return "\n".join([*rows, *over])


def _own(record: Provenance) -> str:
    """The remark where text that the model itself wrote was all that judged it."""
    data, judge = record.facts.get("data"), record.evidence.get("eval_data", "")
    if not record.quality or judge is not None or not isinstance(data, str):
        return ""
    if not {name.strip() for name in data.split(",")} <= {*OWN}:
        return ""
    return "\nThe model itself wrote the text that judged it: this perplexity is not quality."


def _changed(record: Provenance) -> str:
    """What was done to the weights of the layers that stayed, in order."""
    if record.steps:
        names = [str(step["method"]) for step in record.steps]
        how = ", then ".join(IN_WORDS.get(name, name) for name in names)
        return f"Weights of the kept layers were changed by {how}."
    return "No weight of the kept layers was changed."
