"""The page of a result: one HTML file that needs nothing else, in a program or a browser.

Its picture is SVG in the page: it takes the page's colours, which follow light and dark, and needs
no matplotlib.
"""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from short_gpt.runtime.settings import as_flags
from short_gpt.runtime.state import versions

if TYPE_CHECKING:
    from short_gpt.jobs.shrink_result import ShrinkResult

TEMPLATE, MARK = "page.html", "<!-- a page of ShortGPT -->"
HEIGHT = 150  # of the picture, whose width is a phone's, to keep letters large


def shrunk_page(shrunk: ShrinkResult) -> str:
    """The page of a shrunk model, as one text."""
    from jinja2 import Environment, StrictUndefined

    from short_gpt.jobs.shrink_result import GRADES

    assert shrunk.states, "the page of a model that was written"
    name = "the loaded model" if shrunk.source is None else Path(shrunk.source).name
    calibration, judged, size = shrunk.windows
    head, *rows = shrunk.rows()
    template = files("short_gpt.jobs").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(template).render(
        mark=MARK,
        title=f"{shrunk.out.name}: {name} without {len(shrunk.layers)} of {shrunk.total} layers",
        grade=GRADES.index(shrunk.grade.partition(", or ")[0]),
        verdict=shrunk.verdict,
        worth=shrunk.worth,
        removed=shrunk.head,
        front=front(shrunk),
        head=head,
        rows=rows,
        remarks=[*map(as_flags, shrunk.remarks)],
        completions=shrunk.completions[:3],
        how="\n\n".join(filter(None, [shrunk.command, shrunk.plan, str(shrunk.choice or "")])),
        steps=[
            f"seed {shrunk.seed}",
            f"{calibration} windows of {size} tokens learned from, {judged} others evaluated on",
            *(str(step["method"]) for step in shrunk.healing),
            "what was written was read again and compared with the model in memory",
            ", ".join(f"{name} {version}" for name, version in versions().items()),
        ],
        commands=shrunk.next_steps,
    )


def front(shrunk: ShrinkResult) -> dict[str, Any] | None:
    """Dots of KL divergence against size, on linear axes from 0 KLD on, for the template."""
    from short_gpt.jobs.shrink_result import CurvePoint

    points = list(shrunk.curve)
    if not points:
        klds = {kind: kld.value for kind, kld in shrunk.distances.items()}
        name, size = f"{len(shrunk.layers)} removed", shrunk.states["healed"].size
        points = [CurvePoint(name, [*shrunk.layers], size, klds)]
        points += map(CurvePoint.of, shrunk.rivals)
        size = shrunk.states["original"].size
        points.append(CurvePoint("original", [], size, dict.fromkeys(klds, 0.0)))
    heights = [max(point.klds.values(), default=0.0) for point in points]
    sizes, high = [point.size / 1e6 for point in points], max(heights) * 1.1
    span = max(sizes) - min(sizes) or min(sizes)  # a name is as wide as the left margin
    left, right = min(sizes) - 0.25 * span, max(sizes) + 0.15 * span
    if not high:
        return None
    dots = [
        {
            "name": point.name,
            "kind": "removed" if point.layers else "kept",
            "x": 50 + 310 * (size - left) / (right - left),
            "y": HEIGHT * (1 - kld / high),
            "about": f"{size:.0f} MB, KLD {kld:.3f}",
        }
        for point, size, kld in zip(points, sizes, heights, strict=True)
    ]
    across = [(f"{v:g}", 50 + 310 * (v - left) / (right - left)) for v in ticks(left, right)]
    up = [(f"{v:g}", HEIGHT * (1 - v / high)) for v in ticks(0.0, high)]
    return {"dots": dots, "across": across, "up": up, "height": HEIGHT}


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers between two.

    Example:
        >>> ticks(0.0, 0.31)
        [0.0, 0.1, 0.2, 0.3]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(power * k for k in (5, 2, 1) if (high - low) / (power * k) >= 3)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def is_page(path: Path) -> bool:
    """Whether a file is such a page."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(200)
