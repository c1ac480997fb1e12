"""The help is there at once: no command's settings import what only its run needs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from processes import alone

from short_gpt import jobs
from short_gpt.jobs.renamed import OLD
from short_gpt.jobs.settings import takes_fields

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


@pytest.mark.parametrize(
    "package",
    ["llama", *(f"short_gpt{p}" for p in ("", ".jobs", ".plots", ".runtime", ".wrappers"))],
)
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


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_of_a_setting_works_and_names_the_new_one(name):
    new, _ = OLD[name]
    with pytest.warns(DeprecationWarning, match=f"jobs.{name} is now {new}") as warned:
        made = getattr(jobs, name)()
    assert warned[0].filename == __file__  # the caller, not this library
    assert type(made) is getattr(jobs, new)


def test_old_settings_mean_what_they_meant():
    with pytest.warns(DeprecationWarning):
        from short_gpt.jobs import CaseNames, LoraNames, Streaming, StridedCut
    assert StridedCut(32) == jobs.Cut(32, stride=256) and StridedCut(32, 6, 0, 16).step == 16
    assert Streaming(True, "3GB") == jobs.Running(stream=True, max_memory="3GB")
    cases = CaseNames("bi", 2, seeds=1)
    assert (cases.names, cases.numbers, cases.heals) == (["bi"], [2], ["raw", "patched"])
    assert LoraNames(lora_size=64) == jobs.LoraSettings(size=64)
    with pytest.warns(DeprecationWarning):
        from short_gpt.jobs import Distilling, Paper, PerplexityLimit
    assert Distilling("m", top_k=3) == jobs.Settings(teacher="m", top_k=3)
    assert Paper("Llama-2-7B", 0.9) == jobs.Answer(confidence=0.9, paper_model="Llama-2-7B")
    limit = jobs.Choice(max_perplexity_ratio=1.1, eval_data="a", eval_windows=4)
    assert PerplexityLimit(1.1, "a", 4) == limit


def test_settings_are_taken_by_the_names_that_arguments_had():
    defaults = jobs.HealingWindows(), jobs.Settings()

    @takes_fields("heal", learned="windows", distilling="settings")
    def heal(model, *, windows=defaults[0], settings=defaults[1], **fields):
        return model, windows, settings

    windows, settings = jobs.HealingWindows(size=32), jobs.Settings(steps=3)
    with pytest.warns(DeprecationWarning, match="heal: learned is now windows") as warned:
        assert heal("m", learned=windows, settings=settings) == ("m", windows, settings)
    assert warned[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="heal: distilling is now settings"):
        found = heal("m", settings=settings, distilling=jobs.Settings(top_k=5))
    assert found == ("m", defaults[0], jobs.Settings(steps=3, top_k=5))


def test_a_name_that_was_removed_says_what_to_use():
    with pytest.raises(ImportError, match="short_gpt.jobs.draft was removed: compare the pruned"):
        from short_gpt.jobs import draft  # noqa: F401
