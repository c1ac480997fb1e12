"""How good models are: perplexity on texts, and tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.evaluation.paired import difference
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.tasks import TaskRun, task_changes
from short_gpt.jobs.inputs import (
    Cut,
    Notify,
    Reading,
    Running,
    Tasks,
    TextSource,
    about_bos,
    check_model,
    ignore,
    known_total,
    source_of,
)
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.opening import check_tokenizer, of_source, open_model
from short_gpt.wrappers.options import OpenOptions


def evaluate(
    models: Sequence[str],
    reading: Reading | None = None,
    *,
    tasks: Tasks | None = None,
    opening: OpenOptions | None = None,
) -> dict[str, dict[str, float]]:
    """Perplexity and tasks of several checkpoints, one loaded at a time.

    Args:
        models: checkpoints of any format, each of another name.
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
    reading, tasks = reading or Reading(), tasks or Tasks()
    if reading.data == "none" and tasks.tasks is None:
        raise ShortGPTError("nothing to evaluate: give `data` or `tasks`")
    reading.check()
    for number, name in enumerate(models):
        check_model(name)
        if name in models[:number]:
            raise ShortGPTError(f"{name} is named twice: name it once, or another beside it")
    tasks.check()
    own = reading.own_texts()
    opening = opening or OpenOptions()
    check_tokenizer(opening.tokenizer_path, *models)
    every = {name: _evaluated(name, reading, own, tasks, opening) for name in models}
    first = every[models[0]]
    return {name: found.row(first) for name, found in every.items()}


@dataclass(frozen=True)
class _Evaluated:
    layers: int
    text: str  # names the perplexity, before it and after it
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
    name: str, reading: Reading, own: Sequence[str], tasks: Tasks, opening: OpenOptions
) -> _Evaluated:
    size, batch_size = reading.size, reading.batch_size
    short = open_model(name, of_source(opening, name), max_seq_len=size, max_batch_size=batch_size)
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
    opening: OpenOptions | None = None,
    running: Running | None = None,
    notify: Notify = ignore,
) -> Perplexity:
    """The perplexity of a checkpoint on a text, in windows that do not overlap.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        data: texts; each window is read on its own, its first token is not predicted.
        cut, opening, running: how windows are cut, the model opened and run.
        notify: called with what a streamed run will take in memory, before it starts.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> perplexity_of("llama-2-7b", "novels/").value  # doctest: +SKIP
        5.47
    """
    texts, cut, running = source_of(data), cut or Cut(), running or Running()
    running.check_bounds()
    check_model(model)
    cut.check()
    found = texts.read()
    short = running.open(model, opening or OpenOptions(), cut.size)
    windows = cut.windows(found, short.encode, short.bos)
    if said := about_bos(cut.bos or short.bos):
        notify(said)
    if (plan := short.plan_text(running.batch_size)) is not None:
        notify(plan)
    total = known_total(windows, cut.max_windows)
    return short.perplexity(windows, batch_size=running.batch_size, total=total)
