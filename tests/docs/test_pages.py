"""README and the docs name commands, flags, files and exports that exist."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands
from torch.distributed.run import get_args_parser

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


def test_the_readme_is_read_in_four_minutes():
    assert len(PAGES["README.md"].split()) <= 1100


def test_the_docs_stay_short():
    """With their tables, as `cat docs/*.md | wc -w` counts them."""
    pages = [text for page, text in PAGES.items() if Path(page).parent == Path("docs")]
    assert sum(len(text.split()) for text in pages) <= 18000


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


def test_metas_own_package_is_importable_beside_ours_as_the_page_says(tmp_path):
    """Their modules import each other by the name llama, which is ours too."""
    folder, (block,) = (
        tmp_path / "llama3/llama",
        re.findall(r"```bash\n(cp .*?)```", PAGES["docs/python.md"], flags=re.DOTALL),
    )
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from .generation import Llama\n")
    (folder / "generation.py").write_text("from llama.model import Transformer as Llama\n")
    (folder / "model.py").write_text("class Transformer: ...\n")
    subprocess.run(block, shell=True, cwd=tmp_path, check=True)
    code = "import short_gpt, llama, meta_llama as theirs; print(theirs.Llama, llama.Llama)"
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)
    assert "<class 'meta_llama.model.Transformer'> <class 'llama.generation.Llama'>" in done.stdout


def test_the_site_has_every_page():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    pages = {str(Path(page).relative_to("docs")) for page in PAGES if page.startswith("docs/")}
    assert set(listed) == pages and len(listed) == len(pages)


def test_the_tests_that_all_checks_name_exist():
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", (ROOT / ".ci/run").read_text())
    assert len(named) > 5
    for file, name in named:
        text = (ROOT / file).read_text()
        assert not name or f"def {name}(" in text, (file, name)


SEVERAL = [(p, w) for p in PAGES for w in commands(p, "torchrun") if "short_gpt" in w]


@pytest.mark.parametrize(("page", "words"), SEVERAL)
def test_torchrun_takes_no_flag_of_ours_for_its_own(page, words):
    options = ["2" if word == "R" else word for word in words]
    parsed = get_args_parser().parse_args(options)
    place = options.index("short_gpt")
    assert parsed.module and parsed.training_script == "short_gpt"
    assert parsed.training_script_args == options[place + 1 :]
