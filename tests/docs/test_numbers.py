"""README's numbers are those of the results, and the commands shown are those that were run."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from inspect import signature

import pytest
from pages import PAGES, RESULTS, ROOT, commands, result

from short_gpt.cli import COMMANDS
from short_gpt.cli.flags import flags_of

STUDIES = {path.stem: path for path in ROOT.glob("benchmarks/[sb]*/*.py")}  # and baselines


def test_readmes_numbers_are_those_of_the_results():
    own, real = (
        f"{result('own_samples')['rows'][row]['novels']['restored']:.0%}"
        for row in ("own-24", "book+wikitext-24")
    )
    rows = result("reasoning")["rows"]
    before, pruned = (
        50 * rows[name]["from original"]["svamp exact_match"]["value"]
        for name in ("original", "bi-3, pruned")
    )
    architectures = [a["outcome"] for a in result("architectures")["rows"].values()]
    sentences = (
        f"SmolLM2 recovers {own} of the loss increase on unseen novels, and {real} when fitted on",
        f"With three layers removed, Qwen2.5-Coder-0.5B solved {pruned:.0f} word problem instead "
        f"of {before:.0f}",
        f"[{architectures.count('works')} architectures]",
    )
    text = " ".join(PAGES["README.md"].replace("**", "").split())
    for sentence in sentences:
        assert sentence in text
    assert "Llama-2-7B's shapes in [3 GB]" in text
    assert result("refit_streamed")["refit_peak_bytes"] < 3e9


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_names_its_command_machine_and_versions(name):
    content = result(name)
    assert content["command"] and content["machine"]["cores"] >= 1
    assert {"python", "short-gpt", "torch", "numpy"} <= set(content["versions"])


def measuring(arguments: list[str]) -> list[str]:
    """A benchmark's arguments without its folder and those that say where its files go."""
    line = re.sub(
        r" --(?:out|scores) \S+| --overwrite|(?<=benchmarks/)\w+/", "", shlex.join(arguments)
    )
    return shlex.split(line)


@pytest.mark.parametrize("page", ["benchmarks/README.md", *(p for p in PAGES if "docs/" in p)])
def test_the_benchmarks_commands_are_those_that_were_run(page):
    run = [measuring(shlex.split(result(name)["command"])[1:]) for name in RESULTS]
    shown = [words for words in commands(page, "python") if words[0].startswith("benchmarks/")]
    for path, *flags in shown:
        assert (ROOT / path).is_file(), path
        assert not flags or measuring([path, *flags]) in run, flags


def test_all_measures_what_stands_in_the_results_but_closed_questions():
    text = (ROOT / "benchmarks/all.sh").read_text()
    text = text.replace("\\\n", "").replace("$few", re.search(r'^few="(.+)"$', text, re.M)[1])
    measured = dict(re.findall(r"^(?:script|measure) (\w+) (.*)$", text, re.M))
    closed = set(re.findall(r"results/(\w+)\.json", PAGES["benchmarks/README.md"]))
    assert measured.keys() | closed == {*RESULTS} and not measured.keys() & closed
    for script, *words in (shlex.split(line) for line in measured.values()):
        if script != "python":  # a command of the library
            if script == "shrunk":
                known = {**flags_of(COMMANDS["shrink"])}
            else:
                path = STUDIES[script].relative_to(ROOT).with_suffix("")
                known = signature(import_module(".".join(path.parts)).main).parameters
            assert {word[2:] for word in words if word.startswith("--")} <= known.keys()
