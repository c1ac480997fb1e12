"""The tables of README and docs, made from the benchmarks' JSON files.

mkdocs puts them into the pages while it builds the site: `mkdocs.yml` names this file as a hook.
Where a table goes, a page has a line of its own, which is a link to the numbers for whoever reads
the page's source:

    [Table: cost of scoring](../benchmarks/results/scoring.json)

`TABLES` has the names. A test compares README's table with the files. Tables of closed questions
stand in the pages themselves.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mkdocs.exceptions import PluginError

from benchmarks.lib import adversarial as hostile
from benchmarks.tables import evidence_tables as evidence
from benchmarks.tables.evidence_tables import result


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
        "scoring with products in bfloat16 / bare pass": spread(ratios["mixed / bare"]),
        "public way / bare pass": spread(ratios["public / bare"]),
        "public way / scoring": spread(ratios["public / scoring"]),
        "our bare pass / transformers' `LlamaModel`": spread(ratios["bare / transformers"]),
        "peak memory: bare, scoring, public way": f"{sizes} MB",
    }
    return [f"| {name} | {value} |" for name, value in rows.items()]


def stopping() -> list[str]:
    lines = []
    for name, case in result("stopping")["cases"].items():
        read, misled = case["share_of_windows"], case["misled"]
        cells = [read["median"], read["95th percentile"]]
        wrong = [1 - misled["agreement"], misled["wrong_of_early_stops"]]
        shares = [*(f"{cell:.1%}" for cell in cells), *(f"{cell:.2%}" for cell in wrong)]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


def attacked(kinds: Iterable[str] = hostile.KINDS) -> list[str]:
    rows = []
    for kind in kinds:
        case = result("stopping_adversarial")["kinds"][kind]
        runs, stops = (hostile.shares(case, f"wrong_of_{of}") for of in ("runs", "early_stops"))
        rows.append(f"| {kind} | {runs} | {case['early_stops']:,} | {stops} |")
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


def rehearsed() -> list[str]:
    found = result("reproduce_7b")
    assert all(found["limits"].values())
    formats = [found["formats"][name] for name in ("meta", "hf")]
    runs = [made["continued"] for made in formats]
    read, size, total = (
        {run["windows"] for run in runs},
        found["tokens_per_window"],
        found["windows_of_data"],
    )
    name = f"windows of {size} tokens read until settled, of {total}"
    cells = {
        "files": [f"{made['files']}, {made['bytes'] / 1e9:.1f} GB" for made in formats],
        "the 9 layers come out in their order": [
            "yes" if run["layers"] == found["known"] else "no" for run in runs
        ],
        name: [str(*read)] * 2,
        "stopped after, then continued": [
            f"{made['stopped']['windows_saved']} windows" for made in formats
        ],
        "time per window": [f"{run['seconds_a_window']:.1f} s" for run in runs],
        "scoring / floor: the layers' matrix products, and reading the files once a round": [
            f"{run['scoring / floor']:.2f}" for run in runs
        ],
        "peak memory of the process": [f"{run['peak_bytes'] / 1e9:.2f} GB" for run in runs],
    }
    return [f"| {name} | {' | '.join(values)} |" for name, values in cells.items()]


def refit_streamed() -> list[str]:
    found = result("refit_streamed")
    assert all(found["limits"].values())
    plan, peak, every = (
        found[name] / 1e9 for name in ("planned_bytes", "refit_peak_bytes", "peak_bytes")
    )
    return [
        f"| the refit: {found['matrices']} matrices solved | {found['refit_seconds']:.0f} s |",
        f"| a streamed pass over one window | {found['evaluation_seconds'][0]:.0f} s |",
        f"| the command, which also judges, saves and reads again | {found['seconds']:.0f} s |",
        f"| peak memory of the refit | {peak:.2f} GB, planned {plan:.2f} GB |",
        f"| peak memory of the command | {every:.2f} GB |",
    ]


def serving() -> list[str]:
    """A row for every model that was served: its size, memory and speeds, beside the expected."""
    lines = []
    for row in result("serving")["rows"]:
        which = f"{row['removed']} removed" if row["removed"] else "original"
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


def gemma() -> list[str]:
    """A row for every set of layers removed from a Gemma 3."""
    found, lines = result("gemma_kinds"), list[str]()
    for case in found["rows"]:
        cuts = [case[name] for name in ("ours", "theirs")]
        cells = [f"{cut['difference']:.2f}, {abs(cut['divergence']):.2f}" for cut in cuts]
        names = (case["kinds"], case["kinds_by_position"])
        lines.append(evidence.row(evidence.layer_set(case["removed"]), *names, *cells))
    return lines


def peers() -> list[str]:
    """A row for every tool and number of layers removed."""
    lines = list[str]()
    for own in result("peers")["rows"].values():
        for name, row in own.items():
            change = f"{row['nats']:+.3f} ({row['standard_error']:.3f})"
            cells = [evidence.layer_set(row["layers"]), f"{row['perplexity']:.2f}", change]
            # a shell command for a user, whatever the benchmark calls
            effort = "1 command" if name.endswith("GGUF") else row["lines"]
            lines.append(evidence.row(name, *cells, effort))
    return lines


FAMILIES = {
    "llama": "Llama",
    "qwen3": "Qwen 3",
    "gemma3_text": "Gemma 3",
    "smollm3": "SmolLM3",
    "llama4_text": "Llama 4",
    "qwen3_moe": "Qwen 3 MoE",
}


def kinds() -> list[str]:
    """What cuts of layers that change nothing change, a row for every tiny model."""
    found = result("peers")
    lines = list[str]()
    for family, name in FAMILIES.items():
        cuts = (found["families"][family][tool] for tool in ("ours", "theirs"))
        cells = [f"{cut['in_memory']:.2f}, {cut['from_files']:.2f}" for cut in cuts]
        lines.append(evidence.row(name, *cells, "-"))
    cut = found["gemma3_gguf"][0]
    cells = [f"{cut[tool]['difference']:.2f}" for tool in ("ours", "theirs")]
    lines.append(evidence.row("Gemma 3, GGUF", cells[0], "-", cells[1]))
    return lines


METHODS = {
    "Block Influence": "bi",
    "best angular block": "angular",
    "relative magnitude": "relative_magnitude",
    "greedy search (SLEB)": "sleb",
}


def rows() -> dict[tuple[str, int, str], dict]:
    renamed = {"patched": "patch"}
    rows = result("compare")["rows"]
    return {(r["method"], r["n"], renamed.get(r["healing"], r["healing"])): r for r in rows}


def cell(method: str, n: int, healing: str) -> str:
    """A perplexity with the standard error of its change, by the delta method."""
    row = rows()[method, n, healing]
    return f"{row['perplexity']:.2f} ({row['perplexity'] * row['standard_error']:.2f})"


def short_table() -> list[str]:
    lines = []
    for name, method in METHODS.items():
        cells = [name]
        for n in (4, 8):
            cells += [evidence.layer_set(rows()[method, n, "raw"]["layers"])]
            cells += [cell(method, n, "raw"), cell(method, n, "refit")]
        lines.append(evidence.row(*cells))
    return lines


def compared() -> list[str]:
    """A row for every set of layers: pruned, and healed in every closed form."""
    return [
        evidence.row(
            f"{name}: {evidence.layer_set(rows()[method, n, 'raw']['layers'])}",
            *(cell(method, n, healing) for healing in HEALINGS),
        )
        for n in (4, 8)
        for name, method in METHODS.items()
    ]


TASKS = "| {} of 30 layers removed | original | pruned | refitted | refitted and distilled |"
KEPT = "| layers removed | healed by | mean of nine tasks | share kept (95%) | without boolq (95%) "
KEPT += "| what 'refit, both' adds | without boolq "
KEPT += "| held-out chapters | WikiText-2, second half | novels | core-seconds |"
KEPT_TASKS = "| layers removed | healed by | piqa | arc-easy | winogrande | lambada "
KEPT_TASKS += "| arc-challenge | boolq | openbook-qa | copa | wsc "
KEPT_TASKS += "| svamp, right | svamp, a number |"
SHORT = "| method | 4 layers removed | pruned | refitted | 8 layers removed | pruned | refitted |"
HEALINGS = ("raw", "patch", "refit")
COMPARED = "| removed | pruned | patched | refitted |"
HEALED = "| {} | held-out chapters | WikiText-2, second half | novels |"
CROSSED = "| {}, chosen on | bible | wikitext | novels | questions | code |"
COVERED = "| texts | two-sided, Liang and Zeger | CR2 | used | one-sided, Liang and Zeger "
COVERED += "| CR2 | used | times as wide | no interval |"
GEMMA = "| removed | kinds of the kept layers | kinds by position "
GEMMA += "| ShortGPT's cut: difference, divergence | llama.cpp's cut |"
PEERS = "| tool | layers removed | perplexity | change in nats (error) | lines of code |"
KINDS = "| tiny model | ShortGPT | OptiPFair | llama.cpp |"
LARGER = "| layers removed | | chapters | code | WikiText-2, second half | chat | file, MB |"
STEPS = "| model, layers removed | opening | choosing | refit | distilling | judging | writing "
STEPS += "| all steps | peak memory, against opening and reading |"
SERVED = "| | file, MB | peak, MB | prompt, tokens/s | ratio, expected | writing, tokens/s "
SERVED += "| ratio, expected |"
STOPPED = "| answer | windows read, median | windows read, 95th percentile "
STOPPED += "| misled: early and wrong, of runs | wrong, of early stops |"
BROKEN = "| beyond the promise | early and wrong, of runs | early stops | wrong, of these |"
MISLED = "| what misleads | early and wrong, of runs | early stops | wrong, of these |"


def table(head: str, rows: Callable[[], list[str]]) -> Callable[[], str]:
    """What makes a whole table in Markdown, its head included."""
    return lambda: "\n".join([head, f"|{' --- |' * (head.count('|') - 1)}", *rows()])


# What makes every table of the documentation, by the name that stands in a page.
TABLES: dict[str, Callable[[], str]] = {
    "methods and healings": table(COMPARED, compared),
    "cost of scoring": table("| | median (range) |", scoring),
    **{
        f"tasks with {n} layers removed": table(TASKS.format(n), partial(evidence.tasks, n))
        for n in (2, 4)
    },
    "what healings keep": table(KEPT, evidence.kept),
    "each task": table(KEPT_TASKS, evidence.kept_tasks),
    "three models": table(LARGER, evidence.larger),
    "what three models take": table(STEPS, evidence.taken),
    "word problems": table(
        "| model | layers removed | | svamp, solved | well formed | gsm8k, solved | well formed |",
        evidence.word_problems,
    ),
    "cuts of a Gemma 3": table(GEMMA, gemma),
    "architectures of transformers": table(
        "| outcome | architectures | names | where, and why |", evidence.architectures
    ),
    "other tools": table(PEERS, peers),
    "cuts by other tools": table(KINDS, kinds),
    "automatic choice, means": table(
        "| n | removed by | draws | held-out chapters | WikiText-2, second half | novels "
        "| all kinds | auto without it, all kinds |",
        evidence.automatic_means,
    ),
    "automatic choice": table(
        "| n | draw | removed by | layers | held-out chapters | WikiText-2, second half "
        "| novels | all kinds, against auto |",
        evidence.automatic,
    ),
    "the paper's list, rehearsed": table("| | Meta's format | Hugging Face's |", rehearsed),
    "speed and memory": table(SERVED, serving),
    "layers that each text chooses": table(
        "| ranked on | layers it would remove |", evidence.chosen
    ),
    "agreement of rankings": table(
        "| rankings on | layers in common | rank correlation (95%) |", evidence.agreed
    ),
    "choices on every text, pruned": table(
        CROSSED.format("pruned"), partial(evidence.crossed, "raw")
    ),
    "choices on every text, refitted": table(
        CROSSED.format("refitted"), partial(evidence.crossed, "refit")
    ),
    "coverage of rank correlations": table(
        "| scores of two texts | 6 windows | 12 windows | 24 windows |", evidence.covered
    ),
    "own samples": table(
        "| fitted on | held-out chapters | novels | WikiText-2, second half | own dialogs |",
        evidence.own_samples,
    ),
    "layers chosen on own samples": table(
        "| chosen on | layers | held-out chapters | novels | WikiText-2, second half "
        "| own dialogs |",
        evidence.own_choices,
    ),
    "coverage of intervals": table(COVERED, evidence.intervals),
    "early stops": table(STOPPED, stopping),
    "misleading populations": table(MISLED, attacked),
    "populations beyond the promise": table(BROKEN, partial(attacked, hostile.BEYOND)),
    "streamed scoring": table("| | |", streaming),
    "streamed refit": table("| the streamed refit | measured |", refit_streamed),
    "refit": table(HEALED.format("8 of 30 layers removed"), evidence.refitted),
    "distillation": table(
        HEALED.format("8 of 30 layers removed"), partial(evidence.distilled, "distillation")
    ),
}

START = "[Table:"
PLACEHOLDER = re.compile(r"(?m)^\[Table: ([^\]]+)\]\(\.\./benchmarks/results/\w+\.json\)$")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of every page."""
    return with_tables(markdown, page.file.src_uri)


def with_tables(text: str, page: str) -> str:
    """A page's text with a table for every placeholder.

    Raises:
        PluginError: no table has the name, or a placeholder is not of the form above.
    """
    text = PLACEHOLDER.sub(lambda found: _table(found[1], page), text)
    if START in text:
        line = next(line for line in text.splitlines() if START in line)
        form = f"{START} NAME](../benchmarks/results/FILE.json)"
        raise PluginError(f"{page}: {line}: expected {form} in a line of its own")
    return text


def _table(name: str, page: str) -> str:
    if name not in TABLES:
        raise PluginError(f"{page}: no table is called {name!r}; expected one of {sorted(TABLES)}")
    return TABLES[name]()
