"""`short-gpt reproduce --stream` rehearsed from end to end on a model of Llama-2-7B's shapes.

Writes a checkpoint of random bfloat16 weights (13.5 GB, tensor by tensor) in which 9 known layers
are nearly the identity, each a little less than the one before: their output projections are
scaled down. In Meta's format, then in Hugging Face's, the command reads a local Parquet file of
PG-19's columns within 3 GB:

a. whole      from beginning to end, until the 9 layers are settled;
b. stopped    by SIGTERM in the second round, and continued by the same command.

The 9 layers have to come out, in their order, and the continued result has to have the bytes of the
one that was not stopped: of the whole file in one format, of the scores across the formats. Time is
compared with the floor of `streaming.py`: reading the files once a round, and the layers' matrix
products.

    python benchmarks/studies/reproduce_7b.py --out benchmarks/results/reproduce_7b.json
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch

from benchmarks.lib.outcome import apart, begin, finish
from benchmarks.lib.random_llama import (
    LLAMA,
    SHARD_BYTES,
    Tensors,
    letters,
    random_tensors,
    write_hf,
    write_meta,
)
from benchmarks.studies.streaming import child as measured
from benchmarks.studies.streaming import peak, read_file, weights
from llama.args import ModelArgs
from short_gpt.cli.app import main as short_gpt
from short_gpt.runtime.state import read_record
from short_gpt.scoring import stopping
from short_gpt.wrappers.streamed_llama import StreamedLlama

KNOWN = (27, 25, 26, 28, 24, 29, 23, 12, 17)  # seven of them are of the paper's list
WEAKEST, GRADE = 0.05, 1.3  # of the output projections: the first layer's scale, and the ratio
RARE = 0.1  # share of windows that the rule which ends the run guards against
STOPPED = 130  # the exit code of a command that was asked to end
Start = Callable[[Sequence[str], Path], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What is rehearsed.

    Attributes:
        args: the model's shape.
        known: layers that are nearly the identity, the nearest first.
        shard_bytes: of a safetensors file, at most.
        size: tokens of a window.
        windows: that there are, in two texts.
        batch_size: windows that pass a layer together.
        max_memory: Memory of the process.
    """

    args: ModelArgs
    known: tuple[int, ...] = KNOWN
    shard_bytes: int = SHARD_BYTES
    size: int = 32
    windows: int = 200
    batch_size: int = 4
    max_memory: str = "3GB"


def main(
    formats: str = "meta,hf",
    uninterrupted: str = "meta",
    folder: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the rehearsal, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        formats: of the checkpoint, one after the other.
        uninterrupted: formats in which the command also runs without a stop.
        folder: where checkpoint and results are made; the system's temporary folder if not given.
        out: JSON file for the result.
        overwrite: replace an existing file.
    """
    begin(out, overwrite=overwrite)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        content = rehearse(Case(LLAMA), Path(place), names(formats), names(uninterrupted))
    print(table(content))
    missed = [text for text, held in content["limits"].items() if not held]
    finish("reproduce_7b", missed, content, out=out, overwrite=overwrite)


def names(text: str | Sequence[str]) -> list[str]:
    """Names with commas between; fire makes tuples of some."""
    return text.split(",") if isinstance(text, str) else [*text]


def rehearse(
    case: Case,
    place: Path,
    formats: Sequence[str],
    uninterrupted: Sequence[str],
    start: Start | None = None,
) -> dict[str, Any]:
    """The rehearsal's result.

    Args:
        case: what is rehearsed.
        place: an existing folder.
        formats, uninterrupted: as those of `main`.
        start: runs the command; None in a process of its own.
    """
    start, found = start or partial(apart, __file__), {}
    write_texts(case, place / "pg19")
    for name in formats:
        directory = place / name
        directory.mkdir()
        began = time.perf_counter()
        if name == "meta":
            write_meta(case.args, tensors(case), directory)
        else:
            write_hf(case.args, tensors(case), directory, shard_bytes=case.shard_bytes)
        found[name] = {"seconds_to_write": time.perf_counter() - began}
        found[name] |= {"files": len(weights(directory)), "bytes": size_of(directory)}
        found[name] |= {"reading_seconds": read_file(directory)}
        found[name] |= runs(case, directory, start, whole=name in uninterrupted)
        if name == "meta":
            products = measure_products(case, directory)
        shutil.rmtree(directory)
    return summary(case, found, products)


def runs(case: Case, directory: Path, start: Start, *, whole: bool) -> dict[str, Any]:
    """What the command does without a stop, and with one."""
    result, found = directory.parent / f"{directory.name}.json", {}
    if whole:
        found["whole"] = start(command(case, directory, result), directory.parent / "facts")
        found["whole"] |= outcome(result)
        before = result.read_bytes()
        result.unlink()
    stop = start(["stop", *command(case, directory, result)], directory.parent / "facts")
    assert stop["code"] == STOPPED and not result.exists(), stop
    stop["windows_saved"] = windows_of(read_record(f"{result}.state"))
    found["stopped"] = stop
    found["continued"] = start(command(case, directory, result), directory.parent / "facts")
    found["continued"] |= outcome(result)
    if whole:
        found["continued"]["same_file"] = result.read_bytes() == before
    return found


def command(case: Case, directory: Path, result: Path) -> list[str]:
    """The command line behind ``short-gpt``."""
    numbers = {"size": case.size, "stride": case.size, "batch_size": case.batch_size}
    numbers |= {"stream": case.max_memory}
    flags = [f"--{name}={value}" for name, value in numbers.items()]
    line = ["reproduce", str(directory), f"--data={directory.parent / 'pg19'}"]
    return [*line, "--device=cpu", f"--json={result}", *flags]


def outcome(result: Path) -> dict[str, Any]:
    """What the command wrote, and a text of its scores to compare."""
    record = read_record(result)
    scores = {name: record[name] for name in ("result", "importance", "settled")}
    found = {"layers": record["result"]["ours"], "result": record["result"]}
    found |= {"settled": record["settled"]["settled"], "scores": json.dumps(scores)}
    return {**found, "windows": windows_of(record)}


def windows_of(record: dict[str, Any]) -> int:
    return int(sum(record["importance"]["windows"]))


def timed(facts: Path, argv: Sequence[str]) -> None:
    """Runs the command with a clock around its rounds, and writes what that says.

    Args:
        facts: the file.
        argv: of the command; "stop" in front has SIGTERM sent to it as its second round begins.
    """
    stops, rounds = argv[0] == "stop", list[dict[str, float]]()
    score = StreamedLlama.score_batch

    def clocked(self: StreamedLlama, windows: Sequence[Any], **more: Any) -> object:
        if stops and len(rounds) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        start = time.perf_counter()
        scores = score(self, windows, **more)
        rounds.append({"seconds": time.perf_counter() - start, "windows": len(windows)})
        return scores

    began, code, rule = time.perf_counter(), 0, stopping.Stop
    StreamedLlama.score_batch = clocked  # type: ignore[method-assign,assignment]
    stopping.Stop = partial(rule, rare=RARE)  # type: ignore[misc,assignment]
    try:
        short_gpt(list(argv[stops:]))
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        stopping.Stop = rule  # type: ignore[misc]
        StreamedLlama.score_batch = score  # type: ignore[method-assign]
    found = {"code": code, "seconds": time.perf_counter() - began, "rounds": rounds}
    found["peak_bytes"] = peak()
    facts.write_text(json.dumps(found))


def measure_products(case: Case, directory: Path) -> float:
    """Seconds of the matrix products of a batch in all layers, the median of several."""
    rows = case.batch_size * case.size
    half = measured("products", directory=directory, windows=1, repeats=7, size=rows)["seconds"]
    return sorted(half)[len(half) // 2] * case.args.n_layers


def write_texts(case: Case, folder: Path) -> None:
    """Two texts as a Parquet file of PG-19's columns: words of random letters, a token a letter."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    source = random.Random(0)
    books = [letters(case.size * case.windows // 2 - 1, source) for _ in range(2)]  # bos in front
    columns = {"short_book_title": ["One", "Two"], "publication_date": [1900, 1901]}
    columns |= {"url": ["http://one", "http://two"], "text": books}
    (folder / "data").mkdir(parents=True)
    write_table(pa.table(columns), folder / "data" / "validation-00000-of-00001.parquet")


def tensors(case: Case) -> Tensors:
    """All tensors in Meta's names: their descriptions, and what gives one."""
    return random_tensors(case.args, torch.bfloat16, partial(scale, case))


def scale(case: Case, name: str) -> float:
    """Of a tensor: below 1 for the output projections of the known layers."""
    parts = name.split(".")
    number = int(parts[1]) if parts[0] == "layers" else -1
    if number not in case.known or parts[-2] not in ("wo", "w2"):
        return 1.0
    # deeper, the same addition changes a longer state less: the grade is to decide the order
    depth = (number + 1) / case.args.n_layers
    return WEAKEST * GRADE ** case.known.index(number) * depth**0.5


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in weights(directory))


def summary(case: Case, found: dict[str, Any], products_seconds: float) -> dict[str, Any]:
    """The result: of each format and run, times beside their floor, and what was promised."""
    batches = case.batch_size
    for made in found.values():
        for run in (made[name] for name in ("whole", "continued") if name in made):
            scored = sum(r["seconds"] for r in run["rounds"])
            count = sum(r["windows"] for r in run["rounds"])
            floor = (
                count / batches * products_seconds + len(run["rounds"]) * made["reading_seconds"]
            )
            run |= {"seconds_scoring": scored, "seconds_a_window": scored / count}
            run |= {"floor_seconds": floor, "scoring / floor": scored / floor}
    ended = [made["continued"] for made in found.values()]
    every = [*ended, *(made["whole"] for made in found.values() if "whole" in made)]
    scores = {run.pop("scores") for run in every}
    stops = [made["stopped"] for made in found.values()]
    limits = {
        "the known layers in their order": all(run["layers"] == [*case.known] for run in every),
        "settled before all windows were read": all(
            run["settled"] and run["windows"] < case.windows for run in every
        ),
        "stopped and continued: the same file": all(r.get("same_file", True) for r in ended),
        "all runs, in both formats: the same scores": len(scores) == 1,
        "peak memory at most 3 GB": max(r["peak_bytes"] for r in [*every, *stops]) <= 3e9,
    }
    model = f"Llama's layout, {case.args.n_layers} layers of width {case.args.dim}, bfloat16"
    content = {
        "limits": limits,
        "model": model,
        "known": [*case.known],
        "windows_of_data": case.windows,
    }
    content |= {"tokens_per_window": case.size, "windows_at_once": batches}
    return {**content, "products_seconds_a_batch": products_seconds, "formats": found}


def table(content: dict[str, Any]) -> str:
    """A row for every run."""
    size, all_windows = content["tokens_per_window"], content["windows_of_data"]
    rows = [
        f"{content['model']}; {all_windows} windows of {size} tokens",
        f"known {content['known']}",
    ]
    for name, made in content["formats"].items():
        rows.append(
            f"{name}: {made['bytes'] / 1e9:.2f} GB in {made['files']} files, read in "
            f"{made['reading_seconds']:.1f} s"
        )
        for kind in ("whole", "continued"):
            if (run := made.get(kind)) is not None:
                rows.append(
                    f"  {kind:<10} {run['layers']} after {run['windows']} windows; "
                    f"{run['seconds']:.0f} s, of which scoring {run['seconds_scoring']:.0f} s = "
                    f"{run['scoring / floor']:.2f} x floor; a window "
                    f"{run['seconds_a_window']:.2f} s; peak {run['peak_bytes'] / 1e9:.2f} GB"
                )
        rows.append(f"  stopped    after {made['stopped']['windows_saved']} windows")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["timed"]:
        timed(Path(sys.argv[2]), sys.argv[3:])
    else:
        fire.Fire(main)
