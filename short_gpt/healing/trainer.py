"""The training of LoRA healing by the Trainer of transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama.io.json_files import write_json
from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.healing.recipe import Recipe
from short_gpt.models.hf import HFDecoder
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import bar

Window = Sequence[int]
RECIPE = "recipe.json"  # in the folder of checkpoints: what they belong to


def train(
    adapted: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    recipe: Recipe,
    work_dir: str | Path | None,
    *,
    resume: bool,
    show: bool,
) -> tuple[Any, float]:
    """Trains a ``PeftModel`` in place; the weights of its best evaluation stay.

    Returns:
        The Trainer's state: ``global_step``, ``log_history`` and ``best_global_step``; and the
        perplexity on the validation windows before any step.
    """
    run = _identity(adapted, training, validation, recipe)
    with (
        _folder(work_dir, run, resume=resume) as folder,
        quiet(),
        _deterministic(),
        bar("healing", total=recipe.steps, unit="step", show=show) as shown,
    ):
        before = _perplexity(adapted, validation, recipe)
        if recipe.gradient_checkpointing:
            base = adapted.get_base_model()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = _trainer(adapted, training, validation, recipe, folder, shown)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state, before.value


def _perplexity(adapted: Any, validation: Sequence[Window], recipe: Recipe) -> Perplexity:
    adapted.eval()
    return perplexity(HFDecoder(adapted.get_base_model()), batches(validation, recipe.micro_batch))


@contextmanager
def _folder(work_dir: str | Path | None, run: dict[str, Any], *, resume: bool) -> Iterator[Path]:
    """Where checkpoints go; with ``resume`` it must hold some of the same run."""
    if work_dir is None:
        if resume:
            raise ShortGPTError("to resume, name the work_dir that holds the checkpoints")
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    folder = Path(str(work_dir))
    begun = whole_checkpoints(folder) if resume else any(folder.glob("checkpoint-*"))
    if not resume:
        if begun or (folder.exists() and {p.name for p in folder.iterdir()} - {RECIPE}):
            raise FileExistsError(f"{folder} holds an earlier run; resume it, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECIPE, run)
    elif not begun or not (folder / RECIPE).is_file():
        raise ShortGPTError(f"{folder} holds no checkpoint to resume from; start without resume")
    else:
        earlier = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        other = sorted(name for name in run if earlier.get(name) != run[name])
        if other:
            raise ShortGPTError(
                f"{folder} holds a run of another {', '.join(other)}: give the same, or start anew "
                "elsewhere"
            )
    yield folder


def whole_checkpoints(folder: Path) -> bool:
    """Deletes checkpoints that a kill cut short; whether others are left."""
    left = False
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # written last
            left = True
        except (OSError, ValueError):
            shutil.rmtree(path)
    return left


def _identity(
    adapted: Any, training: Sequence[Window], validation: Sequence[Window], recipe: Recipe
) -> dict[str, Any]:
    """What a resumed run must share with the earlier one; the model by 64 values a weight."""
    model = hashlib.sha256()
    for name, weight in adapted.named_parameters():
        values = weight.detach().flatten()[:64].cpu()
        model.update(name.encode() + bytes(values.float().numpy().tobytes()))
    texts = hashlib.sha256(json.dumps([[*map(list, w)] for w in (training, validation)]).encode())
    settings = json.loads(json.dumps(asdict(recipe)))
    return {"recipe": settings, "text": texts.hexdigest(), "model": model.hexdigest()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks to developers; what users must know is raised or reported."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            # peft looks for a config beside GGUF files; no embedding changes its size here
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms inside the block."""
    before, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def _trainer(
    adapted: Any,
    training: Sequence[Window],
    validation: Sequence[Window],
    recipe: Recipe,
    folder: Path,
    shown: Any,
) -> Any:
    from transformers import EarlyStoppingCallback, Trainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Healer(Trainer):
        """Evaluates by `perplexity`: total loss over predicted tokens."""

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            found = _perplexity(adapted, validation, recipe)
            metrics = {"eval_loss": found.nats / found.tokens, "eval_perplexity": found.value}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    callbacks: list[Any] = [_progress(shown)]
    if recipe.patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.patience))
    trainer = Healer(
        model=adapted,
        args=_arguments(adapted, recipe, folder),
        train_dataset=_examples(training),
        eval_dataset=_examples(validation),
        data_collator=_collate,
        callbacks=callbacks,
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _arguments(adapted: Any, recipe: Recipe, folder: Path) -> Any:
    from transformers import TrainingArguments

    weight = next(adapted.parameters())
    on_card = weight.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // recipe.micro_batch,
        eval_strategy="steps",
        eval_steps=min(recipe.eval_every, recipe.steps),
        save_strategy="steps",
        save_steps=min(recipe.eval_every, recipe.steps),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=max(1, min(recipe.eval_every, recipe.steps // 100)),
        logging_nan_inf_filter=False,
        bf16=on_card and weight.dtype == torch.bfloat16,
        fp16=on_card and weight.dtype == torch.float16,
        use_cpu=weight.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
        data_seed=recipe.seed,
        restore_callback_states_from_checkpoint=True,  # how long patience has lasted
        log_level="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the model stays whole on one card
    return arguments


def _examples(windows: Sequence[Window]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(window)} for window in windows]


def _collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Windows as one batch, padded on the right; padding is no target."""
    longest = max(len(e["input_ids"]) for e in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for row, example in enumerate(examples):
        ids = torch.tensor(example["input_ids"])
        tokens[row, : len(ids)] = labels[row, : len(ids)] = ids
    return {"input_ids": tokens, "labels": labels}


def _progress(shown: Any) -> Any:
    """A callback: the bar, a last evaluation, and a stop at a loss that is not finite."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shown.update(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shown.update(1)
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"the loss became {loss} at step {state.global_step}; lower the learning rate, "
                    "or use float32 or bfloat16"
                )
            if "eval_perplexity" in (logs or {}):
                shown.set_postfix_str(f"perplexity {logs['eval_perplexity']:.2f}")

    return Progress()
