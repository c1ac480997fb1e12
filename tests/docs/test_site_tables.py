"""The tables that stand in the docs' pages when the site is built."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError
from pages import PAGES, ROOT

from benchmarks.tables import evidence_tables, site_tables
from benchmarks.tables.made_tables import TABLES
from benchmarks.tables.site_tables import PLACEHOLDER, with_tables

DOCS = [page for page in PAGES if page.startswith("docs/")]
LAYERS = r"\d+(?:, \d+)+(?= \|)"
# The tables of pruned models, and how many different sets of layers each names.
SETS = {
    **{f"tasks with {n} layers removed": 1 for n in (2, 4)},
    "choices on other samples": 16,
    "methods and healings": 7,
    "how near the best choice": 5,
    "other tools": 2,
    "choices on every text, pruned": 5,
    "choices on every text, refitted": 5,
    "refit": 2,
    "distillation": 1,
    "parts of the refit": 1,
    "refit by windows": 1,
    "attention sinks": 5,
    "automatic choice": 17,
    "layers chosen on own samples": 3,
    "what healings keep": 3,
    "each task": 3,
    "word problems": 3,
}


def test_every_table_stands_in_one_page():
    names = [name for page in DOCS for name in PLACEHOLDER.findall(PAGES[page])]
    assert sorted(names) == sorted(TABLES)
    assert "hooks: [benchmarks/tables/site_tables.py]" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("page", DOCS)
def test_a_page_is_built_with_its_tables(page):
    text = with_tables(PAGES[page], page)
    assert "[Table" not in text
    for name in PLACEHOLDER.findall(PAGES[page]):
        assert f"\n\n{TABLES[name]()}\n\n" in f"{text}\n"


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_a_cell_for_every_head(page):
    text = with_tables(PAGES[page], page)
    lines = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    columns = 0
    for line in lines:
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        columns = (columns or bars) if bars else 0
        assert bars == columns, line


@pytest.mark.parametrize("name", SETS)
def test_a_table_of_pruned_models_names_their_layers(name):
    assert len({*re.findall(LAYERS, TABLES[name]())}) == SETS[name]


def test_what_cannot_be_rendered_ends_the_build_with_one_line(monkeypatch):
    line = "[Table: {}](../benchmarks/results/scoring.json)"
    with pytest.raises(PluginError, match=r"^page.md: no table is called 'cost'; expected one of"):
        with_tables(line.format("cost"), "page.md")
    for other in (f"A {line.format('refit')}", "[Table: refit](refit.json)", "[Table: refit]"):
        with pytest.raises(PluginError, match=r"^page.md: .*: expected \[Table: NAME\]"):
            with_tables(f"\n{other}\n", "page.md")
    monkeypatch.setattr("benchmarks.tables.made_tables.result", lambda name: {"ratios": {}})
    with pytest.raises(
        PluginError, match="^page.md: table 'cost of scoring': .*lack the key 'peak"
    ):
        with_tables(line.format("cost of scoring"), "page.md")
    monkeypatch.setattr(evidence_tables, "RESULTS", ROOT / "none")
    with pytest.raises(PluginError, match="^page.md: table 'agreement of rankings': .*calibration"):
        with_tables(line.format("agreement of rankings"), "page.md")


def test_mkdocs_calls_the_hook_with_a_page():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="results.md"))
    line = "[Table: refit](../benchmarks/results/healing.json)"
    assert site_tables.on_page_markdown(line, page=page, config=None) == TABLES["refit"]()
