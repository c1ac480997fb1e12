"""What was done to a pruned model, as one record with its weights: ``pruning.json``.

``removed_layers`` and ``kept_layers`` are numbers of the source that was pruned. If that was itself
pruned it has a record of its own, ``earlier``; ``original_layers`` goes back to the first one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama.files import JsonObject, json_object, read_json
from llama.formats.gguf_read import part_paths, read_header
from llama.sources import is_gguf, is_hub_id, public_name
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.runtime.errors import ShortGPTError, damaged
from short_gpt.runtime.state import read_record, versions
from short_gpt.scoring.importance import Importance

PROVENANCE = "pruning.json"
RECORD = "short_gpt.pruning"  # a key of GGUF, whose value is the text of that file
NAME = "general.name"  # another, the model's name
# What jobs record of a choice and of a healing, as it comes; the model's own record holds it.
EVIDENCE = ("method", "scored_by", "change", "eval_data", "size", "precision")
QUALITY = ("perplexity", "perplexity_tokens", "perplexity_error")
MEASURED = ("source", "block_influence", "scored", *QUALITY, "healing")  # left out where empty
# The library's own keys. They are made from the model; no caller may contradict them.
KEYS = (
    *("removed_layers", "kept_layers", "original_layers", "source_pruning", "source_card"),
    *(*MEASURED, *EVIDENCE, "versions"),
    "files",  # what the directory holds, listed by its writer: not part of the history
)
LICENSE = ("license", "license_name", "license_link")
BASE = "base_model"
BASE_URL = re.compile(r"general\.base_model\.\d+\.repo_url")
HUB = re.compile(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")
Step = Mapping[str, object]  # one change of weights: "method" and its settings, ready for JSON


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
        perplexity: by the name of the model's state, as the next two.
        perplexity_tokens: numbers of the tokens predicted, where known.
        perplexity_error: "interval_95", and numbers of "windows" and "texts", where known.
        healing: what changed weights since ``earlier``, oldest first.
        evidence: how the layers were chosen and what a healing brought, by the keys `EVIDENCE`.
        source_card: the source's licence and base model, of `source_card`.
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
    perplexity: Mapping[str, float] = field(default_factory=dict)
    perplexity_tokens: Mapping[str, int] = field(default_factory=dict)
    perplexity_error: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
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
            quality = short.quality
            measured = {f"{len(key)} layers": quality[key] for key in states if key in quality}
        scores = short.importance
        if short.removed and short.chosen_by is not None and short.chosen_by.n_windows:
            scores = short.chosen_by  # the model may have been scored again since
        influence = short.by_layer(scores, "block_influence").tolist() if scores.n_windows else ()
        if str(source) not in short.history:  # which the first save may write over
            earlier = cls.of_checkpoint(directory or source) or cls._at_hub(short, str(source))
            short.history[str(source)] = (earlier, source_card(source, directory))
        earlier, card = short.history[str(source)]
        errors = {name: _error(perplexity) for name, perplexity in measured.items()}
        return cls(
            removed_layers=list(short.removed),
            kept_layers=list(short.kept),
            source=str(source),
            earlier=earlier,
            block_influence=influence,
            scored=_counts(scores),
            perplexity={name: perplexity.value for name, perplexity in measured.items()},
            perplexity_tokens={name: perplexity.tokens for name, perplexity in measured.items()},
            perplexity_error={name: error for name, error in errors.items() if error},
            healing=[change.how for change in short.changes],
            evidence=dict(short.evidence),
            source_card=card,
            facts=dict(facts or {}),
        )._continued()

    @classmethod
    def _at_hub(cls, short: ModelRecord, name: str) -> Provenance | None:
        """The record of a model opened by its hub id, which transformers does not fetch.

        Where the hub has none or cannot be asked, the new record begins with the hub's model.
        """
        config = getattr(getattr(short, "model", None), "config", None)
        commit = getattr(config, "_commit_hash", None)  # that was opened
        if commit is not None and not Path(name).exists():
            from huggingface_hub import hf_hub_download

            with suppress(Exception):  # of the hub, or of the package that its version connects by
                return cls.read(hf_hub_download(name, PROVENANCE, revision=commit))
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
        path = Path(str(directory))
        if not is_gguf(path):
            return cls.read(path / PROVENANCE) if (path / PROVENANCE).is_file() else None
        text = read_header(part_paths(path)[0]).fields.get(RECORD) if path.is_file() else None
        where = f"{RECORD} in {path}"
        return None if text is None else cls._of_json(json_object(str(text), where), where)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Provenance:
        """The record in a ``pruning.json``; ShortGPTError if there is none in it."""
        return cls._of_json(read_record(path), str(path))

    @classmethod
    def _of_json(cls, content: JsonObject, where: str) -> Provenance:
        try:
            return _parsed(content)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise damaged(
                f"{where}, the record of a pruned model,",
                f"{type(error).__name__}: {error}",
                mend="correct it, or delete it and with it the history of the layers",
            ) from error

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
        record |= {key: value for key in MEASURED if (value := getattr(self, key))}
        if self.earlier:
            record["source_pruning"] = self.earlier.to_dict()
        if self.source_card:
            record["source_card"] = self.source_card
        return {**record, **self.evidence, **self.facts, "versions": self.versions}

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
        if self.perplexity:  # which another text may have judged
            inherited.pop("eval_data", None)
        # what was measured before weights changed was another model
        judged = self if self.perplexity or self.healing else before
        return replace(
            before,
            block_influence=influence,
            scored=self.scored or before.scored,
            **{name: getattr(judged, name) for name in QUALITY},
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


def _parsed(content: Any) -> Provenance:
    """A record from what a file holds; TypeError, KeyError and the like if it is none."""
    earlier = _parsed(content["source_pruning"]) if content.get("source_pruning") else None
    removed, kept = content["removed_layers"], content["kept_layers"]
    count = len(earlier.kept_layers) if earlier else len(removed) + len(kept)
    if sorted([*removed, *kept]) != list(range(count)):
        raise ValueError(f"kept_layers {kept} with removed_layers {removed}")
    values: dict[str, Any] = {key: content[key] for key in MEASURED if content.get(key)}
    perplexities = values.get("perplexity", {}).items()  # JSON has no infinity
    values["perplexity"] = {name: math.inf if v is None else float(v) for name, v in perplexities}
    values["healing"] = [{"method": step["method"], **step} for step in values.get("healing", ())]
    return Provenance(
        removed,
        kept,
        earlier=earlier,
        evidence={key: content[key] for key in EVIDENCE if key in content},
        source_card=content.get("source_card") or {},
        facts={key: value for key, value in content.items() if key not in KEYS},
        versions=content.get("versions") or {},
        **values,
    )


def _counts(importance: Importance) -> dict[str, int]:
    counts = {"windows": importance.n_windows, "tokens": importance.n_tokens}
    return counts if importance.n_windows else {}


def _error(perplexity: Perplexity) -> dict[str, object]:
    """The margin of a perplexity as it is kept; empty if there is none."""
    error = perplexity.error
    if error is None or not error.has_margin:
        return {}
    counts = {"windows": error.windows, "texts": error.texts}
    return {"interval_95": list(perplexity.interval()), **counts}


def source_card(source: str | os.PathLike[str], directory: Path | None = None) -> dict[str, object]:
    """The licence, by the keys `LICENSE`, and `BASE` of a checkpoint, as far as its files tell.

    The base model is the source itself if that is on the hub, else the name that its config
    remembers, else its card's own. ``directory`` is where its files are, if not ``source``.
    """
    if is_gguf(source):
        entries = _card_in_metadata(Path(str(source)))
    else:
        entries = _front_matter(directory or source)
    licence = {key: entries[key] for key in LICENSE if key in entries}
    base = _hub_name(source) or entries.get(BASE)
    return {**licence, BASE: base} if base else licence


def _card_in_metadata(path: Path) -> dict[str, object]:
    """The same of a GGUF file's metadata; a base model that is not on the hub has no name there."""
    fields = read_header(part_paths(path)[0]).fields if path.is_file() else {}
    entries = {key: fields.get(f"general.{key.replace('_', '.')}") for key in LICENSE}
    urls = [value for key, value in fields.items() if BASE_URL.fullmatch(key)]
    names = [match[1] for url in urls if (match := HUB.fullmatch(str(url)))]
    entries[BASE] = names[0] if len(names) == 1 else names
    return {key: value for key, value in entries.items() if _is_names(value)}


def _is_names(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value)


def _hub_name(source: str | os.PathLike[str]) -> str | None:
    """The hub's name of a model, with its owner: its own, or what its config remembers."""
    config = Path(source) / "config.json"
    name = read_json(config).get("_name_or_path") if config.is_file() else str(source)
    # without an owner it may be a directory's
    return name if isinstance(name, str) and "/" in name and is_hub_id(name) else None


def _front_matter(source: str | os.PathLike[str]) -> dict[str, object]:
    """Names and lists of names at the head of a card; what is damaged counts as missing."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    path = Path(source) / "README.md"
    if not Path(source).exists() and is_hub_id(str(source)):
        path = Path(str(try_to_load_from_cache(str(source), path.name)))
    try:
        entries = metadata_load(path) or {}
    except Exception:  # of the file system, of its encoding, or of YAML
        return {}
    return {str(key): value for key, value in entries.items() if _is_names(value)}
