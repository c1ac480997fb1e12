"""Tasks of the lm-evaluation-harness: what they give, and two models on the same documents."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from short_gpt.evaluation.harness import harness
from short_gpt.runtime.digest import Stamps, files_digest, stamps
from short_gpt.runtime.errors import ShortGPTError, without_password

Results = dict[str, dict[str, float]]
Documents = dict[str, dict[str, list[float]]]  # by task and metric, one value a document
YAML = (".yaml", ".yml")
# In a task's file; a list of tasks is no name.
NAME = re.compile(r"^(task|group):[ \t]*(?:(['\"])(.+?)\2|([^\s'\"#\[]+))", re.MULTILINE)


class Evaluated(Protocol):
    """What tasks ask of a model."""

    def harness_model(self, *, batch_size: int = 1) -> object: ...


@dataclass(frozen=True)
class TaskRun:
    """What tasks gave."""

    metrics: Results  # of every task and group, as the harness has them
    # for metrics that have a value a document: 1 for a right answer; the target's nats for
    # "perplexity"
    documents: Documents = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TaskRun:
        """What ``vars`` gave, also from JSON, where NaN and infinities are None: NaN here."""
        metrics = {
            task: {name: _number(value) for name, value in values.items()}
            for task, values in content["metrics"].items()
        }
        documents = {
            task: {name: [*map(_number, values)] for name, values in metrics.items()}
            for task, metrics in content["documents"].items()
        }
        return cls(metrics, documents)

    def named(self) -> dict[str, float]:
        """Every metric by the names of task and metric, as in "piqa acc"."""
        return {
            f"{task} {name}": value
            for task, values in self.metrics.items()
            for name, value in values.items()
        }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


@dataclass(frozen=True)
class TaskDifference:
    """How much a metric changed, paired over the documents.

    Attributes:
        change: second minus first, of the mean over documents; above 0 is better, also for
            "perplexity", where it is the gain in nats a document.
        standard_error: of ``change``, over the documents; NaN for a single one.
        better: documents where the second has the higher value; ``worse`` counts the lower ones.
        p: probability that right and wrong answers swap so unevenly by chance, two-sided
            (McNemar's exact test); NaN for a metric with other values than 0 and 1.
    """

    change: float
    standard_error: float
    documents: int
    better: int
    worse: int
    p: float

    def named(self, metric: str) -> dict[str, float]:
        """The change and its error by the metric's name, and p where there is one."""
        values = {"change": self.change, "change_stderr": self.standard_error, "change_p": self.p}
        return {f"{metric} {name}": v for name, v in values.items() if not math.isnan(v)}


def task_difference(first: Sequence[float], second: Sequence[float]) -> TaskDifference:
    """The change of a metric from one model to another on the same documents, in the same order.

    Example:
        >>> task_difference([1, 1, 0, 1], [1, 0, 0, 0]).change
        -0.5
    """
    if len(first) != len(second) or not first:
        got = f"got {len(first)} and {len(second)}"
        raise ShortGPTError(f"expected values of the same documents, {got}")
    from scipy.stats import binomtest

    changes = [b - a for a, b in zip(first, second, strict=True)]
    count, mean = len(changes), math.fsum(changes) / len(changes)
    squares = math.fsum((c - mean) ** 2 for c in changes)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    p = math.nan
    if {*first, *second} <= {0, 1}:
        p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return TaskDifference(mean, error, count, better, worse, p)


def task_changes(first: TaskRun, second: TaskRun) -> dict[str, float]:
    """Changes of all metrics that both have of every document, by names as in "piqa acc change"."""
    changes: dict[str, float] = {}
    for task, metrics in first.documents.items():
        for metric, values in metrics.items():
            others = second.documents.get(task, {}).get(metric)
            if others is not None:
                # of "perplexity" lm-eval keeps the log-likelihood of every document
                name = "log-likelihood" if metric == "perplexity" else metric
                changes |= task_difference(values, others).named(f"{task} {name}")
    return changes


def documents_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Documents:
    """Values of single documents, from what the harness keeps of each."""
    documents: Documents = {}
    for task, rows in samples.items():
        for row in sorted(rows, key=lambda r: int(r["doc_id"])):
            for metric in row.get("metrics", ()):
                value = row[metric]
                if isinstance(value, int | float):  # those made of several numbers are not means
                    name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
                    documents.setdefault(task, {}).setdefault(name, []).append(float(value))
    return documents


def run_tasks(
    short: Evaluated,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
) -> Results:
    """Evaluates the model as it is now on tasks of the lm-evaluation-harness.

    The harness seeds the generators of random, numpy and torch, so that a second run agrees.

    Args:
        tasks: Names of tasks, groups or tags, also with wildcards, as in ``"mmlu_*"``, or paths of
            their YAML files, whose folders are read too.
        limit: Documents of each task, the first ones, for a trial. Default: all.
        num_fewshot: Examples in each prompt. Default: the tasks' own numbers.

    Returns:
        For every task and group, its metrics and their known standard errors, as in ``{"piqa":
        {"acc": 0.78, "acc_stderr": 0.01}}``, and after a filter ``"exact_match,strict-match"``.

    Example:
        >>> run_tasks(short, ["piqa", "arc_easy"])  # doctest: +SKIP
    """
    return TaskSuite(tasks, limit, num_fewshot, batch_size).documents(short).metrics


@dataclass(frozen=True)
class TaskSuite:
    """Tasks and how they are run; arguments and errors as in `run_tasks`."""

    tasks: str | Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1

    def identity(self) -> dict[str, object]:
        """The settings, with a digest of the tasks' files, ready for JSON.

        Beside a YAML file that ``tasks`` names may lie anything, such as models: of its folder,
        YAML and Python files count, and what these name.
        """
        beside = _files(_folders(self.tasks), "*")
        code = [path for path in beside if path.suffix in (*YAML, ".py")]
        text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in code)
        files = {*code, *(path for path in beside if path.name in text)}
        return {**asdict(self), "files": files_digest(sorted(files))}

    def documents(self, short: Evaluated) -> TaskRun:
        """What `run_tasks` returns, and the values of documents, by which models are paired."""
        names = task_names(self.tasks)
        try:
            run = harness("evaluator").simple_evaluate(
                short.harness_model(batch_size=self.batch_size),
                tasks=names,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                task_manager=_task_manager(_folders(self.tasks)),
                log_samples=True,
            )
        except ConnectionError as error:
            # of a pipe or socket here, not of the hub
            if type(error) in (BrokenPipeError, ConnectionResetError):
                raise
            raise ConnectionError(
                "the tasks' documents are on the hub, which cannot be reached "
                f"({without_password(str(error))}): connect to the network, or use tasks with "
                "local files"
            ) from error
        metrics = {task: _metrics(values) for task, values in run["results"].items()}
        return TaskRun(metrics, documents_of(run["samples"]))


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """The tasks that are meant, wildcards resolved; arguments and errors as for `run_tasks`."""
    harness("tasks")  # a manager of an earlier call may be there without the package
    named = {task: _name(task) for task in _listed(tasks)}  # raises for a file that is not there
    manager = _task_manager(_folders(tasks))
    matches = {task: manager.match_tasks([name]) for task, name in named.items()}
    unknown = [name for name, names in matches.items() if not names]
    if unknown or not matches:
        raise ShortGPTError(
            f"lm-eval has no tasks {unknown}; `lm-eval ls tasks` lists those it has, and the path "
            "of a YAML file names another one"
        )
    return list(dict.fromkeys(name for names in matches.values() for name in names))


def _listed(tasks: str | Sequence[str]) -> Sequence[str]:
    return [tasks] if isinstance(tasks, str) else tasks


def _name(task: str) -> str:
    """The name of a task that may be given by its YAML file."""
    path = Path(task)
    if path.suffix not in YAML:
        return task
    named = {m[1]: m[3] or m[4] for m in NAME.finditer(path.read_text(encoding="utf-8"))}
    return named.get("task") or named.get("group") or path.stem


def _folders(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Folders with tasks beside lm-eval's own."""
    folders = [str(Path(task).parent) for task in _listed(tasks) if Path(task).suffix in YAML]
    return tuple(dict.fromkeys(folders))


def _task_manager(folders: tuple[str, ...]) -> Any:
    return _manager(folders, stamps(_files(folders, "*.y*ml")))


@cache  # reading all of lm-eval's own tasks takes seconds
def _manager(folders: tuple[str, ...], files: Stamps) -> Any:
    return harness("tasks").TaskManager(include_path=[*folders])


def _files(folders: Sequence[str], pattern: str) -> list[Path]:
    """All files below the folders whose names fit."""
    paths = {path for folder in folders for path in Path(folder).rglob(pattern)}
    return sorted(path for path in paths if path.is_file())


def _metrics(values: Mapping[str, str | float]) -> dict[str, float]:
    """The numbers among a task's results: keys are "metric,filter"; unknown ones are "N/A"."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if "," in name and not isinstance(value, str)
    }
