"""Every number that README and the docs print as measured is one of a benchmark's JSON file."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, RESULTS, commands, flowing, result, table, tables

from short_gpt.experiments.comparison import Row
from short_gpt.report import tables as report

# Measured once, and so said where it stands: no benchmark of this repository prints it.
ONCE = """
-0.346 (0.032) +0.002 (0.014) +0.010 (0.013) -0.046 (0.008) -0.561 (0.034) -0.551 (0.027)
"""


def spread(values: dict[str, float], digits: int = 3) -> str:
    low, high = sorted((values["min"], values["max"]))
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def scoring() -> list[str]:
    found = result("scoring")
    ratios, peak = found["ratios"], found["peak_memory_mb"]
    hooks = ratios["hooks / rest of the pass"]
    share = f"{hooks['median']:.2%} ({hooks['min']:.2%} to {hooks['max']:.2%}) of the pass"
    sizes = ", ".join(f"{peak[k]:.0f}" for k in ("bare", "scoring", "public"))
    rows = {
        "scoring / bare pass through embeddings and layers": spread(ratios["scoring / bare"]),
        "of this, inside the hooks": share,
        "public way / bare pass": spread(ratios["public / bare"]),
        "public way / scoring": spread(ratios["public / scoring"]),
        "our bare pass / transformers' `LlamaModel`": spread(ratios["bare / transformers"]),
        "peak memory: bare, scoring, public way": f"{sizes} MB",
    }
    return [f"| {name} | {value} |" for name, value in rows.items()]


def stopping() -> list[str]:
    cases = result("stopping")["cases"]
    assert all(case["agreement"] == 1 for case in cases.values())
    shares = {name: case["share_of_windows"] for name, case in cases.items()}
    return [
        f"| {name} | {s['median']:.1%} | {s['95th percentile']:.1%} |" for name, s in shares.items()
    ]


def attacked() -> list[str]:
    rows = []
    for kind, case in result("stopping_adversarial")["kinds"].items():
        low, high = case["interval"]
        share = f"{case['wrong_of_early_stops']:.2%} ({low:.2%} - {high:.2%})"
        runs, early = case["wrong_of_runs"], case["stopped_early"]
        rows.append(f"| {kind} | {share} | {runs:.2%} | {early:.1%} |")
    return rows


def streaming() -> list[str]:
    found = result("streaming")
    run, need = found["streamed"], found["llama_2_70b"]
    ratio = spread(found["streamed / floor"], 2)
    peak, plan = run["peak_bytes"] / 1e9, run["planned_bytes"] / 1e9
    full, half = (need[kind]["bytes"] / 1e9 for kind in ("float32", "bfloat16"))
    return [
        f"| time for {found['windows']} windows, reading included | {run['seconds']:.0f} s |",
        f"| time / floor: the layers' matrix products alone, and reading the file | {ratio} |",
        f"| peak memory of the process | {peak:.2f} GB, planned {plan:.2f} GB |",
        f"| Llama-2-70B, computed from the same plan | {full:.1f} GB, in bfloat16 {half:.1f} GB |",
    ]


def greedy() -> str:
    found = result("greedy")
    time = found["time_ratio"]
    return (
        f"{found['layers_run_ratio']:.3f} of the layers run and {time['median']:.3f} of the time "
        f"({time['min']:.3f} to {time['max']:.3f})"
    )


def compared() -> str:
    found = result("compare")
    return report.compared([Row(**row) for row in found["rows"]], found["agreement"])


def rows() -> dict[tuple[str, int, str], dict]:
    return {(r["method"], r["n"], r["healing"]): r for r in result("compare")["rows"]}


def cell(method: str, n: int, healing: str) -> str:
    """A perplexity with the standard error of its change, by the delta method; "" if not run."""
    row = rows().get((method, n, healing))
    if row is None:
        return ""
    return f"{row['perplexity']:.2f} ({row['perplexity'] * row['standard_error']:.2f})"


def short_table() -> list[str]:
    names = {
        "Block Influence": "bi",
        "best angular block": "angular",
        "relative magnitude": "relative_magnitude",
        "greedy search (SLEB)": "sleb",
    }
    columns = ((4, "raw"), (8, "raw"), (8, "patched"), (8, "lora"))
    cells = {name: [cell(method, *c) for c in columns] for name, method in names.items()}
    return [f"| {name} | {' | '.join(row)} |".replace("|  |", "| |") for name, row in cells.items()]


def healed() -> str:
    """What both healings bring back of 8 layers, as a sentence."""
    parts = []
    for method, where in (("bi", "layers removed by Block Influence"), ("angular", "")):
        raw, patch, lora = (rows()[method, 8, h] for h in ("raw", "patched", "lora"))
        start = f"Of 8 {where}" if where else "Of the angular block of 8"
        verb = " lowers the loss" if where else ""
        error, ppl = ("standard error ", "perplexity ") if where else ("", "")
        parts.append(
            f"{start}, the patch{verb} by {-patch['gain']:.3f}{' nats a token' if where else ''} "
            f"({error}{patch['gain_error']:.3f}; {ppl}{raw['perplexity']:.2f} to "
            f"{patch['perplexity']:.2f}), LoRA by {-lora['gain']:.3f} ({lora['gain_error']:.3f}; "
            f"to {lora['perplexity']:.2f})."
        )
    return " ".join(parts)


def refitted() -> list[str]:
    """Perplexities by kind of text, and the share of the lost nats that is back."""
    lines = []
    for name, kinds in result("healing")["rows"].items():
        cells = [f"{found['perplexity']:.2f}" for found in kinds.values()]
        if name not in ("whole", "cut"):
            shares = [f"{found['restored']:.0%}" for found in kinds.values()]
            cells = [f"{c}, {share}" for c, share in zip(cells, shares, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def serving() -> list[str]:
    """A row for every model that was served: its size, memory and speeds, beside the expected."""
    lines = []
    for row in result("serving")["rows"]:
        which = f"{row['removed']} less" if row["removed"] else "whole"
        cells = [f"{row['kind']}, {which}", f"{row['megabytes']:.0f}"]
        cells += [f"{row['peak_mb']['median']:.0f}"]
        for name in ("prompt", "generation"):
            cells += [f"{row[name]['median']:.0f}"]
            cells += [
                f"{spread(row[f'{name}_ratio'], 2)}, {row[f'{name}_expected']:.2f}"
                if row["removed"]
                else "1"
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def drafted() -> list[str]:
    """A row for every length of a draft, a column for every cut model."""
    cut = [result(f"draft_{n}")["lengths"] for n in (4, 8)]
    lines = []
    for found in zip(*cut, strict=True):
        cells = [f"{100 * f['share']:.1f}% ± {100 * f['reach_95']:.1f}" for f in found]
        cells += [f"{f['tokens_per_pass']:.2f}" for f in found]
        lines.append(f"| {found[0]['length']} | {' | '.join(cells)} |")
    return lines


def slower() -> str:
    """What drafts are worth in llama.cpp, as a sentence."""
    few, more = result("serving")["drafts"]
    ratios = [f"{d['speed_ratio']['median']:.2f}" for d in (few, more)]
    return (
        f"writes with drafts of {few['length']} at {ratios[0]} of its own speed with "
        f"{few['removed']} layers less and at {ratios[1]} with {more['removed']}"
    )


def family() -> list[str]:
    """Perplexities and sizes of the second family."""
    found = result("second_family")
    sizes = [*found["megabytes"].values()]
    lines = []
    for (name, p), size in zip(
        found["perplexity"].items(), [*sizes[:2], None, sizes[2]], strict=True
    ):
        low, high = p["interval_95"]
        cells = f"{p['perplexity']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {name} | {cells} | {'' if size is None else f'{size:.0f}'} |")
    return [line.replace("|  |", "| |") for line in lines]


def passes() -> str:
    cost = result("healing")["cost"]["refit"]
    return f"{cost['passes']:.2f} ({cost['passes_least']:.2f} to {cost['passes_most']:.2f})"


def test_the_table_of_the_refit_is_what_was_measured():
    head = "| 8 of 30 layers less | held-out chapters | WikiText-2, second half | novels |"
    assert table("docs/healing.md", head) == refitted()
    assert f"took {passes()} times" in flowing("docs/healing.md")


def test_the_tables_of_costs_are_what_was_measured():
    assert table("docs/results.md", "| | median (range) |") == scoring()
    head = "| answer | windows read, median | windows read, 95th percentile |"
    assert table("docs/scaling.md", head) == stopping()
    head = "| what misleads | wrong, of early stops | of all runs | stopped early |"
    assert table("docs/scaling.md", head) == attacked()
    found = result("stopping_adversarial")
    *promised, _ = found["kinds"].values()  # the last is rarer than promised
    assert all(case["wrong_of_early_stops"] <= 1 - found["confidence"] for case in promised)
    assert streaming() in tables("docs/scaling.md")


def test_what_serving_costs_is_what_was_measured():
    head = "| | file, MB | peak, MB | prompt, tokens/s | ratio, expected | writing, tokens/s "
    assert table("docs/serve.md", f"{head}| ratio, expected |") == serving()
    head = "| tokens of a draft | 4 less: accepted | 8 less: accepted | 4 less: tokens a pass "
    assert table("docs/serve.md", f"{head}| 8 less: tokens a pass |") == drafted()
    assert slower() in flowing("docs/serve.md")
    assert all(draft["same_text"] for draft in result("serving")["drafts"])


def test_the_second_family_is_what_was_measured():
    assert table("docs/results.md", "| Qwen2.5-Coder-0.5B | perplexity | MB |") == family()
    removed = ", ".join(map(str, result("second_family")["removed"]))
    assert f"without its layers {removed}" in flowing("docs/results.md")


def test_the_comparison_is_what_was_measured():
    assert compared() in PAGES["docs/results.md"]
    head = "| removed by | 4 layers | 8 layers | 8, patched | 8, LoRA |"
    assert table("README.md", head) == short_table()


SENTENCES = {
    "docs/results.md": (greedy, healed),
    "docs/healing.md": (lambda: healed().replace("8 layers removed", "8 of 30 layers removed"),),
    "README.md": (
        lambda: f"whole: {rows()['dense', 0, 'raw']['perplexity']:.3f}",
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
    known = [*scoring(), *stopping(), *streaming(), greedy(), compared(), healed(), ONCE]
    measured = " ".join([*known, passes(), *short_table(), *family(), *serving()])
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


def test_the_comparisons_command_is_the_one_that_was_run():
    (arguments,) = (a for a in commands("docs/results.md", "short-gpt") if a[0] == "compare")
    given = {
        name.lstrip("-"): value for name, value in zip(*[iter(arguments[1:])] * 2, strict=True)
    }
    found = result("compare")
    assert found["command"] == "compare"
    for name, value in given.items():
        kind = type(found["arguments"][name])
        assert kind(value) == found["arguments"][name], name
