"""Saved scores: what a file of `rank` says of the layers to remove, and of which model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from llama.io.json_files import JsonObject
from llama.io.sources import find_source, resolve
from short_gpt.checkpoints.gguf_layers import Stack
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.jobs.scored import UNKNOWN, Scored
from short_gpt.models.numbering import span
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import CHECKED, content_digest, read_record
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.lists import layer_numbers
from short_gpt.selection.methods import METHODS, check_method, choose
from short_gpt.wrappers.opening import layers_of


@dataclass(frozen=True)
class Scores:
    """What a file of `rank` says of the layers to remove.

    Attributes:
        file: its name.
        method: a name of `METHODS`.
        arguments: those that the ranking was made with.
        importance: the scores; None where a search by loss found the layers.
        searched: these layers, in order of removal.
        scored: of which weights, tokenizer and configuration, as far as an older file says.
        settled: the verdict of the stop that ended the scoring; empty if there was none.
    """

    file: str
    method: str
    arguments: Mapping[str, object]
    importance: Importance | None = None
    searched: list[int] = field(default_factory=list)
    scored: Scored = UNKNOWN
    settled: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str, method: str | None = None) -> Scores:
        """The scores of a file; ``method`` takes the place of the one that ranked.

        Raises:
            FileNotFoundError, ShortGPTError: no such file, no scores in it, other ones than were
                written, or those of another method, which cannot be chosen by.
        """
        record = _read(file)
        ranked, scored = _part(record, "arguments", file), _part(record, "scored", file)
        of = Scored(**{f.name: str(scored[f.name]) for f in fields(Scored) if scored.get(f.name)})
        if "chosen" not in record:
            if type(ranked.get("seed") or 0) is not int:
                raise ShortGPTError(f"{file}: expected a whole number as seed; rank again")
            method = str(method or ranked.get("method") or "bi")
            check_method(method)
            verdict = _part(record, "settled", file)
            importance = importance_of(record, file)
            return cls(file, method, ranked, importance, scored=of, settled=verdict)
        chosen = _part(record, "chosen", file)
        found, layers = str(chosen.get("method")), chosen.get("layers")
        if method not in (None, found):
            raise ShortGPTError(f"{file} holds the layers of {found}, not of {method}")
        check_method(found)
        return cls(file, found, ranked, None, _searched(layers, file), of)

    def check_model(self, model: str) -> str | None:
        """Whether the scores are the model's.

        Returns:
            What could not be checked, in words; None if all was.

        Raises:
            ShortGPTError: they are of another number of layers, of other weights or another
                configuration, or texts were read with another tokenizer.
        """
        self._check_layers(model)
        if self.scored.weights is None:
            return (
                f"not checked: {self.file} does not say of which weights its scores are, so they "
                f"may be of another model than {model}; short-gpt rank writes it"
            )
        path = self.arguments.get("tokenizer_path")
        theirs = Scored.of(model, str(path) if path else None)
        self._check_digests(model, theirs)
        if self.scored.configuration is None and theirs.configuration is not None:
            return (
                f"not checked: {self.file} does not say of which configuration its scores are, so "
                f"that of {model} may have changed since; short-gpt rank writes it"
            )
        return None

    def _check_digests(self, model: str, theirs: Scored) -> None:
        ours = self.scored
        if theirs.weights not in (None, ours.weights):
            raise ShortGPTError(
                f"{self.file} holds scores of the weights {ours.weights}, {model} has "
                f"{theirs.weights}: "
                f"score this model by short-gpt rank {model}, or name the model that was scored"
            )
        if ours.configuration and theirs.configuration not in (None, ours.configuration):
            raise ShortGPTError(
                f"{self.file} holds scores of the configuration {ours.configuration}, {model} now "
                f"has {theirs.configuration}, whose entries differ: score it anew by "
                f"short-gpt rank {model}, or put the former config.json (params.json) back"
            )
        if ours.tokenizer is not None and theirs.tokenizer not in (None, ours.tokenizer):
            raise ShortGPTError(
                f"{self.file} holds scores of texts read with the tokenizer {ours.tokenizer}, "
                f"{model} now has {theirs.tokenizer}: score it anew by short-gpt rank {model}, or "
                "put the former tokenizer back"
            )

    def _check_layers(self, model: str) -> None:
        count = _layers_of(model)
        if count is not None and not self._of_layers(count):
            searched = f"the layers {span(self.searched)}"
            what = f"{len(self.importance.layers)} layers" if self.importance else searched
            raise ShortGPTError(
                f"{self.file} scores {what}, {model} has {count}; they do not belong together"
            )

    def about(self, n: int) -> str | None:
        """What the run that scored does not say of the n layers now chosen; None if nothing.

        A stop settles one answer. Others, of fewer windows than there are, may change with more.
        """
        stop, verdict = self.settled.get("stop"), self.settled
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

    def _of_layers(self, count: int) -> bool:
        """Whether a model of so many layers can be what was scored."""
        if self.importance is None:
            return max(self.searched, default=0) < count
        return self.importance.layers == list(range(count))

    def layers(self, n: int) -> list[int]:
        """The n layers that the method removes; raises ShortGPTError for too many."""
        if self.importance is not None:
            seed = self.arguments.get("seed")
            return choose(self.importance, n, method=self.method, seed=int(str(seed or 0)))
        if not 1 <= n <= len(self.searched):
            raise ShortGPTError(
                f"n = {n}; {self.file} holds {len(self.searched)} layers that {self.method} chose"
            )
        return self.searched[:n]

    def record(self, **evidence: object) -> Provenance:
        """How the layers were chosen, and what else tells for them, to be kept with the result."""
        how = {"method": METHODS[self.method], "scored_by": self.arguments, **evidence}
        data = self.arguments.get("data")
        facts = {"data": data} if data else None
        return Provenance.of_scores(self.importance, evidence=how, facts=facts)


def _layers_of(model: str) -> int | None:
    """How many layers a checkpoint of any format has, a hub's one fetched; None if not known."""
    source = find_source(model)
    if source.kind == "gguf":
        return Stack.open(source).layers
    return layers_of(source if source.kind == "meta" else resolve(source))


def _read(file: str) -> JsonObject:
    """What a file of `rank` holds; one of an earlier version, without a digest, as it is.

    Raises:
        FileNotFoundError, ShortGPTError: no such file, or it does not hold what was written.
    """
    record = read_record(file)
    if CHECKED in record and record[CHECKED] != content_digest(record):
        raise ShortGPTError(
            f"{file} does not hold the scores that were written: it was edited or is damaged; "
            "write it anew by short-gpt rank, or fetch it anew from where it is whole"
        )
    return record


def importance_of(record: Mapping[str, object], source: str) -> Importance:
    """The scores in a record that `rank` wrote; raises ShortGPTError if there are none."""
    found = record.get("importance")
    if not isinstance(found, dict):
        raise ShortGPTError(f"{source} holds no scores; expected a file written by short-gpt rank")
    try:
        return Importance.from_dict(found)
    except ShortGPTError as error:
        raise ShortGPTError(f"{source}: {error}; write it anew by short-gpt rank") from None


def read_scores(file: str) -> Importance:
    """The scores in a file that `rank` wrote.

    Raises:
        FileNotFoundError, ShortGPTError: no such file, or no scores of one pass in it.
    """
    return importance_of(_read(file), file)


def _searched(layers: object, file: str) -> list[int]:
    """The layers that a search chose."""
    try:
        return layer_numbers(layers)
    except TypeError as error:
        raise ShortGPTError(
            f"{file} holds no layers that a search chose: {error}; write it anew by short-gpt rank"
        ) from None


def _part(record: Mapping[str, object], name: str, file: str) -> Mapping[str, object]:
    """An object inside a record; empty where there is none."""
    found = record.get(name) or {}
    if not isinstance(found, dict):
        raise ShortGPTError(f"{file}: {name} is {found!r}, expected an object; rank anew")
    return found
