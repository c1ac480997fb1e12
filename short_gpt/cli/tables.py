"""Results as text for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from short_gpt.jobs.inputs import about_bos, about_own
from short_gpt.runtime.frames import aligned
from short_gpt.runtime.settings import as_flags

if TYPE_CHECKING:
    from short_gpt.evaluation.perplexity import Perplexity, SamplingError
    from short_gpt.jobs import HealingResult, PruneResult, Ranking, ReproductionResult
    from short_gpt.jobs.comparing import Row
    from short_gpt.scoring.importance import Importance
    from short_gpt.selection.search import Search

# how text was read, at the end of a measure of `jobs.evaluate`
READ_HOW = "(?:, bos in every window)?(?:, precision mixed)?"


def ranked(result: Ranking) -> str:
    """The table of a ranking, by whichever method, and whether its answer is settled."""
    answer = result.answer
    parts = [remark] if (remark := about_bos(result.bos)) else []
    parts += [f"precision {name}" for name in result.precision.values()]
    if result.search is not None:
        return "\n".join([*parts, search(result.search, answer.method)])
    if result.choice is not None:
        from short_gpt.selection.methods import METHODS

        chosen = f"{METHODS[answer.method]}: {result.choice.layers}"
        return "\n".join([*parts, f"{result.choice}\n", chosen])
    assert result.importance is not None
    parts += [ranking(result.importance, answer.n, method=answer.method, seed=result.seed or 0)]
    parts += [as_flags(str(result.verdict))] if result.verdict else []
    return "\n".join(parts)


def ranking(
    importance: Importance, n: int | None = None, *, method: str = "bi", seed: int = 0
) -> str:
    """A row for every layer, with 95% intervals, and what each method would remove if n is given.

    ``method`` and ``seed`` say whose layers are marked, as in `methods.choose`.
    """
    from short_gpt.selection.methods import METHODS, choose

    scores, margin = importance.block_influence, importance.margin
    order = scores.argsort(stable=True).tolist()
    chosen = [] if n is None else choose(importance, n, method=method, seed=seed)
    rows = [f"{'layer':>5}  {'Block Influence':>15}  {'± (95%)':>10}  {'rank':>4}"]
    for i, layer in enumerate(importance.layers):
        mark = "  remove" if layer in chosen else ""
        error = known(margin[i].item(), ".6f")
        rows.append(f"{layer:>5}  {scores[i]:>15.6f}  {error:>10}  {order.index(i) + 1:>4}{mark}")
    agreement = (
        f"rank agreement of two halves of the windows {importance.agreement:.3f}"
        if importance.n_windows > 1
        else "one window: no standard errors"
    )
    windows = f"{importance.n_windows:,} window{'s' * (importance.n_windows != 1)}"
    rows += ["", f"{windows}, {importance.n_tokens:,} tokens; {agreement}"]
    rows += [f"±: {_samples(importance)}"]
    if n is not None:
        rows += [f"{METHODS[method]}: {chosen}"] if method not in ("bi", "angular") else []
        block = importance.least_important(n, angular=True)
        start = importance.layers.index(block[0])
        distance = importance.angular[start, start + n]
        rows += [
            f"lowest Block Influence:    {importance.least_important(n)}",
            f"best block by angle:       {block}, distance {distance:.4f}",
        ]
    return "\n".join(rows)


def search(result: Search, method: str) -> str:
    """A row for every layer that a search by loss removed."""
    from short_gpt.evaluation.perplexity import exp
    from short_gpt.selection.methods import KLD, METHODS

    measure, far = ("KLD", True) if method == KLD else ("loss", False)
    rows = [f"{'layer':>5}  {f'{measure}, nats':>10}" + ("" if far else f"  {'perplexity':>12}")]
    for layer, loss in result.steps:
        rows.append(f"{layer:>5}  {loss:>10.4f}" + ("" if far else f"  {exp(loss):>12.3f}"))
    which = "it alone removed" if method == "perplexity" else "it and those above removed"
    return "\n".join([*rows, "", f"{measure} with {which}", f"{METHODS[method]}: {result.removed}"])


def _error(windows: int, texts: int | None, degrees: float = 0.0) -> SamplingError:
    """What an error is over; how large it is stands elsewhere."""
    from short_gpt.evaluation.perplexity import SamplingError

    return SamplingError(math.nan, windows, texts, degrees)


def _samples(importance: Importance) -> str:
    """What the margins are over, and what they do not cover."""
    texts = importance.n_texts
    error = _error(importance.n_windows, texts, importance.degrees)
    if error.no_interval:
        return f"no interval: {error.no_interval}"
    over = f"over {error.over}"
    return over if texts is not None and texts > 1 else f"{over}; too small where they overlap"


def reproduced(result: ReproductionResult) -> str:
    """The ranking, and the paper's list beside it."""
    parts = [f"not the paper's protocol: {'; '.join(result.changed)}"] if result.changed else []
    parts += [f"taken for PG-19: {', '.join(result.taken)}"] if result.taken else []
    return "\n".join([*parts, ranked(result.ranking), "", result.comparison.table()])


def pruned(result: PruneResult) -> str:
    chosen = result.chosen
    lines = [chosen.unchecked] if chosen.unchecked else []
    lines += [f"removed layers {result.layers}", f"written: {result.out}"]
    remark = as_flags(result.remark or "")
    return "\n".join([*lines, *(line for line in (result.proof, remark) if line)])


def healed(result: HealingResult) -> str:
    """Perplexities before and after, and what the healing changed."""
    bos, evidence = about_bos(str(result.texts.get("bos"))), result.evidence
    held, data = result.texts.get("eval_data"), str(result.texts.get("data"))
    own = about_own(data, None if held is None else str(held))
    lines = [remark for remark in (bos, own, result.unchecked, result.left_out) if remark]
    lines += [f"{perplexities(result.perplexity)}\n"]
    if len(evidence.changes) > 1:
        lines += [f"{name} changes the loss by {part}" for name, part in evidence.changes.items()]
    lines += evidence.unchanged
    lines += [f"healing changes the loss by {evidence.change}"]
    if (apart := evidence.kld_change) is not None:
        change = f"{apart.nats:+.4f} nats a token (standard error {apart.standard_error:.4f})"
        lines += [f"healing changes the KL divergence from the original by {change}"]
    if evidence.worse:
        lines += [
            "WORSE: on held-out text the healed model is further from the original than without "
            "the healing. Use the layers alone (short-gpt prune), or give more --max_windows, text "
            "like that to be read, or other settings"
        ]
    if result.quantization is not None:
        lines += [f"writing it in the file's own types changes the loss by {result.quantization}"]
    return "\n".join([*lines, *([as_flags(result.remark)] if result.remark else [])])


def perplexities(models: Mapping[str, Perplexity]) -> str:
    """A row for every named perplexity, its ratio to the first, and 95% intervals."""
    width = max(len(name) for name in models)
    first = next(iter(models.values()))
    rows = [f"{'':<{width}}  {'perplexity':>12}  {'ratio':>7}  {'tokens':>9}  {'windows':>7}"]
    far = all(p.kld is not None for p in models.values())
    rows[0] += f"  {'KLD':>15}  {'same top token':>14}" if far else ""
    for name, p in models.items():
        ratio, counts = p.value / first.value, f"{p.tokens:>9,}  {p.windows:>7,}"
        counts += f"  {p.kld!s:>15}  {p.same_top.value:>14.1%}" if p.kld and p.same_top else ""
        rows.append(f"{name:<{width}}  {p.value:>12.3f}  {ratio:>7.2f}  {counts}")
    if (error := first.error) is not None and error.no_interval:
        rows.append(f"no interval: {error.no_interval}")
    elif error is not None:
        ends = ["{:.3f} to {:.3f}".format(*p.interval()) for p in models.values()]
        rows += [f"95%: {'; '.join(ends)}", f"over {error.over}"]
    rows += ["KLD: from the original, nats a token"] if far else []
    return "\n".join(rows)


def comparison(results: Mapping[str, Mapping[str, float]]) -> str:
    """A row for every measure with its standard error, a column for every model."""
    names = {name: Path(name).name for name in results}
    heads = names if len({*names.values()}) == len(names) else {name: name for name in names}
    every = dict.fromkeys(m for row in results.values() for m in row)
    measures = {
        m: _named(m) for m in every if not re.search(f"(_stderr|_p|_low|_high){READ_HOW}$", m)
    }
    cells = {m: [_with_error(row, m) for row in results.values()] for m in measures}
    rows = aligned([["", *heads.values()], *([label, *cells[m]] for m, label in measures.items())])
    kinds = {"_stderr": "standard errors", "perplexity_low": "95% intervals of perplexities"}
    shown = [words for end, words in kinds.items() if any(end in measure for measure in every)]
    return "\n".join([*rows, *[f"in brackets: {'; '.join(shown)}"] * bool(shown)])


def _named(measure: str) -> str:
    return re.sub(f" nats change(?={READ_HOW}$)", ": change of the loss, nats a token", measure)


def _with_error(row: Mapping[str, float], measure: str) -> str:
    if measure not in row:
        return ""
    base = re.sub(f"{READ_HOW}$", "", measure)
    how = measure.removeprefix(base)
    error, p, low, high = (
        row.get(f"{base}{end}{how}") for end in ("_stderr", "_p", "_low", "_high")
    )
    if error is not None:
        parts = [f"{_rounded(row[measure], error)} ({_rounded(error, error)})"]
    else:  # perplexities as in the other tables
        parts = [format(row[measure], ".3f" if base.endswith(" perplexity") else ".6g")]
    parts += [] if low is None else [f" ({low:.3f} to {high:.3f})"]
    return "".join([*parts, *([] if p is None else [f", p {p:.3g}"])])


def _rounded(value: float, error: float) -> str:
    """A value to the second digit of its error."""
    if not 0 < error < math.inf:
        return f"{value:.6g}"
    digits = 1 - math.floor(math.log10(error))
    return f"{value:.{max(digits, 0)}f}" if digits <= 6 else f"{round(value, digits):g}"


def compared(rows: Sequence[Row], *, bos: str = "first") -> str:
    """A row for every method, a column for every number of layers, and every set of layers."""
    dense, pruned = rows[0], rows[1:]
    sizes = {r.n: r for r in sorted(pruned, key=lambda r: r.n)}
    lines = [*filter(None, [about_bos(bos)])]
    size = f"{dense.parameters / 1e6:.1f} M"
    lines += [f"original model: perplexity {dense.perplexity:.3f}, {size}", ""]
    for healing in dict.fromkeys(r.healing for r in pruned):
        lines += [*_healed(healing, [r for r in pruned if r.healing == healing], [*sizes]), ""]
    lines += [*_removed(pruned, [*sizes]), ""]
    lines += [_line("parameters, M", [f"{r.parameters / 1e6:.1f}" for r in sizes.values()])]
    lines += [_line("weights, MB", [f"{r.megabytes:.0f}" for r in sizes.values()])]
    if dense.windows:
        lines.append(f"standard errors over {_error(dense.windows, dense.texts).over}")
    return "\n".join(lines)


def _line(name: str, cells: Sequence[object]) -> str:
    return f"{name:<28}" + "".join(f"{cell!s:>22}" for cell in cells)


def _healed(healing: str, rows: Sequence[Row], counts: Sequence[int]) -> list[str]:
    parts: dict[str, Callable[[Row], tuple[float | None, float | None, str]]] = {
        "perplexity (standard error)": lambda r: (
            r.perplexity,
            r.perplexity * r.standard_error,
            ".2f" if r.perplexity < 10_000 else ".2e",
        )
    }
    if all(r.kld is not None for r in rows):
        far = "KLD from the original, nats a token (standard error)"
        parts[far] = lambda r: (r.kld, r.kld_error, ".3f")
        parts["same top token as the original"] = lambda r: (r.same_top, None, ".1%")
    if any(r.gain is not None for r in rows):
        change = "loss in nats a token, change from raw (standard error)"
        parts[change] = lambda r: (r.gain, r.gain_error, "+.3f")
    lines = [_line("layers removed", counts)]
    for title, part in parts.items():
        lines.append(f"{healing}: {title}")
        for method in dict.fromkeys(r.method for r in rows):
            own = [[r for r in rows if (r.method, r.n) == (method, n)] for n in counts]
            lines.append(_line(f"  {method}", [_cell([part(r) for r in sets]) for sets in own]))
    return lines


def _cell(values: Sequence[tuple[float | None, float | None, str]]) -> str:
    """A value with its error, in a form; of several sets, such as random ones, both ends."""
    numbers = [(v, form) for v, _, form in values if v is not None and not math.isnan(v)]
    if not numbers:
        return "-"
    ends = [known(*min(numbers)), known(*max(numbers))]
    _, error, form = values[0]
    if len(numbers) > 1 or error is None:
        return " to ".join(dict.fromkeys(ends))
    return f"{ends[0]} ({known(error, form.removeprefix('+'))})"


def _removed(rows: Sequence[Row], counts: Sequence[int]) -> list[str]:
    heads = [f"{n} layer{'s' * (n != 1)}" for n in counts]
    lines = [f"{'sets of layers removed':<28}" + " | ".join(heads)]
    for method, seed in dict.fromkeys((r.method, r.seed) for r in rows):
        sets = {r.n: r.layers for r in rows if (r.method, r.seed) == (method, seed)}
        cells = (" ".join(map(str, sorted(sets[n]))) if n in sets else "-" for n in counts)
        name = method if seed is None else f"{method}, seed {seed}"
        lines.append(f"  {name:<26}{' | '.join(cells)}")
    return lines


def known(value: float | None, form: str) -> str:
    """A number as it is printed; a dash where there is none, or NaN: one sample has no error."""
    return "-" if value is None or math.isnan(value) else format(value, form)
