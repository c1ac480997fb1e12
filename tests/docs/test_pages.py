"""README and the docs name commands, flags, files and exports that exist."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands

from short_gpt.cli import COMMANDS
from short_gpt.cli.app import prepared

LINKED = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
SHOWN = [(page, words) for page in PAGES for words in commands(page, "short-gpt") if words]


@pytest.mark.parametrize("page", LINKED)
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).is_file(), target


def test_the_readme_is_read_in_three_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 180


@pytest.mark.parametrize(("page", "words"), SHOWN)
def test_the_commands_and_their_flags_exist(page, words):
    prepared(words, COMMANDS)  # refuses what is unknown or missing


def test_every_command_stands_in_the_table():
    shown = {words[0] for page, words in SHOWN if page == "docs/commands.md"}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_what_the_examples_import_is_exported(page):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                package = import_module(str(node.module))
                assert hasattr(package, "__path__")  # no module inside one
                assert {alias.name for alias in node.names} <= set(package.__all__)


def test_the_site_has_every_page():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    pages = {str(Path(page).relative_to("docs")) for page in PAGES if page.startswith("docs/")}
    assert set(listed) == pages and len(listed) == len(pages)
