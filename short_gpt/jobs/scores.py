"""Saved scores, and the layers that a job removes: named, or by scores."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.args import ModelArgs
from llama.checkpoint.meta import read_params
from llama.io.files import FILES
from llama.io.json_files import JsonObject, read_json
from llama.io.sources import Source, find_source, resolve
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.gguf_layers import Stack
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.jobs.settings import Choice
from short_gpt.models.config_file import config_digest, params_entries
from short_gpt.models.loading import TOKENIZER
from short_gpt.models.numbering import span
from short_gpt.runtime.digest import files_digest, json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import CHECKED, content_digest, read_record
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import AUTO, METHODS, WITHOUT_TEXT, check_method, choose
from short_gpt.wrappers.opening import layers_of, weights_of

TOKENIZER_CONFIG = "tokenizer_config.json"
Digests = Mapping[str, str | None]

# what scores belong to, and what helps where a model's differ
MENDS = {
    "weights": ("the weights", "name the model that was scored"),
    "configuration": ("the configuration", "put the former config.json (params.json) back"),
    "tokenizer": ("texts read with the tokenizer", "put the former tokenizer back"),
}


@dataclass(frozen=True)
class SavedScores:
    """What a file of `rank` says of the layers to remove."""

    file: str  # its name
    method: str  # a name of `METHODS`
    arguments: Mapping[str, object]  # of the ranking
    importance: Importance | None = None  # the scores; None where a search by loss chose the layers
    searched: list[int] = field(default_factory=list)  # these layers, in order of removal
    scored: Digests = field(default_factory=dict)  # of `digests_of` the model, if known
    # the verdict of the stop that ended the scoring, if one did
    settled: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str, method: str | None = None) -> SavedScores:
        """The scores of a file; ``method`` replaces the one that ranked."""
        record = _read(file)
        arguments, scored = record.get("arguments", {}), record.get("scored", {})
        if "precision" in arguments:  # the one that auto chose
            arguments = {**arguments, "precision": record.get("precision", "float32")}
        digests = {name: str(scored[name]) for name in MENDS if scored.get(name)}
        if "chosen" not in record:
            method = str(method or arguments.get("method") or "bi")
            check_method(method)
            importance, settled = _importance(record, file), record.get("settled") or {}
            return cls(file, method, arguments, importance, [], digests, settled)
        search = record["chosen"]
        by = str(search["method"])
        if method not in (None, by):
            raise ShortGPTError(f"{file} holds the layers of {by}, not of {method}")
        return cls(file, by, arguments, None, search["layers"], digests)

    def check_model(self, model: str) -> str | None:
        """Raises ShortGPTError unless the scores are the model's; returns what was not checked."""
        self._check_layers(model)
        if not self.scored.get("weights"):
            return (
                f"not checked: {self.file} does not say of which weights its scores are, so they "
                f"may be of another model than {model}; short-gpt rank writes it"
            )
        path = self.arguments.get("tokenizer_path")
        digests = digests_of(model, str(path) if path else None)
        for name, (what, mend) in MENDS.items():
            ours, theirs = self.scored.get(name), digests[name]
            if ours and theirs not in (None, ours):
                raise ShortGPTError(
                    f"{self.file} holds scores of {what} {ours}, {model} has {theirs}: score it "
                    f"by short-gpt rank {model}, or {mend}"
                )
        if digests["configuration"] and not self.scored.get("configuration"):
            return (
                f"not checked: {self.file} does not say of which configuration its scores are, so "
                f"that of {model} may have changed since; short-gpt rank writes it"
            )
        return None

    def _check_layers(self, model: str) -> None:
        source = find_source(model)
        if source.kind == "gguf":
            count: int | None = Stack.open(source).layers
        else:  # a hub's is fetched
            count = layers_of(source if source.kind == "meta" else resolve(source))
        if count is None:
            return
        if self.importance is None:
            what, fits = f"the layers {span(self.searched)}", max(self.searched, default=0) < count
        else:
            scored = self.importance.layers
            what, fits = f"{len(scored)} layers", scored == list(range(count))
        if not fits:
            raise ShortGPTError(
                f"{self.file} scores {what}, {model} has {count}; they do not belong together"
            )

    def about(self, n: int) -> str | None:
        """Why the n chosen layers are not settled: a stop settles only one answer."""
        stop, verdict = self.settled.get("stop"), self.settled
        if self.method in WITHOUT_TEXT:  # whatever the windows are
            return None
        if not isinstance(stop, Mapping) or verdict.get("windows") == verdict.get("population"):
            return None
        if not verdict.get("settled"):
            return f"not settled: {self.file} ended before its answer was; more may change it"
        answer = {"bi": False, "angular": True}.get(self.method)
        if answer == stop.get("angular") and stop.get("n") == n:
            return None
        how = "the best block of" if stop.get("angular") else "the lowest Block Influence,"
        return (
            f"not settled: {self.file} was read until {how} {stop.get('n')} layers were settled, "
            f"not {n} by {self.method}; ranking for these settles them"
        )

    def layers(self, n: int) -> list[int]:
        """The n layers that the method removes; raises ShortGPTError for too many."""
        if self.importance is not None:
            seed = self.arguments.get("seed")
            return choose(self.importance, n, method=self.method, seed=int(str(seed or 0)))
        if not 1 <= n <= (most := len(self.searched)):
            layers = f"{most} layer{'s' * (most != 1)}"
            raise ShortGPTError(f"n = {n}; {self.file} holds {layers} that {self.method} chose")
        if self.method == AUTO and n < len(self.searched):  # they have no order
            raise ShortGPTError(
                f"n = {n}; {self.file} holds {len(self.searched)} layers that {AUTO} chose "
                f"together: take {len(self.searched)}, or rank again with `n` {n}"
            )
        return self.searched[:n]

    def record(self) -> Provenance:
        """How the layers were chosen, to be kept with the result."""
        how = {"method": METHODS[self.method], "scored_by": self.arguments}
        data = self.arguments.get("data")
        facts = {"data": data} if data else None
        return Provenance.of_scores(self.importance, evidence=how, facts=facts)


def _read(file: str) -> JsonObject:
    """What a file of `rank` holds, as its digest says."""
    record = read_record(file)
    own = {name: record[name] for name in record if name != FILES}  # the demo's folder lists them
    if CHECKED not in record:
        raise ShortGPTError(f"{file} has no digest of scores: write it again by short-gpt rank")
    if record[CHECKED] != content_digest(own):
        raise ShortGPTError(f"{file} is damaged, or was edited: write it again by short-gpt rank")
    return record


def _importance(record: Mapping[str, Any], source: str) -> Importance:
    if "importance" not in record:
        raise ShortGPTError(f"{source} holds no scores; expected a file written by short-gpt rank")
    return Importance.from_dict(record["importance"])


# What scores are of


def digests_of(model: str, tokenizer_path: str | None = None) -> dict[str, str | None]:
    """Digests of a model's present files, by which saved scores are recognized as its own."""
    source = find_source(model)
    return {
        "weights": weights_of(source),
        "tokenizer": tokenizer_of(source, tokenizer_path),
        "configuration": configuration_of(source),
    }


def tokenizer_of(source: str | Source, path: str | None = None) -> str | None:
    """A digest of a checkpoint's tokenizer, without chat templates; None where it has no files.

    The weights' digest covers that of GGUF.
    """
    kind, files = find_source(source).kind, []
    if kind == "meta" or path is not None:
        with suppress(FileNotFoundError):
            file = Path(path or find_tokenizer(source))
            files = [file, *file.parent.glob(TOKENIZER_CONFIG)]
    elif kind != "gguf":
        files = [p for p in resolve(source).iterdir() if TOKENIZER.fullmatch(p.name)]
    parts = [_tokenizer_part(path) for path in sorted(files) if path.is_file()]
    return json_digest(parts) if parts else None


def configuration_of(source: str | Source) -> str | None:
    """A digest of the relevant part of a checkpoint's configuration; None without such a file."""
    kind = find_source(source).kind
    if kind == "meta":
        return config_digest(params_entries(ModelArgs.from_params(read_params(Path(source)))))
    path = None if kind == "gguf" else resolve(source) / "config.json"
    return config_digest(read_json(path)) if path is not None and path.is_file() else None


def _tokenizer_part(path: Path) -> str:
    if path.name != TOKENIZER_CONFIG:
        return files_digest([path])
    config = read_json(path)
    return json_digest({name: config[name] for name in sorted(config) if name != "chat_template"})


# Layers to remove


@dataclass(frozen=True)
class ChosenLayers:
    """Layers to remove, and the record of the choice."""

    layers: list[int]  # original numbers, in order of removal
    record: Provenance  # of the choice, to be kept with the pruned model
    importance: Importance | None = None  # the scores of one pass that chose them, if any
    unchecked: str | None = None  # what of the scores was not checked or not settled


def chosen(model: str, choice: Choice) -> ChosenLayers:
    """The layers of a choice.

    Raises:
        ShortGPTError: the choice contradicts itself, or the scores are of another model.
    """
    n = choice.check().n
    if choice.scores is None:
        if n is not None:
            raise ShortGPTError("`n` chooses from `scores`, not from `layers`")
        return ChosenLayers(choice.named or [], Provenance())
    scores = SavedScores.read(choice.scores, choice.by)
    if n is None:
        raise ShortGPTError("with `scores`, say how many layers to remove: `n`")
    unchecked = scores.check_model(model)
    layers, remarks = scores.layers(n), _lines(unchecked, scores.about(n))
    return ChosenLayers(layers, scores.record(), importance=scores.importance, unchecked=remarks)


def _lines(*remarks: str | None) -> str | None:
    return "\n".join(remark for remark in remarks if remark) or None
