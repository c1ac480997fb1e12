"""The tables of results that stand in the docs' pages."""

from __future__ import annotations

import re

import pytest
from pages import PAGES

from benchmarks.tables import write
from benchmarks.tables.write import PLACE, TABLES

DOCS = [page for page in PAGES if page.startswith("docs/") or page == "README.md"]


def test_every_table_stands_in_one_page():
    names = [place[0] for page in DOCS for place in PLACE.findall(PAGES[page])]
    assert sorted(names) == sorted(TABLES)
    marked = [line for page in DOCS for line in re.findall("<!-- (?:table|end).*", PAGES[page])]
    assert len(marked) == 2 * len(TABLES)  # none is written otherwise


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_a_cell_for_every_head(page):
    lines = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL).splitlines()
    columns = 0
    for line in lines:
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        columns = (columns or bars) if bars else 0
        assert bars == columns, line


def test_a_page_that_differs_is_named_and_then_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("No table.\n")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "healing.md"
    page.write_text("Before.\n\n<!-- table refit -->\n| old |\n<!-- end -->\n\nAfter.\n")
    with pytest.raises(SystemExit, match="write.py"):
        write.main(check=True)
    assert capsys.readouterr().out == "docs/healing.md differs from benchmarks/results\n"
    assert "| old |" in page.read_text()
    write.main()
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- table refit -->\n\n| 8 of 30 layers removed |")
    assert "2, 3, 12, 13, 14, 15, 17, 25" in text and "old" not in text
    assert text.endswith("`benchmarks/results/healing_own.json`\n\n<!-- end -->\n\nAfter.\n")
    write.main(check=True)
