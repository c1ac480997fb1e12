"""The page of a result: one HTML file that needs nothing else, in a program or a browser.

Pictures are SVG in the page; those drawn here take the page's colours, which follow light and dark.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from short_gpt.runtime.settings import as_flags
from short_gpt.runtime.state import versions
from short_gpt.scoring.importance import Importance

if TYPE_CHECKING:
    from short_gpt.jobs.shrunk import ShrinkResult

TEMPLATE, MARK = "page.html", "<!-- a page of ShortGPT -->"
WIDTH, HEIGHT, LEFT, ROW = 360, 150, 34, 34  # of pictures: a phone's, to keep letters large

REMOVED = "Block Influence of every layer, 1 - cos of the hidden states before and after it. "
REMOVED += "Removed layers are orange; lines are 95% intervals."
TRIED = "Each set was refitted, and compared by held-out loss: nats a token more than the chosen "
TRIED += "set's (orange), with two standard errors, paired over the windows."


class Picture(NamedTuple):
    """A part of a page."""

    heading: str
    svg: str
    caption: str


def page(
    title: str,
    lead: str,
    rows: Sequence[Sequence[str]],
    *,
    remarks: Sequence[str] = (),
    prompt: str = "",
    completions: Mapping[str, str] | None = None,
    pictures: Sequence[Picture] = (),
    how: str = "",
    steps: Sequence[str] = (),
    commands: Sequence[str] = (),
) -> str:
    """A page as one text.

    Args:
        title: the heading.
        lead: one sentence below it.
        rows: of the table, its head first.
        remarks: paragraphs below the table.
        prompt: that the completions, by the model's state, answer.
        how: the text of *How it was made*, and ``steps`` its list.
        commands: those that open the result.
    """
    from jinja2 import Environment, StrictUndefined

    template = files("short_gpt.jobs").joinpath(TEMPLATE).read_text(encoding="utf-8")
    made = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    ).from_string(template)
    parts: dict[str, object] = {"mark": MARK, "title": title, "lead": lead}
    parts |= {"head": rows[0], "rows": rows[1:], "remarks": remarks}
    parts |= {"prompt": prompt, "completions": completions or {}}
    parts |= {"pictures": pictures, "how": how, "commands": commands}
    own = ", ".join(f"{name} {version}" for name, version in versions().items())
    return made.render(**parts, steps=[*steps, own])


def shrunk_page(shrunk: ShrinkResult) -> str:
    """The page of a shrunk model."""
    pictures = []
    if shrunk.importance is not None:
        drawn = bars(shrunk.importance, shrunk.layers)
        pictures.append(Picture("What was removed", drawn, REMOVED))
    if (svg := dots(shrunk.choice)) is not None:
        pictures.append(Picture("Which sets were tried", svg, TRIED))
    learned, judged, size = shrunk.windows
    name = "the loaded model" if shrunk.source is None else Path(shrunk.source).name
    read = f"{learned} windows of {size} tokens learned from, {judged} others evaluated on"
    return page(
        f"{shrunk.out.name}: {name} without {len(shrunk.layers)} of {shrunk.total} layers",
        ". ".join(line[0].upper() + line[1:] for line in (shrunk.head, shrunk.verdict)) + ".",
        shrunk.rows(),
        remarks=[*map(as_flags, shrunk.remarks)],
        prompt=shrunk.prompt,
        completions={state: report.completion for state, report in shrunk.states.items()},
        pictures=pictures,
        how="\n\n".join(filter(None, [shrunk.command, shrunk.plan, shrunk.chosen])),
        steps=[
            f"seed {shrunk.seed}",
            read,
            *(str(step["method"]) for step in shrunk.healing),
            "what was written was read again and compared with the model in memory",
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
    known = [(v, v + r) for v, r in pairs if v > 0 and math.isfinite(v)] or [(1.0, 1.0)]
    low = math.floor(math.log10(min(value for value, _ in known)))
    high = math.log10(max(end for _, end in known))
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
    return _svg(parts, -8, HEIGHT + 30, "Block Influence of every layer")


def dots(choice: Mapping[str, Any]) -> str | None:
    """How much more each candidate set costs than the chosen one, as SVG; None without them."""
    if not choice:
        return None
    rows = [(", ".join(c["methods"]), c["difference"], c["layers"]) for c in choice["candidates"]]
    ends = [
        [c["nats"] - 2 * c["standard_error"], c["nats"] + 2 * c["standard_error"]]
        for _, c, _ in rows
    ]
    known = [end for pair in ends for end in pair if math.isfinite(end)] + [0.0]
    low, high = min(known), max(known)
    scale = (WIDTH - 16) / ((high - low) or 1.0)

    def at(nats: float) -> float:
        return 8 + (nats - low) * scale

    foot = len(rows) * ROW
    parts = [f'<line class="grid" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="0" y2="{foot}"/>']
    for number, ((name, change, layers), (first, last)) in enumerate(zip(rows, ends, strict=True)):
        y, kind = number * ROW + 24, "removed" if layers == choice["layers"] else "kept"
        said = (
            f"{escape(name)}: {change['nats']:+.4f} nats" if kind == "kept" else f"{name}: chosen"
        )
        parts.append(f'<text x="8" y="{y - 10}" class="start">{said}</text>')
        if math.isfinite(first):
            parts.append(
                f'<line class="error" x1="{at(first):.1f}" x2="{at(last):.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(f'<circle class="{kind}" cx="{at(change["nats"]):.1f}" cy="{y}" r="4"/>')
    return _svg(parts, 0, foot + 4, "Held-out loss of candidate sets, from the chosen one")


def _svg(parts: Sequence[str], top: int, height: int, about: str) -> str:
    box = f"0 {top} {WIDTH} {height - top}"
    return f'<svg viewBox="{box}" role="img" aria-label="{about}">{"".join(parts)}</svg>'
