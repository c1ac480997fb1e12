"""The page of a result: one HTML file that needs nothing else, in a program or a browser.

Its picture is SVG in the page: it takes the page's colours, which follow light and dark, and needs
no matplotlib.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from short_gpt.runtime.settings import as_flags
from short_gpt.runtime.state import versions
from short_gpt.scoring.importance import Importance

if TYPE_CHECKING:
    from short_gpt.jobs.shrunk import ShrinkResult

TEMPLATE, MARK = "page.html", "<!-- a page of ShortGPT -->"
WIDTH, HEIGHT, LEFT = 360, 150, 34  # of pictures: a phone's, to keep letters large


def shrunk_page(shrunk: ShrinkResult) -> str:
    """The page of a shrunk model, as one text."""
    from jinja2 import Environment, StrictUndefined

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
        lead=". ".join(line[0].upper() + line[1:] for line in (shrunk.head, shrunk.verdict)) + ".",
        head=head,
        rows=rows,
        remarks=[*map(as_flags, shrunk.remarks)],
        prompt=shrunk.prompt,
        completions={state: report.completion for state, report in shrunk.states.items()},
        bars=None if shrunk.importance is None else bars(shrunk.importance, shrunk.layers),
        how="\n\n".join(filter(None, [shrunk.command, shrunk.plan, shrunk.chosen])),
        steps=[
            f"seed {shrunk.seed}",
            f"{calibration} windows of {size} tokens learned from, {judged} others evaluated on",
            *(str(step["method"]) for step in shrunk.healing),
            "what was written was read again and compared with the model in memory",
            ", ".join(f"{name} {version}" for name, version in versions().items()),
        ],
        commands=shrunk.next_steps,
    )


def without_folders(text: str, names: Iterable[str]) -> str:
    """A page without the folders of those names that are absolute paths: they may name a user."""

    def shown(name: str) -> str:  # as the template writes it
        return escape(name, quote=False).replace("'", "&#39;").replace('"', "&#34;")

    for path in [Path(name) for name in names if os.path.isabs(name)]:
        forms = [(str(path), path.name), (str(path.parent), ".")]
        quoted = [(shlex.quote(whole), short) for whole, short in forms]
        forms += [(word[1:-1], short) for word, short in quoted if word[0] == "'"]
        for whole, short in forms:
            if whole.strip("/"):  # not of an ending tag
                name = shown(short).replace("\\", r"\\")
                text = re.sub(rf"(?<![\w<]){re.escape(shown(whole))}", name, text)
    return text


def is_page(path: Path) -> bool:
    """Whether a file is such a page."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(200)


def bars(importance: Importance, removed: Sequence[int]) -> str:
    """Block Influence of every layer on a logarithmic axis, as SVG; removed layers are marked."""
    values = dict(zip(importance.layers, importance.block_influence.tolist(), strict=True))
    margins = [m if math.isfinite(m) else 0.0 for m in importance.margin.tolist()]
    pairs = [*zip(values.values(), margins, strict=True)]
    finite = [(v, v + r) for v, r in pairs if v > 0 and math.isfinite(v)] or [(1.0, 1.0)]
    low = math.floor(math.log10(min(value for value, _ in finite)))
    high = math.log10(max(end for _, end in finite))
    low = min(low, math.ceil(high) - 1)
    step = (WIDTH - LEFT) / max(len(values), 1)

    def top(value: float) -> float:
        return HEIGHT * (high - math.log10(max(value, 10.0**low))) / (high - low)

    parts = []
    for power in range(low, math.floor(high) + 1):
        y = top(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" class="end">{10.0**power:g}</text>')
    every = -(-len(values) // 10)
    for index, (layer, value) in enumerate(values.items()):
        kind, x, y = "removed" if layer in removed else "kept", LEFT + index * step, top(value)
        parts.append(
            f'<rect class="{kind}" x="{x + step / 10:.1f}" y="{y:.1f}" width="{step * 0.8:.1f}" '
            f'height="{HEIGHT - y:.1f}"><title>layer {layer}, {kind}: {value:.4g}</title></rect>'
        )
        middle, margin = f"{x + step / 2:.1f}", margins[index]
        if margin:
            ends = f'y1="{top(value - margin):.1f}" y2="{top(value + margin):.1f}"'
            parts.append(f'<line class="error" x1="{middle}" x2="{middle}" {ends}/>')
        if not index % every:
            parts.append(f'<text x="{middle}" y="{HEIGHT + 16}">{layer}</text>')
    box = f"0 -8 {WIDTH} {HEIGHT + 38}"
    label = "Block Influence of every layer"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
