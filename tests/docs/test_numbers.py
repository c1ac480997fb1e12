"""Every number that README and the docs print as measured is one of a benchmark's JSON file."""

from __future__ import annotations

import re

import adversarial as hostile
import fill_docs
import pytest
from evidence_tables import adapter
from healing_tables import minutes, passes, refitted
from made_tables import (
    DRAFTED,
    FAMILY,
    MISLED,
    SERVED,
    STOPPED,
    attacked,
    compared,
    drafted,
    family,
    greedy,
    healed,
    least,
    rehearsed,
    rows,
    scoring,
    serving,
    short_table,
    slower,
    spread,
    stopping,
    streaming,
)
from pages import PAGES, RESULTS, commands, flowing, result, table, tables

# Measured once, and so said where it stands: no benchmark of this repository prints it.
ONCE = """
-0.346 (0.032) +0.002 (0.014) +0.010 (0.013) -0.046 (0.008) -0.561 (0.034) -0.551 (0.027)
"""


@pytest.mark.parametrize("page", sorted({*fill_docs.TABLES, *fill_docs.BLOCKS}))
def test_the_tables_are_those_that_the_results_fill(page):
    assert fill_docs.filled(page, PAGES[page]) == PAGES[page]


def test_a_table_is_filled_between_its_head_and_the_next_empty_line():
    (head,) = fill_docs.TABLES["README.md"]
    text = f"Before\n\n{head}\n| --- |\n| old |\n| older |\n\nBehind"
    rows = "\n".join(short_table())
    assert fill_docs.filled("README.md", text) == f"Before\n\n{head}\n| --- |\n{rows}\n\nBehind"
    with pytest.raises(ValueError, match="stands there 0 times"):
        fill_docs.filled("README.md", "nothing")


def test_the_table_of_the_refit_is_what_was_measured():
    head = "| 8 of 30 layers less | held-out chapters | WikiText-2, second half | novels |"
    assert table("docs/healing.md", head) == refitted()
    assert f"took {passes()} times" in flowing("docs/healing.md")
    assert f"On two CPU cores greedy search's took {minutes()}" in flowing("docs/healing.md")


def test_the_tables_of_costs_are_what_was_measured():
    assert table("docs/results.md", "| | median (range) |") == scoring()
    assert table("docs/scaling.md", STOPPED) == stopping()
    cases = result("stopping")["cases"].values()
    assert all(case["misled"]["layers"] != case["layers"] for case in cases)
    wrong = max(1 - case["misled"]["agreement"] for case in cases)
    assert f"at most {wrong:.2%} of the runs ended early and wrong" in flowing("docs/scaling.md")
    assert wrong <= 1 - result("stopping")["confidence"]
    assert all(case["agreement"] == 1 for case in cases)
    assert least() in flowing("docs/scaling.md")
    assert table("docs/scaling.md", MISLED) == attacked()
    found = result("stopping_adversarial")
    assert [*found["kinds"]] == [*hostile.KINDS, *hostile.BEYOND]
    wrong = {kind: case["wrong_of_runs"] for kind, case in found["kinds"].items()}
    assert all(wrong[kind] <= 1 - found["confidence"] for kind in hostile.KINDS)
    assert streaming() in tables("docs/scaling.md")
    assert table("docs/results.md", "| | Meta's format | Hugging Face's |") == rehearsed()


def test_what_serving_costs_is_what_was_measured():
    assert table("docs/serve.md", SERVED) == serving()
    assert table("docs/serve.md", DRAFTED) == drafted()
    assert slower() in flowing("docs/serve.md")
    assert all(draft["same_text"] for draft in result("serving")["drafts"])


def test_the_second_family_is_what_was_measured():
    assert table("docs/results.md", FAMILY) == family()
    removed = ", ".join(map(str, result("second_family")["removed"]))
    assert f"without its layers {removed}" in flowing("docs/results.md")


def test_intervals_hold_as_often_as_is_said():
    found = result("coverage")
    assert found["least"] == 0.93 and len(found["checked"]) == 10
    for kind in found["checked"]:
        assert [*found["kinds"][kind]] == ["3", "5", "10", "20"]
        for case in found["kinds"][kind].values():
            ends = [case["new"][end] for end in ("two_sided", "upper", "lower")]
            assert min(ends) >= 0.93 and case["no_interval"] < 0.2


def test_our_adapter_gives_what_lm_evals_own_gives():
    assert adapter() in flowing("docs/results.md")


def test_the_comparison_is_what_was_measured():
    assert compared() in PAGES["docs/results.md"]
    head = "| removed by | 4 layers | 8 layers | 8, patched | 8, LoRA |"
    assert table("README.md", head) == short_table()


def held_out(name: str, healed: str) -> str:
    """A healed model's perplexity on chapters, as a page prints it."""
    return f"at {result(name)['rows'][healed]['held-out chapters']['perplexity']:.2f}"


SENTENCES = {
    "docs/results.md": (greedy, healed),
    "docs/healing.md": (lambda: healed().replace("8 layers removed", "8 of 30 layers removed"),),
    "README.md": (
        lambda: f"whole: {rows()['dense', 0, 'raw']['perplexity']:.3f}",
        lambda: f"Block Influence's 8 less are {held_out('healing', 'refit')};",
        lambda: f"on 2 CPU cores, {held_out('distillation', 'distill')} (",
        lambda: f"Scoring costs {spread(result('scoring')['ratios']['scoring / bare'])} times",
    ),
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_sentences_say_what_was_measured(page):
    for sentence in SENTENCES[page]:
        assert sentence() in flowing(page)


@pytest.mark.parametrize("page", PAGES)
def test_no_error_bar_stands_in_a_page_without_a_measurement(page):
    """What looks like a measurement, 1.23 (0.04) or 1.23 (1.20 to 1.30), is one of those above."""
    filled = [line for own in fill_docs.TABLES.values() for make in own.values() for line in make()]
    measured = " ".join(
        [*filled, *streaming(), greedy(), compared(), healed(), slower(), passes(), ONCE]
    )
    number = r"[-+]?\d+\.\d+"
    for text in re.findall(rf"{number} \({number}(?: to {number})?\)", PAGES[page]):
        assert text in measured, text


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_names_its_command_machine_and_versions(name):
    found = result(name)
    assert found["command"]
    assert found["machine"]["cores"] >= 1 and found["machine"]["torch_threads"] >= 1
    assert found["machine"]["system"]
    assert {"python", "short-gpt", "torch", "numpy"} <= set(found["versions"])


def measuring(arguments: list[str]) -> list[str]:
    """A benchmark's arguments without those that only say where its files go."""
    kept, items = [], iter(arguments)
    for item in items:
        if item in ("--out", "--scores"):
            next(items)
        elif item != "--overwrite":
            kept.append(item)
    return kept


@pytest.mark.parametrize("page", ["docs/results.md", "docs/scaling.md", "benchmarks/README.md"])
def test_the_benchmarks_commands_are_those_that_were_run(page):
    run = [measuring(result(name)["command"].split()[1:]) for name in RESULTS]
    shown = commands(page, "python")
    assert shown and all(arguments in run for arguments in shown)


@pytest.mark.parametrize("name", ["compare", "compare_healing"])
def test_the_comparisons_command_is_the_one_that_was_run(name):
    found = result(name)
    assert found["command"] == "compare"
    shown = [a for a in commands("docs/results.md", "short-gpt") if a[0] == "compare"]
    (arguments,) = (a for a in shown if f"{name}.json" in a)
    given = zip(*[iter(arguments[1:])] * 2, strict=True)
    for option, value in given:
        run = found["arguments"][option.lstrip("-")]
        run = ",".join(map(str, run)) if isinstance(run, list) else run
        assert type(run)(value) == run, option


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_a_cell_for_every_head(page):
    lines = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL).splitlines()
    columns = 0
    for line in lines:
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        columns = (columns or bars) if bars else 0
        assert bars == columns, line
