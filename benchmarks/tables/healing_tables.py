"""Tables and the picture of what healing brings back, from the JSON files of its benchmarks.

    python benchmarks/tables/healing_tables.py

draws the picture, `docs/images/refit_text.png`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.tables.evidence_tables import MODELS, layer_set, result, row
from short_gpt.scoring.metrics import student_t

KINDS = ("held-out chapters", "WikiText-2, second half", "novels")
CHOSEN_BY = ("chapters", "first half of the second text", "novels")
PERPLEXITIES = ("original", "pruned")
Cells = Mapping[str, Mapping[str, float]]  # by kind of text


def refitted() -> list[str]:
    """Block Influence's layers and auto's: perplexities, and the share of the lost nats back."""
    every = [distilled(name) for name in ("healing", "healing_own")]
    return [*every[0], *every[1][1:]]  # the original once


def healed(name: str, kinds: Cells) -> str:
    """A row of a model: perplexities and, after the comma, the restored share of the lost nats."""
    plain = name.startswith(("original", "pruned"))
    share = [None if plain else found["restored"] for found in kinds.values()]
    cells = zip([found["perplexity"] for found in kinds.values()], share, strict=True)
    return row(name, *(f"{p:.2f}" + (f", {s:.0%}" if s is not None else "") for p, s in cells))


def passes() -> str:
    cost = result("healing")["cost"]["refit"]
    return f"{cost['passes']:.2f} ({cost['passes_least']:.2f} to {cost['passes_most']:.2f})"


def distilled(name: str) -> list[str]:
    """The same of a model that is refitted and then distilled."""
    found = result(name)
    names = {"whole": "original", "cut": _pruned(found["layers"])}
    return [healed(names.get(row, row), kinds) for row, kinds in found["rows"].items()]


def _pruned(layers: Sequence[int]) -> str:
    return f"pruned: {layer_set(layers)}"


def novels() -> str:
    """How far apart both sets end on novels, once refitted, as a sentence."""
    auto, influence = (
        result(name)["rows"]["refit"]["lambada_passages"] for name in ("healing_own", "healing")
    )
    values = [f"{found['perplexity']:.2f}" for found in (auto, influence)]
    apart = influence["nats"] - auto["nats"]
    return (
        f"on novels auto's set reaches {values[0]} and Block Influence's {values[1]}, "
        f"{apart:.3f} nats per token apart"
    )


def minutes() -> str:
    """What that takes, as a sentence."""
    found = result("distillation")
    cost = found["seconds"]
    return (
        f"{cost['refit']:.0f} seconds for the refit, {cost['teacher']:.0f} for the original "
        f"model's predictions and {cost['distill']:.0f} for {found['recipe']['steps']} steps, "
        f"{sum(cost.values()):.0f} in all"
    )


def ways() -> list[str]:
    """Every way of training of `training_choices.py`: LoRA's from the refit, others from LoRA."""
    lines = []
    for name, cells in result("training_choices")["rows"].items():
        kinds = [cells[kind] for kind in ("book", "wikitext", "novels")]
        texts = [f"{kind['perplexity']:.2f}" for kind in kinds]
        mean = ""
        if "steps" in cells:
            found = [kind["from refit" if name == "lora" else "from lora"] for kind in kinds]
            texts = [text + _than(change) for text, change in zip(texts, found, strict=True)]
            error = math.hypot(*(change["standard_error"] for change in found)) / len(found)
            mean = f"{sum(change['nats'] for change in found) / len(found):+.3f} ({error:.3f})"
        lines.append(row(name, *texts, mean, f"{cells.get('steps', '')}"))
    return lines


def rates() -> list[str]:
    """Divergence from the original model before and after a training at several rates."""
    lines = []
    for file in ("training_rates_smollm2", "training_rates_05b", "training_rates"):
        found = result(file)
        for rate, cells in found["rows"].items():
            before, *_, after = cells["divergence"].values()
            kept = f"{cells['kept']} of {found['steps']}"
            nats = "" if cells["kept"] == "0" else _than(cells)[2:]
            name = f"{MODELS[file.replace('training_rates', 'larger')]}, {found['width']}"
            lines.append(row(name, rate, f"{before:.3f}", f"{after:.3f}", kept, nats))
    return lines


def parts() -> list[str]:
    """The original and the pruned model, and what each part of the refit restores."""
    cases = group("parts")
    return [healed("original", next(iter(cases.values()))["whole"]), *_of_a_set(cases)]


def _of_a_set(cases: Mapping[str, Any]) -> list[str]:
    """The pruned model, and the healed one in every case."""
    first = next(iter(cases.values()))
    lines = [healed(_pruned(first["layers"]), first["cut"])]
    return [*lines, *(healed(name, found["healed"]) for name, found in cases.items())]


def windows() -> list[str]:
    """The same by the windows of both texts that were fitted on."""
    return _of_a_set(by_windows())


def choices(file: str) -> list[str]:
    """Every case of `refit_choices.py`: perplexities, and what each is from the usual refit by."""
    lines = []
    for name, found in result(file)["sets"].items():
        of = f"{name}'s 8"
        for model in PERPLEXITIES:
            lines.append(row(f"{of}: {model}", *(f"{found[model][k]:.2f}" for k in CHOSEN_BY), ""))
        for case, cells in (found["usual"] | found.get("ridges", {})).items():
            kinds, every = cells["kinds"], cells["kinds"]["all three kinds"]
            values = [f"{kinds[k]['perplexity']:.2f}{_than(kinds[k])}" for k in CHOSEN_BY]
            lines.append(row(f"{of}: {case}", *values, _than(every)[2:]))
    return lines


def sinks() -> list[str]:
    """By set of layers, fits that weigh tokens by their targets, and lost ones more."""
    lines = []
    sets = result("refit_sinks")["sets"]
    sets |= {f"0.5B: {k}": v for k, v in result("refit_sinks_05b")["sets"].items()}
    for name, found in sets.items():
        layers = layer_set(found["layers"])
        lines.append(row(f"{name}, pruned: {layers}", *_plain(found["pruned"])))
        for case, cells in found["sinks"].items():
            method = "patch" if case.startswith("patch") else "refit"
            weights = "" if cells["than"] == case else ", lost sinks weigh more"
            kinds = [*cells["kinds"].values()][:3]  # chapters, WikiText-2, novels
            values = [f"{kind['perplexity']:,.2f}{_than(kind)}" for kind in kinds]
            lines.append(row(f"{name}: {method}{weights}", *values))
    return lines


def _plain(perplexities: Mapping[str, float]) -> list[str]:
    return [f"{value:,.2f}" for value in [*perplexities.values()][:3]]


def _than(found: Mapping[str, float]) -> str:
    if not found["nats"]:  # the case itself, or one that equals it
        return ""
    return f", {round(found['nats'], 3) + 0:+.3f} ({found['standard_error']:.3f})"


def by_windows() -> dict[str, Mapping[str, Cells]]:
    """Cases by their windows, those of both texts in their number."""
    cases = group("windows")
    both = sorted((n for n in cases if "0" not in n.split(" + ")), key=lambda n: int(n.split()[0]))
    return {name: cases[name] for name in [*both, *(n for n in cases if n not in both)]}


def group(name: str) -> dict[str, Mapping[str, Cells]]:
    return result("refit_parts")["groups"][name]


def picture(path: Path) -> None:
    """Draws the share that is back against the tokens that were fitted on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = result("refit_parts")["tokens_of_parts"]
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    cases = by_windows()
    counts = {name: sum(map(int, name.split(" + "))) * size for name in cases}
    both = [name for name in cases if "0" not in name.split(" + ")]
    alone = [name for name in cases if name not in both]  # chapters, then WikiText-2
    for place, (kind, mark) in enumerate(zip(KINDS, "osD", strict=True)):
        back, error = {}, {}
        for n, found in cases.items():
            healed, lost = ([*found[how].values()][place] for how in ("healed", "cut"))
            back[n] = 100 * healed["restored"]
            error[n] = 100 * healed["standard_error"] / lost["nats"]
        label = f"loss on {kind}, fitted on both texts"
        x, y, bars = zip(*((counts[n], back[n], error[n]) for n in both), strict=True)
        line, *_ = axes.errorbar(x, y, bars, fmt=f"{mark}-", capsize=3, label=label)
        for name, shape, aside in zip(alone, "v^", (0.94, 1 / 0.94), strict=True):
            look = {"color": line.get_color(), "mfc": "w", "markersize": 9}
            axes.plot(counts[name] * aside, back[name], shape, **look)
    for shape, text in zip("v^", ("chapters", "WikiText-2"), strict=True):
        axes.plot([], [], f"k{shape}", mfc="w", markersize=9, label=f"fitted on {text} alone")
    axes.set(xlabel="tokens fitted on", ylabel="% of the lost nats restored", xscale="log")
    axes.set_title("What a refit restores, by the text it was fitted on", fontsize="medium")
    ticks = sorted(set(counts.values()))
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def nearest() -> list[str]:
    """Where every method's choice stands among all sets, with 95% intervals over the windows."""
    found = result("optimality")
    quantile = student_t(0.975, found["windows"] - 1)  # every window is of another book
    lines = []
    for name, choice in found["choices"].items():
        cells = []
        for kind in ("raw", "healed"):
            own = choice[kind]
            cells += [own["rank"], interval(own["gap"], quantile * own["standard_error"])]
        whole = found["checked"]["choices"][name]
        less = "0" if name == "sleb" else ""
        less = less or interval(whole["less_sleb"], quantile * whole["standard_error"])
        lines.append(row(name, layer_set(choice["layers"]), *cells, less))
    return lines


def above(kind: str) -> dict[str, str]:
    """The choices whose interval lies above 0, against the set that is best on other windows."""
    found = result("optimality")
    quantile = student_t(0.975, found["windows"] - 1)
    choices = {name: choice[kind] for name, choice in found["choices"].items()}
    gaps = {
        name: (own["gap_to_best_on_other_windows"], quantile * own["standard_error_of_that"])
        for name, own in choices.items()
    }
    return {name: interval(*gap) for name, gap in gaps.items() if gap[0] > gap[1]}


def interval(value: float, reach: float) -> str:
    return f"{value:+.3f} ({value - reach:+.3f} to {value + reach:+.3f})"


if __name__ == "__main__":
    picture(Path(__file__).parents[2] / "docs" / "images" / "refit_text.png")
