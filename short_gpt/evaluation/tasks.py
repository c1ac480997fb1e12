"""Tasks of the lm-evaluation-harness on the models of both wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from short_gpt.evaluation.documents import Results, TaskRun, documents_of
from short_gpt.evaluation.harness import harness
from short_gpt.runtime.errors import ShortGPTError


class TaskManager(Protocol):
    """What lm-eval's manager of tasks is asked for."""

    def match_tasks(self, task_list: list[str]) -> list[str]: ...


class Evaluated(Protocol):
    """What tasks ask of a model."""

    def harness_model(self, *, batch_size: int = 1) -> object: ...


def run_tasks(
    short: Evaluated,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 1,
) -> Results:
    """Evaluates the model as it is now on tasks of the lm-evaluation-harness.

    The harness seeds the generators of random, numpy and torch, so that a second run agrees.

    Args:
        short: a `ShortLlama` or `ShortHFModel`.
        tasks: names of tasks, groups or tags, also with wildcards, as in ``"mmlu_*"``.
        limit: only the first so many documents of each task, for a trial.
        num_fewshot: examples in each prompt; None for the tasks' own numbers.
        include_path: a folder with YAML files of more tasks.
        batch_size: requests read at once.

    Returns:
        For every task and group, its metrics and their standard errors by name, as in
        ``{"piqa": {"acc": 0.78, "acc_stderr": 0.01}}``. A metric after a filter is named
        ``"exact_match,strict-match"``. Standard errors that the harness does not know are absent.

    Raises:
        MissingPackageError: lm-eval is missing.
        ShortGPTError: no tasks, or an unknown one; or as in the model's own ``harness_model``.

    Example:
        >>> run_tasks(short, ["piqa", "arc_easy"])  # doctest: +SKIP
    """
    path = None if include_path is None else str(include_path)
    return TaskSuite(tasks, limit, num_fewshot, path, batch_size).run(short)


@dataclass(frozen=True)
class TaskSuite:
    """Tasks and how they are run; arguments as in `run_tasks`.

    Example:
        >>> TaskSuite(["piqa"], limit=100).run(short)  # doctest: +SKIP
    """

    tasks: str | Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    batch_size: int = 1

    def check(self) -> None:
        """Raises what `run_tasks` would for tasks that are unknown, before a model is run."""
        task_names(self.tasks, self.include_path)

    def run(self, short: Evaluated) -> Results:
        """Evaluates the model as it is now; results and errors as in `run_tasks`."""
        return self.documents(short).metrics

    def documents(self, short: Evaluated) -> TaskRun:
        """The same with the values of single documents, by which two models are paired.

        Example:
            >>> suite = TaskSuite(["piqa"])  # doctest: +SKIP
            >>> task_changes(suite.documents(whole), suite.documents(cut))  # doctest: +SKIP
        """
        names = task_names(self.tasks, self.include_path)
        done = harness("evaluator").simple_evaluate(
            short.harness_model(batch_size=self.batch_size),
            tasks=names,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            task_manager=_task_manager(self.include_path),
            log_samples=True,
        )
        metrics = {task: _metrics(found) for task, found in done["results"].items()}
        return TaskRun(metrics, documents_of(done["samples"]))


def task_names(tasks: str | Sequence[str], include_path: str | Path | None = None) -> list[str]:
    """The tasks that are meant, wildcards resolved; arguments and errors as for `run_tasks`."""
    asked = [tasks] if isinstance(tasks, str) else tasks
    if not asked:
        raise ShortGPTError("expected at least one task, got none; `lm-eval ls tasks` lists them")
    harness("tasks")  # a manager of an earlier call may be there without the package
    manager = _task_manager(include_path and str(include_path))
    found = {task: manager.match_tasks([task]) for task in asked}
    if unknown := [task for task, names in found.items() if not names]:
        raise ShortGPTError(
            f"lm-eval has no tasks {unknown}; `lm-eval ls tasks` lists those it has, and "
            "`include_path` names a folder with more as YAML files"
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


@cache  # reading all of lm-eval's own tasks takes seconds
def _task_manager(include_path: str | None) -> TaskManager:
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"`include_path` {include_path} is no folder of YAML files")
    return harness("tasks").TaskManager(include_path=include_path)


def _metrics(found: Mapping[str, str | float]) -> dict[str, float]:
    """The numbers among a task's results: keys are "metric,filter"; unknown ones are "N/A"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if "," in name and not isinstance(value, str)
    }
