"""The command that sets all methods side by side: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama.parallel import several_ranks
from short_gpt.cli.shared import (
    arguments_of,
    check_run,
    interruptible,
    numbers_of,
    open_short,
    say,
    say_written,
    targets_of,
)
from short_gpt.data import demo
from short_gpt.data.disjoint import hold_out
from short_gpt.data.texts import read_texts, texts
from short_gpt.data.windows import windows
from short_gpt.evaluation.tasks import TaskSuite
from short_gpt.experiments.compare import Cases
from short_gpt.experiments.compare import compare as compare_methods
from short_gpt.experiments.comparison_lora import LoraHealing, LoraSettings
from short_gpt.experiments.rows import LORA, PATCHED, RAW
from short_gpt.opening import OpenOptions
from short_gpt.report import tables as report
from short_gpt.report.plots import quality_curves, require_matplotlib, save
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import refuse_existing, write_record
from short_gpt.selection.methods import METHODS

DEFAULT = "bi,angular,deepest,relative_magnitude,perplexity,sleb,reverse,random"


def compare(
    ckpt_dir: str | None = None,
    *,
    methods: str = DEFAULT,
    counts: Any = (2, 4, 8, 12),
    healing: str = "raw,patched",
    data: str = "pg19",
    eval_data: str | None = None,
    split: str = "validation",
    column: str = "text",
    max_texts: int | None = None,
    size: int = 1024,
    max_windows: int = 24,
    search_windows: int = 4,
    eval_windows: int = 16,
    seeds: int = 3,
    lora_only: str | None = None,
    lora_steps: int | None = None,
    lora_rank: int | None = None,
    lora_learning_rate: float | None = None,
    lora_batch: int | None = None,
    lora_size: int | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    seed: int = 0,
    tokenizer_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    state: str | None = None,
    out: str | None = None,
    plots: str | None = None,
    overwrite: bool = False,
) -> None:
    """Compares methods x numbers of layers x healing on one model, nothing measured twice.

    Without a checkpoint, the demo's small model and book are compared. Interrupted, the same
    command continues from its state file.

    Example: short-gpt compare llama-2-7b --data novels/ --eval_data others/ --out compared.json

    Args:
        ckpt_dir: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        methods: names as of rank --method, with commas between.
        counts: numbers of layers to remove, as in 2,4,8.
        healing: of raw, patched and lora, with commas between.
        data: texts to choose layers and to heal by: pg19, a local file or folder of .txt, .jsonl
            or .parquet, or a hub data set's name.
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out.
        split: split of the data.
        column: column of the text in .jsonl, .parquet and hub data sets.
        max_texts: take only the first so many texts of data.
        size: tokens in a window.
        max_windows: windows of data for scores and patches.
        search_windows: of these, how many the searches by loss read.
        eval_windows: windows to evaluate on.
        seeds: random sets for every number of layers.
        lora_only: what to heal by lora, which takes far longer than all the rest, as in
            bi:8,angular:8; all if not given.
        lora_steps: steps of lora, a tenth of them warm-up but at most 100; the recipe's 5000 if
            not given.
        lora_rank: its rank; the recipe's if not given.
        lora_learning_rate: its peak; the recipe's if not given.
        lora_batch: windows a step; the recipe's 16 if not given.
        lora_size: tokens in a window of lora; the recipe's if not given.
        tasks: of lm-eval, with commas between, for the models without healing.
        limit: only the first so many documents of each task.
        include_path: folder with YAML files of more tasks.
        seed: of the choice of windows.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        state: file that the run is saved in and continued from; OUT.state if not given.
        out: JSON file for the results.
        plots: folder for the picture quality.png.
        overwrite: replace existing files.
    """
    arguments = arguments_of(locals())
    if several_ranks():
        raise ShortGPTError("compare runs on one rank; start it alone")
    names, numbers, healings = methods.split(","), numbers_of(counts), healing.split(",")
    if odd := [h for h in healings if h not in (RAW, PATCHED, LORA)]:
        raise ShortGPTError(f"--healing {odd[0]}: expected some of {RAW}, {PATCHED}, {LORA}")
    if odd := [m for m in names if m not in METHODS]:
        raise ShortGPTError(f"--methods {odd[0]}: expected some of {', '.join(METHODS)}")
    only = _pairs(lora_only, names, numbers, healings)
    targets = targets_of(out, None, overwrite=overwrite)
    picture = _picture(plots, overwrite=overwrite)
    source, calibration, evaluation = _material(ckpt_dir, arguments)
    check_run(source, max(numbers), size, size, max_windows)
    short = open_short(source, tokenizer_path, size, 1, device, dtype, None)

    def cut(found: list[str], count: int | None) -> list[list[int]]:
        return list(windows(found, short.encode, size=size, stride=size, seed=seed, limit=count))

    held, chosen = cut(evaluation, eval_windows), cut(calibration, max_windows)
    suite = TaskSuite(tasks.split(","), limit, None, include_path) if tasks else None
    lora = None
    if LORA in healings:
        settings = LoraSettings(lora_steps, lora_rank, lora_learning_rate, lora_batch, lora_size)
        options = OpenOptions(tokenizer_path=tokenizer_path, device=device, dtype=dtype)
        lora = LoraHealing(source, calibration, short.encode, held, settings, options, seed)
    with interruptible():
        result = compare_methods(
            short,
            chosen,
            held,
            cases=Cases(names, numbers, healings, seeds, search_windows, only),
            lora=lora,
            tasks=suite,
            state=state if state is not None else out and f"{out}.state",
        )
    say(report.compared(result.rows, result.agreement, result.tasks))
    if out is not None:
        record = {"command": "compare", "arguments": arguments, "seed": seed, **result.to_dict()}
        write_record(out, record, overwrite=overwrite)
    if picture is not None:
        save(quality_curves(result.rows), picture)
        targets.append(picture)
    if result.state is not None:
        result.state.clear()
    say_written(targets)


def _pairs(
    given: str | None, methods: list[str], counts: list[int], healings: list[str]
) -> list[tuple[str, int]] | None:
    """Methods and numbers, as in bi:8,angular:8."""
    if given is None:
        return None
    if LORA not in healings:
        raise ShortGPTError("--lora_only is for --healing lora")
    cases = {f"{m}:{n}": (m, n) for m in methods for n in counts}
    if odd := [part for part in given.split(",") if part not in cases]:
        raise ShortGPTError(
            f"--lora_only {odd[0]}: expected METHOD:NUMBER of --methods and --counts, as in "
            f"{next(iter(cases))}"
        )
    return [cases[part] for part in given.split(",")]


def _picture(plots: str | None, *, overwrite: bool) -> Path | None:

    if plots is None:
        return None
    require_matplotlib()
    picture = Path(plots) / "quality.png"
    refuse_existing(picture, overwrite=overwrite)
    return picture


def _material(ckpt_dir: str | None, given: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """The model, texts to choose and heal by, and texts to evaluate on."""
    if ckpt_dir is None:
        return str(demo.checkpoint()), demo.bible("calibration"), demo.bible("held_out")
    found = list(read_texts(given["data"], given["split"], given["column"], given["max_texts"]))
    if given["eval_data"] is None:
        return ckpt_dir, *hold_out(found, seed=given["seed"])
    return ckpt_dir, found, list(texts(given["eval_data"], column=given["column"]))
