"""Every number of the README's tables is one that a benchmark's JSON file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from short_gpt.experiments.comparison import Row
from short_gpt.report import tables as report

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def scoring() -> list[str]:
    found = result("scoring")
    rows = {
        "scoring / bare pass through embeddings and layers": "scoring / bare",
        "public way / bare pass": "public / bare",
        "public way / scoring": "public / scoring",
        "our bare pass / transformers' `LlamaModel`": "bare / transformers",
    }
    spreads = {name: found["ratios"][key] for name, key in rows.items()}
    lines = [
        f"| {name} | {s['median']:.3f} ({s['min']:.3f} to {s['max']:.3f}) |"
        for name, s in spreads.items()
    ]
    hooks, peak = found["ratios"]["hooks / rest of the pass"], found["peak_memory_mb"]
    share = f"{hooks['median']:.2%} ({hooks['min']:.2%} to {hooks['max']:.2%}) of the pass"
    sizes = ", ".join(f"{peak[k]:.0f}" for k in ("bare", "scoring", "public"))
    lines.append(f"| of this, inside the hooks | {share} |")
    return [*lines, f"| peak memory: bare, scoring, public way | {sizes} MB |"]


def stopping() -> list[str]:
    cases = result("stopping")["cases"]
    assert all(case["agreement"] == 1 for case in cases.values())
    shares = {name: case["share_of_windows"] for name, case in cases.items()}
    return [
        f"| {name} | {s['median']:.1%} | {s['95th percentile']:.1%} |" for name, s in shares.items()
    ]


def streaming() -> list[str]:
    found = result("streaming")
    run, ratio, need = found["streamed"], found["streamed / floor"], found["llama_2_70b"]
    low, high = sorted((ratio["min"], ratio["max"]))
    spread = f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"
    peak, plan = run["peak_bytes"] / 1e9, run["planned_bytes"] / 1e9
    full, half = (need[kind]["bytes"] / 1e9 for kind in ("float32", "bfloat16"))
    return [
        f"| time for {found['windows']} windows, reading included | {run['seconds']:.0f} s |",
        f"| time / floor: the layers' matrix products alone, and reading the file | {spread} |",
        f"| peak memory of the process | {peak:.2f} GB, planned {plan:.2f} GB |",
        f"| Llama-2-70B, computed from the same plan | {full:.1f} GB, in bfloat16 {half:.1f} GB |",
    ]


def greedy() -> list[str]:
    found = result("greedy")
    time, layers = found["time_ratio"], found["layers_run_ratio"]
    return [
        f"{layers:.3f} of the layers run",
        f"{time['median']:.3f} of the time ({time['min']:.3f} to {time['max']:.3f})",
    ]


def comparison() -> list[str]:
    found = result("compare")
    return [report.compared([Row(**row) for row in found["rows"]], found["agreement"])]


@pytest.mark.parametrize("table", [scoring, stopping, streaming, greedy, comparison])
def test_the_readme_prints_what_was_measured(table):
    for line in table():
        assert line in README, line
