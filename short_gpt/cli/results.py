"""Results of jobs as text for a terminal."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from llama.io.sources import is_gguf
from short_gpt.cli.tables import perplexities, ranking, search, sublayers
from short_gpt.jobs.demonstration import Demo, Look
from short_gpt.jobs.healed import Healing
from short_gpt.jobs.inputs import about_bos
from short_gpt.jobs.pruning import Pruned
from short_gpt.jobs.ranking import Ranking
from short_gpt.jobs.reproduction import Reproduced
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


def reproduced(result: Reproduced) -> str:
    """The ranking, the paper's list beside it, and what the scores say of the paper's order."""
    parts = [f"not the paper's protocol: {'; '.join(result.changed)}"] if result.changed else []
    parts += [ranked(result.ranking), "", result.comparison.table()]
    if result.published is not None:
        parts += [f"rank correlation with published scores of all layers {result.published:.3f}"]
    return "\n".join([*parts, "", result.order.table()])


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
    command = ["short-gpt", "prune", model, out, *chosen]
    return "next: " + shlex.join(command)


def pruned(result: Pruned) -> str:
    """What was tried, removed, written and proved."""
    lines = [result.chosen.unchecked] if result.chosen.unchecked else []
    if result.chosen.budget is not None:
        lines += _tried(result.chosen.budget)
    lines += [f"--eval_data was {result.chosen.unsure}"] if result.chosen.unsure else []
    lines += [f"removed layers {result.layers}", f"written: {result.out}"]
    lines += [f"written: {result.recipe}"] if result.recipe is not None else []
    remark = re.sub(r"`(\w+)`", r"--\1", result.remark or "")
    return "\n".join([*lines, *(said for said in (result.proof, remark) if said)])


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
    bos = about_bos(str(result.texts.get("bos")))
    lines = [said for said in (bos, result.unchecked, result.left_out) if said]
    evidence = result.evidence
    lines += [f"{perplexities(result.perplexity)}\n"]
    if len(evidence.changes) > 1:
        lines += [f"{name} changes the loss by {part}" for name, part in evidence.changes.items()]
    lines += [said for step in evidence.steps if (said := _unchanged(step))]
    lines += [f"healing changes the loss by {evidence.change}"]
    if evidence.worse:
        lines += [
            "WORSE: on held-out text the healed model predicts worse than without the healing. Use "
            "the layers alone (short-gpt prune), or give more --max_windows, text like that to be "
            "read, or other settings"
        ]
    if result.quantization is not None:
        lines += [f"writing it in the file's own types changes the loss by {result.quantization}"]
    lines += [result.remark] if result.remark else []
    return "\n".join(lines)


def _unchanged(step: Mapping[str, object]) -> str | None:
    """What a refit has left as it was; None if nothing, or of another method."""
    fits = step.get("fits", [])
    assert isinstance(fits, list)
    left = [fit for fit in fits if fit["ridge"] is None and fit["norm_ridge"] is None]
    if not left:
        return None
    names = ", ".join(f"{fit['part']} of {fit['layer']}" for fit in left)
    return (
        f"{len(left)} of {len(fits)} matrices unchanged: no ridge lowered the held-out error "
        f"({names})"
    )


def demonstrated(result: Demo, n: int) -> str:
    """All that the demo found."""
    looks = result.looks
    said = "\n".join(f"{name}:\n  {look.completion}" for name, look in looks.items())
    quality = perplexities({name: look.perplexity for name, look in looks.items()})
    parts = [ranking(result.importance, n), f"Held-out chapters:\n{quality}", costs(looks)]
    parts += [f"Greedy completions:\n{said}"]
    return "\n\n".join([*parts, "The saved checkpoint, loaded again, gives the same logits."])


def costs(looks: Mapping[str, Look]) -> str:
    """A row for every model: its size, and how fast it generates."""
    width = max(map(len, looks))
    rows = [f"{'':<{width}}  {'megabytes':>10}  {'tokens/s':>9}"]
    rows += [
        f"{name:<{width}}  {look.megabytes:>10.1f}  {look.tokens_per_second:>9.1f}"
        for name, look in looks.items()
    ]
    return "\n".join(rows)
