"""How good models are: perplexity on texts, and tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from short_gpt.data.texts import shown, texts
from short_gpt.data.windows import at_least
from short_gpt.evaluation.documents import TaskRun, task_changes
from short_gpt.evaluation.paired import difference
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.protocols import PROTOCOLS, protocol
from short_gpt.evaluation.tasks import TaskSuite, task_names
from short_gpt.jobs.inputs import (
    Cut,
    Notify,
    Opening,
    Running,
    TextSource,
    about_bos,
    check_model,
    ignore,
    known_total,
    listed,
    source_of,
)
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.short_model import ShortModel


@dataclass(frozen=True)
class Reading:
    """The text whose perplexity is compared.

    Args:
        data: wikitext-2, c4 or pg19, cut as published results do; a local file or folder; none.
        source: a local copy of wikitext-2, c4 or pg19.
        size: tokens in a window.
        max_windows: read only the first so many windows.
        bos: first leaves it in front of a text's first window alone, as published results do;
            every puts it in front of every window; if not given, every for Gemma, which needs it.
        batch_size: windows read at once, and prompts of the tasks.
    """

    data: str = "wikitext-2"
    source: str | None = None
    size: int = 2048
    max_windows: int | None = None
    bos: str | None = None
    batch_size: int = 1

    def check(self) -> None:
        """Raises ShortGPTError for what would go wrong after a model is loaded."""
        if self.source is not None and self.data not in PROTOCOLS:
            known = " or ".join(PROTOCOLS)
            raise ShortGPTError(f"`source` is a copy of {known}; `data` is {self.data}")
        Cut(self.size, self.max_windows, bos=self.bos).check()

    def own_texts(self) -> list[str]:
        """The texts of a local file or folder; none of a published protocol."""
        return [] if self.data in ("none", *PROTOCOLS) else list(shown(texts(self.data)))

    def windows(self, short: ShortModel, own: Sequence[str]) -> Iterable[list[int]]:
        """Windows of the protocol's text, or of ``own``."""
        bos = self.bos or short.bos
        if own:
            return Cut(self.size, self.max_windows, None).windows(own, short.encode, bos)
        return protocol(
            self.data,
            short.encode,
            size=self.size,
            limit=self.max_windows,
            source=self.source,
            bos=bos,
        )


@dataclass(frozen=True)
class Tasks:
    """Tasks of the lm-evaluation-harness.

    Args:
        tasks: names of tasks with commas between, such as piqa,arc_easy; none if not given.
        limit: only the first so many documents of each task.
        include_path: folder with YAML files of more tasks.
    """

    tasks: str | None = None
    limit: int | None = None
    include_path: str | None = None

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return listed(self.tasks or "")

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, or a task that is unknown."""
        if self.limit is not None:
            at_least(1, "limit", self.limit)
        if self.tasks is not None:
            task_names(self.names, self.include_path)

    def suite(self, *, batch_size: int = 1) -> TaskSuite | None:
        """The tasks as a suite, which reads so many prompts at once; None without tasks."""
        if self.tasks is None:
            return None
        return TaskSuite(self.names, batch_size=batch_size, **self._settings())

    def run(self, short: ShortModel, *, batch_size: int = 1) -> TaskRun:
        """Every metric of every task, and the values of documents; nothing without tasks."""
        suite = self.suite(batch_size=batch_size)
        return TaskRun({}) if suite is None else suite.documents(short)

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "tasks"}


@dataclass(frozen=True)
class FewShotTasks(Tasks):
    """Tasks of the lm-evaluation-harness with examples in the prompts.

    Args:
        num_fewshot: examples in each prompt; the tasks' own numbers if not given.
    """

    num_fewshot: int | None = None

    def check(self) -> None:
        if self.num_fewshot is not None:
            at_least(0, "num_fewshot", self.num_fewshot)
        super().check()


def evaluate(
    models: Sequence[str],
    reading: Reading | None = None,
    *,
    tasks: FewShotTasks | None = None,
    opening: Opening | None = None,
) -> dict[str, dict[str, float]]:
    """Perplexity and tasks of several checkpoints, one loaded at a time.

    Args:
        models: checkpoints of either format, each of another name.
        reading: the text whose perplexity is taken.
        tasks: of the lm-evaluation-harness.
        opening: of every model.

    Returns:
        By model: its number of layers, perplexity, and metrics of the tasks, by their names. Of
        every model but the first also how much the loss of a token and each metric changed, with
        the standard error paired over the same windows and documents: as in "piqa acc change" and
        "piqa acc change_stderr".

    Raises:
        ShortGPTError: nothing to evaluate, or a wrong setting.
        MissingPackageError: tasks need lm-eval.

    Example:
        >>> evaluate(["llama-2-7b", "llama-2-5b"])["llama-2-5b"]["layers"]  # doctest: +SKIP
        23.0
    """
    reading, tasks = reading or Reading(), tasks or FewShotTasks()
    if reading.data == "none" and tasks.tasks is None:
        raise ShortGPTError("nothing to evaluate: give `data` or `tasks`")
    reading.check()
    for number, name in enumerate(models):
        check_model(name)
        if name in models[:number]:
            raise ShortGPTError(f"{name} is named twice: name it once, or another beside it")
    tasks.check()
    own = reading.own_texts()
    opening = opening or Opening()
    opening.check(*models)
    every = {name: _evaluated(name, reading, own, tasks, opening) for name in models}
    first = every[models[0]]
    return {name: found.row(first) for name, found in every.items()}


@dataclass(frozen=True)
class _Evaluated:
    """One model's results."""

    layers: int
    text: str  # names the perplexity, in front of it and behind it
    bos: str
    read: str  # a digest of the windows' tokens
    perplexity: Perplexity | None
    tasks: TaskRun

    def row(self, first: _Evaluated) -> dict[str, float]:
        """The results by their names, and for any but the first how much they changed."""
        found, changes = {"layers": float(self.layers)}, {}
        if self.perplexity is not None:
            found[f"{self.text} perplexity{self.bos}"] = self.perplexity.value
        if first is not self:
            changes = self._loss_change(first) | task_changes(first.tasks, self.tasks)
        return found | self.tasks.named() | changes

    def _loss_change(self, first: _Evaluated) -> dict[str, float]:
        """Of the loss of a token; nothing where the windows differ, as those of two tokenizers."""
        ours, theirs = self.perplexity, first.perplexity
        if ours is None or theirs is None or self.read != first.read:
            return {}
        change = difference([theirs], [ours])
        names = {"nats change": change.nats, "nats change_stderr": change.standard_error}
        return {f"{self.text} {k}{self.bos}": v for k, v in names.items() if v == v}


def _evaluated(
    name: str, reading: Reading, own: Sequence[str], tasks: FewShotTasks, opening: Opening
) -> _Evaluated:
    """One model's results; it is gone from memory afterwards."""
    short = opening.of(name).whole(name, size=reading.size, batch_size=reading.batch_size)
    found, read = None, ""
    if reading.data != "none":
        windows = list(reading.windows(short, own))
        read = json_digest([list(window) for window in windows])
        found = short.perplexity(windows, batch_size=reading.batch_size)
    bos = ", bos in every window" if (reading.bos or short.bos) == "every" else ""
    run = tasks.run(short, batch_size=reading.batch_size)
    return _Evaluated(len(short.kept), reading.data, bos, read, found, run)


def perplexity_of(
    model: str,
    data: str | TextSource = "pg19",
    *,
    cut: Cut | None = None,
    opening: Opening | None = None,
    running: Running | None = None,
    notify: Notify = ignore,
) -> Perplexity:
    """The perplexity of a checkpoint on a text, in windows that do not overlap.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        data: texts; each window is read on its own, its first token is not predicted.
        cut, opening, running: how windows are cut, the model opened and run.
        notify: is told what a streamed run will take in memory, before it starts.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> perplexity_of("llama-2-7b", "novels/").value  # doctest: +SKIP
        5.47
    """
    texts, cut, running = source_of(data), cut or Cut(), running or Running()
    if running.max_memory is not None and not running.stream:
        raise ShortGPTError(
            f"`max_memory` {running.max_memory} bounds `stream`; add it, or leave this out"
        )
    check_model(model)
    cut.check()
    found = texts.read()
    short = running.open(model, opening or Opening(), cut.size, None)
    windows = cut.windows(found, short.encode, short.bos)
    if said := about_bos(cut.bos or short.bos):
        notify(said)
    if (plan := short.plan_text(running.batch_size)) is not None:
        notify(plan)
    total = known_total(windows, cut.max_windows)
    return short.perplexity(windows, batch_size=running.batch_size, total=total)
