"""Tables and the picture of what healing brings back, from the JSON files of its benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence_tables import result, row

KINDS = ("held-out chapters", "WikiText-2, second half", "novels")
Cells = Mapping[str, Mapping[str, float]]  # by kind of text


def refitted() -> list[str]:
    """Perplexities by kind of text, and the share of the lost nats that is back."""
    return [healed(name, found) for name, found in result("healing")["rows"].items()]


def healed(name: str, kinds: Cells) -> str:
    """A line of a model: perplexities, and behind the comma the share that is back."""
    plain = name in ("whole", "cut")
    share = [None if plain else found["restored"] for found in kinds.values()]
    cells = zip([found["perplexity"] for found in kinds.values()], share, strict=True)
    return row(name, *(f"{p:.2f}" + (f", {s:.0%}" if s is not None else "") for p, s in cells))


def passes() -> str:
    cost = result("healing")["cost"]["refit"]
    return f"{cost['passes']:.2f} ({cost['passes_least']:.2f} to {cost['passes_most']:.2f})"


def distilled(name: str) -> list[str]:
    """The same of a model that is refitted and then distilled."""
    return [healed(row, found) for row, found in result(name)["rows"].items()]


def minutes() -> str:
    """What that takes, as a sentence."""
    found, other = result("distillation"), result("distillation_influence")
    cost, others = found["seconds"], sum(other["seconds"].values())
    return (
        f"{cost['teacher']:.0f} seconds for the whole model's predictions, {cost['refit']:.0f} for "
        f"the refit and {cost['distill']:.0f} for {found['recipe']['steps']} steps, "
        f"{sum(cost.values()):.0f} in all, and Block Influence's {others:.0f}"
    )


def parts() -> list[str]:
    """The whole and the cut model, and what each part of the refit brings back."""
    cases = group("parts")
    first = next(iter(cases.values()))
    lines = [healed(name, first[name]) for name in ("whole", "cut")]
    return [*lines, *(healed(name, found["healed"]) for name, found in cases.items())]


def windows() -> list[str]:
    """The same by the windows of both texts that were fitted on."""
    return [healed(name, found["healed"]) for name, found in by_windows().items()]


def aims() -> list[str]:
    """The same by how far the changes aim, 1 being the target."""
    cases = {"1": group("windows")["16 + 16"], **group("aims")}
    return [healed(name, found["healed"]) for name, found in cases.items()]


def by_windows() -> dict[str, Mapping[str, Cells]]:
    """Cases by their windows, those of both texts in their number."""
    cases = group("windows")
    both = sorted((n for n in cases if "0" not in n.split(" + ")), key=lambda n: int(n.split()[0]))
    return {name: cases[name] for name in [*both, *(n for n in cases if n not in both)]}


def sets() -> list[str]:
    """Fewer and more layers: as cut, and refitted, on every kind of text."""
    made = result("healing")
    plain = {"layers": made["layers"], "cut": made["rows"]["cut"], "healed": made["rows"]["refit"]}
    every = sorted([*group("sets").values(), plain], key=lambda found: len(found["layers"]))
    return [_set(found["layers"], found["cut"], found["healed"]) for found in every]


def _set(layers: Sequence[int], cut: Cells, healed: Cells) -> str:
    cells = [
        f"{a['perplexity']:.2f}, {b['perplexity']:.2f} ({b['restored']:.0%})"
        for a, b in zip(cut.values(), healed.values(), strict=True)
    ]
    return row(f"{len(layers)}: {', '.join(map(str, sorted(layers)))}", *cells)


def group(name: str) -> dict[str, Mapping[str, Cells]]:
    file = "refit_sets" if name == "sets" else "refit_aims" if name == "aims" else "refit_parts"
    return result(file)["groups"][name]


def picture(path: Path) -> None:
    """Draws the share that is back against the tokens that were fitted on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = result("refit_parts")["tokens_of_parts"]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    cases = by_windows()
    counts = {name: sum(map(int, name.split(" + "))) * size for name in cases}
    both = [name for name in cases if "0" not in name.split(" + ")]
    for place, kind in enumerate(KINDS):
        back = {
            n: 100 * [*found["healed"].values()][place]["restored"] for n, found in cases.items()
        }
        line = axes.plot([counts[n] for n in both], [back[n] for n in both], "o-", label=kind)
        for name, marker in zip([n for n in cases if n not in both], ("v", "^"), strict=True):
            color = line[0].get_color()
            axes.plot(counts[name], back[name], marker, color=color, mfc="none", markersize=9)
    axes.plot([], [], "kv", mfc="none", label="fitted on chapters alone")
    axes.plot([], [], "k^", mfc="none", label="fitted on WikiText-2 alone")
    axes.set(xlabel="tokens fitted on", ylabel="% of the lost nats back", xscale="log")
    ticks = sorted(set(counts.values()))
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def nearest() -> list[str]:
    """Where every method's choice stands among all sets, as cut and refitted in front of gaps."""
    found = result("optimality")
    lines = []
    for name, choice in found["choices"].items():
        cells = []
        for kind in ("raw", "healed"):
            own = choice[kind]
            cells += [own["rank"], f"{own['gap']:.3f} ({own['standard_error']:.3f})"]
        whole = found["checked"]["choices"][name]
        less = f"{whole['less_sleb']:+.3f} ({whole['standard_error']:.3f})"
        lines.append(row(name, ", ".join(map(str, sorted(choice["layers"]))), *cells, less))
    return lines
