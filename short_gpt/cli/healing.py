"""The command that brings quality back after layers are removed: heal."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama.io.files import check_new
from llama.io.sources import is_meta
from short_gpt.checkpoints import PROVENANCE
from short_gpt.cli.choice import chosen
from short_gpt.cli.shared import (
    arguments_of,
    check_run,
    interruptible,
    open_short,
    say,
    say_written,
    targets_of,
)
from short_gpt.healing import HealingJob, LoraSettings, PatchSettings
from short_gpt.healing.four_bit import require_four_bit
from short_gpt.healing.lora import require_packages
from short_gpt.healing.recipe import PRESETS, Recipe, recipe_for
from short_gpt.healing.texts import Source
from short_gpt.report import tables as report
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import write_record
from short_gpt.short_hf import ShortHFModel
from short_gpt.short_model import ShortModel

METHODS = ("patch", "lora")
SETTINGS = (
    *("rank", "alpha", "learning_rate", "steps", "warmup", "batch", "micro_batch"),
    *("eval_every", "patience", "four_bit", "gradient_checkpointing"),
)


def heal(
    model_dir: str,
    out_dir: str,
    *,
    data: str = "pg19",
    method: str = "patch",
    layers: Any = None,
    scores: str | None = None,
    n_prune_layers: int | None = None,
    angular: bool = False,
    eval_data: str | None = None,
    split: str = "validation",
    column: str = "text",
    max_texts: int | None = None,
    size: int | None = None,
    max_windows: int | None = None,
    eval_windows: int = 32,
    drop_overlap: bool | None = None,
    ridge: float | None = None,
    preset: str = "paper",
    rank: int | None = None,
    alpha: int | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
    warmup: int | None = None,
    batch: int | None = None,
    micro_batch: int | None = None,
    eval_every: int | None = None,
    patience: int | None = None,
    four_bit: bool = False,
    gradient_checkpointing: bool = False,
    resume: bool = False,
    seed: int = 0,
    tokenizer_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Removes layers and brings quality back: a closed-form patch, or LoRA.

    The patch takes minutes and one pass over the windows. LoRA also heals a model whose layers
    are already removed; a Meta checkpoint goes to Hugging Face's format and back. No text that is
    evaluated on is learned from.

    Example: short-gpt heal llama-2-7b llama-2-5b --data novels/ --scores r.json --n_prune_layers 9

    Args:
        model_dir: Meta checkpoint directory, Hugging Face directory or hub id.
        out_dir: new directory; must not exist.
        data: texts to learn from: pg19, a local file or folder of .txt, .jsonl or .parquet, or a
            hub data set's name.
        method: patch, or lora.
        layers: numbers of the layers to remove first, as in 21,22,23.
        scores: JSON file that rank wrote, to choose them by.
        n_prune_layers: how many layers to remove by the scores.
        angular: remove the best block of consecutive layers, not the lowest Block Influence.
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out.
        split: split of the data.
        column: column of the text in .jsonl, .parquet and hub data sets.
        max_texts: take only the first so many texts of data.
        size: tokens in a window; 1024 for the patch, the recipe's for lora.
        max_windows: windows to learn from; 64 for the patch, all for lora.
        eval_windows: windows to evaluate on.
        drop_overlap: leave out windows that share text with those to evaluate on, instead of
            refusing them; on if no eval_data is given.
        ridge: of the patch, relative to the mean square of what the MLP gives; 1e-4.
        preset: of lora, paper or demo; each of the following changes one of its settings.
        rank: of lora's changes.
        alpha: their scale times the rank; the rank.
        learning_rate: at its peak.
        steps: optimizer steps.
        warmup: steps until the peak.
        batch: windows a step.
        micro_batch: windows read at once.
        eval_every: steps between evaluations and checkpoints.
        patience: stop after so many evaluations without a better one.
        four_bit: train over weights in 4 bits; needs bitsandbytes and CUDA.
        gradient_checkpointing: less memory, more time.
        resume: continue lora from the checkpoints of an interrupted run, in OUT_DIR.training.
        seed: of the choice of texts and windows, and of training.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        out: JSON file for the evidence.
        overwrite: replace an earlier pruned checkpoint, and out.
    """
    arguments = arguments_of(locals())
    settings = {name: arguments[name] for name in SETTINGS if arguments[name] not in (None, False)}
    _check_method(method, preset, settings, ridge, resume=resume)
    targets = targets_of(out, None, overwrite=overwrite)
    check_new(Path(out_dir), marker=PROVENANCE, overwrite=overwrite, source=Path(model_dir))
    drop, facts = _selection(model_dir, method, layers, scores, n_prune_layers, angular=angular)
    check_run(model_dir, None, size or 1024, 1, max_windows)
    source = Source(data, eval_data, split, column, max_texts, seed)
    given = {"tokenizer_path": tokenizer_path, "device": device, "dtype": dtype}
    with interruptible():
        short = _opened(model_dir, method, size or 1024, given)
        how = _settings(short, method, {**settings, "seed": seed}, preset, ridge)
        if isinstance(how, LoraSettings):
            how = replace(how, work_dir=f"{out_dir}.training", resume=resume)
            size = size or (how.recipe or Recipe()).size
        size = size or 1024
        cut = source.windows(
            short.encode,
            size,
            limit=max_windows or (64 if method == "patch" else None),
            eval_windows=eval_windows,
            drop_overlap=drop_overlap,
            validate=method == "lora",
        )
        if cut.left_out is not None:
            say(cut.left_out)
        job = HealingJob(short, cut, drop, settings=how)
        evidence = job.run()
        say(f"{report.perplexities(dict(evidence.perplexity))}\n")
        say(f"healing changes the loss by {evidence.change}")
        inputs = {"data": data, "eval_data": eval_data, "size": size}
        job.save(out_dir, facts=facts | inputs, overwrite=overwrite)
    if out is not None:
        result = evidence.to_dict() | inputs
        record = {"command": "heal", "arguments": arguments, "seed": seed, "result": result}
        write_record(out, record, overwrite=overwrite)
    say_written([Path(out_dir), *targets])


def _check_method(
    method: str, preset: str, settings: dict[str, Any], ridge: float | None, *, resume: bool
) -> None:

    if method not in METHODS:
        raise ShortGPTError(f"--method {method}: expected one of {', '.join(METHODS)}")
    foreign = [
        *settings,
        *(["resume"] if resume else []),
        *(["preset"] if preset != "paper" else []),
    ]
    if method == "patch" and foreign:
        raise ShortGPTError(f"--{foreign[0]} is for --method lora")
    if method == "lora" and ridge is not None:
        raise ShortGPTError("--ridge is for --method patch")
    if preset not in PRESETS:
        raise ShortGPTError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    if method == "lora":
        Recipe(**{**asdict(Recipe()), **settings})
        require_packages()
        if settings.get("four_bit"):
            require_four_bit()


def _selection(
    model_dir: str, method: str, layers: Any, scores: str | None, n: int | None, *, angular: bool
) -> tuple[list[int], dict[str, Any]]:
    """The layers to remove, if any, and the facts of their choice."""
    if method == "lora" and layers is None and scores is None:
        if n is not None or angular:
            raise ShortGPTError("--n_prune_layers and --angular choose from --scores FILE")
        return [], {}
    if layers is None and scores is None:
        raise ShortGPTError(
            "the patch reads the whole model and removes layers itself: give --layers 21,22,23 or "
            "--scores FILE --n_prune_layers N"
        )
    return chosen(model_dir, layers, scores, n, angular=angular)


def _opened(model_dir: str, method: str, size: int, given: dict[str, Any]) -> ShortModel:
    """The model; for lora as one of Hugging Face's."""
    path, device, dtype = given["tokenizer_path"], given["device"], given["dtype"]
    if method == "patch" or not is_meta(model_dir):
        return open_short(model_dir, path, size, 1, device, dtype, None)
    return ShortHFModel.from_meta(model_dir, **given)


def _settings(
    short: ShortModel, method: str, changes: dict[str, Any], preset: str, ridge: float | None
) -> PatchSettings | LoraSettings:
    if method == "patch":
        return PatchSettings() if ridge is None else PatchSettings(ridge)
    return LoraSettings(recipe_for(short.trainable().config, preset, **changes))
