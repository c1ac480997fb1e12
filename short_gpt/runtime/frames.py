"""Results as tables of columns: a pandas data frame, or HTML for a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any

from short_gpt.runtime.errors import required

Columns = Mapping[str, Sequence[object]]  # of one length, by their names


class Table(ABC):
    """A result of columns: a table in a notebook, and a pandas frame for all else."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, list[object]]:
        """Columns of equal length, by name; the first one names the rows."""

    def to_dataframe(self) -> Any:
        """`columns` as a pandas frame; MissingPackageError where there is no pandas."""
        with required("pandas", by="a data frame"):
            frame = import_module("pandas").DataFrame
        return frame(self.columns).set_index(next(iter(self.columns)))

    def _repr_html_(self) -> str:
        return html_table(self.columns, repr(self))


def html_table(columns: Columns, title: str) -> str:
    """The columns as an HTML table; numbers to four digits."""

    def row(cells: Sequence[object], tag: str) -> str:
        shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in shown)}</tr>"

    rows = [row([*columns], "th"), *(row(r, "td") for r in zip(*columns.values(), strict=True))]
    return f"<table><caption>{escape(title)}</caption>{''.join(rows)}</table>"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        right = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([f"{first:<{widths[0]}}", *right]).rstrip())
    return lines
