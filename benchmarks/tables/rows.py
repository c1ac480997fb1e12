"""The rows of the documentation's tables, made from the benchmarks' JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import adversarial as hostile

RESULTS = Path(__file__).parents[1] / "results"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def layer_set(layers: Iterable[int]) -> str:
    """Layers as a table prints a set of them."""
    return ", ".join(map(str, sorted(layers)))


def spread(values: Mapping[str, float], digits: int = 3) -> str:
    low, high = sorted((values["min"], values["max"]))
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def nats(cell: Mapping[str, float]) -> str:
    """A difference in nats a token, with its standard error."""
    return f"{cell['nats']:+.3f} ({cell['standard_error']:.3f})"


def changed(cell: Mapping[str, float]) -> str:
    return f"{cell['value']:.2f}, {cell['change']:+.2f} ({cell['standard_error']:.2f})"


# Sets of layers

METHODS = {
    "Block Influence": "bi",
    "best angular block": "angular",
    "relative magnitude": "relative_magnitude",
    "greedy search (SLEB)": "sleb",
}


def _compared() -> dict[tuple[str, int, str], dict]:
    rows = result("compare")["rows"]
    return {(r["method"], r["n"], r["healing"].replace("patched", "patch")): r for r in rows}


def _perplexity(found: dict) -> str:
    """A perplexity with the standard error of its change, by the delta method."""
    return f"{found['perplexity']:.2f} ({found['perplexity'] * found['standard_error']:.2f})"


def compared() -> list[str]:
    """A row for every set of layers: pruned, and healed in every closed form."""
    found = _compared()
    return [
        row(
            f"{name}: {layer_set(found[method, n, 'raw']['layers'])}",
            *(_perplexity(found[method, n, healing]) for healing in ("raw", "patch", "refit")),
        )
        for n in (4, 8)
        for name, method in METHODS.items()
    ]


CANDIDATES = {
    "bi": "Block Influence",
    "angular": "best angular block",
    "relative_magnitude": "relative magnitude",
    "sleb": "greedy search",
    "stepwise_bi": "`stepwise_bi`",
}


def automatic() -> list[str]:
    """By number of layers and candidate: nats above auto's set."""
    lines = []
    for found in sorted(result("choices")["means"], key=lambda found: found["n"]):
        for name in [name for name in CANDIDATES if name in found["from auto"]]:
            own = found["from auto"][name]["all three kinds"]
            worse = nats(own) if own["standard_error"] else "the same set"
            lines.append(row(f"{found['n']} layers: {CANDIDATES[name]}", worse))
    return lines


# Layers and bits

WORTH = {"worth_05b": "Qwen2.5-Coder-0.5B"}
FRONTS = {"front_smollm2": "SmolLM2-135M"}
ON, WORK = ("wikitext", "answers"), ("prompt", "generation")


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other is as small in both numbers, from left to right."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def fronts() -> list[str]:
    """By model, the files on the front of bytes and KL divergence on WikiText-2, up to 1 nat."""
    lines = []
    for file, model in FRONTS.items():
        found = {(row["bytes"], row["wikitext"]["kld"]): row for row in result(file)["rows"]}
        for point in (point for point in front(found) if point[1] < 1):
            own = found[point]
            cells = [f"{own[text]['kld']:.3f} ({own[text]['same_top']:.0%})" for text in ON]
            times = [(own["speeds"] and f"{own['speeds'][w]['ratio']:.2f}") or "-" for w in WORK]
            title = f"{model}, {own['removed']} removed"
            lines.append(row(title, own["types"][3:], f"{point[0] / 1e6:.0f}", *cells, *times))
    return lines


# Three models, and word problems

MODELS = {
    "larger_smollm2": "SmolLM2-135M",
    "larger_05b": "Qwen2.5-Coder-0.5B",
    "larger": "Qwen2.5-Coder-1.5B",
}
ASKED = {"reasoning": MODELS["larger_05b"], "reasoning_15b": MODELS["larger"]}  # word problems


def larger() -> list[str]:
    """By model and set: changes of the loss on WikiText-2, the minutes of all steps, the memory."""
    lines = []
    for file, model in MODELS.items():
        for own in result(file)["rows"].values():
            title = f"{model}, {len(own['layers'])} of {own['of']}"
            states = [own["texts"]["wikitext"][state] for state in ("pruned", "refit", "healed")]
            margins = [f"{cell['change']:+.3f} (±{cell['reach_95']:.3f})" for cell in states]
            minutes = sum(step["seconds"] for step in own["steps"].values()) / 60
            peak = max(step["peak_mb"] for step in own["steps"].values()) / 1e3
            lines.append(row(title, *margins, f"{minutes:.0f}", f"{peak:.1f} GB"))
    return lines


def word_problems() -> list[str]:
    """Shares of word problems solved, and the changes, paired."""
    lines = []
    for file, model in ASKED.items():
        for name, own in result(file)["rows"].items():
            state = name.rpartition(", ")[2]
            title = {"original": model, "pruned": f"without {layer_set(own['layers'])}"}
            cells = [own["from original"][f"{task} exact_match"] for task in ("svamp", "gsm8k")]
            shares = [f"{c['value']:.2f}" if state == "original" else changed(c) for c in cells]
            lines.append(row(title.get(state, ""), state, *shares))
    return lines


# Calibration text


def crossed() -> list[str]:
    """What every choice and its refit cost beyond the text's own, on every text."""
    found = result("calibration")["calibration"]
    cells = [cell for cell in found["cells"] if cell["healing"] == "refit"]
    lines = []
    for choice, layers in found["choices"].items():
        own = [_crossed(cell) for cell in cells if cell["choice"] == choice]
        lines.append(row(f"{choice}: {layer_set(layers)}", *own))
    return lines


def _crossed(cell: dict) -> str:
    if cell["choice"] == cell["text"]:
        return f"perplexity {cell['perplexity']:.2f}"
    return f"{cell['excess']:+.3f} ({cell['excess_error']:.3f})"


FITTED_ON = ("book-24", "book+wikitext-24", "own-24", "own-192", "a third each-24")
FITTED_ON += ("book+wikitext-96", "book+wikitext+own-96")


def own_samples() -> list[str]:
    """Nats above the original model, by what the refit was fitted on."""
    rows = result("own_samples")["rows"]
    return [row(name, *map(nats, rows[name].values())) for name in ("pruned", *FITTED_ON)]


def own_dialogs() -> list[str]:
    """By what the refit was fitted on: KL divergence and same top token by text, and answers."""
    found, lines = result("own_dialogs"), []
    names = {"none": "pruned", "book": "the book", "half of each": "half of each (`self`)"}
    for cell, own in found["rows"].items():
        kind = cell.split(", ")[1]
        each = [own[text] for text in ("wikitext", "book", "answers")]
        distances = [f"{text['kld']:.3f} ({text['same_top']:.0%})" for text in each]
        right = f"{own['right']}, {own['kept']} of the original's {found['original_right']}"
        lines.append(row(names.get(kind, kind), *distances, right))
    return lines


# Tasks

HEALED = {
    "pruned": "pruned",
    "linearpatch": "LinearPatch",
    "ghosted": "Ghosted Layers",
    "replaceme": "ReplaceMe, least squares",
    "layerwise": "layers trained one by one",
    "refit-text": "refit, real text",
    "refit-own": "refit, own samples",
    "refit": "refit, both",
    "distilled": "refit, both, and distilled",
}
SETS = {"auto": "auto", "bi": "Block Influence"}


def kept() -> list[str]:
    """Which share of the mean over eight tasks each healing keeps, and nats above the original."""
    found, lines = result("kept"), []
    for chosen, chooser in SETS.items():
        for healed in HEALED if chosen == "auto" else ("pruned", "refit", "distilled"):
            own = found["rows"][f"{chosen} {healed}"]
            title = f" ({chooser}: {layer_set(found['layers'][chosen])})"
            cells = [HEALED[healed] + (title if healed == "pruned" else "")]
            cells.append(share(own["without boolq"]))
            lines.append(row(*cells, *map(nats, own["texts"].values())))
    return lines


def share(mean: dict) -> str:
    """Of the original's mean, what is kept, with its 95% interval."""
    return "{:.1%} ({:.1%} to {:.1%})".format(mean["share"], *mean["interval_95"])


TASKS = {"lambada_openai acc": "lambada, last word"}
TEXTS = {
    "held-out chapters": "chapters",
    "WikiText-2": "WikiText-2, second half",
    "turns": "right answers in the chat template",
}


def tasks() -> list[str]:
    """Tasks, perplexities and completions with 4 layers removed, and what each lost."""
    states = ("whole", "4 less", "4 less, refitted", "4 less, distilled")
    rows = [result("tasks")["rows"][state] for state in states]
    lines = []
    for name, title in TASKS.items():
        first, *others = (found["tasks"][name] for found in rows)
        lines.append(row(title, f"{first['value']:.2f}", *map(changed, others)))
    for kind in rows[0]["texts"]:
        first, *others = (found["texts"][kind] for found in rows)
        title = f"perplexity: {TEXTS.get(kind, kind)}"
        cells = [f"{cell['perplexity']:.2f}, {nats(cell)}" for cell in others]
        lines.append(row(title, f"{first['perplexity']:.2f}", *cells))
    same, again = (
        [sum(found[key]) / len(found[key]) for found in rows]
        for key in ("same_tokens", "repetition")
    )
    length = result("tasks")["completion"]
    lines.append(row("greedy tokens equal", length, *(f"{value:.1f}" for value in same[1:])))
    lines.append(row("repeated 4-grams", *(f"{value:.0%}" for value in again)))
    return lines


# Healing


def refitted() -> list[str]:
    """Block Influence's layers and auto's: perplexities, and the share of the lost nats back."""
    every = [distilled(name) for name in ("healing", "healing_own")]
    return [*every[0], *every[1][1:]]  # the original once


def distilled(name: str = "distillation") -> list[str]:
    """The same of a model that is refitted and then distilled."""
    found = result(name)
    names = {"whole": "original", "cut": f"pruned: {layer_set(found['layers'])}"}
    names |= {"refit": "refitted", "distill": "refitted and distilled"}
    return [_healed(names[state], kinds) for state, kinds in found["rows"].items()]


def _healed(name: str, kinds: Mapping[str, Mapping[str, float]]) -> str:
    """Perplexities and, after the comma, the restored share of the lost nats."""
    plain = name.startswith(("original", "pruned"))
    shares = ["" if plain else f", {kind['restored']:.0%}" for kind in kinds.values()]
    values = [f"{kind['perplexity']:.2f}" for kind in kinds.values()]
    return row(name, *map("".join, zip(values, shares, strict=True)))


def ways() -> list[str]:
    """Ways of training for the same time: steps, and nats from the refit on each text."""
    return [
        row(name, own["steps"], *(nats(own[kind]["from refit"]) for kind in KINDS_TRAINED))
        for name, own in result("training_choices")["rows"].items()
        if name in ("lora", "lora-all-maps", "full-1e-4")
    ]


KINDS_TRAINED = ("book", "wikitext", "novels")
RATES = {"training_rates_smollm2": "larger_smollm2", "training_rates_05b": "larger_05b"}
RATES |= {"training_rates": "larger"}


def rates() -> list[str]:
    """By model and peak rate: the divergence before and after, and nats from the refit."""
    lines = []
    for file, model in RATES.items():
        found = result(file)
        for rate, own in found["rows"].items():
            if rate in ("0.002", "0.0005"):  # between and beyond the others
                continue
            before, *_, after = own["divergence"].values()
            kept = nats(own) if own["kept"] != "0" else "no step kept"
            title = f"{MODELS[model]}, width {found['width']}"
            lines.append(row(title, rate, f"{before:.3f}, {after:.3f}", kept))
    return lines


def trained_tokens() -> list[str]:
    """By tokens of training after the refit: distances from the original, and answers kept."""
    found, lines = result("answers_smollm2")["rows"], []
    before = found["original"]["right"]
    names = {"pruned": "pruned", "0": "refit"}
    for name, own in found.items():
        if name == "original":
            continue
        distances = [
            f"{own[kind]['kld']:.3f} ({own[kind]['same_top']:.0%})"
            for kind in ("wikitext", "answers")
        ]
        kept = sum(a and b for a, b in zip(before, own["right"], strict=True))
        trained = f"refit, then {own['tokens']:,} tokens" if "tokens" in own else names[name]
        lines.append(row(trained, *distances, f"{kept} of {sum(before)}"))
    return lines


def sinks() -> list[str]:
    """By set: the refit's perplexity on novels, plain weights and lost sinks weighed more."""
    step, lines = "step 0.5, ridge 2 F / N", []
    for file, model in (("refit_sinks", ""), ("refit_sinks_05b", "0.5B, ")):
        for name, own in result(file)["sets"].items():
            cells = [own["sinks"][cell] for cell in (f"{step}, sinks as other tokens", step)]
            found = [cell["kinds"]["lambada_passages"] for cell in cells]
            values = [f"{cell['perplexity']:,.2f}" for cell in found]
            lines.append(row(f"{model}{name}", *values, nats(found[1])))
    return lines


def parts(group: str) -> list[str]:
    """The share of the lost nats that each part of the refit, or amount of text, restores."""
    return [
        row(name, *(f"{kind['restored']:.0%}" for kind in own["healed"].values()))
        for name, own in result("refit_parts")["groups"][group].items()
    ]


UNTABLED = ("local", "(ridge 0.1)", " 0.03", " 0.3", " ridge F / N")  # of no use today, or between


def steps_and_ridges() -> list[str]:
    """Nats above the default step and ridge, over three kinds of text, for two sets of layers."""
    sets = result("refit_choices")["sets"].values()
    every = [own["usual"] | own["ridges"] for own in sets]
    default, *others = [name for name in every[0] if not name.endswith(UNTABLED)]
    lines = [row(f"{default} (the default)", *["0"] * len(every))]
    for name in others:
        lines.append(row(name, *(nats(own[name]["kinds"]["all three kinds"]) for own in every)))
    return lines


# Errors and early stops


def covering(found: dict) -> list[str]:
    """By kind of texts, alike within a text: the least share of all numbers of texts."""
    lines = []
    for kind, cases in found["kinds"].items():
        if not kind.endswith("independent windows"):
            shares = [min(case[rule]["two_sided"] for case in cases.values()) for rule in RULES]
            unknown = max(case["no_interval"] for case in cases.values())
            lines.append(row(kind, *(f"{share:.1%}" for share in (*shares, unknown))))
    return lines


RULES = ("former", "new")  # of errors over texts


def stopping() -> list[str]:
    lines = []
    for name, case in result("stopping")["cases"].items():
        read, wrong = case["share_of_windows"], 1 - case["misled"]["agreement"]
        shares = [f"{read[of]:.1%}" for of in ("median", "95th percentile")]
        lines.append(row(name, *shares, f"{wrong:.2%}"))
    return lines


def attacked() -> list[str]:
    """The four populations that mislead most often."""
    kinds = result("stopping_adversarial")["kinds"]
    worst = sorted(kinds, key=lambda kind: kinds[kind]["wrong_of_runs"], reverse=True)[:4]
    return [
        row(kind, hostile.shares(kinds[kind], "wrong_of_runs"), f"{kinds[kind]['early_stops']:,}")
        for kind in worst
    ]


# Time and memory


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
        "our bare pass / transformers' `LlamaModel`": spread(ratios["bare / transformers"]),
        "peak memory: bare, scoring, public way": f"{sizes} MB",
    }
    return [row(*cells) for cells in rows.items()]


def streaming() -> list[str]:
    found = result("streaming")
    run, need = found["streamed"], found["llama_2_70b"]
    peak, plan = run["peak_bytes"] / 1e9, run["planned_bytes"] / 1e9
    full, half = (need[kind]["bytes"] / 1e9 for kind in ("float32", "bfloat16"))
    return [
        row(f"time for {found['windows']} windows, reading included", f"{run['seconds']:.0f} s"),
        row("time / floor (the layers' products alone)", spread(found["streamed / floor"], 2)),
        row("peak memory of the process", f"{peak:.2f} GB, planned {plan:.2f} GB"),
        row("Llama-2-70B, by the same plan", f"{full:.1f} GB, in bfloat16 {half:.1f} GB"),
    ]


def refit_streamed() -> list[str]:
    found = result("refit_streamed")
    assert all(found["limits"].values())
    plan, peak = (found[name] / 1e9 for name in ("planned_bytes", "refit_peak_bytes"))
    return [
        row(f"the refit: {found['matrices']} matrices", f"{found['refit_seconds']:.0f} s"),
        row("a streamed pass over one window", f"{found['evaluation_seconds'][0]:.0f} s"),
        row("the whole command, verification included", f"{found['seconds']:.0f} s"),
        row("peak memory", f"{peak:.2f} GB, planned {plan:.2f} GB"),
    ]


def serving() -> list[str]:
    """By format and layers removed: the size and speeds, beside the expected."""
    lines = []
    for own in result("serving")["rows"]:
        if own["removed"] not in (0, 4, 8) or own["kind"] != "Q4_1":
            continue
        cells = [f"{own['kind']}, {own['removed']} removed", f"{own['megabytes']:.0f}"]
        for name in ("prompt", "generation"):
            ratio, expected = spread(own[f"{name}_ratio"], 2), own[f"{name}_expected"]
            speed = f"{own[name]['median']:.0f} tokens/s"
            cells.append(f"{ratio}, {expected:.2f}" if own["removed"] else speed)
        lines.append(row(*cells))
    return lines


def worth() -> list[str]:
    """README's: what `shrink` gives for models that people know, beside the same in fewer bits."""
    lines = []
    for name, model in WORTH.items():
        own = result(name)["result"]
        right = {state: each["right"] for state, each in own["answers"].items()}
        kept = sum(a and b for a, b in zip(right["original"], right["healed"], strict=True))
        healed, rival = own["states"]["healed"], own["rivals"][0]
        speeds = {
            state: ", ".join(f"{each[work]['ratio']:.2f}" for work in WORK)
            for state, each in own["speeds"].items()
        }
        lines.append(
            row(
                model,
                f"{len(own['layers'])} of {own['total']}",
                ", ".join(f"{each['healed']['kld']:.3f}" for each in own["quality"].values()),
                f"{kept} of {sum(right['original'])}",
                speeds["healed"],
                f"{healed['size'] / 1e6:.0f} MB",
                ", ".join(f"{each['kld']:.3f}" for each in rival["quality"].values()),
                speeds[rival["name"]],
                f"{rival['size'] / 1e6:.0f} MB",
            )
        )
    return lines


# Formats and other tools

NEEDED = ("mlx", "onnx", "onnx-ir")  # by another package, whose version is shown


def servers() -> list[str]:
    """By program: the largest difference of a log probability, or the mean of large ones."""
    lines = []
    for name, own in result("servers")["rows"].items():
        versions = {n: v for n, v in own.get("versions", {}).items() if n not in NEEDED}
        title = f"{name} ({', '.join(map(' '.join, versions.items()))})" if versions else name
        if "failed" in own:
            lines.append(row(title, "failed", ""))
            continue
        both = [own[state] for state in ("pruned", "healed")]
        near = all(one["largest"] < 0.01 for one in both)
        cells = [f"{one['largest']:.0e}" if near else f"{one['mean']:.2f}" for one in both]
        shares = [f"{one['same_top']:.0%}" for one in both if one["same_top"] is not None]
        found = ", ".join(cells) + ("" if near else " on average")
        lines.append(row(title, found, ", ".join(dict.fromkeys(shares)) or "-"))
    return lines


def gemma() -> list[str]:
    """A row for every set of layers removed from a Gemma 3."""
    lines = []
    for case in result("gemma_kinds")["rows"]:
        cuts = [f"{case[name]['difference']:.2f}" for name in ("ours", "theirs")]
        names = (case["kinds"], case["kinds_by_position"])
        lines.append(row(layer_set(case["removed"]), *names, *cuts))
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
    found, lines = result("peers"), []
    for family, name in FAMILIES.items():
        cuts = (found["families"][family][tool] for tool in ("ours", "theirs"))
        lines.append(row(name, *(f"{cut['from_files']:.2f}" for cut in cuts), "-"))
    cut = found["gemma3_gguf"][0]
    ours, theirs = (f"{cut[tool]['difference']:.2f}" for tool in ("ours", "theirs"))
    lines.append(row("Gemma 3, GGUF", ours, "-", theirs))
    return lines


def architectures() -> list[str]:
    """A row for each outcome; the architectures that work are all others."""
    groups: dict[str, list[str]] = {}
    for name, found in result("architectures")["rows"].items():
        groups.setdefault(found["outcome"], []).append(f"`{name}`")
    names = {outcome: ", ".join(n) for outcome, n in groups.items()}
    names["works"] = "all others"
    return [row(f"{outcome}, {len(n)}", names[outcome]) for outcome, n in groups.items()]
