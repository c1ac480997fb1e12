"""Every number that README and the docs' text print as measured is one of a benchmark's JSON file.

The docs' tables are made from these files when the site is built: `test_site_tables.py`.
"""

from __future__ import annotations

import re
import shlex

import pytest
from pages import PAGES, RESULTS, commands, flowing, measured, result
from sentences import MADE, misled, sentences

from benchmarks.lib import adversarial as hostile
from benchmarks.tables.healing_tables import above, nearest
from benchmarks.tables.made_tables import SHORT, TABLES, short_table

# Perplexities that others published and README quotes.
PUBLISHED = {"13.99"}


@pytest.mark.parametrize("page", MADE)
def test_the_sentences_say_what_was_measured(page):
    for sentence in sentences(page):
        assert sentence in flowing(page)


def test_readmes_table_is_what_was_measured():
    table = "\n".join([SHORT, "| --- | --- | --- | --- | --- | --- | --- |", *short_table()])
    assert f"\n\n{table}\n\n" in PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_no_measurement_stands_in_a_page_without_a_result(page):
    """What looks like one: 1.23 (0.04), 1.23 (1.20 to 1.30), or a perplexity, 12.34 or 123.45."""
    made = [*(make() for make in TABLES.values()), *short_table()]
    made += [sentence for own in MADE for sentence in sentences(own)]
    known = " ".join(made)
    number = r"[-+]?\d+\.\d+"
    for text in re.findall(rf"{number} \({number}(?: to {number})?\)", PAGES[page]):
        assert text in known, text
    text = re.sub(r"^```.*?^```|^## Published.*?^## ", "", PAGES[page], flags=re.M | re.S)
    perplexity = r"(?<![\d.])\d{2,3}\.\d{2}(?![\d.])"
    results = {*measured(), *PUBLISHED, *re.findall(perplexity, known)}
    assert {*re.findall(perplexity, text)} <= results


def test_stops_hold_what_is_promised():
    found = result("stopping")
    assert all(case["misled"]["layers"] != case["layers"] for case in found["cases"].values())
    assert all(case["agreement"] == 1 for case in found["cases"].values())
    assert misled() <= 1 - found["confidence"]
    found = result("stopping_adversarial")
    assert [*found["kinds"]] == [*hostile.KINDS, *hostile.BEYOND]
    wrong = {kind: case["wrong_of_runs"] for kind, case in found["kinds"].items()}
    assert all(wrong[kind] <= 1 - found["confidence"] for kind in hostile.KINDS)
    assert all(wrong[kind] > 1 - found["confidence"] for kind in hostile.BEYOND)
    assert "because fewer than 2% of the windows decide" in flowing("docs/scaling.md")


def test_drafts_write_the_same_text():
    assert all(draft["same_text"] for draft in result("serving")["drafts"])


def test_intervals_hold_as_often_as_is_said():
    found = result("coverage")
    assert found["least"] == 0.93 and len(found["checked"]) == 10
    for kind in found["checked"]:
        assert [*found["kinds"][kind]] == ["3", "5", "10", "20"]
        for case in found["kinds"][kind].values():
            ends = [case["new"][end] for end in ("two_sided", "upper", "lower")]
            assert min(ends) >= 0.93 and case["no_interval"] < 0.2


def test_three_windows_are_judged_by_student_t_of_two_degrees_of_freedom():
    """By the quantile of a table, 4.303, and not by bare errors."""
    assert result("optimality")["windows"] == 3
    row = next(line for line in nearest() if line.startswith("| bi "))
    own = result("optimality")["choices"]["bi"]["raw"]
    low, high = (own["gap"] + side * 4.303 * own["standard_error"] for side in (-1, 1))
    assert f"| {own['gap']:+.3f} ({low:+.3f} to {high:+.3f}) |" in row
    assert [*above("raw")] == ["sleb_healed"] and not above("healed")


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
            kept.append(re.sub(r"^benchmarks/\w+/", "benchmarks/", item))
    return kept


@pytest.mark.parametrize(
    "page", ["docs/results.md", "docs/tasks.md", "docs/scaling.md", "benchmarks/README.md"]
)
def test_the_benchmarks_commands_are_those_that_were_run(page):
    run = [measuring(shlex.split(result(name)["command"])[1:]) for name in RESULTS]
    shown = commands(page, "python")
    assert shown and all(measuring(arguments) in run for arguments in shown)


def test_the_comparisons_command_is_the_one_that_was_run():
    found = result("compare")
    assert found["command"] == "compare"
    (arguments,) = (a for a in commands("docs/results.md", "short-gpt") if a[0] == "compare")
    given = dict(zip(*[iter(arguments[1:])] * 2, strict=True))
    del given["--json"]
    for option, value in given.items():
        run = found["arguments"][option.lstrip("-")]
        run = ",".join(map(str, run)) if isinstance(run, list) else run
        assert type(run)(value) == run, option
