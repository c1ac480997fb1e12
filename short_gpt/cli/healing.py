"""The command that brings quality back after layers are removed: heal."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama.formats.convert import meta_to_hf
from llama.io.files import check_new
from llama.io.sources import is_meta
from short_gpt.checkpoints.healed import save_healed
from short_gpt.checkpoints.meta import PROVENANCE
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
from short_gpt.evaluation.paired import difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing.linear_patch import RIDGE, fit, fold
from short_gpt.healing.lora import heal as heal_lora
from short_gpt.healing.lora import require_four_bit, require_packages
from short_gpt.healing.recipe import PRESETS, Recipe, recipe_for
from short_gpt.healing.texts import Learning, Source
from short_gpt.report import tables as report
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import write_record

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
    with interruptible(), _opened(model_dir, method, size or 1024, given) as short:
        recipe = _recipe(short, preset, settings, seed) if method == "lora" else None
        size = size or (recipe.size if recipe else 1024)
        limit = max_windows or (64 if method == "patch" else None)
        cut = source.windows(short, size, limit, eval_windows, drop_overlap, lora=bool(recipe))
        job = _Job(short, drop, cut, recipe, ridge)
        evidence = job.run(f"{out_dir}.training", resume=resume)
        result = evidence | {"data": data, "eval_data": eval_data, "size": size}
        options = {"overwrite": overwrite, "tokenizer_path": tokenizer_path}
        job.save(out_dir, facts | result, model_dir, options)
    if out is not None:
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
    """The layers to remove, if any, and how they were chosen."""
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


@contextmanager
def _opened(model_dir: str, method: str, size: int, given: dict[str, Any]) -> Iterator[Any]:
    """The model; for lora as one of Hugging Face's."""
    path, device, dtype = given["tokenizer_path"], given["device"], given["dtype"]
    if method == "patch" or not is_meta(model_dir):
        yield open_short(model_dir, path, size, 1, device, dtype, None)
        return

    with tempfile.TemporaryDirectory() as folder:
        converted = f"{folder}/converted"
        meta_to_hf(model_dir, converted, tokenizer_path=path)
        yield open_short(converted, None, size, 1, device, dtype, None)


def _recipe(short: Any, preset: str, settings: dict[str, Any], seed: int) -> Any:

    return recipe_for(short.model.config, preset, **{**settings, "seed": seed})


@dataclass
class _Job:
    """One healing: measured before and after, and saved."""

    short: Any
    drop: list[int]
    cut: Learning
    recipe: Any
    ridge: float | None
    patch: Any = None
    work_dir: str = ""

    def run(self, work_dir: str, *, resume: bool) -> dict[str, Any]:
        """Removes, heals and measures; prints the table and returns the evidence."""
        found: dict[str, list[Perplexity]] = {}
        count, self.work_dir = len(self.short.kept), work_dir
        if self.drop:
            if self.recipe is None:
                self.patch = self._fit()
            found[f"whole, {count} layers"] = self._measure()
            self.short.remove_layers(self.drop)
        raw = f"pruned, {len(self.short.kept)} layers" if self.drop else f"before, {count} layers"
        found[raw] = self._measure()
        how = self._heal(resume=resume)
        found["healed"] = self._measure()
        totals = {name: together(parts) for name, parts in found.items()}
        change = difference(found[raw], found["healed"])
        say(f"{report.perplexities(totals)}\n\nhealing changes the loss by {change}")
        values = {name: p.value for name, p in totals.items()}
        return {"healing": how, "perplexity": values, "change": asdict(change)}

    def save(
        self, out_dir: str, facts: dict[str, Any], source: str, options: dict[str, Any]
    ) -> None:

        meta = self.recipe is not None and is_meta(source)
        options = {**options, "as_meta": meta}
        save_healed(self.short, out_dir, facts, source=source, **options)
        if self.recipe is not None:
            shutil.rmtree(self.work_dir, ignore_errors=True)

    def _fit(self) -> Any:

        ridge = RIDGE if self.ridge is None else self.ridge
        return fit(self.short, self.drop, self.cut.training, ridge=ridge)

    def _heal(self, *, resume: bool) -> dict[str, Any]:
        if self.patch is not None:
            fold(self.short, self.patch)
            return self.patch.to_dict()

        parts = (self.cut.training, self.cut.validation, self.cut.evaluation)
        return heal_lora(
            self.short, *parts, recipe=self.recipe, work_dir=self.work_dir, resume=resume
        ).to_dict()

    def _measure(self) -> list[Perplexity]:
        return losses(self.short.decoder, self.cut.evaluation)
