"""The tables and sentences of README and docs, made from the benchmarks' JSON files.

`site_tables.py` puts the tables into the pages when the site is built. A test compares README's
table, and the sentences of all pages, with the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from benchmarks.lib import adversarial as hostile
from benchmarks.tables import evidence_tables as evidence
from benchmarks.tables import healing_tables as healing
from benchmarks.tables.evidence_tables import result
from short_gpt.scoring.stopping import Stop
from short_gpt.selection.search import most_layers_run


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


def least() -> str:
    """What every rule with the same promise has to read, as a sentence."""
    found = result("stopping")
    share = hostile.least_median(Stop(hostile.N, confidence=found["confidence"]), found["windows"])
    return f"the median run cannot read less than {share:.1%} of {found['windows']} windows"


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
        "time per window: predicted, measured": [
            f"{run['seconds_a_window_foretold'][0]:.1f} s, {run['seconds_a_window']:.1f} s"
            for run in runs
        ],
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


def drafted() -> list[str]:
    """A row for every length of a draft, a column for every cut model."""
    cut = [result(f"draft_{n}")["lengths"] for n in (4, 8)]
    lines = []
    for found in zip(*cut, strict=True):
        cells = [f"{100 * f['share']:.1f}% ± {100 * f['reach_95']:.1f}" for f in found]
        cells += [f"{f['tokens_per_pass']:.2f}" for f in found]
        lines.append(f"| {found[0]['length']} | {' | '.join(cells)} |")
    return lines


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


def served_sets() -> str:
    """Which layers are removed from the served models, as a sentence."""
    order = ", ".join(map(str, result("serving")["removed"]))
    return f"with the first 2, 4, 8 or 12 of the layers {order} removed"


def slower() -> str:
    """What drafts are worth in llama.cpp, as a sentence."""
    few, more = result("serving")["drafts"]
    ratios = [spread(d["speed_ratio"], 2) for d in (few, more)]
    return (
        f"With {few['length']} tokens per draft, the original model writes at {ratios[0]} of its "
        f"own speed if the draft lacks {few['removed']} layers, and at {ratios[1]} if it lacks "
        f"{more['removed']}"
    )


def operations(inputs: int, outputs: int) -> float:
    """Floating-point operations to solve ``down_proj`` and ``o_proj``, of these widths."""
    return sum(f**3 / 3 + 2 * f**2 * outputs for f in (inputs, outputs))


def solved() -> str:
    """How long a layer of Llama-3.1-8B is solved at most, from Llama-2-7B's, as sentences."""
    found, (ours, theirs) = result("refit_streamed"), (operations(f, 4096) for f in (14336, 11008))
    seconds, layers = found["refit_seconds"], found["matrices"] // 2
    each, numbers = seconds / layers, [f"{n / 1e12:.2f}" for n in (ours, theirs)]
    return (
        f"of this model {numbers[0]} x 10¹² a layer, and {numbers[1]} x 10¹² with Llama-2-7B's "
        f"shapes (F = 11,008). There, two layers took {seconds:.0f} s on one core, all reading and "
        f"passes included (`benchmarks/results/refit_streamed.json`): {each:.0f} s a layer at "
        f"most, and {each:.0f} x {numbers[0]} / {numbers[1]} = {each * ours / theirs:.0f} s."
    )


def searched() -> str:
    """How many passes a greedy search for 8 of 32 layers takes, as a cell."""
    found, layers = result("greedy"), most_layers_run(32, 8)
    slower = found["time_ratio"]["median"] / found["layers_run_ratio"]
    return (
        f"{layers:,} layers a window on 4 windows: {4 * layers / 32:.0f} passes, in {slower:.1f} "
        "times their bare time"
    )


def refit_passes() -> str:
    """What a refit on 64 windows and three evaluations on 32 take, as a cell."""
    passes = result("healing")["cost"]["refit"]["passes"]
    total = 64 * passes + 3 * 32
    return f"64 windows in {passes:.2f} passes each, 3 x 32 evaluation windows: {total:.0f} passes"


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


def default_cut() -> str:
    """What the layers that OptiPFair removes by default cost, as a part of a sentence."""
    found = result("peers")["rows"]["4"]["OptiPFair, its default"]["perplexity"]
    return f"without its last layers this model's perplexity is {found:,.0f}"


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


def greedy() -> str:
    found = result("greedy")
    time = found["time_ratio"]
    return (
        f"{found['layers_run_ratio']:.3f} of the layers run and {time['median']:.3f} of the time "
        f"({time['min']:.3f} to {time['max']:.3f})"
    )


METHODS = {
    "Block Influence": "bi",
    "best angular block": "angular",
    "relative magnitude": "relative_magnitude",
    "greedy search (SLEB)": "sleb",
}


def rows() -> dict[tuple[str, int, str], dict]:
    former = {"patched": "patch"}
    rows = result("compare")["rows"]
    return {(r["method"], r["n"], former.get(r["healing"], r["healing"])): r for r in rows}


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


def choices() -> list[str]:
    """Every set of a ranking: its perplexity, and how many samples of each kind chose it."""
    found = result("choice_variance")
    methods = {"bi": "Block Influence", "relative_magnitude": "magnitude", "angular": "angle"}
    texts = {"wikitext2_test": "WikiText-2", "lambada_passages": "novels"}

    def column(layers: list[int], text: str, windows: int) -> str:
        own = [c for c in found["choices"] if (c["text"], c["windows"]) == (text, windows)]
        own = [c for c in own if len(c["layers"]) == len(layers)]
        parts = []
        for method, name in methods.items():
            sets = [c["layers"] for c in own if c["method"] == method]
            if layers in sets:
                parts.append(f"{name} {sets.count(layers)} of {len(sets)}")
        return ", ".join(parts)

    lines = []
    for cut in found["sets"]:
        layers, many = cut["layers"], found["windows_to_rank_on"]
        cells = [column(layers, "chapters", n) for n in (many, found["windows_of_a_short_sample"])]
        others = {text: column(layers, text, many) for text in texts}
        cells.append("; ".join(f"{texts[text]}: {c}" for text, c in others.items() if c))
        error = cut["perplexity"] * cut["standard_error"]
        perplexity = f"{cut['perplexity']:.2f} ({error:.2f})"
        lines.append(evidence.row(evidence.layer_set(layers), perplexity, *cells))
    return [line.replace("|  |", "| |").replace("|  |", "| |") for line in lines]


def healed() -> str:
    """What patch and refit restore with 8 layers removed, as sentences."""
    parts = []
    for method, where in (("bi", "With 8 layers removed by Block Influence"), ("sleb", "")):
        raw, patch, refit = (rows()[method, 8, h] for h in ("raw", "patch", "refit"))
        start = where or "With greedy search's 8 removed"
        loss, nats = ("the loss", " nats per token") if where else ("it", "")
        error, ppl = ("standard error ", "perplexity ") if where else ("", "")
        parts.append(
            f"{start}, the patch lowers {loss} by {-patch['gain']:.3f}{nats} "
            f"({error}{patch['gain_error']:.3f}; {ppl}{raw['perplexity']:.2f} to "
            f"{patch['perplexity']:.2f}) and the refit by {-refit['gain']:.3f} "
            f"({refit['gain_error']:.3f}; to {refit['perplexity']:.2f})."
        )
    return " ".join(parts)


TASKS = "| {} of 30 layers removed | original | pruned | refitted | refitted and distilled |"
KEPT = "| layers removed | healed by | mean of nine tasks | share kept (95%) | without boolq (95%) "
KEPT += "| what 'refit, both' adds | without boolq "
KEPT += "| held-out chapters | WikiText-2, second half | novels | core-seconds |"
KEPT_TASKS = "| layers removed | healed by | piqa | arc-easy | winogrande | lambada "
KEPT_TASKS += "| arc-challenge | boolq | openbook-qa | copa | wsc "
KEPT_TASKS += "| svamp, right | svamp, a number |"
NEAREST = "| method | removes | rank, pruned | nats above the best (95%) | rank, refitted "
NEAREST += "| nats above the best (95%) | full refit, nats above sleb's (95%) |"
SHORT = "| method | 4 layers removed | pruned | refitted | 8 layers removed | pruned | refitted |"
HEALINGS = ("raw", "patch", "refit")
COMPARED = "| removed | pruned | patched | refitted |"
CHOSEN = (
    "| layers removed | perplexity | chosen on 24 windows | on 4 windows | on 24 of other text |"
)
BY_SETTING = (
    "| layers removed, and the refit | chapters | WikiText-2, first half | novels | all kinds |"
)
HEALED = "| {} | held-out chapters | WikiText-2, second half | novels |"
CROSSED = "| {}, chosen on | bible | wikitext | novels | questions | code |"
COVERED = "| texts | two-sided, Liang and Zeger | CR2 | used | one-sided, Liang and Zeger "
COVERED += "| CR2 | used | times as wide | no interval |"
DRAFTED = "| tokens per draft | 4 removed: accepted | 8 removed: accepted "
DRAFTED += "| 4 removed: tokens per pass | 8 removed: tokens per pass |"
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
    "choices on other samples": table(CHOSEN, choices),
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
    "how near the best choice": table(NEAREST, healing.nearest),
    "the paper's list, rehearsed": table("| | Meta's format | Hugging Face's |", rehearsed),
    "speed and memory": table(SERVED, serving),
    "drafts": table(DRAFTED, drafted),
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
    "refit": table(HEALED.format("8 of 30 layers removed"), healing.refitted),
    "distillation": table(
        HEALED.format("8 of 30 layers removed"), partial(healing.distilled, "distillation")
    ),
    "ways of training": table(
        "| after the refit | held-out chapters | WikiText-2, second half | novels "
        "| mean of the three | steps |",
        healing.ways,
    ),
    "rates": table(
        "| model, width | rate at the peak | divergence before | after all steps | step kept "
        "| nats, from the refit |",
        healing.rates,
    ),
    "parts of the refit": table(HEALED.format("healed by"), healing.parts),
    "refit by windows": table(HEALED.format("windows"), healing.windows),
    "attention sinks": table(HEALED.format("layers removed"), healing.sinks),
    "steps and realigned inputs": table(BY_SETTING, partial(healing.choices, "refit_usual")),
    "refit by step size and ridge": table(BY_SETTING, partial(healing.choices, "refit_choices")),
}
