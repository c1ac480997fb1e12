"""What scoring costs over the bare forward pass, on the real small model.

Five ways to read the same windows of 1024 tokens, in turn, so that all meet the same machine:

a. bare       embeddings and layers, nothing else: the floor;
b. scoring    the same with this library's hooks: Block Influence and all angular distances;
c. public     the way of public implementations: all hidden states and logits kept, an S x S
              product for its diagonal, one pass for Block Influence and another for angles;
d. peer       transformers' LlamaModel on the same weights, against a;
e. mixed      scoring with products in bfloat16 (`--precision mixed`), against a; only if asked
              for, because processors that emulate such products take many times as long.

Ratios are taken within a repeat; the table gives their median and range. The hooks' own time is
measured inside the pass. Peak memory is measured in fresh processes, one for each way.

    python benchmarks/studies/scoring.py --repeats 15 --out benchmarks/results/scoring.json
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch
from torch import Tensor

from benchmarks.lib.outcome import begin, finish
from llama import Llama
from short_gpt import ShortLlama, windows
from short_gpt.data import demo
from short_gpt.scoring.hooks import LayerHooks
from short_gpt.scoring.run import measure

SIZE = 1024
FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of processors that multiply bfloat16


def main(
    repeats: int = 15, out: str | None = None, overwrite: bool = False, mixed: bool = False
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    short, book = load(repeats + 1)
    ways = {
        "bare": lambda w: bare(short, w),
        "scoring": lambda w: scoring(short, w),
        "public": lambda w: public(short, w),
        "peer": peer(),
    }
    if mixed:
        ways["mixed"] = lambda w: in_mixed(short, lambda: scoring(short, w))
    for way in ways.values():  # warm up
        way(book[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    hooks: list[float] = []
    for repeat, window in enumerate(book[1:]):
        for name in rotated(list(ways), repeat):
            seconds[name].append(timed(ways[name], window))
        hooks.append(hook_share(short, window))
    linux = sys.platform == "linux"
    memory = {name: peak_memory(name) for name in ways if linux and name not in ("peer", "mixed")}
    result = summary(seconds, hooks, memory)
    if mixed:
        result["mixed against float32"] = differences(short, book[1:])
    print(table(result))
    missed = [text for text, held in limits(result).items() if not held]
    content = {"limits": limits(result), "seconds": seconds, **result}
    finish("scoring", missed, content, out=out, overwrite=overwrite)


def build(directory: Path | None = None) -> ShortLlama:
    """The demo's model, or another of its format."""
    directory = directory or demo.checkpoint()
    llama = Llama.build(directory, directory / "tokenizer.json", SIZE, 1, device="cpu")
    return ShortLlama(llama)


def load(count: int) -> tuple[ShortLlama, list[list[int]]]:
    short = build()
    chosen = windows(demo.bible(), short.encode, size=SIZE, stride=SIZE, seed=1, limit=count)
    return short, list(chosen)


def bare(short: ShortLlama, window: list[int]) -> None:
    short.decoder.run(torch.tensor([window]))


def scoring(short: ShortLlama, window: list[int]) -> None:
    measure(short.decoder, [[window]])


def in_mixed(short: ShortLlama, read: Callable[[], Any]) -> Any:
    short.decoder.mixed = True
    try:
        return read()
    finally:
        short.decoder.mixed = False


def differences(short: ShortLlama, windows: list[list[int]]) -> dict[str, Any]:
    """How far Block Influence in mixed precision is from that in float32, on the same windows."""

    def influence() -> Tensor:
        return measure(short.decoder, [[window] for window in windows]).block_influence  # (L,)

    plain, mixed = influence(), in_mixed(short, influence)
    lowest = [scores.argsort()[:12].tolist() for scores in (plain, mixed)]
    return {
        "largest relative difference of Block Influence": float((mixed / plain - 1).abs().max()),
        "the lowest 12 layers in the same order": lowest[0] == lowest[1],
        "processor": sorted(FLAGS & set(Path("/proc/cpuinfo").read_text().split()))
        if sys.platform == "linux"
        else None,
    }


@torch.no_grad()
def public(short: ShortLlama, window: list[int]) -> list[float]:
    """Block Influence from one full pass, angular distances of nine layers from another."""
    influence = []
    for x, y in pairs(all_states(short, window), 1):
        influence.append(float((1 - diagonal_cosine(x, y)).sum()))
    angles = []
    for x, y in pairs(all_states(short, window), 9):
        cos = diagonal_cosine(x[:, -1:], y[:, -1:]).clamp(-1, 1)
        angles.append(float(cos.arccos().sum() / math.pi))
    return influence + angles


def all_states(short: ShortLlama, window: list[int]) -> list[Tensor]:
    """Every hidden state of a full pass, which also makes the logits and fills a cache."""
    states: list[Tensor] = []
    layers = short.llama.model.layers
    handles = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    handles += [layer.register_forward_hook(lambda *a: states.append(a[-1])) for layer in layers]
    logits = short.llama.model(torch.tensor([window]), 0)
    for handle in handles:
        handle.remove()
    assert logits.shape[1] == len(window)
    return states


def pairs(states: list[Tensor], n: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(states[:-n], states[n:], strict=True))


def diagonal_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of row t of x with row t of y, read off the product of all rows with all rows."""
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    norms = x.norm(dim=-1, keepdim=True) @ y.norm(dim=-1, keepdim=True).T
    return ((x @ y.T) / norms).diagonal().nan_to_num(nan=0.5)


def peer() -> Callable[[list[int]], None]:
    from transformers import AutoModel

    file = demo.gguf_file()
    model = AutoModel.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()

    @torch.no_grad()
    def run(window: list[int]) -> None:
        model(torch.tensor([window]), use_cache=False)

    return run


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def timed(way: Callable[[list[int]], object], window: list[int]) -> float:
    start = time.perf_counter()
    way(window)
    return time.perf_counter() - start


def hook_share(short: ShortLlama, window: list[int]) -> float:
    """Seconds inside the hooks, sums and angles included, as a share of the rest of the pass."""
    inside, plain = [0.0], {name: getattr(LayerHooks, name) for name in ("after", "scores")}

    def clocked(name: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            start = time.perf_counter()
            result = plain[name](*args)
            inside[0] += time.perf_counter() - start
            return result

        return call

    for name in plain:
        setattr(LayerHooks, name, clocked(name))
    try:
        total = timed(lambda w: scoring(short, w), window)
    finally:
        for name, method in plain.items():
            setattr(LayerHooks, name, method)
    return inside[0] / (total - inside[0])


def peak_memory(name: str) -> float:
    """Peak resident MB of a fresh process that reads three windows this way."""
    command = [sys.executable, __file__, "read", "--name", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def read(name: str) -> None:
    """Reads three windows of random tokens one way and prints the process's peak memory in MB."""
    short = build()
    way = {"bare": bare, "scoring": scoring, "public": public}[name]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        way(short, torch.randint(49152, (SIZE,), generator=generator).tolist())
    # not ru_maxrss, which a process takes over from the one that started it
    status = Path("/proc/self/status").read_text()
    print(json.dumps(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6))


def summary(
    seconds: dict[str, list[float]], hooks: list[float], memory: dict[str, float]
) -> dict[str, Any]:
    def ratio(name: str, to: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(seconds[name], seconds[to], strict=True)])

    mixed = {"mixed / bare": ratio("mixed", "bare")} if "mixed" in seconds else {}
    return {
        "ratios": {
            **mixed,
            "scoring / bare": ratio("scoring", "bare"),
            "public / bare": ratio("public", "bare"),
            "public / scoring": ratio("public", "scoring"),
            "bare / transformers": ratio("bare", "peer"),
            "hooks / rest of the pass": spread(hooks),
        },
        "seconds_per_window": {name: spread(values) for name, values in seconds.items()},
        "peak_memory_mb": memory,
    }


def limits(result: dict[str, Any]) -> dict[str, bool]:
    """What this library promises, and whether it held (medians)."""
    ratios, memory = result["ratios"], result["peak_memory_mb"]
    extra = memory.get("scoring", 0) - memory.get("bare", 0)
    return {
        "scoring at most 1.05 x bare": ratios["scoring / bare"]["median"] <= 1.05,
        "hooks at most 1.5% of the pass": ratios["hooks / rest of the pass"]["median"] <= 0.015,
        "scoring at most 64 MB over bare": extra <= 64,
        "bare at most 1.05 x transformers": ratios["bare / transformers"]["median"] <= 1.05,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(result: dict[str, Any]) -> str:
    rows = [f"{'':<26}  {'median':>8}  {'min':>8}  {'max':>8}"]
    for group in ("ratios", "seconds_per_window"):
        for name, s in result[group].items():
            label = name if group == "ratios" else f"{name}, s/window"
            rows.append(f"{label:<26}  {s['median']:>8.4f}  {s['min']:>8.4f}  {s['max']:>8.4f}")
    memory = result["peak_memory_mb"]
    rows += [f"{f'{n}, peak MB':<26}  {mb:>8.0f}" for n, mb in memory.items()]
    rows += [f"mixed: {k}: {v}" for k, v in result.get("mixed against float32", {}).items()]
    return "\n".join(rows)


if __name__ == "__main__":
    fire.Fire({"run": main, "read": read} if sys.argv[1:2] in (["read"], ["run"]) else main)
