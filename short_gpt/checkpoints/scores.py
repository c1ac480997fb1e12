"""Saved scores: the layers that a file of `rank` chooses, and of which model the scores are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llama.args import ModelArgs
from llama.checkpoint.meta import read_params
from llama.files import FILES, read_json
from llama.sources import Source, find_source, resolve
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.models.loading import TOKENIZER, config_digest, params_entries, weight_files
from short_gpt.runtime.digest import files_digest, json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import CHECKED, content_digest, read_record
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import AUTO, METHODS, WITHOUT_TEXT, check_method, choose

TOKENIZER_CONFIG = "tokenizer_config.json"
PARTS = ("weights", "configuration", "tokenizer")  # of a model, which scores depend on
Digests = Mapping[str, str | None]  # by these names


@dataclass(frozen=True)
class SavedScores:
    """What a file of `rank` says of the layers to remove."""

    file: str  # its name
    method: str  # a name of `METHODS`
    arguments: Mapping[str, object]  # of the ranking
    importance: Importance | None = None  # the scores; None where a search by loss chose the layers
    searched: list[int] = field(default_factory=list)  # these layers, in order of removal
    scored: Digests = field(default_factory=dict)  # of the model that was scored, if recorded
    # the verdict of the stop that ended the scoring, if one did
    settled: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str, method: str | None = None) -> SavedScores:
        """The scores of a file; ``method`` replaces the one that ranked."""
        record = read_record(file)
        content = {name: record[name] for name in record if name != FILES}  # a folder's list
        if record.get(CHECKED) != content_digest(content):
            raise ShortGPTError(
                f"{file} is no file of scores, or damaged: write it by short-gpt rank"
            )
        arguments, scored = record.get("arguments", {}), record.get("scored", {})
        digests = {name: str(scored[name]) for name in PARTS if scored.get(name)}
        if search := record.get("chosen"):
            if method not in (None, search["method"]):
                raise ShortGPTError(
                    f"{file} holds the layers of {search['method']}, not of {method}"
                )
            return cls(file, search["method"], arguments, None, search["layers"], digests)
        method = str(method or arguments.get("method") or "bi")
        check_method(method)
        if "importance" not in record:
            raise ShortGPTError(f"{file} holds no scores; expected a file of short-gpt rank")
        importance = Importance.from_dict(record["importance"])
        return cls(file, method, arguments, importance, [], digests, record.get("settled") or {})

    def check_model(self, model: str) -> str | None:
        """Raises ShortGPTError if the scores are another model's; returns what was not checked."""
        if not self.scored.get("weights"):
            return (
                f"not checked: {self.file} does not say of which model its scores are, so it may "
                f"be another than {model}"
            )
        for name, present in digests_of(model).items():
            if self.scored.get(name) and present not in (None, self.scored[name]):
                raise ShortGPTError(
                    f"{self.file} holds scores of the {name} {self.scored[name]}, {model} has "
                    f"{present}: score it by short-gpt rank {model}, or name the model that was "
                    "scored"
                )
        return None

    def unsettled(self, n: int) -> str | None:
        """Why the n chosen layers are not settled: a stop settles only one answer."""
        stop, verdict = self.settled.get("stop"), self.settled
        if self.method in WITHOUT_TEXT or not isinstance(stop, Mapping):
            return None
        answer = {"bi": False, "angular": True}.get(self.method), n
        settled = verdict.get("settled") and answer == (stop.get("angular"), stop.get("n"))
        if settled or verdict.get("windows") == verdict.get("population"):
            return None
        return (
            f"not settled: {self.file} was read until another answer was settled, or to a limit; "
            f"ranking for {n} by {self.method} settles these"
        )

    def layers(self, n: int) -> list[int]:
        """The n layers that the method removes; raises ShortGPTError for too many."""
        if self.importance is not None:
            seed = self.arguments.get("seed")
            return choose(self.importance, n, method=self.method, seed=int(str(seed or 0)))
        most = len(self.searched)
        if not 1 <= n <= most or (self.method == AUTO and n < most):  # auto's have no order
            raise ShortGPTError(
                f"n = {n}; {self.file} holds {most} layer{'s' * (most != 1)} that {self.method} "
                f"chose{' together' * (self.method == AUTO)}: rank again with `n` {n}"
            )
        return self.searched[:n]

    def record(self) -> Provenance:
        """How the layers were chosen, to be kept with the result."""
        how = {"method": METHODS[self.method], "scored_by": self.arguments}
        data = self.arguments.get("data")
        facts = {"data": data} if data else None
        return Provenance.of_scores(self.importance, evidence=how, facts=facts)


@dataclass(frozen=True)
class ChosenLayers:
    """Layers to remove, and the record of the choice."""

    layers: list[int]  # original numbers, in order of removal
    record: Provenance  # of the choice, to be kept with the pruned model
    importance: Importance | None = None  # the scores of one pass that chose them, if any
    unchecked: str | None = None  # what of the scores was not checked or not settled


def chosen(
    model: str,
    layers: Sequence[int] | None = None,
    *,
    scores: str | None = None,
    n: int | None = None,
    method: str | None = None,
) -> ChosenLayers:
    """The layers named, or the ``n`` that a method chooses by the saved ``scores`` of a model.

    Raises:
        ShortGPTError: there is no ``n``, or the scores are of another model.
    """
    if scores is None:
        if n is not None:
            raise ShortGPTError("`n` chooses from `scores`, not from `layers`")
        return ChosenLayers([*(layers or ())], Provenance())
    if n is None:
        raise ShortGPTError("with `scores`, say how many layers to remove: `n`")
    saved = SavedScores.read(scores, method)
    remarks = saved.check_model(model), saved.unsettled(n)
    unchecked = "\n".join(filter(None, remarks)) or None
    return ChosenLayers(saved.layers(n), saved.record(), saved.importance, unchecked)


# What scores are of


def digests_of(model: str) -> dict[str, str | None]:
    """Digests of a model's present files, by which saved scores are recognized as its own."""
    source = find_source(model)
    each = weights_of(source), configuration_of(source), tokenizer_of(source)
    return dict(zip(PARTS, each, strict=True))


def weights_of(source: str | Source) -> str | None:
    """A digest of a checkpoint's files of weights, which depends on format and shards; or None."""
    return files_digest(files) if (files := weight_files(source)) else None


def tokenizer_of(source: str | Source) -> str | None:
    """A digest of a checkpoint's tokenizer, without chat templates; None where it has no files.

    The weights' digest covers that of GGUF.
    """
    kind, files = find_source(source).kind, []
    if kind == "meta":
        with suppress(FileNotFoundError):
            file = find_tokenizer(source)
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
