"""The sizes of a run of `shrink` side by side, of which one may be picked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from short_gpt.checkpoints.prune import prune_checkpoint
from short_gpt.costs.rivals import (
    Rival,
    distances,
    has_quantizer,
    of_file,
    requantized,
    rivals,
    scratch,
    smaller_types,
)
from short_gpt.costs.speeds import WORK, Speeds, of_files, pytorch, speeds
from short_gpt.healing.job import RAW, pruned
from short_gpt.healing.settings import CLOSED_WINDOWS
from short_gpt.jobs.shrink_result import ANSWERS, CurvePoint
from short_gpt.jobs.shrink_run import ShrinkRun
from short_gpt.models.decoder import in_own_dtype
from short_gpt.runtime.digest import json_digest, windows_digest
from short_gpt.runtime.errors import ShortGPTError, one_line
from short_gpt.runtime.memory import format_bytes, free_memory
from short_gpt.runtime.progress import bar
from short_gpt.wrappers.options import FLOAT32


def curve_of(run: ShrinkRun, remarks: list[str]) -> list[CurvePoint]:
    """Every size, refitted and measured, and the original in fewer bits; remarks are added."""
    counts = run.settings.counts(run.count)
    # questions and chat template may be others when a run goes on
    asked = json_digest([run.questions, windows_digest(run.texts[ANSWERS])])
    with bar("sizes", total=len(counts) + 1, unit="size", show=True, delay=0) as shown:
        rows = [run.cells.value(f"size 0 {asked}", partial(_point, run, []))]
        for n in counts:
            layers = run.sets.layers(run.method, n, run.seed, most=counts[-1])
            shown.update(1)
            rows.append(run.cells.value(f"size {n} {asked}", partial(_point, run, sorted(layers))))
    points = [CurvePoint(**row) for row in rows]
    timed = "in llama.cpp" if run.in_llama_cpp else "in PyTorch"
    times = _kept(run, f"speeds of sizes {timed}", partial(_speeds, run, points), remarks)
    points = [point._replace(speeds=times.get(point.name, [])) for point in points]
    name = f"fewer bits {asked}, timed {timed}"
    others = _kept(run, name, partial(_in_fewer_bits, run), remarks)
    if run.opened.in_place:
        remarks.append(
            "sizes are measured before their refitted matrices are rounded to the file's types; "
            "the picked one as it is written"
        )
    return points + [CurvePoint(**row) for row in others]


def _kept(
    run: ShrinkRun, name: str, measure: Callable[[list[str]], Any], remarks: list[str]
) -> Any:
    """What ``measure`` gives, kept with what it remarks, which later runs say too."""

    def measured() -> dict[str, Any]:
        said = list[str]()
        return {"value": measure(said), "remarks": said}

    kept = run.cells.value(f"{name}, with remarks", measured)
    remarks += kept["remarks"]
    return kept["value"]


def _speeds(
    run: ShrinkRun, points: Sequence[CurvePoint], remarks: list[str]
) -> dict[str, list[float]]:
    """How many times as fast as the original each size is, by `WORK`."""
    if not run.in_llama_cpp:
        found = in_pytorch(run, {point.name: point.layers for point in points})
        return {name: [works[work].ratio for work in WORK] for name, works in found.items()}
    ratios, source = {"original": [1.0] * len(WORK)}, str(run.source)
    for name, layers, *_ in points[1:]:
        with optional(remarks), scratch(run.folder) as folder:
            path = prune_checkpoint(source, folder / "pruned.gguf", layers)  # healed as fast
            ratios[name] = _in_llama_cpp(run, path, remarks, run.fastest(layers))
    return ratios


def in_pytorch(run: ShrinkRun, sets: Mapping[str, Sequence[int]]) -> Speeds:
    """Speeds of the model without some layers, which is as fast as the healed one, by name."""
    short = run.short
    timers = {n: pytorch(short, partial(short.without_layers, own)) for n, own in sets.items()}
    most = {name: run.fastest(layers) for name, layers in sets.items()}
    with in_own_dtype(short.decoder):
        return speeds(timers, run.parts.evaluation[0], most=most)


def _in_llama_cpp(
    run: ShrinkRun, path: Path, remarks: list[str], most: float = math.inf
) -> list[float]:
    """How many times as fast as the original a GGUF file is; empty where llama.cpp cannot say."""
    if run.in_llama_cpp:
        with optional(remarks):
            paths = {"original": Path(str(run.source)), "other": path}
            found = of_files(paths, run.parts.evaluation[0], most={"other": most})
            return [found["other"][work].ratio for work in WORK]
    return []


def _point(run: ShrinkRun, layers: Sequence[int]) -> dict[str, Any]:
    """The model without some layers, refitted, ready for JSON."""
    short, (sizes, rest) = run.short, run.stored
    size = rest + sum(size for i, size in enumerate(sizes) if i not in layers)
    calibration = run.parts.training[:CLOSED_WINDOWS]
    with pruned(short, layers, run.settings.heal_by if layers else RAW, calibration):
        with in_own_dtype(short.decoder):
            klds = distances(short, run.texts, run.reference)
        answers = [reply.right for reply in run.ask() if reply.right is not None]
    name = f"{len(layers)} removed" if layers else "original"
    right = sum(answers) if answers else None
    return CurvePoint(name, [*layers], size, klds, right)._asdict()


def _in_fewer_bits(run: ShrinkRun, remarks: list[str]) -> list[dict[str, Any]]:
    """The original in fewer bits, as `_point`: of GGUF files of each type that is smaller."""
    points, source = list[CurvePoint](), str(run.source)
    with optional(remarks):
        points += map(CurvePoint.of, rivals_in_memory(run))
        if run.opened.in_place and has_quantizer():
            opening = replace(run.opening, precision=FLOAT32)
            for kind in smaller_types(source):
                with scratch(run.folder) as folder:
                    path = requantized(source, folder / f"{kind}.gguf", kind)
                    rival = CurvePoint.of(of_file(path, run.texts, run.reference, opening))
                    points.append(rival._replace(speeds=_in_llama_cpp(run, path, remarks)))
    return [point._asdict() for point in points]


@contextmanager
def optional(remarks: list[str]) -> Iterator[None]:
    """A comparison: the model is also made, and written after hours, where it fails."""
    try:
        yield
    except Exception as error:
        remarks.append(one_line(str(error)) or type(error).__name__)


def rivals_in_memory(run: ShrinkRun) -> list[Rival]:
    """The original, which the model still is, in fewer bits; a GGUF file's come after writing."""
    if run.opened.in_place or not has_quantizer():
        return []
    if (most := sum(p.nbytes for p in run.short.decoder.layers.parameters())) > free_memory():
        more = format_bytes(most)
        raise ShortGPTError(f"not compared with fewer bits: that takes {more} more of memory")
    total = sum(run.stored[0]) + run.stored[1]
    itemsize = run.opened.dtype.itemsize
    with in_own_dtype(run.short.decoder):
        return rivals(run.short, run.texts, run.reference, stored=total, itemsize=itemsize)
