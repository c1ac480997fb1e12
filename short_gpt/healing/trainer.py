"""The training of LoRA, on text or by distillation, by the Trainer of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from llama.io.swap import follow_umask
from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.healing.batching import collate, examples
from short_gpt.healing.distillation import Distillation
from short_gpt.healing.quiet import deterministic, kept_config, quiet
from short_gpt.healing.recipe import Recipe
from short_gpt.healing.run_folder import note_files, run_folder
from short_gpt.models.computation import config_digest, config_entries
from short_gpt.models.hf import HFDecoder
from short_gpt.runtime.digest import json_digest, weights_digest
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.progress import Bar, bar
from short_gpt.runtime.state import joined

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


@dataclass(frozen=True)
class TrainingRun:
    """What one run of training takes.

    Attributes:
        training, validation, recipe: windows to learn from, to choose the step by; settings.
        work_dir: keeps checkpoints; None keeps none.
        resume: continue from the last checkpoint there.
        show: whether to show a bar.
        distillation: what is learned in the place of the text; None learns the text.
    """

    training: Sequence[Window]
    validation: Sequence[Window]
    recipe: Recipe
    work_dir: str | Path | None = None
    resume: bool = False
    show: bool = True
    distillation: Distillation | None = None

    def identity(self, adapted: PeftModel) -> dict[str, object]:
        """What a resumed run must share with the earlier one."""
        windows = [[list(w) for w in part] for part in (self.training, self.validation)]
        own = {
            "recipe": json.loads(json.dumps(asdict(self.recipe))),  # as a file gives it back
            "text": json_digest(windows),
            "model": weights_digest(adapted),
            "configuration": config_digest(config_entries(adapted.get_base_model().config)),
        }
        return joined(own, {} if self.distillation is None else self.distillation.identity())

    def measure(self, adapted: PeftModel) -> dict[str, float]:
        """On the validation windows: what the best step is chosen by, and the perplexity."""
        adapted.eval()
        decoder, at_once = HFDecoder(adapted.get_base_model()), self.recipe.micro_batch
        if self.distillation is not None:
            first = len(self.training)
            return self.distillation.measure(
                decoder, self.validation, first=first, batch_size=at_once
            )
        found = perplexity(decoder, batches(self.validation, at_once))
        return {"eval_loss": found.nats / found.tokens, "eval_perplexity": found.value}


def train(adapted: PeftModel, run: TrainingRun) -> tuple[TrainerState, dict[str, float]]:
    """Trains a ``PeftModel`` in place; the weights of its best evaluation stay.

    Returns:
        The Trainer's state: ``global_step``, ``log_history`` and ``best_global_step``; and what
        `TrainingRun.measure` gave before any step.
    """
    recipe = run.recipe
    with (
        run_folder(run.work_dir, run.identity(adapted), resume=run.resume) as folder,
        quiet(),
        deterministic(),
        kept_config(adapted),
        bar("healing", total=recipe.steps, unit="step", show=run.show) as shown,
    ):
        before = run.measure(adapted)
        if recipe.gradient_checkpointing:
            base = cast("PreTrainedModel", adapted.get_base_model())
            base.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = _trainer(adapted, run, folder, shown)
        if not (run.resume and _finished(trainer, folder)):
            trainer.train(resume_from_checkpoint=run.resume)
        return trainer.state, before


def _finished(trainer: Trainer, folder: Path) -> bool:
    """Whether all steps are done, for the Trainer would do one more; loads the best if so."""
    from transformers import TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    state = f"{get_last_checkpoint(str(folder))}/trainer_state.json"
    trainer.state = TrainerState.load_from_json(state)
    if done := trainer.state.global_step >= trainer.args.max_steps:
        trainer._load_best_model()
    return done


def _trainer(adapted: PeftModel, run: TrainingRun, folder: Path, shown: Bar) -> Trainer:
    distillation = run.distillation
    trainer = _kind(adapted, run)(
        model=adapted,
        args=_arguments(adapted, run.recipe, folder),
        train_dataset=examples(run.training),
        eval_dataset=examples(run.validation),
        # pads, so that windows may differ in length
        data_collator=collate if distillation is None else distillation.collate,
        callbacks=_callbacks(run.recipe, shown),
    )
    if distillation is not None:  # the sum over a whole step's batch is divided by its tokens
        trainer.model_accepts_loss_kwargs = True
    _silence(trainer)
    return trainer


def _kind(adapted: PeftModel, run: TrainingRun) -> type[Trainer]:
    """The Trainer that evaluates by `TrainingRun.measure`, and that takes a teacher's loss."""
    from transformers import Trainer

    class Healer(Trainer):
        def evaluate(self, *_: object, **__: object) -> dict[str, float]:
            metrics = run.measure(adapted)
            self.log(metrics)
            tell = self.callback_handler.on_evaluate
            self.control = tell(self.args, self.state, self.control, metrics)
            return metrics

    class Distiller(Healer):
        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, torch.Tensor | Any],
            return_outputs: bool = False,
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> torch.Tensor:
            assert run.distillation is not None and num_items_in_batch is not None
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits
            return run.distillation.loss(logits, inputs) / num_items_in_batch

    return Healer if run.distillation is None else Distiller


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


def _progress(shown: Bar) -> TrainerCallback:
    """A callback: bar, last evaluation, digests, modes of files, and a stop at a loss of NaN."""
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

        def on_save(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            follow_umask(Path(str(args.output_dir)))
            note_files(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

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
