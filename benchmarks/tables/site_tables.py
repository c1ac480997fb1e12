"""Puts the tables of results into the pages of the documentation, while mkdocs builds them.

`mkdocs.yml` names this file as a hook. Where a table goes, a page has a line of its own, which is a
link to the numbers for whoever reads the page's source:

    [Table: cost of scoring](../benchmarks/results/scoring.json)

`made_tables.TABLES` has the names, and makes the tables from the JSON files.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mkdocs.exceptions import PluginError

from benchmarks.tables.made_tables import TABLES

START = "[Table:"
PLACEHOLDER = re.compile(r"(?m)^\[Table: ([^\]]+)\]\(\.\./benchmarks/results/\w+\.json\)$")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of every page."""
    return with_tables(markdown, page.file.src_uri)


def with_tables(text: str, page: str) -> str:
    """A page's text with a table for every placeholder.

    Raises:
        PluginError: no table has the name, or a placeholder is not of the form above.
    """
    text = PLACEHOLDER.sub(lambda found: _table(found[1], page), text)
    if START in text:
        line = next(line for line in text.splitlines() if START in line)
        form = f"{START} NAME](../benchmarks/results/FILE.json)"
        raise PluginError(f"{page}: {line}: expected {form} in a line of its own")
    return text


def _table(name: str, page: str) -> str:
    if name not in TABLES:
        raise PluginError(f"{page}: no table is called {name!r}; expected one of {sorted(TABLES)}")
    return TABLES[name]()
