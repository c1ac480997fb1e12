"""How good models are: perplexity on texts, and tasks of the lm-evaluation-harness."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from llama.files import check_output, new_file
from short_gpt.evaluation.perplexity import Perplexity, difference
from short_gpt.evaluation.tasks import TaskRun, task_changes
from short_gpt.jobs.costs import end_dry_run
from short_gpt.jobs.inputs import Notify, Reading, Tasks, check_model, ignore
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.progress import is_first_rank
from short_gpt.runtime.settings import takes_fields
from short_gpt.wrappers.opening import check_tokenizer, of_source, open_model
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import own_samples


@takes_fields("evaluate")
@interruptible()
def evaluate(
    models: str | PathLike[str] | Iterable[str | PathLike[str]],
    reading: Reading = Reading(),
    *,
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    notify: Notify = ignore,
    dry_run: bool = False,
    **fields: Any,
) -> dict[str, dict[str, float]]:
    """Perplexity and tasks of several checkpoints, one loaded at a time.

    ``notify`` is called with what intervals are over and, before an error is raised, with what was
    measured. ``dry_run`` raises `DryRun`, which says what would be done, in place of the work.
    ``fields`` are single settings by their names, in place of objects: ``data="novels/"``,
    ``tasks="piqa"``.

    Returns:
        By model: its number of layers, the perplexity of each text with the ends of its 95%
        interval ("perplexity_low" and "perplexity_high"), and metrics of the tasks. Of every model
        except the first also how much the loss of a token and each metric changed, with the
        standard error paired over windows and documents, as in "piqa acc change" and
        "piqa acc change_stderr".

    Example:
        >>> evaluate(["llama-2-7b", "llama-2-5b"])["llama-2-5b"]["layers"]  # doctest: +SKIP
        23.0
    """
    if reading.data == "none" and tasks.tasks is None:
        raise ShortGPTError("nothing to evaluate: give `data` or `tasks`")
    reading.check()
    if isinstance(models, str | PathLike) or not isinstance(models, Iterable):
        models = [models]
    each = [*models]
    for name in each:
        check_model(name)
    names = [os.fspath(name) for name in each]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ShortGPTError(f"{name} is named twice: name it once, or another beside it")
    tasks.check()
    check_tokenizer(opening.tokenizer_path, *names)
    own = reading.own_texts()
    if dry_run:
        short = open_model(names[0], of_source(opening, names[0]), max_seq_len=reading.size)
        read = [one for one in (reading.data, tasks.tasks) if one not in ("none", None)]
        work = f"evaluate {' and '.join(names)} on {' and '.join(map(str, read))}"
        work += "; tasks take more" if tasks.tasks else ""
        windows = {} if reading.data == "none" else reading.windows(short, own)
        total = sum(map(len, windows.values())) * len(names) or None  # of every model
        end_dry_run(short, work, reading.size, total)
    first, rows = None, dict[str, dict[str, float]]()
    try:
        for name in names:
            row = rows[name] = {}
            measured = _evaluated(name, row, reading, own, tasks, opening, first, notify)
            first = first or measured
            if measured[0]:  # a pair is read in one precision
                opening = replace(opening, precision=next(iter(measured[0].values()))[0].precision)
    except BaseException:  # also Ctrl-C
        for name, row in rows.items():  # what was measured is printed
            if row.keys() - {"layers"}:
                values = ", ".join(f"{measure} {value:.6g}" for measure, value in row.items())
                notify(f"measured of {name} before this ended: {values}")
        raise
    return rows


# by text, a model's perplexity and a digest of the windows' tokens; and its tasks
Measured = tuple[dict[str, tuple[Perplexity, str]], TaskRun]


def _evaluated(
    name: str,
    row: dict[str, float],
    reading: Reading,
    own: Mapping[str, Sequence[str]],
    tasks: Tasks,
    opening: OpenOptions,
    first: Measured | None,
    notify: Notify,
) -> Measured:
    """Fills the row of a model."""
    size, batch_size = reading.size, reading.batch_size
    short = open_model(name, of_source(opening, name), max_seq_len=size, max_batch_size=batch_size)
    bos = ", bos in every window" if (reading.bos or short.bos) == "every" else ""
    bos += ", precision mixed" if short.about_precision else ""
    row["layers"] = float(len(short.kept))
    measured: dict[str, tuple[Perplexity, str]] = {}
    for text, windows in ({} if reading.data == "none" else reading.windows(short, own)).items():
        digest = windows_digest(windows)
        value = short.perplexity(windows, batch_size=batch_size)
        measured[text] = value, digest
        row[f"{text} perplexity{bos}"] = value.value
        if value.error is not None and not value.error.no_interval:
            ends = zip(("low", "high"), value.interval(), strict=True)  # of 95%
            row |= {f"{text} perplexity_{name}{bos}": end for name, end in ends}
            if first is None or digest != first[0][text][1]:
                notify(f"{text}: 95% intervals of perplexities over {value.error.over}")
    run = tasks.run(short, batch_size=batch_size)
    row |= run.named()
    for text, (before, digest) in ({} if first is None else first[0]).items():
        if digest == measured[text][1]:  # windows of two tokenizers are not paired
            change = difference([before], [measured[text][0]])
            nats = {"nats change": change.nats, "nats change_stderr": change.standard_error}
            row |= {f"{text} {k}{bos}": v for k, v in nats.items() if v == v}
    if first is not None:
        row |= task_changes(first[1], run)
    return measured, run


@interruptible()
def write_samples(
    model: str, out: str, count: int, size: int, *, seed: int, opening: OpenOptions
) -> Path:
    """Writes `own_samples` of a checkpoint as texts to a .jsonl file, which ``data`` reads."""
    at_least(1, samples=count)
    at_least(2, max_gen_len=size)
    at_least(0, seed=seed)
    target = Path(out)
    if target.suffix != ".jsonl":
        raise ShortGPTError(f"`out` {out}: expected the name of a .jsonl file")
    if target.is_file():
        raise FileExistsError(f"{target} exists; choose another name")
    check_output(target, overwrite=False, replaces=lambda _: False)
    short = open_model(model, opening, max_seq_len=size, model_parallel_size=1)
    if size > (most := short.decoder.max_seq_len):
        raise ShortGPTError(f"`max_gen_len` {size}: this model takes {most} tokens, give no more")
    texts = own_samples(short, count, size, seed=seed, beside=target)
    if not is_first_rank():
        return target
    with new_file(target, overwrite=False, replaces=lambda _: False) as partial:
        lines = (json.dumps({"text": short.decode(ids)}) + "\n" for ids in texts)
        partial.write_text("".join(lines), encoding="utf-8")
    return target
