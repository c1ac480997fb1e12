"""What was done to a pruned model, as one record beside its weights: ``pruning.json``.

Layers have two numberings. ``removed_layers`` and ``kept_layers`` are numbers of the source that
the model was cut from; a source that was itself cut has a record of its own, ``earlier``, whose
``kept_layers`` lead one step further back. ``original_layers`` goes all the way to the first one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from short_gpt.checkpoints import records
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.records import (
    EVIDENCE,
    KEYS,
    PROVENANCE,
    Measured,
    Step,
    record_of,
    source_card,
)
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.weight_changes import REMOVED_SUBLAYERS, WeightChange
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import read_record, versions
from short_gpt.scoring.importance import Importance


@dataclass(frozen=True)
class Provenance:
    """What is known of a pruned or healed model.

    Made by `of` from a model in memory, by `of_scores` and `cut` for one cut in its files, by
    `read` from ``pruning.json``.

    Attributes:
        removed_layers: the source's numbers of the layers taken out, in order of removal.
        kept_layers: of those that stayed, ascending.
        source: the checkpoint whose layers these numbers count; None in some older records.
        earlier: the source's own record, if it was itself cut or healed.
        block_influence: by the source's layers; NaN or None where one was not scored.
        scored: numbers of "windows" and "tokens" that the scores come from.
        quality: perplexities, by the name of the model's state.
        healing: what changed weights since ``earlier``, oldest first.
        removed_sublayers: the source's numbers of kept layers whose "attention" or "mlp" is zero.
        evidence: how the layers were chosen and what a healing brought, by the keys `EVIDENCE`.
        source_card: the source's licence and base model, of `records.source_card`.
        facts: what the caller adds, such as ``{"data": "PG-19"}``.
        versions: of the packages that made it.

    Raises:
        ShortGPTError: a fact has the name of a record of the library's own.

    Example:
        >>> Provenance([3, 1], [0, 2, 4], "whole").original_layers
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
    removed_sublayers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    evidence: Mapping[str, object] = field(default_factory=dict)
    source_card: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
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
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
    ) -> Provenance:
        """The record of a model in memory.

        Args:
            short: the model, as it is now.
            source: where it was opened; a directory's own ``pruning.json`` is taken over.
            facts: what the caller adds.
            measured: perplexities by the name of the model's state; None takes `remembered`.
        """
        own = cls(
            removed_layers=list(short.removed),
            kept_layers=list(short.kept),
            source=str(source),
            earlier=cls.beside(source),
            block_influence=short.importances.tolist() if short.n_windows else (),
            scored=counts_of(short.importance),
            quality=kept_quality(remembered(short) if measured is None else measured),
            healing=[c.how for c in short.changes if c.how["method"] != REMOVED_SUBLAYERS],
            removed_sublayers=removed_halves(short.changes, short.kept),
            evidence=dict(short.evidence),
            source_card=source_card(source),
            facts=dict(facts or {}),
        )
        return own._continued()

    @classmethod
    def of_scores(
        cls,
        importance: Importance | None = None,
        *,
        evidence: Mapping[str, object] | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> Provenance:
        """The record of a cut to come, which `cut` completes.

        Args:
            importance: the scores of the source's layers by which they were chosen, if any.
            evidence: how they were chosen, by the keys `EVIDENCE`.
            facts: what the caller adds.
        """
        own = cls(evidence=dict(evidence or {}), facts=dict(facts or {}))
        if importance is None:
            return own
        influence = importance.block_influence.tolist()
        return replace(own, block_influence=influence, scored=counts_of(importance))

    def cut(
        self,
        source: str | os.PathLike[str],
        *,
        removed: Sequence[int],
        kept: Sequence[int],
        directory: Path | None = None,
    ) -> Provenance:
        """The record of a checkpoint cut in its files.

        Args:
            source: the checkpoint, by the name to keep.
            removed: its layers that are removed.
            kept: its layers that are kept.
            directory: where its files lie, if not at ``source``.
        """
        return replace(
            self,
            removed_layers=list(removed),
            kept_layers=list(kept),
            source=str(source),
            earlier=self.beside(directory or source),
            source_card=source_card(source, directory),
        )

    @classmethod
    def beside(cls, directory: str | os.PathLike[str]) -> Provenance | None:
        """The record in a checkpoint directory or a GGUF file; None if there is none."""
        record = record_of(directory)
        return None if record is None else _read(*record)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Provenance:
        """The record in a ``pruning.json``, of this or an earlier version.

        Raises:
            FileNotFoundError: no such file.
            ShortGPTError: it is no such record; the message names the file and the entry.
        """
        return _read(read_record(path), str(path))

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
    def all_sublayers(self) -> dict[str, list[int]]:
        """The first model's numbers of layers that stayed without "attention" or "mlp"."""
        before = self.earlier.all_sublayers if self.earlier else {}
        left = set(self.original_layers)
        removed: dict[str, list[int]] = {}
        for kind in ("attention", "mlp"):
            layers = {*before.get(kind, ()), *self._original(self.removed_sublayers.get(kind, ()))}
            removed[kind] = sorted(layers & left)
        return removed

    @property
    def first_source(self) -> str | None:
        """The first model, as far back as its records name it."""
        return (self.earlier.first_source if self.earlier else None) or self.source

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
            "removed_sublayers": dict(self.removed_sublayers),
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
        """The record itself; where no layer went since ``earlier``, that one with what is new.

        A model that was cut, saved, opened again and healed is the cut one, healed: its record
        says what went, instead of a second removal of nothing.
        """
        before = self.earlier
        if before is None or self.removed_layers:
            return self
        changed = bool(self.healing or self.removed_sublayers)
        count = len(before.removed_layers) + len(before.kept_layers)
        return replace(
            before,
            block_influence=records.spread(self.block_influence, before.kept_layers, count)
            or before.block_influence,
            scored=self.scored or before.scored,
            # what was measured before weights changed was another model
            quality=self.quality or ({} if changed else before.quality),
            healing=[*before.healing, *self.healing],
            removed_sublayers=self._merged_sublayers(before),
            evidence={**before.evidence, **self.evidence},
            source_card={**before.source_card, **self.source_card},
            facts={**before.facts, **self.facts},
            versions=self.versions,
        )

    def _merged_sublayers(self, before: Provenance) -> dict[str, list[int]]:
        """Sublayers removed then and now, by the layers of ``before``'s source."""
        merged = {kind: list(layers) for kind, layers in before.removed_sublayers.items()}
        for kind, layers in self.removed_sublayers.items():
            merged[kind] = merged.get(kind, []) + [before.kept_layers[i] for i in layers]
        return merged


def _read(record: Mapping[str, object], where: str) -> Provenance:
    """A record from the content of a file; ``where`` names it in what is raised."""
    source = record.get("source")
    source_pruning = records.mapping(record, "source_pruning", where)
    earlier = _read(source_pruning, where) if source_pruning else None
    sublayers = records.mapping(record, "removed_sublayers", where)
    records.check_numbering(record, len(earlier.kept_layers) if earlier else None, where)
    return Provenance(
        removed_layers=records.numbers(record.get("removed_layers"), "removed_layers", where),
        kept_layers=records.numbers(record.get("kept_layers"), "kept_layers", where),
        source=None if source is None else str(source),
        earlier=earlier,
        block_influence=records.influences(record, where),
        scored=records.scored_counts(records.mapping(record, "scored", where), where),
        quality=records.measurements(record, where),
        healing=records.healing_steps(record.get("healing"), where),
        removed_sublayers={kind: records.numbers(v, kind, where) for kind, v in sublayers.items()},
        evidence={key: record[key] for key in EVIDENCE if key in record},
        source_card=records.mapping(record, "source_card", where),
        facts={key: value for key, value in record.items() if key not in KEYS},
        versions={k: str(v) for k, v in records.mapping(record, "versions", where).items()},
    )


def remembered(short: ModelRecord) -> dict[str, Perplexity]:
    """Perplexities that a model remembers, of the original and the pruned one, by name."""
    states = (tuple(range(short.n_layers)), tuple(short.kept))
    return {f"{len(s)} layers": short.quality[s] for s in states if s in short.quality}


def kept_quality(quality: Mapping[str, Perplexity]) -> dict[str, Measured]:
    """Perplexities as a record keeps them."""
    return {
        name: Measured(perplexity.value, perplexity.tokens, _error(perplexity))
        for name, perplexity in quality.items()
    }


def _error(perplexity: Perplexity) -> dict[str, object]:
    """The interval of a perplexity and its samples; empty where no error is known."""
    if perplexity.error is None or not perplexity.error.known:
        return {}
    over = {"windows": perplexity.error.windows, "texts": perplexity.error.texts}
    return {"interval_95": list(perplexity.interval()), **over}


def counts_of(importance: Importance) -> dict[str, int]:
    """How many windows and tokens were scored; empty if none were."""
    if not importance.n_windows:
        return {}
    return {"windows": importance.n_windows, "tokens": importance.n_tokens}


def removed_halves(changes: Iterable[WeightChange], kept: Sequence[int]) -> dict[str, list[int]]:
    """The kept layers without their attention or MLP; empty if there are none."""
    by_kind: dict[str, list[int]] = {"attention": [], "mlp": []}
    for change in changes:
        if change.how["method"] == REMOVED_SUBLAYERS:
            for kind, layers in by_kind.items():
                removed = records.numbers(change.how[kind], kind, "the model")
                layers += [i for i in removed if i in kept]
    return by_kind if any(by_kind.values()) else {}
