"""Results of jobs as text for a terminal."""

from __future__ import annotations

import shlex

from llama.io.sources import is_gguf
from short_gpt.jobs.demonstration import Demo
from short_gpt.jobs.healing import Healing
from short_gpt.jobs.inputs import about_bos
from short_gpt.jobs.pruning import Pruned
from short_gpt.jobs.ranking import Ranking
from short_gpt.report.tables import perplexities, ranking, search, sublayers
from short_gpt.selection.perplexity_budget import Budget


def ranked(result: Ranking) -> str:
    """The table of a ranking, by whichever method, and whether its answer is settled."""
    answer = result.answer
    parts = [said] if (said := about_bos(result.bos)) else []
    if result.search is not None:
        return "\n".join([*parts, search(result.search, answer.method)])
    assert result.importance is not None
    parts += [ranking(result.importance, answer.n, method=answer.method, seed=result.seed or 0)]
    parts += ["\n" + sublayers(result.importance)] if answer.sublayers else []
    parts += [str(result.verdict)] if result.verdict else []
    return "\n".join(parts)


def next_command(model: str, result: Ranking, scores: str | None) -> str | None:
    """The command that acts on a ranking; None where there is none.

    Args:
        model: what was ranked.
        scores: the file that the ranking was written to; None where it was not.
    """
    n = result.answer.n
    if scores is None and n is None:
        return None
    layers = [] if scores else ["--layers", ",".join(map(str, result.layers))]
    chosen = ["--scores", scores, "--n", "N" if n is None else str(n)] if scores else layers
    out = "OUT.gguf" if is_gguf(model) else "OUT"
    return "next: " + shlex.join(["short-gpt", "prune", model, out, *chosen])


def pruned(result: Pruned) -> str:
    """What was tried, removed, written and proved."""
    lines = [result.chosen.unchecked] if result.chosen.unchecked else []
    if result.chosen.budget is not None:
        lines += _tried(result.chosen.budget)
    lines += [f"--eval_data was {result.chosen.unsure}"] if result.chosen.unsure else []
    lines += [f"removed layers {result.layers}", f"written: {result.out}"]
    lines += [f"written: {result.recipe}"] if result.recipe is not None else []
    return "\n".join([*lines, *(said for said in (result.proof, result.remark) if said)])


def _tried(budget: Budget) -> list[str]:
    """What the perplexity rises by without every number of layers tried."""
    lines = []
    for n, found in budget.tried.items():
        sure = f", {budget.verdict(n)}" if n else ""
        rise = f"ratio {found.value / budget.tried[0].value:.4f}{sure}"
        lines.append(f"{n:>3} layers less: perplexity {found.value:.3f}, {rise}")
    return lines


def healed(result: Healing) -> str:
    """Perplexities before and after, and what the healing changed."""
    lines = [said for said in (result.unchecked, result.left_out) if said]
    evidence = result.evidence
    lines += [f"{perplexities(evidence.perplexity)}\n"]
    lines += [f"healing changes the loss by {evidence.change}"]
    if evidence.worse:
        lines += [
            "WORSE: on held-out text the healed model predicts worse than without the healing. Use "
            "the layers alone (short-gpt prune), or give more --max_windows, text like that to be "
            "read, or other settings"
        ]
    lines += [result.remark] if result.remark else []
    return "\n".join(lines)


def demonstrated(result: Demo, n: int) -> str:
    """All that the demo found."""
    said = "\n".join(f"{name}:\n  {text}" for name, text in result.completions.items())
    parts = [ranking(result.importance, n), f"Held-out chapters:\n{perplexities(result.quality)}"]
    parts += [f"Greedy completions:\n{said}"]
    return "\n\n".join([*parts, "The saved checkpoint, loaded again, gives the same logits."])
