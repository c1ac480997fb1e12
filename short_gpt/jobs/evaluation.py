"""How good models are: perplexity on texts, distance from the first, and lm-eval's tasks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any, NamedTuple

from short_gpt.data.texts import check_named_once, read_texts, source_names
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import PROTOCOLS, Perplexity, difference, protocol, rows_of
from short_gpt.evaluation.tasks import TaskRun, task_changes
from short_gpt.jobs.inputs import Tasks, WindowSettings, check_model
from short_gpt.jobs.saving import Running, interruptible
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_model import ShortModel

NONE = "none"  # the name of no text


@interruptible()
def evaluate(
    model: str | PathLike[str] | Sequence[str],
    pruned: str | None,
    windows: WindowSettings,
    source: str | None,
    tasks: Tasks,
    opening: OpenOptions,
    running: Running,
) -> dict[str, dict[str, float]]:
    """What `jobs.evaluate` does."""
    one = isinstance(model, str | PathLike) or not isinstance(model, Iterable)
    several: Any = [model] if one else model
    models = [*several, *([] if pruned is None else [pruned])]
    for each in models:
        check_model(each)
    names = [os.fspath(each) for each in models]
    for name in names:
        if names.count(name) > 1:
            raise ShortGPTError(f"{name} is named twice: name it once, or another beside it")
    _check(windows, source, tasks)
    cut = partial(_cut, windows, source, _local_texts(windows, source))
    opening = replace(opening, max_seq_len=windows.size or 0)
    first, rows = None, dict[str, dict[str, float]]()
    try:
        for name in names:
            row = rows[name] = {}
            others = first is None and len(names) > 1
            measured = _evaluated(name, row, cut, tasks, opening, first, running, others=others)
            first = first or measured
    except BaseException:  # also Ctrl-C
        for name, row in rows.items():  # what was measured is printed
            if row.keys() - {"layers"}:
                values = ", ".join(f"{measure} {value:.6g}" for measure, value in row.items())
                running.tell(f"measured of {name} before this ended: {values}")
        raise
    return rows


def _cut(
    windows: WindowSettings,
    source: str | None,
    local: Mapping[str, Sequence[str]],
    short: ShortModel,
) -> dict[str, list[list[int]]]:
    """Windows of each text by its name, in their order: as published, or without overlap.

    ``local`` are the texts of files and folders; none of a protocol, with its ``source`` here.
    """
    cut, name = replace(windows, seed=None), windows.name
    if name == NONE:
        return {}
    if not local:
        how: Any = {"size": cut.size, "limit": cut.max_windows, "source": source}
        return {name: list(protocol(name, short.encode, **how, bos=short.bos))}
    each = None if cut.max_windows is None else cut.max_windows // len(local)
    return {name: list(cut.cut([own], short, each)) for name, own in local.items()}


def _check(windows: WindowSettings, source: str | None, tasks: Tasks) -> None:
    """Raises ShortGPTError for settings that do not go together."""
    name = windows.name
    if name == NONE and tasks.tasks is None:
        raise ShortGPTError("nothing to evaluate: give `data` or `tasks`")
    if source is not None and name not in PROTOCOLS:
        raise ShortGPTError(f"`source` is a copy of {' or '.join(PROTOCOLS)}; `data` is {name}")
    windows.check()
    check_named_once(names := source_names(name))
    if windows.max_windows is not None and windows.max_windows < len(names):
        raise ShortGPTError(
            f"`max_windows` = {windows.max_windows}: expected at least one for each of "
            f"{len(names)} texts"
        )
    tasks.check()


def _local_texts(windows: WindowSettings, source: str | None) -> dict[str, list[str]]:
    """The texts of each local file or folder; none of a protocol, whose first is read."""
    if windows.name in PROTOCOLS:
        rows_of(windows.name, source)
    if windows.name in (NONE, *PROTOCOLS):
        return {}
    names, column = source_names(windows.name), windows.column
    return {name: [*read_texts(name, column, split=None)] for name in names}


class Measured(NamedTuple):
    """What the first model gave, from which the others differ."""

    texts: dict[str, tuple[Perplexity, str]]  # by text; with a digest of the windows' tokens
    tasks: TaskRun
    reference: Reference | None  # what it predicts; None of a streamed model


def _evaluated(
    name: str,
    row: dict[str, float],
    texts: Callable[[ShortModel], dict[str, list[list[int]]]],
    tasks: Tasks,
    opening: OpenOptions,
    first: Measured | None,
    running: Running,
    *,
    others: bool,
) -> Measured:
    """Fills the row of a model; ``others`` will be compared with it."""
    short = open_model(name, opening)
    how = ", bos in every window" if short.bos == "every" else ""
    how += ", precision mixed" if short.about_precision else ""
    row["layers"] = float(len(short.kept))
    measured: dict[str, tuple[Perplexity, str]] = {}
    cut, own = texts(short), None
    if others:  # which the passes below fill
        own = short.reference([w for windows in cut.values() for w in windows], read=False)
    for text, windows in cut.items():
        digest = windows_digest(windows)
        reference = own
        if first is not None and digest == first.texts[text][1] and not short.streamed:
            reference = first.reference
        if reference is not None and reference.vocab_size != short.decoder.vocab_size:
            reference = None  # heads padded to other sizes have no divergence
        value = short.perplexity(windows, batch_size=opening.batch_size, reference=reference)
        measured[text] = value, digest
        row[f"{text} perplexity{how}"] = value.value
        means = {"KLD, nats a token": value.kld, "same top token": value.same_top}
        for measure, mean in means.items():
            if mean is not None and first is not None:
                row[f"{text} {measure}{how}"] = mean.value
                row[f"{text} {measure}_stderr{how}"] = mean.error.standard_error
        if value.error is not None and not value.error.no_interval:
            ends = zip(("low", "high"), value.interval(), strict=True)  # of 95%
            row |= {f"{text} perplexity_{name}{how}": end for name, end in ends}
            if first is None or digest != first.texts[text][1]:
                running.tell(f"{text}: 95% intervals of perplexities over {value.error.over}")
    run = tasks.run(short, batch_size=opening.batch_size)
    row |= run.named()
    for text, (before, digest) in ({} if first is None else first.texts).items():
        if digest == measured[text][1]:  # windows of two tokenizers are not paired
            change = difference([before], [measured[text][0]])
            nats = {"nats change": change.nats, "nats change_stderr": change.standard_error}
            row |= {f"{text} {k}{how}": v for k, v in nats.items() if v == v}
    if first is not None:
        row |= task_changes(first.tasks, run)
    if own is not None:
        own.keep_head()  # only one model's layers are in memory
    return Measured(measured, run, own)
