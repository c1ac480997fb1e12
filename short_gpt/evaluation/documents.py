"""Two models on the same documents of tasks: what a change costs or brings, with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from short_gpt.runtime.errors import ShortGPTError

Results = dict[str, dict[str, float]]
Documents = dict[str, dict[str, list[float]]]  # by task and metric, one value a document


@dataclass(frozen=True)
class TaskRun:
    """What tasks gave.

    Attributes:
        metrics: of every task and group, as the harness has them.
        documents: of every task, the value of each document, for metrics that have one: 1 where
            an answer is right; nats of the target for "perplexity".
    """

    metrics: Results
    documents: Documents = field(default_factory=dict)

    def named(self) -> dict[str, float]:
        """Every metric by the names of task and metric, as in "piqa acc"."""
        return {f"{task} {m}": v for task, found in self.metrics.items() for m, v in found.items()}


@dataclass(frozen=True)
class TaskDifference:
    """How much a metric changed, paired over the documents.

    Attributes:
        change: second less first, of the mean over documents; above 0 is better, also for
            "perplexity", where it is the gain in nats a document.
        standard_error: of ``change``, over the documents; NaN for a single one.
        documents: compared.
        better, worse: of them, those where the second has the higher value, and the lower.
        p: that right and wrong answers swap so unevenly by chance, two-sided (McNemar's exact
            test); NaN for a metric with other values than 0 and 1.
    """

    change: float
    standard_error: float
    documents: int
    better: int
    worse: int
    p: float

    def named(self, metric: str) -> dict[str, float]:
        """The change and its error by the metric's name, and p where there is one."""
        found = {f"{metric} change": self.change, f"{metric} change_stderr": self.standard_error}
        return {k: v for k, v in {**found, f"{metric} change_p": self.p}.items() if v == v}


def task_difference(first: Sequence[float], second: Sequence[float]) -> TaskDifference:
    """The change of a metric from one model to another on the same documents.

    Args:
        first, second: values of the documents, in the same order.

    Raises:
        ShortGPTError: the numbers of documents differ, or there is none.

    Example:
        >>> task_difference([1, 1, 0, 1], [1, 0, 0, 0]).change
        -0.5
    """
    if len(first) != len(second) or not first:
        raise ShortGPTError(
            f"expected values of the same documents, got {len(first)} and {len(second)}"
        )
    changes = [b - a for a, b in zip(first, second, strict=True)]
    count, mean = len(changes), math.fsum(changes) / len(changes)
    squares = math.fsum((c - mean) ** 2 for c in changes)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    answers = {*first, *second} <= {0, 1}
    p = _exact(better, worse) if answers else math.nan
    return TaskDifference(mean, error, count, better, worse, p)


def _exact(better: int, worse: int) -> float:
    """Two-sided probability that fair coins fall at least as unevenly."""
    count, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def task_changes(first: TaskRun, second: TaskRun) -> dict[str, float]:
    """Changes of all metrics that both have of every document, by names as in "piqa acc change".

    Raises:
        ShortGPTError: the documents differ in number.
    """
    found: dict[str, float] = {}
    for task, metrics in first.documents.items():
        for metric, values in metrics.items():
            others = second.documents.get(task, {}).get(metric)
            if others is not None:
                # of "perplexity" lm-eval keeps the log-likelihood of every document
                name = "log-likelihood" if metric == "perplexity" else metric
                found |= task_difference(values, others).named(f"{task} {name}")
    return found


def documents_of(samples: Mapping[str, Sequence[Mapping[str, object]]]) -> Documents:
    """Values of single documents, from what the harness keeps of each."""
    found: Documents = {}
    for task, rows in samples.items():
        for row in sorted(rows, key=lambda r: int(str(r["doc_id"]))):
            for metric in _names(row):
                value = row[metric]
                if isinstance(value, int | float):  # those made of several numbers are not means
                    name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
                    found.setdefault(task, {}).setdefault(name, []).append(float(value))
    return found


def _names(row: Mapping[str, object]) -> list[str]:
    metrics = row.get("metrics")
    return [str(name) for name in metrics] if isinstance(metrics, list) else []
