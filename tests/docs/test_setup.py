"""What is installed: without a choice, all that the commands need; extras for the rest."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from importlib.metadata import packages_distributions
from types import SimpleNamespace
from typing import Any

import pytest
from pages import PAGES, ROOT

from llama import MissingPackageError
from llama.errors import required

EXTRAS = {"eval", "rival", "notebooks", "docs", "dev"}
# What an installation lacks: pip itself, pandas, and services that a training reports to.
RAISING = {"llama/errors.py", "short_gpt/data/demo.py"}
RAISING |= {"short_gpt/healing/lora.py"}
# Imported where an extra or a user brings them, or only while types are checked.
OTHERS = {"lm_eval", "google", "_typeshed", "pandas", "llama", "short_gpt"}
OTHERS |= {"libgguf", "xllamacpp"}


@pytest.fixture(scope="module")
def packaging() -> dict[str, Any]:
    """The arguments that setup.py gives to setuptools."""
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        stub = SimpleNamespace(setup=given.update, find_packages=lambda include: [])
        patch.setitem(sys.modules, "setuptools", stub)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def name(requirement: str) -> str:
    """A requirement's package without its version, as registries spell it."""
    return re.split(r"[\[<>=! ]", requirement)[0].replace("_", "-").lower()


def imported() -> set[str]:
    """The top-level names of every import of both packages, inside functions too."""
    found = set()
    for path in (*(ROOT / "short_gpt").rglob("*.py"), *(ROOT / "llama").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found


def test_all_that_the_library_imports_is_installed_without_an_extra(packaging):
    owners = packages_distributions()
    third_party = imported() - set(sys.stdlib_module_names) - OTHERS
    needed = {owner.replace("_", "-").lower() for top in third_party for owner in owners[top]}
    installed = {name(requirement) for requirement in packaging["install_requires"]}
    assert {"transformers", "peft", "gguf", "matplotlib", "platformdirs"} <= needed
    assert needed <= installed
    # transformers loads onto devices by accelerate, and its tokenizers are read by these two
    assert installed - needed == {"accelerate"}


def test_extras_bring_what_is_not_installed_without_them(packaging):
    extras, installed = packaging["extras_require"], packaging["install_requires"]
    assert not any("_" in extra for extra in extras)  # pip before 23.3 would not find it
    assert set(extras) == EXTRAS | {"all"}
    assert set(extras["all"]) == {*extras["notebooks"], *extras["dev"]}
    assert {*extras["docs"], *extras["eval"]} <= {*extras["dev"]}
    assert not {*map(name, installed)} & {name(r) for own in extras.values() for r in own}


def test_the_first_page_says_what_each_extra_is_for(packaging):
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["docs/index.md"], flags=re.MULTILINE)
    assert set(rows) == EXTRAS
    pages = [*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    lines = re.findall(r"pip install .*?\[([\w,-]+)\]", "\n".join(pages))
    assert {extra for line in lines for extra in line.split(",")} <= EXTRAS


def test_the_badges_are_true(packaging):
    versions = [c.split()[-1] for c in packaging["classifiers"] if c[-4:-2] == "3."]
    first, last = versions[0], versions[-1]
    assert packaging["python_requires"] == f">={first}"
    assert f"badge/python-{first}_to_{last}-" in PAGES["README.md"]
    assert f"badge/license-{packaging['license']}-" in PAGES["README.md"]
    assert packaging["license"] in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_release_file_that_readme_installs_is_this_version(packaging):
    assert f"short_gpt-{packaging['version']}-py3-none-any.whl[" in PAGES["README.md"]


def test_a_missing_package_is_named_with_a_command_that_needs_no_checkout(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = r"^training needs peft \(import of peft halted; .*\): pip install peft$"
    with pytest.raises(MissingPackageError, match=line), required("peft", by="training"):
        import peft  # noqa: F401
    with pytest.raises(ZeroDivisionError), required("peft", by="training"):
        _ = 1 / 0
