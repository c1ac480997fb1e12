"""What scoring one layer at a time costs, in time and memory, on a model of Llama-2-7B's shapes.

Makes a checkpoint of random bf16 weights (13.5 GB) in a temporary folder, which is removed at the
end, and scores 4 windows of 1024 tokens from it in a fresh process, in float32 on the CPU:

a. streamed   reading included, from a file that is not in the system's cache;
b. floor      the matrix products alone of all layers on these windows, plus reading the file alone.

The products of one layer are timed before and after the run, each time in a fresh process, and
counted once for every layer. What Llama-2-70B would need follows from the same plan.

    python benchmarks/studies/streaming.py --out benchmarks/results/streaming.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch
from torch import Tensor

from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import spread
from llama.args import ModelArgs
from llama.checkpoint.meta import Checkpoint, full_shapes
from llama.checkpoint.pth import TensorInfo, write_shard
from llama.formats.hf import params_json
from short_gpt.runtime.memory import plan, resident
from short_gpt.runtime.progress import bar
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance
from short_gpt.wrappers.streamed_llama import open_stream
from short_gpt.wrappers.streamed_transformer import Batch

SIZE, MAX_MEMORY = 1024, "3GB"
LLAMA_70B: dict[str, Any] = {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096}
LLAMA_70B |= {"ffn_dim_multiplier": 1.3, "n_layers": 80, "vocab_size": 32000}
PRODUCTS = ("attention.w{}", "qkvo"), ("feed_forward.w{}", "132")


def main(
    layers: int = 32,
    windows: int = 4,
    repeats: int = 10,
    folder: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        layers: of the model; fewer for a quick look.
        windows: of 1024 tokens.
        repeats: of the products of a layer, before the run and after it.
        folder: where the checkpoint is made; the system's temporary folder if not given.
        out: JSON file for the result.
        overwrite: replace an existing file.
    """
    begin(out, overwrite=overwrite)
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        make_checkpoint(Path(directory), layers)
        half = {"directory": directory, "windows": windows, "repeats": repeats}
        before = child("products", **half)["seconds"]
        reading = read_file(Path(directory))
        drop_cache(Path(directory))
        streamed = child("score", directory=directory, windows=windows)
        after = child("products", **half)["seconds"]
    result = summary(streamed, before + after, reading, layers, windows)
    print(table(result))
    missed = [text for text, held in limits(result).items() if not held]
    content = {"limits": limits(result), **result}
    finish("streaming", missed, content, out=out, overwrite=overwrite)


def make_checkpoint(directory: Path, layers: int) -> None:
    """Writes Llama-2-7B's shapes in bf16, every tensor another part of the same random numbers."""
    args = ModelArgs(n_layers=layers, vocab_size=32000)
    shapes = full_shapes(args)
    infos = {n: TensorInfo(shape, torch.bfloat16, n) for n, shape in shapes.items()}
    largest = max(info.numel for info in infos.values())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(largest + 64 * len(infos), generator=generator).mul_(0.02).bfloat16()
    first = {name: 64 * i for i, name in enumerate(infos)}
    with bar("writing", total=len(infos), unit="tensor") as shown:

        def read(name: str) -> Tensor:
            shown.update()
            if name.endswith("norm.weight"):
                return torch.ones(shapes[name], dtype=torch.bfloat16)
            return noise[first[name] :][: infos[name].numel].view(shapes[name])

        write_shard(directory / "consolidated.00.pth", infos, read)
    (directory / "params.json").write_text(json.dumps(params_json(args)))


def weights(directory: Path) -> list[Path]:
    """The files of weights, in either format."""
    return sorted([*directory.glob("consolidated.*.pth"), *directory.glob("*.safetensors")])


def drop_cache(directory: Path) -> None:
    for path in weights(directory):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())  # pages not yet on the disk could not be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_file(directory: Path) -> float:
    """Seconds to read the files from beginning to end, none of them cached."""
    drop_cache(directory)
    buffer, start = bytearray(16 * 2**20), time.perf_counter()
    for path in weights(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def child(name: str, **arguments: object) -> dict[str, Any]:
    """What a fresh process of this script prints."""
    options = [f"--{key}={value}" for key, value in arguments.items()]
    command = [sys.executable, __file__, name, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def score(directory: str, windows: int) -> None:
    """Scores the windows layer by layer; prints seconds, and bytes of memory: plan and peak."""
    process, start = resident(), time.perf_counter()
    model = open_stream(directory, max_seq_len=SIZE, device="cpu")
    planned = model.plan(max_memory=MAX_MEMORY)
    opened = time.perf_counter() - start
    into = Importance.empty(range(len(model.layers)))
    tokens = torch.randint(32000, (windows, SIZE), generator=torch.Generator().manual_seed(1))
    assert windows <= planned.windows
    mask = torch.ones(1, SIZE, dtype=torch.bool)
    batches = [Batch(window[None], mask, watched=True) for window in tokens]
    model.run(batches)
    into.add(Scores.cat([batch.seen.scores() for batch in batches if batch.seen]))
    seconds = time.perf_counter() - start
    assert into.block_influence.isfinite().all() and into.n_windows == windows
    found: dict[str, Any] = {"seconds": seconds, "seconds_to_open": opened, "peak_bytes": peak()}
    found |= {"process_bytes": process, "plan": planned.describe()}
    found |= {"planned_bytes": sum(planned.host.values()) + windows * planned.window}
    print(json.dumps(found))


def products(directory: str, windows: int, repeats: int, size: int = SIZE) -> None:
    """Prints the seconds of the matrix products of one layer on the windows, several times."""
    checkpoint = Checkpoint(directory)
    names = [form.format(letter) for form, letters in PRODUCTS for letter in letters]
    matrices = [checkpoint.read(f"layers.0.{name}.weight").float() for name in names]
    states = [torch.randn(size, matrices[0].shape[1]) for _ in range(windows)]
    wide = [torch.randn(size, checkpoint.args.ffn_dim) for _ in range(windows)]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for x, y in zip(states, wide, strict=True):
            for weight in matrices:
                torch.nn.functional.linear(x if weight.shape[1] == x.shape[1] else y, weight)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds[1:]}))


def peak() -> int:
    """Most bytes that this process ever held."""
    # not ru_maxrss, which a process takes over from the one that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def summary(
    streamed: dict[str, Any], one_layer: list[float], reading: float, layers: int, windows: int
) -> dict[str, Any]:
    all_products = spread([layers * seconds for seconds in one_layer])
    floor = {name: seconds + reading for name, seconds in all_products.items()}
    return {
        "model": f"Llama-2-7B's shapes, {layers} layers, random bf16 weights, run in float32",
        "windows": windows,
        "tokens_per_window": SIZE,
        "streamed": {**streamed, "windows_per_second": windows / streamed["seconds"]},
        "floor_seconds": floor,
        "products_seconds": all_products,
        "reading_seconds": reading,
        "streamed / floor": {name: streamed["seconds"] / floor[name] for name in floor},
        "llama_2_70b": {
            name: described(getattr(torch, name), windows, streamed["process_bytes"])
            for name in ("float32", "bfloat16")
        },
    }


def described(dtype: torch.dtype, windows: int, process: int) -> dict[str, object]:
    """What 70B needs for as many windows, by the plan that the run above kept to."""
    args = ModelArgs(**LLAMA_70B, max_seq_len=SIZE)
    options: dict[str, Any] = {"dtype": dtype, "stored": torch.bfloat16, "process": process}
    least = plan(args, **options, max_memory="1TB")
    size = sum(least.host.values()) + windows * least.window
    found = plan(args, **options, max_memory=size)
    return {"bytes": found.total, "plan": found.describe()}


def limits(result: dict[str, Any]) -> dict[str, bool]:
    """What this library promises, and whether it held."""
    streamed = result["streamed"]
    return {
        "peak memory at most 3 GB": streamed["peak_bytes"] <= 3e9,
        "peak memory within the plan": streamed["peak_bytes"] <= streamed["planned_bytes"],
        "streamed at most 1.15 x the floor": result["streamed / floor"]["median"] <= 1.15,
    }


def table(result: dict[str, Any]) -> str:
    streamed, floor = result["streamed"], result["floor_seconds"]
    ratio, products = result["streamed / floor"], result["products_seconds"]
    rows = [
        f"{result['model']}: {result['windows']} windows of {SIZE} tokens",
        f"streamed          {streamed['seconds']:>8.1f} s   {streamed['windows_per_second']:.4f} "
        "windows/s",
        f"floor             {floor['median']:>8.1f} s   ({floor['min']:.1f} to {floor['max']:.1f})",
        f"  products        {products['median']:>8.1f} s",
        f"  reading         {result['reading_seconds']:>8.1f} s",
        f"streamed / floor  {ratio['median']:>8.3f}     ({ratio['max']:.3f} to {ratio['min']:.3f})",
        f"peak memory       {streamed['peak_bytes'] / 1e9:>8.2f} GB, planned "
        f"{streamed['planned_bytes'] / 1e9:.2f} GB",
        f"plan: {streamed['plan']}",
    ]
    rows += [f"70B in {n}: {need['plan']}" for n, need in result["llama_2_70b"].items()]
    return "\n".join(rows)


if __name__ == "__main__":
    commands = {"run": main, "score": score, "products": products}
    fire.Fire(commands if sys.argv[1:2] and sys.argv[1] in commands else main)
