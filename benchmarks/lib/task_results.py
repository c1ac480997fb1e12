"""What the values of tasks' documents say of a model: changes, the mean over tasks and its share.

The tasks are fixed and their documents a sample: the variance of a mean over T tasks is the sum of
the tasks' variances over T^2. Changes are paired over documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import sqrt
from typing import Any

from scipy.stats import kendalltau

from short_gpt import ShortHFModel
from short_gpt.evaluation.perplexity import Perplexity, combined, difference
from short_gpt.evaluation.tasks import TaskRun, TaskSuite, task_difference

CLOSE = 1e-3  # nats by which two programs may differ on a document
Parts = Mapping[str, list[Perplexity]]  # losses of windows by their kind
Documents = Mapping[str, Mapping[str, list[float]]]  # values by task and metric


def against_theirs(ours: TaskRun, suite: TaskSuite, theirs: ShortHFModel) -> dict[str, object]:
    """How far lm-eval's own class for transformers gives the same of every document."""
    other = suite.documents(theirs)
    pairs = [
        (metric, a, b)
        for task, metrics in ours.documents.items()
        for metric, values in metrics.items()
        for a, b in zip(values, other.documents[task][metric], strict=True)
    ]
    nats = [abs(a - b) for metric, a, b in pairs if metric == "perplexity"]
    answers = [a == b for metric, a, b in pairs if metric != "perplexity"]
    return {
        "values": len(pairs),
        "answers": len(answers),
        "answers_equal": all(answers),
        "nats": max(nats),
    }


def metrics(found: Documents, whole: Documents) -> dict[str, dict[str, float | None]]:
    """Every metric of every task, with its change from the whole model's, paired."""
    each = {}
    for task, own in found.items():
        for metric, values in own.items():
            change = asdict(task_difference(whole[task][metric], values))
            change["p"] = None if change["p"] != change["p"] else change["p"]
            name = f"{task.removeprefix('local_')} {metric}"
            each[name] = {"value": sum(values) / len(values), **change}
    return each


def text_changes(found: Parts, whole: Parts) -> dict[str, dict[str, float]]:
    """Perplexity of every kind of text, with its change in nats, paired."""
    texts = {}
    for kind, parts in found.items():
        change = difference(whole[kind], parts)
        texts[kind] = {"perplexity": combined(parts).value, "nats": change.nats}
        texts[kind]["standard_error"] = change.standard_error
    return texts


def judging(documents: Documents) -> dict[str, list[float]]:
    """The values that count for the mean, by task: acc_norm where lm-eval has it, else acc."""
    tasks = {task: own for task, own in documents.items() if task.startswith("local_")}
    return {task: list(own.get("acc_norm", own.get("acc", []))) for task, own in tasks.items()}


def kept(
    whole: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The mean over tasks, its change, and the share R of the original's, by the delta method.

    The variance of R is that of the mean of own - R whole, over the original's mean squared.
    """

    def error(factor: float) -> float:
        each = [
            task_difference([factor * v for v in whole[t]], own[t]).standard_error for t in whole
        ]
        return sqrt(sum(e**2 for e in each)) / len(each)

    before, after = (sum(sum(v) / len(v) for v in m.values()) / len(m) for m in (whole, own))
    share = after / before
    reach = 1.96 * error(share) / before
    result = {"value": after, "change": after - before, "standard_error": error(1.0)}
    return {**result, "share": share, "interval_95": [share - reach, share + reach]}


def change(before: Mapping[str, list[float]], after: Mapping[str, list[float]]) -> dict[str, Any]:
    """The change of the mean alone, and its standard error."""
    both = kept(before, after)
    return {name: both[name] for name in ("change", "standard_error")}


def unflattered(judged: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """All tasks but boolq, which the small model answers worse than it does when it is damaged."""
    return {task: values for task, values in judged.items() if task != "local_boolq"}


def summed(models: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """The values of every document, added over models."""
    return {t: [sum(own) for own in zip(*(m[t] for m in models), strict=True)] for t in models[0]}


GUESSED = dict.fromkeys(("piqa", "winogrande", "copa", "winograd_wsc"), 0.5)  # of two answers
GUESSED |= dict.fromkeys(("arc_easy", "arc_challenge", "openbook_qa"), 0.25)
GUESSED |= {"lambada_openai": 0.0}


def above_guesses(judged: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """What is above a guess, of all tasks but boolq, which the small model answers worse than one.

    A share of the mean counts guesses as kept; a share of this does not.
    """
    names = {f"local_{task}": guess for task, guess in GUESSED.items()}
    return {t: [v - guess for v in judged[t]] for t, guess in names.items() if t in judged}


def ranks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """Kendall's tau between the loss, in nats over all texts, and the mean over tasks.

    -1 where the lower loss always has the better tasks; of pruned models, and of healed ones.
    """
    result: dict[str, dict[str, float | int | None]] = {}
    for name, raw in (("pruned", True), ("healed", False)):
        own = [r for key, r in rows.items() if key.endswith(" pruned") == raw and key != "original"]
        loss = [sum(text["nats"] for text in r["texts"].values()) for r in own]
        result[name] = {"models": len(own)}
        for mean, tau in (("mean", "tau"), ("without boolq", "tau without boolq")):
            found = kendalltau(loss, [r[mean]["value"] for r in own]).statistic if own[1:] else None
            result[name][tau] = None if found is None or found != found else float(found)
    return result


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Two lines for every model: mean, change, share and tasks, and perplexities."""
    names = ", ".join(rows["original"]["tasks"])
    lines = [f"{'':<22}{'mean':>7}{'change':>18}{'share kept':>26}  {names}"]
    for name, row in rows.items():
        mean, (low, high) = row["mean"], row["mean"]["interval_95"]
        share = f"{mean['share']:.1%} ({low:.1%} to {high:.1%})"
        change = f"{mean['change']:+.4f} ({mean['standard_error']:.4f})"
        tasks = " ".join(f"{cell['value']:.3f}" for cell in row["tasks"].values())
        lines.append(f"{name:<22}{mean['value']:>7.4f}{change:>18}{share:>26}  {tasks}")
        texts = [
            f"{kind} {cell['perplexity']:.2f} {cell['nats']:+.3f} ({cell['standard_error']:.3f})"
            for kind, cell in row["texts"].items()
        ]
        lines.append(f"{'':<22}{', '.join(texts)}")
    return "\n".join(lines)
