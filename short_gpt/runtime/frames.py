"""Results as tables of columns: a pandas data frame, or HTML for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from typing import Any

from short_gpt.runtime.errors import MissingPackageError

Columns = Mapping[str, Sequence[object]]  # of one length, by their names


def data_frame(columns: Columns) -> Any:
    """A pandas frame, the first column as index; MissingPackageError where there is no pandas."""
    try:
        frame = import_module("pandas").DataFrame
    except ImportError:
        raise MissingPackageError("a data frame needs: pip install pandas") from None
    return frame(dict(columns)).set_index(next(iter(columns)))


def html_table(columns: Columns, title: str) -> str:
    """The columns as an HTML table; numbers to four digits."""

    def row(cells: Sequence[object], tag: str) -> str:
        shown = (f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in shown)}</tr>"

    rows = [row([*columns], "th"), *(row(r, "td") for r in zip(*columns.values(), strict=True))]
    return f"<table><caption>{escape(title)}</caption>{''.join(rows)}</table>"
