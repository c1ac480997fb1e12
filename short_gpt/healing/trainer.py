"""The training of LoRA healing by the Trainer of transformers."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from llama.io.json_files import write_json
from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.healing.quiet import deterministic, kept_config, quiet
from short_gpt.healing.recipe import Recipe
from short_gpt.models.hf import HFDecoder
from short_gpt.runtime.digest import json_digest, weights_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import Bar, bar
from short_gpt.runtime.results import read_record

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        PreTrainedModel,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

Window = Sequence[int]
RECIPE = "recipe.json"  # in the folder of checkpoints: what they belong to


@dataclass(frozen=True)
class TrainingRun:
    """What one run of training takes.

    Attributes:
        training, validation, recipe: windows to learn from, to choose the step by; settings.
        work_dir: keeps checkpoints; None keeps none.
        resume: continue from the last checkpoint there.
        show: whether to show a bar.
    """

    training: Sequence[Window]
    validation: Sequence[Window]
    recipe: Recipe
    work_dir: str | Path | None = None
    resume: bool = False
    show: bool = True

    def identity(self, adapted: PeftModel) -> dict[str, object]:
        """What a resumed run must share with the earlier one."""
        windows = [[list(w) for w in part] for part in (self.training, self.validation)]
        return {
            "recipe": json.loads(json.dumps(asdict(self.recipe))),  # as a file gives it back
            "text": json_digest(windows),
            "model": weights_digest(adapted),
        }


def train(adapted: PeftModel, run: TrainingRun) -> tuple[TrainerState, float]:
    """Trains a ``PeftModel`` in place; the weights of its best evaluation stay.

    Returns:
        The Trainer's state: ``global_step``, ``log_history`` and ``best_global_step``; and the
        perplexity on the validation windows before any step.
    """
    recipe = run.recipe
    with (
        _folder(run.work_dir, run.identity(adapted), resume=run.resume) as folder,
        quiet(),
        deterministic(),
        kept_config(adapted),
        bar("healing", total=recipe.steps, unit="step", show=run.show) as shown,
    ):
        before = _perplexity(adapted, run)
        if recipe.gradient_checkpointing:
            base = cast("PreTrainedModel", adapted.get_base_model())
            base.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = _trainer(adapted, run, folder, shown)
        if not (run.resume and _finished(trainer, folder)):
            trainer.train(resume_from_checkpoint=run.resume)
        return trainer.state, before.value


def _finished(trainer: Trainer, folder: Path) -> bool:
    """Whether all steps are done, for the Trainer would do one more; loads the best if so."""
    from transformers import TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    state = f"{get_last_checkpoint(str(folder))}/trainer_state.json"
    trainer.state = TrainerState.load_from_json(state)
    if done := trainer.state.global_step >= trainer.args.max_steps:
        trainer._load_best_model()
    return done


def _perplexity(adapted: PeftModel, run: TrainingRun) -> Perplexity:
    adapted.eval()
    windows = batches(run.validation, run.recipe.micro_batch)
    return perplexity(HFDecoder(adapted.get_base_model()), windows)


@contextmanager
def _folder(work_dir: str | Path | None, run: dict[str, object], *, resume: bool) -> Iterator[Path]:
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
        _check_run(folder, run)
    yield folder


def _check_run(folder: Path, run: dict[str, object]) -> None:
    """Raises ShortGPTError unless the checkpoints in a folder are of the same run."""
    earlier, now = _settings(read_record(folder / RECIPE)), _settings(run)
    for name, value in now.items():
        if earlier.get(name) != value:
            raise ShortGPTError(
                f"{folder} holds a run of another {name}: {earlier.get(name)!r}, now {value!r}; go "
                f"on with the former {name}, or delete {folder} to begin anew"
            )


def _settings(run: Mapping[str, object]) -> dict[str, object]:
    """What a run depends on, the recipe's settings by their own names."""
    own = recipe if isinstance(recipe := run.get("recipe"), dict) else {}
    return {**own, **{name: value for name, value in run.items() if name != "recipe"}}


def begun(folder: Path) -> bool:
    """Whether a folder holds a run of `train` that can be continued."""
    return (folder / RECIPE).is_file() and whole_checkpoints(folder)


def whole_checkpoints(folder: Path) -> bool:
    """Deletes checkpoints that a kill cut short; whether others are left."""
    left = False
    for path in folder.glob("checkpoint-*"):
        try:
            read_record(path / "trainer_state.json")  # written last
            left = True
        except (OSError, ValueError):
            shutil.rmtree(path)
    return left


def _trainer(adapted: PeftModel, run: TrainingRun, folder: Path, shown: Bar) -> Trainer:
    from transformers import Trainer

    class Healer(Trainer):
        """Evaluates by `perplexity`: total loss over predicted tokens."""

        def evaluate(self, *_: object, **__: object) -> dict[str, float]:
            measured = _perplexity(adapted, run)
            loss = measured.nats / measured.tokens  # what the Trainer chooses the best step by
            metrics = {"eval_loss": loss, "eval_perplexity": measured.value}
            self.log(metrics)
            tell = self.callback_handler.on_evaluate
            self.control = tell(self.args, self.state, self.control, metrics)
            return metrics

    trainer = Healer(
        model=adapted,
        args=_arguments(adapted, run.recipe, folder),
        train_dataset=_examples(run.training),
        eval_dataset=_examples(run.validation),
        data_collator=_collate,  # pads, so that windows may differ in length
        callbacks=_callbacks(run.recipe, shown),
    )
    _silence(trainer)
    return trainer


def _silence(trainer: Trainer) -> None:
    """Takes out what prints: the bar here tells as much."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _callbacks(recipe: Recipe, shown: Bar) -> list[TrainerCallback]:
    from transformers import EarlyStoppingCallback

    stop = [] if recipe.patience is None else [EarlyStoppingCallback(recipe.patience)]
    return [_progress(shown), *stop]


def _arguments(adapted: PeftModel, recipe: Recipe, folder: Path) -> TrainingArguments:
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
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=max(1, min(recipe.eval_every, recipe.steps // 100)),
        logging_nan_inf_filter=False,  # `_progress` is to see them
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
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)  # (B, S)
    labels = torch.full_like(tokens, -100)  # what cross entropy passes over
    for row, example in enumerate(examples):
        ids = torch.tensor(example["input_ids"])
        tokens[row, : len(ids)] = labels[row, : len(ids)] = ids
    return {"input_ids": tokens, "labels": labels}


def _progress(shown: Bar) -> TrainerCallback:
    """A callback: the bar, a last evaluation, and a stop at a loss that is not finite."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            shown.update(state.global_step)

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            shown.update(1)
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: dict[str, float] | None = None,
            **_: object,
        ) -> None:
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"the loss became {loss} at step {state.global_step}; lower the learning rate, "
                    "or use float32 or bfloat16"
                )
            if logs and "eval_perplexity" in logs:
                shown.set_postfix_str(f"perplexity {logs['eval_perplexity']:.2f}")

    return Progress()
