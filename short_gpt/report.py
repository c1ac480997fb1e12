"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from short_gpt.evaluate import Perplexity
from short_gpt.importance import Importance


def ranking(importance: Importance, n: int | None = None) -> str:
    """A row for every layer, and what each method would remove.

    Args:
        importance: at least one window.
        n: how many layers to remove; None leaves the methods' choices out.
    """
    scores, errors = importance.block_influence, importance.standard_error
    order = scores.argsort(stable=True).tolist()
    place = {position: rank for rank, position in enumerate(order, start=1)}
    chosen = [] if n is None else importance.least_important(n)
    rows = [f"{'layer':>5}  {'Block Influence':>15}  {'std. error':>10}  {'rank':>4}"]
    for i, layer in enumerate(importance.layers):
        mark = "  remove" if layer in chosen else ""
        rows.append(f"{layer:>5}  {scores[i]:>15.6f}  {errors[i]:>10.6f}  {place[i]:>4}{mark}")
    rows += [
        "",
        f"{importance.n_windows:,} windows, {importance.n_tokens:,} tokens; {_halves(importance)}",
    ]
    return "\n".join(rows + choices(importance, n))


def choices(importance: Importance, n: int | None) -> list[str]:
    """The layers that each method would remove; nothing if ``n`` is None."""
    if n is None:
        return []
    block = importance.least_important(n, angular=True)
    start = importance.layers.index(block[0])
    distance = importance.angular[start, start + n]
    return [
        f"lowest Block Influence:    {importance.least_important(n)}",
        f"best block by angle:       {block}, distance {distance:.4f}",
    ]


def _halves(importance: Importance) -> str:
    if importance.n_windows < 2:
        return "one window: no standard errors"
    return f"rank agreement of two halves of the windows {importance.agreement:.3f}"


def perplexities(found: Mapping[str, Perplexity]) -> str:
    """A row for every named perplexity, with the ratio to the first."""
    width = max(len(name) for name in found)
    first = next(iter(found.values())).value
    rows = [f"{'':<{width}}  {'perplexity':>12}  {'ratio':>7}  {'tokens':>9}  {'windows':>7}"]
    for name, p in found.items():
        rows.append(
            f"{name:<{width}}  {p.value:>12.3f}  {p.value / first:>7.2f}  {p.tokens:>9,}"
            f"  {p.windows:>7,}"
        )
    return "\n".join(rows)


def comparison(results: Mapping[str, Mapping[str, float]]) -> str:
    """A row for every measure, a column for every model."""
    names = list(results)
    measures = list(dict.fromkeys(m for row in results.values() for m in row))
    first = max(map(len, measures))
    widths = [max(len(name), 12) for name in names]
    cells = [f"{n:>{w}}" for n, w in zip(names, widths, strict=True)]
    rows = ["  ".join([f"{'':<{first}}", *cells])]
    for measure in measures:
        values = (results[n].get(measure) for n in names)
        cells = [f"{v:>{w}.6g}" for v, w in zip(values, widths, strict=True) if v is not None]
        rows.append("  ".join([f"{measure:<{first}}", *cells]))
    return "\n".join(rows)
