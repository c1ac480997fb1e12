"""Every number that README and the docs' text print as measured is one of a benchmark's JSON file.

The docs' tables are made from these files when the site is built: `test_site_tables.py`.
"""

from __future__ import annotations

import re
import shlex

import adversarial as hostile
import pytest
from evidence_tables import adapter, kept, swept, swept_beside
from healing_tables import above, group, minutes, nearest, novels, passes
from made_tables import (
    SHORT,
    TABLES,
    default_cut,
    greedy,
    healed,
    least,
    own_text,
    refit_passes,
    rows,
    searched,
    served_sets,
    short_table,
    slower,
    solved,
    spread,
)
from pages import PAGES, RESULTS, commands, flowing, measured, result

# Perplexities that others published and README quotes.
PUBLISHED = {"13.99"}


def distilled() -> str:
    """A distilled model's perplexities, as a part of a sentence."""
    rows = result("distillation")["rows"]
    (chapters, _, novels), (_, _, whole) = (
        [f"{found['perplexity']:.2f}" for found in rows[name].values()]
        for name in ("distill", "whole")
    )
    on_novels = f"{novels} on 8 windows of novels (original model: {whole})"
    return f"to {chapters} on the same chapters and {on_novels}"


def restored(kind: int) -> str:
    """What a refit on chapters alone restores of a kind of text, as a page prints it."""
    return f"{[*group('windows')['16 + 0']['healed'].values()][kind]['restored']:.0%}"


def misled() -> float:
    """The largest share of runs that ended early and wrong on windows made to mislead."""
    return max(1 - case["misled"]["agreement"] for case in result("stopping")["cases"].values())


def last_words(state: str) -> str:
    """The share of passages whose last word a model predicts, as a page prints it."""
    return f"{result('tasks')['rows'][state]['tasks']['lambada_openai acc']['value']:.0%}"


def shares() -> list[str]:
    """Sentences on the shares of a mean over tasks that are kept."""
    rows = result("kept")["rows"]
    share = {name: f"{row['mean']['share']:.1%}" for name, row in rows.items()}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in kept()]
    without = {name: row[4] for name, row in zip(rows, cells, strict=True)}
    auto, bi = share["auto refit"], share["bi pruned"]
    return [
        f"As pruned, Block Influence's set keeps {bi}, nearly as much as auto's",
        f"and leaves the tasks at {share['bi refit']}. Over",
        f"the mean is {result('kept')['kendall']['healed']['tau']:.2f};",
        f"auto's set keeps {without['auto pruned']} as pruned, {without['auto linearpatch']} with "
        f"LinearPatch, and {without['auto refit']} refitted",
        f"from the mix with real text: {share['auto refit-own']} against {auto}, and "
        f"{without['auto refit-own']} against {without['auto refit']} without boolq",
    ]


def mixed() -> str:
    """What products in bfloat16 gain and cost."""
    found = result("mixed")
    first, second = (f"{ratio:.2f}" for ratio in found["ratios"])
    (one, two, three) = (
        f"{row['change']:.3f} ({row['standard_error']:.3f})" for row in found["rows"].values()
    )
    one = one.replace("(", "nats (standard error ")
    times = f"takes {first} and {second} of the time in float32"
    losses = f"{one} on held-out chapters, {two} on WikiText-2's second half and {three} on novels"
    assert found["layers"] == {"float32": [10, *range(12, 19)], "mixed": [*range(11, 19)]}
    assert times in flowing("docs/scaling.md")
    return losses


def scored_mixed() -> str:
    """What products in bfloat16 gain and change of scoring."""
    found = result("scoring")
    other = found["mixed against float32"]
    assert other["the lowest 12 layers in the same order"]
    differs = f"{other['largest relative difference of Block Influence']:.2%}"
    assert f"over {len(found['seconds']['mixed'])} windows differs by at most {differs}" in flowing(
        "docs/scaling.md"
    )
    time = spread(found["ratios"]["mixed / bare"], 2)
    return f"takes {time} of the time of a bare pass in float32"


SENTENCES = {
    "docs/results.md": (
        *(lambda i=i: shares()[i] for i in range(5)),
        greedy,
        novels,
        adapter,
        default_cut,
        lambda: (
            f"`sleb_healed`, when pruned, by {above('raw')['sleb_healed']}. For all other choices"
        ),
    ),
    "docs/healing.md": (
        lambda: healed().replace("8 layers removed", "8 of 30 layers removed"),
        lambda: f"took {passes()} times",
        lambda: f"On two CPU cores it took {minutes()}",
        lambda: f"it restores {restored(0)} of the lost nats on held-out chapters",
        lambda: f"{restored(2)} on novels and {restored(1)} on WikiText-2",
    ),
    "docs/scaling.md": (
        least,
        mixed,
        scored_mixed,
        lambda: f"at most {misled():.2%} of the runs ended early and wrong",
    ),
    "docs/serve.md": (served_sets, slower),
    "docs/prune-8b.md": (solved, searched, refit_passes),
    "docs/choose.md": (
        lambda: f"in {last_words('4 less')} of the cases instead of {last_words('whole')}",
    ),
    "docs/limits.md": (swept, swept_beside),
    "README.md": (
        swept,
        lambda: f"original model: {rows()['dense', 0, 'raw']['perplexity']:.3f}",
        own_text,
        distilled,
        lambda: f"restores {restored(0)} of the lost nats on its held-out chapters",
        lambda: f"and {restored(2)} on novels",
        lambda: f"Scoring costs {spread(result('scoring')['ratios']['scoring / bare'])} times",
    ),
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_sentences_say_what_was_measured(page):
    for sentence in SENTENCES[page]:
        assert sentence() in flowing(page)


def test_readmes_table_is_what_was_measured():
    table = "\n".join([SHORT, "| --- | --- | --- | --- | --- | --- | --- |", *short_table()])
    assert f"\n\n{table}\n\n" in PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_no_measurement_stands_in_a_page_without_a_result(page):
    """What looks like one: 1.23 (0.04), 1.23 (1.20 to 1.30), or a perplexity, 12.34 or 123.45."""
    made = [*(make() for make in TABLES.values()), *short_table()]
    made += [sentence() for own in SENTENCES.values() for sentence in own]
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
            kept.append(item)
    return kept


@pytest.mark.parametrize("page", ["docs/results.md", "docs/scaling.md", "benchmarks/README.md"])
def test_the_benchmarks_commands_are_those_that_were_run(page):
    run = [measuring(shlex.split(result(name)["command"])[1:]) for name in RESULTS]
    shown = commands(page, "python")
    assert shown and all(arguments in run for arguments in shown)


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
