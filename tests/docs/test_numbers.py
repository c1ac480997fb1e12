"""Every number that README and the docs print as measured is one of a benchmark's JSON file."""

from __future__ import annotations

import re

import adversarial as hostile
import fill_docs
import pytest
from evidence_tables import adapter
from healing_tables import above, group, minutes, novels, passes, refitted
from made_tables import (
    CHOSEN,
    CROSSED,
    DRAFTED,
    FAMILY,
    HEALED,
    HEALINGS,
    MISLED,
    NEAREST,
    SERVED,
    SHORT,
    STOPPED,
    TASKS,
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
    served_sets,
    serving,
    short_table,
    slower,
    spread,
    stopping,
    streaming,
)
from pages import PAGES, RESULTS, commands, flowing, measured, result, table, tables

# Perplexities that others published and README quotes.
PUBLISHED = {"13.99"}
# The tables of pruned models, by their page, and how many different sets each names.
SETS = {
    "README.md": {SHORT: 7},
    "docs/results.md": {
        CHOSEN: 16,
        HEALINGS: 4,
        NEAREST: 5,
        **{TASKS.format(n): 1 for n in (2, 4, 8)},
    },
    "docs/calibration.md": {CROSSED.format(how): 5 for how in ("as cut", "refitted")},
    "docs/healing.md": {
        HEALED.format("layers less"): 3,
        **{
            HEALED.format(head): 1
            for head in (
                "8 of 30 layers less",
                "greedy search's 8 less",
                "Block Influence's 8 less",
                "healed by",
                "windows",
                "aimed at",
            )
        },
    },
}


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
    assert table("README.md", SHORT) == short_table()


def chapters(name: str) -> str:
    """A distilled model's perplexity on held-out chapters, as a page prints it."""
    return f"{result(name)['rows']['distill']['held-out chapters']['perplexity']:.2f}"


def restored(kind: int) -> str:
    """What a refit on chapters alone restores of a kind of text, as a page prints it."""
    return f"{[*group('windows')['16 + 0']['healed'].values()][kind]['restored']:.0%}"


SENTENCES = {
    "docs/results.md": (greedy, healed, novels),
    "docs/healing.md": (
        lambda: healed().replace("8 layers removed", "8 of 30 layers removed"),
        lambda: f"Refitted, {novels()}.",
        lambda: f"{chapters('distillation')} and {chapters('distillation_influence')}, and all",
        lambda: f"it restores {restored(0)} of the lost nats on held-out chapters",
        lambda: f"{restored(2)} on novels and {restored(1)} on WikiText-2",
    ),
    "docs/serve.md": (served_sets,),
    "README.md": (
        lambda: f"whole: {rows()['dense', 0, 'raw']['perplexity']:.3f}",
        lambda: f"Block Influence's 8 less are at {chapters('distillation_influence')} and",
        lambda: f"greedy search's at {chapters('distillation')} (",
        lambda: f"brings {restored(0)} of the lost nats back on its held-out chapters",
        lambda: f"and {restored(2)} on novels",
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
    known = " ".join([*filled, *streaming(), greedy(), compared(), healed(), slower(), passes()])
    known += " ".join(above("raw").values())
    number = r"[-+]?\d+\.\d+"
    for text in re.findall(rf"{number} \({number}(?: to {number})?\)", PAGES[page]):
        assert text in known, text


@pytest.mark.parametrize("page", PAGES)
def test_no_perplexity_stands_in_a_page_without_a_result(page):
    """What looks like one, 12.34 or 123.45, is in a JSON file, also in the words of a page."""
    filled = [line for own in fill_docs.TABLES.values() for make in own.values() for line in make()]
    text = re.sub(r"^```.*?^```|^## Published.*?^## ", "", PAGES[page], flags=re.M | re.S)
    number = r"(?<![\d.])\d{2,3}\.\d{2}(?![\d.])"
    known = {*measured(), *PUBLISHED, *re.findall(number, " ".join([*filled, compared()]))}
    assert {*re.findall(number, text)} <= known


@pytest.mark.parametrize(("page", "head"), [(page, head) for page in SETS for head in SETS[page]])
def test_a_table_of_pruned_models_names_their_layers(page, head):
    named = re.findall(r"\d+(?:, \d+)+(?= \|)", "\n".join(table(page, head)))
    assert len({*named}) == SETS[page][head]


def test_three_windows_are_judged_by_student_t_of_two_degrees_of_freedom():
    """By the quantile of a table, 4.303, and not by bare errors."""
    assert result("optimality")["windows"] == 3
    row = next(line for line in table("docs/results.md", NEAREST) if line.startswith("| bi "))
    own = result("optimality")["choices"]["bi"]["raw"]
    low, high = (own["gap"] + side * 4.303 * own["standard_error"] for side in (-1, 1))
    assert f"| {own['gap']:+.3f} ({low:+.3f} to {high:+.3f}) |" in row
    (luckless,) = above("raw").values()
    assert f"`sleb_healed`'s as pruned, {luckless}; of the others" in flowing("docs/results.md")
    assert not above("healed")


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
