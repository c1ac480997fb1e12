"""Tables of choices, calibration text, tasks, answers and healing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
HEALINGS = ("", ", refitted", ", distilled")
# Of WikiText-2's test text the first half was fitted on: the name says which half is judged by.
TEXTS = {
    "turns": "right answers in the chat template",
    "WikiText-2": "WikiText-2, second half",
}


def result(name: str) -> dict:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def layer_set(layers: Iterable[int]) -> str:
    """Layers as a table prints a set of them."""
    return ", ".join(map(str, sorted(layers)))


CHOICES = {
    "bi": "Block Influence",
    "angular": "best angular block",
    "relative_magnitude": "relative magnitude",
    "sleb": "greedy search",
    "stepwise_bi": "`stepwise_bi`",
    "auto without swaps": "auto without swaps",
    "auto": "**auto**",
}
KINDS = ("held-out chapters", "other half of the second text", "lambada_passages")


def automatic_means() -> list[str]:
    """By number of layers and candidate: nats above auto's set, and what it brings auto."""

    def nats(found: Mapping[str, Any]) -> str:
        if not found["standard_error"]:
            return "the same"  # sets
        return f"{found['nats']:+.3f} ({found['standard_error']:.3f})"

    lines = []
    for found in sorted(result("choices")["means"], key=lambda found: found["n"]):
        for name in [name for name in CHOICES if name in found["from auto"]]:
            own, brings = found["from auto"][name], found["without it"].get(name)
            cells = [nats(own[kind]) for kind in (*KINDS, "all three kinds")]
            cells.append(nats(brings["all three kinds"]) if brings else "")
            lines.append(row(found["n"], CHOICES[name], own["draws"], *cells))
    return lines


def automatic() -> list[str]:
    """Sets of the automatic choice and of its candidates, refitted, by draw of calibration text."""
    lines = []
    for found in sorted(result("choices")["rows"], key=lambda found: (found["n"], found["draw"])):
        methods: dict[str, list[str]] = {}  # by their set of layers
        for method, layers in found["sets"].items():
            methods.setdefault(layer_set(layers), []).append(method)
        for layers, own in methods.items():
            cells = found["from auto"][own[0]]
            change = cells["all three kinds"]
            nats = (
                "" if "auto" in own else f"{change['nats']:+.3f} ({change['standard_error']:.3f})"
            )
            who = ", ".join(CHOICES[method] for method in own)
            values = [f"{cells[kind]['perplexity']:.2f}" for kind in KINDS]
            lines.append(row(found["n"], found["draw"] + 1, who, layers, *values, nats))
    return lines


def chosen() -> list[str]:
    """The layers that each text would remove."""
    choices = result("calibration")["calibration"]["choices"]
    return [row(name, layer_set(layers)) for name, layers in choices.items()]


def agreed() -> list[str]:
    """How far rankings agree, of two texts and of two halves of one."""
    found = result("calibration")["calibration"]
    lines = [_agreement(a) for a in found["agreement"]]
    for way, own in found["ways"].items():
        lines += [_agreement(a, f"{a['first']}, {way}") for a in own]
    return lines


def _agreement(found: dict, name: str | None = None) -> str:
    a, b = found["first"], found["second"]
    name = name or (f"{a}, its halves" if a == b else f"{a}, {b}")
    low, high = found["interval"]
    value = f"{found['correlation']:.3f} ({low:.3f} to {high:.3f})"
    return row(name, f"{found['shared']} of {found['n']}", value)


def crossed(healing: str) -> list[str]:
    """Every choice on every text: perplexity, and what it costs beyond the text's own choice."""
    found = result("calibration")["calibration"]
    cells = [c for c in found["cells"] if c["healing"] == healing]
    lines = []
    for choice in dict.fromkeys(c["choice"] for c in cells):
        own = [c for c in cells if c["choice"] == choice]
        name = f"{choice}: {layer_set(found['choices'][choice])}"
        lines.append(row(name, *(_crossed(c) for c in own)))
    return lines


def _crossed(cell: dict) -> str:
    if cell["choice"] == cell["text"]:
        return f"**{cell['perplexity']:.2f}**"
    return f"{cell['perplexity']:.2f}, {cell['excess']:+.3f} ({cell['excess_error']:.3f})"


def own_samples() -> list[str]:
    """Perplexity by what the refit was fitted on, and nats above the original model."""
    rows = result("own_samples")["rows"]
    return [row(name, *map(_own, cells.values())) for name, cells in rows.items()]


def own_choices() -> list[str]:
    """The layers that Block Influence chooses on own samples and on real text, as pruned."""
    found = result("own_samples")["choices"]["sets"]
    texts = {"book": "24 windows of the book", "novels": "24 of novels", "own-24": "24 of own text"}
    return [
        row(
            texts[name],
            layer_set(own["layers"]),
            *(_own(cell) for kind, cell in own.items() if kind != "layers"),
        )
        for name, own in found.items()
    ]


def _own(cell: dict) -> str:
    if not cell["nats"]:
        return f"{cell['perplexity']:.2f}"
    return f"{cell['perplexity']:.2f}, {cell['nats']:+.3f} ({cell['standard_error']:.3f})"


MODELS = {
    "larger_smollm2": "SmolLM2-135M",
    "larger_05b": "Qwen2.5-Coder-0.5B",
    "larger": "Qwen2.5-Coder-1.5B",
}
ASKED = {"reasoning": MODELS["larger_05b"], "reasoning_15b": MODELS["larger"]}  # word problems
TEXT_KINDS = ("prose", "code", "wikitext", "chat")


def larger() -> list[str]:
    """Perplexities of three models on every kind of text: original, pruned, refitted, distilled."""
    lines = []
    for file, model in MODELS.items():
        found = result(file)
        for place, own in enumerate(found["rows"].values()):
            for state in [*own["texts"]["prose"]][place > 0 :]:
                cells = [_judged(own["texts"][kind][state]) for kind in TEXT_KINDS]
                size = {"original": found["megabytes"], "healed": own["file_megabytes"]}
                removed = "none" if state == "original" else layer_set(own["layers"])
                about = f"{model}, {own['of']} layers, {own['windows'][0]} windows"
                title = removed if place else f"{about}: {removed}"
                cells.append(f"{size[state]:.0f}" if state in size else "")
                title = title if state in ("original", "pruned") else ""
                name = {"refit": "refitted", "healed": "distilled"}.get(state, state)
                lines.append(row(title, name, *cells))
    return lines


def _judged(cell: dict) -> str:
    if not cell["change"]:
        return f"{cell['perplexity']:.2f}"
    return f"{cell['perplexity']:.2f}, {cell['change']:+.3f} ± {cell['reach_95']:.3f}"


# of the steps of `larger.py`, those that a column adds up
STEPS: list[tuple[str, ...]] = [("opening",), ("choosing",), ("refit",), ("healing",)]
STEPS += [("judging", "judging the refit"), ("writing and reading again", "llama.cpp")]


def taken() -> list[str]:
    """The minutes of every step and the bare passes over a window in them, and the peak memory."""
    lines = []
    for file, model in MODELS.items():
        for own in result(file)["rows"].values():
            cells = []
            for parts in (*STEPS, tuple(own["steps"])):
                steps = [own["steps"][part] for part in parts if part in own["steps"]]
                minutes = sum(step["seconds"] for step in steps) / 60
                passes = sum(step["bare_windows"] for step in steps)
                cells.append(f"{minutes:.1f} ({passes:.0f})")
            peak = max(step["peak_mb"] for step in own["steps"].values())
            cells.append(f"{peak / 1e3:.1f} GB, {peak / own['bare']['peak_mb']:.2f} times")
            lines.append(row(f"{model}, {len(own['layers'])} of {own['of']}", *cells))
    return lines


def word_problems() -> list[str]:
    """Shares of word problems solved and answered with a number, and the changes, paired."""
    lines = []
    for file, model in ASKED.items():
        for name, own in result(file)["rows"].items():
            state = name.rpartition(", ")[2]
            title = {"original": "none", "pruned": layer_set(own["layers"])}.get(state, "")
            cells = [_solved(cell, state) for cell in own["from original"].values()]
            of = model if state == "original" else ""
            lines.append(row(of, title, state, *cells, *["-"] * (4 - len(cells))))
    return lines


def _solved(cell: dict, state: str) -> str:
    if state == "original":
        return f"{cell['value']:.2f}"
    return f"{cell['value']:.2f}, {cell['change']:+.2f} ({cell['standard_error']:.2f})"


def covered() -> list[str]:
    """How often the interval of a rank correlation holds it, in simulated texts."""
    found = result("calibration")["coverage"]
    kinds = dict.fromkeys(name.split(", ", 1)[1] for name in found)
    counts = dict.fromkeys(name.split(" ", 1)[0] for name in found)
    return [row(k, *(f"{found[f'{n} windows, {k}']:.0%}" for n in counts)) for k in kinds]


def intervals() -> list[str]:
    """How often intervals of 95% hold, and their one-sided ends, in simulated texts."""
    return covering(result("coverage"))


def covering(found: dict) -> list[str]:
    """A row for every kind of texts: the least of all numbers of texts, before and now."""
    return [_least(kind, list(own.values())) for kind, own in found["kinds"].items()]


def _least(kind: str, cases: list[dict]) -> str:
    ends = [
        f"{min(min(case[rule][end] for end in ends) for case in cases):.1%}"
        for ends in (("two_sided",), ("upper", "lower"))
        for rule in ("former", "cr2", "new")
    ]
    wider = [case["new"]["width"] / case["former"]["width"] for case in cases]
    without = max(case["no_interval"] for case in cases)
    return row(kind, *ends, f"{min(wider):.2f} to {max(wider):.2f}", f"{without:.1%}")


def tasks(count: int) -> list[str]:
    """Tasks, perplexities and completions with so many layers less, and what each lost."""
    names = ["whole", *(f"{count} less{healing}" for healing in HEALINGS)]
    rows = {name: result("tasks")["rows"][name] for name in names}
    layers = layer_set(result("tasks")["layers"][str(count)])
    lines = [row("layers removed", "none", *[layers] * len(HEALINGS))]
    for name in rows["whole"]["tasks"]:
        own = [found["tasks"][name] for found in rows.values()]
        cells = [f"{c['value']:.3f}, {c['change']:+.3f} ({c['standard_error']:.3f})" for c in own]
        title = name.replace("perplexity", "log-likelihood of the word, nats").replace("_", "-")
        lines.append(row(title, f"{own[0]['value']:.3f}", *cells[1:]))
    for kind in rows["whole"]["texts"]:
        own = [found["texts"][kind] for found in rows.values()]
        cells = [_text(c) for c in own]
        title = TEXTS.get(kind, kind)
        lines.append(row(f"perplexity: {title}", f"{own[0]['perplexity']:.2f}", *cells[1:]))
    same, again = (
        [sum(found[key]) / len(found[key]) for found in rows.values()]
        for key in ("same_tokens", "repetition")
    )
    length = result("tasks")["completion"]
    lines.append(row("greedy tokens equal to the original model's", f"all {length}", *_means(same)))
    lines.append(row("repeated 4-grams", *(f"{v:.0%}" for v in again)))
    return lines


HEALED = {
    "pruned": "-",
    "linearpatch": "LinearPatch",
    "ghosted": "Ghosted Layers",
    "replaceme": "ReplaceMe, least squares",
    "layerwise": "layers trained one by one",
    "refit-text": "refit, real text",
    "refit-own": "refit, own samples",
    "refit": "refit, both",
    "distilled": "refit, both, and distilled",
    "refit-mixed": "refit, both, products in bfloat16",
    "distilled-mixed": "refit, both, and distilled, products in bfloat16",
}


def _kept_rows() -> list[tuple[str, str, dict]]:
    """Of every row of kept.json: the layers where they are new, what healed it, and itself."""
    found, shown = result("kept"), ""
    rows = []
    for name, own in found["rows"].items():
        chosen, _, healed = name.partition(" ")
        layers = layer_set(found["layers"][chosen]) if healed else "none"
        rows.append((layers if layers != shown else "", HEALED[healed] if healed else "", own))
        shown = layers
    return rows


def kept() -> list[str]:
    """Which share of the mean over tasks each healing keeps, and perplexities."""
    lines = []
    for layers, healed, own in _kept_rows():
        mean, healing = own["mean"], own["healing"]
        cells = [f"{mean['value']:.3f}", "", ""]
        if healed:
            cells = [f"{mean['value']:.3f}, {mean['change']:+.3f} ({mean['standard_error']:.3f})"]
            cells += [share(mean), share(own["without boolq"])]
        better = own["refit against it"]
        cells += [_added(better), _added(better["without boolq"])] if better else ["", ""]
        texts = [_text(c) if healed else f"{c['perplexity']:.2f}" for c in own["texts"].values()]
        seconds = f"{healing['processor_seconds']:.0f}" if healing else ""
        lines.append(row(layers, healed, *cells, *texts, seconds))
    return lines


def kept_tasks() -> list[str]:
    """Each task of the same rows: what counts for the mean, and the word problems."""
    lines = []
    for layers, healed, own in _kept_rows():
        cells = [f"{value:.3f}" for value in _judging(own).values()]
        svamp = [own["tasks"][f"svamp {name}"]["value"] for name in ("exact_match", "well_formed")]
        lines.append(row(layers, healed, *cells, *(f"{value:.2f}" for value in svamp)))
    return lines


def _judging(own: dict) -> dict[str, float]:
    """What counts for the mean, by task: acc_norm where there is one, else acc."""
    values = {name: cell["value"] for name, cell in own["tasks"].items()}
    tasks = [name.removesuffix(" acc") for name in values if name.endswith(" acc")]
    return {task: values.get(f"{task} acc_norm", values[f"{task} acc"]) for task in tasks}


def _added(change: dict) -> str:
    return f"{change['change']:+.3f} ({change['standard_error']:.3f})"


def share(mean: dict) -> str:
    """Of the original's mean, what is kept, with its 95% interval."""
    return "{:.1%} ({:.1%} to {:.1%})".format(mean["share"], *mean["interval_95"])


def _text(cell: dict) -> str:
    return f"{cell['perplexity']:.2f}, {cell['nats']:+.3f} ({cell['standard_error']:.3f})"


def _means(values: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in values[1:]]


def architectures() -> list[str]:
    """A row for each outcome, and one for each architecture that does not work."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, found in result("architectures")["rows"].items():
        groups.setdefault((found["outcome"], reason(found)), []).append(f"`{name}`")
    order = ("works", "not refitted", "refused", "FAILS", "not built")
    rows = sorted(groups.items(), key=lambda item: (order.index(item[0][0]), -len(item[1])))
    return [row(outcome, str(len(n)), ", ".join(n), why) for (outcome, why), n in rows]


def reason(found: Mapping[str, Any]) -> str:
    """Why an architecture does not work, in one cell; the classes' own names left out."""
    if found["outcome"] == "works":
        return ""
    stage, text = next(
        (name, text)
        for name, text in found["stages"].items()
        if not text.startswith(("ok", "theirs")) or found["outcome"] == "not built"
    )
    text = text.removeprefix("refused: ").removeprefix("nothing of this model can be refitted: ")
    text = re.sub(r" \(looked for .*?\)|; name one with layers_path.*|^\w+Error: ", "", text)
    text = re.sub(
        r"\b[A-Z][A-Za-z0-9_]+(Model|LM|LMHeadModel|Layer|Block|Generation|RMSNorm)\b",
        "the model",
        text,
    )
    return f"{stage}: {text}".replace("|", "\\|")


def refitted() -> list[str]:
    """Block Influence's layers and auto's: perplexities, and the share of the lost nats back."""
    every = [distilled(name) for name in ("healing", "healing_own")]
    return [*every[0], *every[1][1:]]  # the original once


def distilled(name: str) -> list[str]:
    """The same of a model that is refitted and then distilled."""
    found = result(name)
    names = {"whole": "original", "cut": _pruned(found["layers"])}
    return [healed(names.get(row, row), kinds) for row, kinds in found["rows"].items()]


def healed(name: str, kinds: Mapping[str, Mapping[str, float]]) -> str:
    """A row of a model: perplexities and, after the comma, the restored share of the lost nats."""
    plain = name.startswith(("original", "pruned"))
    share = [None if plain else found["restored"] for found in kinds.values()]
    cells = zip([found["perplexity"] for found in kinds.values()], share, strict=True)
    return row(name, *(f"{p:.2f}" + (f", {s:.0%}" if s is not None else "") for p, s in cells))


def _pruned(layers: Iterable[int]) -> str:
    return f"pruned: {layer_set(layers)}"
