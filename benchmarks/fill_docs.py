"""Fills the tables of README and docs from the benchmarks' JSON files.

    python benchmarks/fill_docs.py

Only what `made_tables` names is written, and one picture drawn; the words around it are left, and a
test compares them.
"""

from __future__ import annotations

from pathlib import Path

from healing_tables import picture
from made_tables import BLOCKS, TABLES

ROOT = Path(__file__).parents[1]


def filled(page: str, text: str) -> str:
    """A page with its tables as the files have them.

    Args:
        page: its path below the repository's root.
        text: of the page.

    Raises:
        ValueError: a table or a block does not stand there once.
    """
    for head, rows in TABLES.get(page, {}).items():
        text = _with_table(page, text, head, rows())
    for start, block in BLOCKS.get(page, {}).items():
        text = _with_block(page, text, start, block())
    return text


def _with_table(page: str, text: str, head: str, rows: list[str]) -> str:
    lines = text.split("\n")
    if lines.count(head) != 1:
        raise ValueError(f"{page}: {head} stands there {lines.count(head)} times")
    first = lines.index(head) + 2
    end = next(i for i in range(first, len(lines) + 1) if not "".join(lines[i : i + 1]))
    return "\n".join([*lines[:first], *rows, *lines[end:]])


def _with_block(page: str, text: str, start: str, block: str) -> str:
    fence = f"```\n{start}"
    if text.count(fence) != 1:
        raise ValueError(f"{page}: a block with {start} stands there {text.count(fence)} times")
    first = text.index(fence) + len("```\n")
    return text[:first] + block + text[text.index("\n```", first) :]


def main() -> None:
    """Writes the pages that change."""
    for page in sorted({*TABLES, *BLOCKS}):
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (new := filled(page, text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"filled: {page}")
    picture(ROOT / "docs" / "images" / "refit_text.png")


if __name__ == "__main__":
    main()
