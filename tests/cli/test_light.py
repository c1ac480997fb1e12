"""The help is there at once: no command's settings import what only its run needs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from processes import alone

HELPS = """
import sys
from short_gpt.cli import COMMANDS
from short_gpt.cli.app import main
main(["--help"])
for name in COMMANDS:
    main([name, "--help"])
print(sorted({"torch", "transformers", "numpy", "fire", "tqdm"} & set(sys.modules)))
"""


def test_the_help_of_every_command_needs_no_torch():
    done = subprocess.run([sys.executable, "-c", HELPS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["llama", "short_gpt", "short_gpt.healing", "short_gpt.jobs"])
def test_a_lazy_package_has_the_names_that_it_lists(package):
    module = import_module(package)
    version = ["__version__"] if package == "short_gpt" else []
    assert sorted([*module.__all__, *version]) == dir(module)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_modules_are_reached_without_an_import_of_their_own(tmp_path):
    code = "import short_gpt; print(short_gpt.healing.refit, short_gpt.jobs.reproduction.published)"
    done = alone(tmp_path / "printed", exec, code, {}).end()
    assert done.codes == [0], done.err
    assert "short_gpt.healing.refit" in done.out and "function published" in done.out
