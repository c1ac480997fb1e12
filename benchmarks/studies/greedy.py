"""Greedy search (SLEB) from stored states against the plain loop; real small model.

Both search on the same windows in the same run, in turns of one round each, so that both meet the
machine's changing speed alike. The plain loop is that of SLEB's authors: every trial runs the model
without the layer from the beginning. The two must give the same list, and losses within 1e-5 nats.

    python benchmarks/studies/greedy.py --repeats 3 --out benchmarks/results/greedy.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
from torch import nn

from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import build, spread
from short_gpt import ShortLlama, windows
from short_gpt.data import demo
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.models.decoder import without_layers
from short_gpt.runtime.progress import bar
from short_gpt.selection.search import Search, SearchOptions, sleb_rounds


def main(
    n: int = 8,
    count: int = 2,
    size: int = 256,
    repeats: int = 3,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short = build()
    chosen = windows(demo.bible(), short.encode, size=size, stride=size, seed=0, limit=count)
    read = list(chosen)
    found, ran, seconds = race(short, read, n, repeats)
    result = summary(found, ran, seconds)
    print(table(result))
    missed = [text for text, held in result["limits"].items() if not held]
    content = {**result, "windows": count, "tokens_per_window": size, "seconds": seconds}
    finish("greedy", missed, content, out=out, overwrite=overwrite)


def race(
    short: ShortLlama, read: list[list[int]], n: int, repeats: int
) -> tuple[dict[str, Search], dict[str, int], dict[str, list[float]]]:
    """Both searches in turns of one round.

    Their last results, the layers that each ran on one window, and the seconds of all repeats.
    """
    seconds: dict[str, list[float]] = {"plain": [], "restart": []}
    found: dict[str, Search] = {}
    ran: dict[str, int] = {}
    with bar("searching", total=2 * repeats * n, unit="round") as shown:
        for repeat in range(repeats):
            restart = sleb_rounds(short.decoder, read, n, SearchOptions())
            ways = {"plain": plain(short, read, n), "restart": restart}
            spent, ran = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
            for turn in range(n):
                for name in sorted(ways, reverse=bool((repeat + turn) % 2)):
                    started = time.perf_counter()
                    with counted(short) as windows_of_layers:
                        found[name] = next(ways[name])
                    spent[name] += time.perf_counter() - started
                    ran[name] += sum(windows_of_layers)
                    shown.update()
            for name, total in spent.items():
                seconds[name].append(total)
    return found, ran, seconds


@contextmanager
def counted(short: ShortLlama) -> Iterator[list[int]]:
    """How many windows each layer that runs inside the block reads.

    A layer that is passed over runs no attention; a single token looks at what a layer returns.
    """
    read: list[int] = []

    def count(attention: nn.Module, args: tuple[Any, ...]) -> None:
        batch, tokens, _ = args[0].shape
        read.append(batch if tokens > 1 else 0)

    with ExitStack() as stack:
        for layer in short.decoder.layers:
            stack.callback(layer.attention.register_forward_pre_hook(count).remove)
        yield read


def plain(short: ShortLlama, read: list[list[int]], n: int) -> Iterator[Search]:
    """The search as SLEB's authors run it: every trial from the first layer on."""
    decoder, search = short.decoder, Search()
    count = len(decoder.layers)
    for _ in range(n):
        alive = [i for i in range(count) if i not in search.removed]
        loss = {}
        for j in alive[1:-1]:
            with without_layers(decoder, [*search.removed, j]):
                tried = perplexity(decoder, [[window] for window in read])
            loss[j] = tried.nats / tried.tokens
        search.removed.append(min(loss, key=lambda i: (loss[i], i)))
        search.losses.append(loss)
        yield search


def summary(
    found: dict[str, Search], ran: dict[str, int], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    ours, theirs = found["restart"], found["plain"]
    pairs = zip(ours.losses, theirs.losses, strict=True)
    off = max(abs(a[i] - b[i]) for a, b in pairs for i in b)
    ratios = [a / b for a, b in zip(seconds["restart"], seconds["plain"], strict=True)]
    layers = ran["restart"] / ran["plain"]
    limits = {
        "the same list": ours.removed == theirs.removed,
        "losses within 1e-5 nats": off <= 1e-5,
        "at most 0.55 x the layers run": layers <= 0.55,
        "at most 0.65 x the time (median)": spread(ratios)["median"] <= 0.65,
    }
    return {
        "removed": ours.removed,
        "largest_difference_of_losses": off,
        "layers_run": {name: ran[name] for name in ("plain", "restart")},
        "layers_run_ratio": layers,
        "time_ratio": spread(ratios),
        "limits": limits,
    }


def table(result: dict[str, Any]) -> str:
    time_ratio = result["time_ratio"]
    return "\n".join(
        [
            f"removed, both ways: {result['removed']}",
            f"losses differ by at most {result['largest_difference_of_losses']:.1e} nats",
            f"layers run, restart / plain: {result['layers_run_ratio']:.3f}",
            f"time, restart / plain: {time_ratio['median']:.3f} "
            f"({time_ratio['min']:.3f} to {time_ratio['max']:.3f})",
        ]
    )


if __name__ == "__main__":
    fire.Fire(main)
