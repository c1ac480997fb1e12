"""The tables that stand in the docs' pages when the site is built."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError
from pages import PAGES, ROOT

from benchmarks.tables.made_tables import PLACEHOLDER, TABLES, on_page_markdown, with_tables

DOCS = [page for page in PAGES if page.startswith("docs/")]


def test_every_table_stands_in_one_page():
    names = [name for page in DOCS for name in PLACEHOLDER.findall(PAGES[page])]
    assert sorted(names) == sorted(TABLES)
    assert "hooks: [benchmarks/tables/made_tables.py]" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_a_cell_for_every_head(page):
    text = with_tables(PAGES[page], page)
    assert "[Table" not in text or not page.startswith("docs/")
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    columns = 0
    for line in lines:
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        columns = (columns or bars) if bars else 0
        assert bars == columns, line


def test_mkdocs_calls_the_hook_which_refuses_a_table_that_nobody_makes():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results.md"))
    line = "[Table: {}](../benchmarks/results/healing.json)"
    made = on_page_markdown(line.format("refit"), page=page, config=None)
    assert made == TABLES["refit"]() and "2, 3, 12, 13, 14, 15, 17, 25" in made
    with pytest.raises(PluginError, match=r"^results.md: no table is called 'cost'"):
        on_page_markdown(line.format("cost"), page=page, config=None)
