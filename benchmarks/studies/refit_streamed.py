"""What `short-gpt heal --heal_by refit --stream` takes on a model of Llama-2-7B's shapes.

Writes a checkpoint of random float16 weights in Hugging Face's format (13.5 GB, tensor by tensor),
removes layers 28 to 30, and refits those that are left behind the first gap, 27 and 31, by the
command itself, in a process of its own within 3 GB. Weights are random, so that what is restored
means nothing: it is memory and time that are measured.

    python benchmarks/studies/refit_streamed.py --out benchmarks/results/refit_streamed.json
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch

from benchmarks.lib.outcome import apart, begin, finish
from benchmarks.lib.random_llama import LLAMA, letters, random_tensors, write_hf
from benchmarks.studies.streaming import peak
from llama.args import ModelArgs
from short_gpt.cli.app import main as short_gpt
from short_gpt.healing import refit
from short_gpt.wrappers.streamed_llama import StreamedLlama

Start = Callable[[Sequence[str], Path], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What is refitted.

    Attributes:
        args: the model's shape.
        layers: that are removed.
        size: tokens of a window.
        windows: that are read, of which the last chooses ridges.
        max_memory: Memory of the process.
    """

    args: ModelArgs
    layers: tuple[int, ...] = (28, 29, 30)
    size: int = 128
    windows: int = 4
    max_memory: str = "3GB"


def main(
    size: int = 128,
    windows: int = 4,
    folder: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        size: tokens of a window.
        windows: that are read.
        folder: keeps the checkpoint, or has it; a temporary folder if not given.
        out: JSON file for the result.
        overwrite: replace an existing file.
    """
    begin(out, overwrite=overwrite)
    with ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory())
        content = refitted(Case(LLAMA, size=size, windows=windows), Path(place))
    print(table(content))
    missed = [text for text, held in content["limits"].items() if not held]
    finish("refit_streamed", missed, content, out=out, overwrite=overwrite)


def refitted(case: Case, place: Path, start: Start | None = None) -> dict[str, Any]:
    """The benchmark's result.

    Args:
        case: what is refitted.
        place: a folder, where the checkpoint is if it was written before.
        start: runs the command; None in a process of its own.
    """
    checkpoint = place / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    if not (checkpoint / "config.json").exists():
        write_hf(case.args, random_tensors(case.args, torch.float16), checkpoint)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        found = (start or partial(apart, __file__))(
            command(case, checkpoint, Path(folder)), Path(folder) / "facts"
        )
    assert found.pop("code") == 0, "the command failed"
    limits = {
        "peak memory at most 3 GB": found["peak_bytes"] <= 3e9,
        "the refit's peak within its plan": found["refit_peak_bytes"] <= found["planned_bytes"],
    }
    model = f"Llama's layout, {case.args.n_layers} layers of width {case.args.dim}, float16"
    content = {"limits": limits, "model": model, "removed": [*case.layers]}
    return {**content, "windows": case.windows, "tokens_per_window": case.size, **found}


def command(case: Case, checkpoint: Path, folder: Path) -> list[str]:
    """The command line behind ``short-gpt``, whose texts are written for it."""
    source = random.Random(0)
    for name, windows in (("learn", case.windows), ("judge", 1)):
        (folder / f"{name}.txt").write_text(letters(case.size * windows - 1, source))
    texts = [f"--data={folder / 'learn.txt'}", f"--eval_data={folder / 'judge.txt'}"]
    numbers = {"size": case.size, "max_windows": case.windows, "eval_windows": 1}
    numbers |= {"layers": ",".join(map(str, case.layers))}
    line = ["heal", str(checkpoint), str(folder / "out"), "--heal_by=refit", *texts]
    line += [f"--stream={case.max_memory}", "--device=cpu"]
    return [*line, *(f"--{name}={value}" for name, value in numbers.items())]


def timed(facts: Path, argv: Sequence[str]) -> None:
    """Runs the command with a clock around refit and passes, and writes what that says.

    Args:
        facts: the file.
        argv: of the command.
    """
    found: dict[str, Any] = {"code": 0, "matrices": 0, "evaluation_seconds": []}
    plan, solve, judge = refit.plan_of, refit._solve, StreamedLlama.window_perplexities

    def planned(*given: Any, **more: Any) -> object:
        made = plan(*given, **more)
        found.update(plan=str(dict(made.host)), planned_bytes=sum(made.host.values()))
        return made

    def clocked(*given: Any) -> str:
        begun, state = time.perf_counter(), given[5]
        refused = solve(*given)
        found.update(refit_seconds=time.perf_counter() - begun, refit_peak_bytes=peak())
        found["matrices"] = len(state.fits)
        return refused

    def judged(self: StreamedLlama, *given: Any, **more: Any) -> object:
        begun = time.perf_counter()
        losses = judge(self, *given, **more)
        found["evaluation_seconds"].append(time.perf_counter() - begun)
        return losses

    began = time.perf_counter()
    with (
        patch.object(refit, "plan_of", planned),
        patch.object(refit, "_solve", clocked),
        patch.object(StreamedLlama, "window_perplexities", judged),
    ):
        try:
            short_gpt(list(argv))
        except SystemExit as end:
            found["code"] = int(end.code or 0)
    found |= {"seconds": time.perf_counter() - began, "peak_bytes": peak()}
    facts.write_text(json.dumps(found))


def table(content: dict[str, Any]) -> str:
    """What was measured, a line each."""
    windows, size = content["windows"], content["tokens_per_window"]
    return "\n".join(
        [
            f"{content['model']}; {windows} windows of {size} tokens",
            f"without {content['removed']}: {content['matrices']} matrices in "
            f"{content['refit_seconds']:.0f} s, the command {content['seconds']:.0f} s",
            f"a pass over one window {content['evaluation_seconds'][0]:.0f} s",
            f"peak memory {content['peak_bytes'] / 1e9:.2f} GB, of the refit "
            f"{content['refit_peak_bytes'] / 1e9:.2f} GB, planned "
            f"{content['planned_bytes'] / 1e9:.2f} GB",
            content["plan"],
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["timed"]:
        timed(Path(sys.argv[2]), sys.argv[3:])
    else:
        fire.Fire(main)
