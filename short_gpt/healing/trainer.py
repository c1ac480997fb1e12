"""The training of LoRA, on text or by distillation, by the Trainer of transformers."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from llama.files import follow_umask
from llama.ranks import environment
from short_gpt.data.windows import Answer, TokenIds, batches, learned
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.healing.distillation import Distillation, collate, examples, learned_digest
from short_gpt.healing.settings import Recipe
from short_gpt.models.decoder import rounded_matrices
from short_gpt.models.hf import HFDecoder
from short_gpt.models.loading import config_digest, config_entries
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import json_digest, weights_digest
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.runtime.progress import Bar, bar
from short_gpt.runtime.state import StateFile, damaged_run, hold, joined

if TYPE_CHECKING:
    import transformers
    from peft import PeftModel

RECIPE = "recipe.json"  # which run the checkpoints belong to
LAST = "files.txt"  # the names of a checkpoint's files, written when these are complete
PRECISION = "ACCELERATE_MIXED_PRECISION"


def of_lora(recipe: Recipe) -> dict[str, Any]:
    """The settings without those of distillation, which its teacher knows."""
    others = ("top_k", "temperature", "kl_share")
    return {name: value for name, value in asdict(recipe).items() if name not in others}


class TrainingRun(NamedTuple):
    """What one run of training reads, writes and learns."""

    training: Sequence[TokenIds]  # to learn from
    validation: Sequence[TokenIds]  # to choose the step by
    recipe: Recipe
    work_dir: str | Path | None = None  # keeps checkpoints, to continue from; None keeps none
    show: bool = True  # a bar
    distillation: Distillation | None = None  # what is learned instead of the text alone
    mixed: bool = False  # matrix products in bfloat16
    layers_path: str | None = None  # where the layers are in the model; None finds them

    def identity(self, adapted: PeftModel) -> dict[str, object]:
        read = {
            "text": json_digest([*map(learned_digest, (self.training, self.validation))]),
            "model": weights_digest(adapted),
            "configuration": config_digest(config_entries(adapted.get_base_model().config)),
        }
        taught = {} if self.distillation is None else self.distillation.identity()
        recipe = of_lora(self.recipe) | {"warmup": self.recipe.warmup_steps}
        del recipe["report_to"]
        precision = {"precision": "mixed"} if self.mixed else {}
        processes = {"number of processes": replicas.current().count}  # each draws for itself
        return joined(recipe, read, taught, precision, processes)

    def measure(self, adapted: PeftModel) -> dict[str, float]:
        """On the validation windows: what the best step is chosen by, and the perplexity."""
        adapted.eval()
        decoder = HFDecoder(adapted.get_base_model(), self.layers_path)
        at_once = self.recipe.micro_batch
        decoder.mixed = self.mixed
        if self.distillation is not None:
            read = {"first": len(self.training), "batch_size": at_once}  # validation comes after
            metrics = self.distillation.measure(decoder, self.validation, **read)
        else:
            # its answers alone, of a dialog
            counted = [Answer(w, 0, counted=learned(w)) for w in self.validation]
            measured = perplexity(decoder, batches(counted, at_once))
            loss = measured.nats / measured.tokens
            metrics = {"eval_loss": loss, "eval_perplexity": measured.value}
        return replicas.current().gather(metrics)[0]  # by which all ranks choose


def train(
    adapted: PeftModel, run: TrainingRun
) -> tuple[transformers.TrainerState, dict[str, float]]:
    """Trains in place to the best evaluation; returns the state, and what `measure` gave first."""
    recipe = run.recipe
    with (
        run_folder(run.work_dir, run.identity(adapted)) as (folder, begun),
        quiet(),
        deterministic(next(adapted.parameters()).device),
        environment(PRECISION, None),  # transformers 4 sets it for all later trainings
        bar("healing", total=recipe.steps, unit="step", show=run.show) as shown,
    ):
        before = run.measure(adapted)
        if recipe.gradient_checkpointing:
            base = cast("transformers.PreTrainedModel", adapted.get_base_model())
            base.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = _trainer(adapted, run, folder, shown)
        decoder = HFDecoder(adapted.get_base_model(), run.layers_path)
        if not (begun and _finished(trainer, folder)):
            with rounded_matrices(decoder, frozen=True) if run.mixed else nullcontext():
                trainer.train(resume_from_checkpoint=begun)
        return trainer.state, before


def _finished(trainer: transformers.Trainer, folder: Path) -> bool:
    """Whether all steps are done, or patience ended training; then loads the best.

    The Trainer would go on in both cases.
    """
    from transformers import TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    last = Path(str(get_last_checkpoint(str(folder))))
    trainer.state = TrainerState.load_from_json(str(last / "trainer_state.json"))
    _find_best(trainer.state, folder)
    kept: Any = trainer.state.stateful_callbacks  # read from JSON
    stopped = kept.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    if done := stopped or trainer.state.global_step >= trainer.args.max_steps:
        trainer._load_best_model()
    return done


def _find_best(state: transformers.TrainerState, folder: Path) -> None:
    """Names the best checkpoint by its present path; the saved one may be of another directory."""
    if state.best_model_checkpoint is not None:
        best = folder / Path(state.best_model_checkpoint).name
        if not best.is_dir():  # the Trainer would only warn, and keep other weights
            raise damaged_run(best, folder)
        state.best_model_checkpoint = str(best)


def _trainer(
    adapted: PeftModel, run: TrainingRun, folder: Path, shown: Bar
) -> transformers.Trainer:
    """The Trainer that evaluates by `TrainingRun.measure`, and that takes a teacher's loss."""
    from transformers import EarlyStoppingCallback, Trainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    recipe, distillation = run.recipe, run.distillation

    class Healer(Trainer):
        def evaluate(self, *_: object, **__: object) -> dict[str, float]:
            metrics = run.measure(adapted)
            self.log(metrics)
            tell = self.callback_handler.on_evaluate
            self.control = tell(self.args, self.state, self.control, metrics)
            return metrics

        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, torch.Tensor | Any],
            return_outputs: bool = False,
            num_items_in_batch: torch.Tensor | int | None = None,
        ) -> Any:
            if distillation is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            assert num_items_in_batch is not None
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits  # (B, S, V)
            loss = distillation.loss(logits, inputs) / num_items_in_batch  # of all processes
            return loss * self.accelerator.num_processes  # the mean of their gradients is taken

    stop = [] if recipe.patience is None else [EarlyStoppingCallback(recipe.patience)]
    trainer = Healer(
        model=adapted,
        args=_arguments(adapted, run, folder),
        train_dataset=examples(run.training),
        eval_dataset=examples(run.validation),
        # pads, so that windows may differ in length
        data_collator=collate if distillation is None else distillation.collate,
        callbacks=[_progress(shown), *stop],
    )
    if distillation is not None:  # the sum over a whole step's batch is divided by its tokens
        trainer.model_accepts_loss_kwargs = True
    for prints in (PrinterCallback, ProgressCallback):  # the bar shows the same
        trainer.remove_callback(prints)
    return trainer


def _arguments(
    adapted: PeftModel, run: TrainingRun, folder: Path
) -> transformers.TrainingArguments:
    from transformers import TrainingArguments

    recipe, weight = run.recipe, next(adapted.parameters())
    at_once = recipe.micro_batch * replicas.current().count
    on_card, dtype = weight.device.type == "cuda", weight.dtype
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup_steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch_size // at_once,
        eval_strategy="steps",
        eval_steps=min(recipe.eval_every, recipe.steps),
        save_strategy="steps",
        save_steps=min(recipe.eval_every, recipe.steps),
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=max(1, min(recipe.eval_every, recipe.steps // 100)),
        logging_nan_inf_filter=False,  # `_progress` must see them
        bf16=run.mixed or (on_card and dtype == torch.bfloat16),
        fp16=on_card and dtype == torch.float16,
        use_cpu=weight.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=recipe.report_to.split(",") if recipe.report_to else [],
        seed=recipe.seed,
        data_seed=recipe.seed,
        restore_callback_states_from_checkpoint=True,  # how long patience has lasted
        log_level="error",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the model stays on one card
    return arguments


def _progress(shown: Bar) -> transformers.TrainerCallback:
    """A callback: bar, last evaluation, complete checkpoints, and a stop at a loss of NaN."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _find_best(state, Path(str(args.output_dir)))
            shown.update(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            shown.update(1)
            if state.global_step >= state.max_steps:
                control.should_evaluate = control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder, team = Path(str(args.output_dir)), replicas.current()
            team.gather(None)  # waits for the random numbers of every rank
            if not team.rank:
                follow_umask(folder)
                checkpoint = folder / f"checkpoint-{state.global_step}"
                names = sorted(path.name for path in checkpoint.iterdir())
                (checkpoint / LAST).write_text("\n".join(names), encoding="utf-8")

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            logs = more.get("logs") or {}
            loss = logs.get("loss", 0.0)
            if not math.isfinite(loss):
                raise NotFiniteError(
                    f"the loss became {loss} at step {state.global_step}; lower the learning rate, "
                    "or use float32 or bfloat16"
                )
            if "eval_perplexity" in logs:
                shown.set_postfix_str(f"perplexity {logs['eval_perplexity']:.2f}")

    return Progress()


@contextmanager
def run_folder(work_dir: str | Path | None, run: dict[str, object]) -> Iterator[tuple[Path, bool]]:
    """The folder of all ranks' checkpoints, and whether it holds some of this run to continue."""
    team = replicas.current()
    if work_dir is None:
        with tempfile.TemporaryDirectory() as name:
            yield Path(team.gather(name)[0]), False
            team.gather(None)  # waits for ranks that still read
        return
    folder = Path(str(work_dir))
    with hold(folder) as lock:
        if any(folder.glob("checkpoint-*")):  # nothing of another run is deleted or continued
            if not (folder / RECIPE).is_file():
                raise FileExistsError(
                    f"{folder} holds checkpoints and no {RECIPE}: they are another run's; name "
                    "another folder"
                )
            StateFile(folder / RECIPE, run, lock=lock, folder=folder)  # refuses another run
        team.gather(None)  # all have looked before one deletes
        begun = team.gather(not team.rank and _drop_unfinished(folder))[0]
        if not begun and not team.rank:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RECIPE).unlink(missing_ok=True)
            StateFile(folder / RECIPE, run, lock=lock).save({})
        try:
            yield folder, begun
        except BaseException:
            if not team.rank and not _drop_unfinished(folder):  # nothing to continue from
                (folder / RECIPE).unlink(missing_ok=True)
                with suppress(OSError):  # logs stay
                    folder.rmdir()
            raise


def _drop_unfinished(folder: Path) -> bool:
    """Deletes checkpoints that a kill left unfinished; whether another one exists."""
    for path in folder.glob("checkpoint-*"):
        names = (path / LAST).read_text("utf-8").split("\n") if (path / LAST).is_file() else [LAST]
        if not all((path / name).is_file() for name in names):
            shutil.rmtree(path)
    return any(folder.glob("checkpoint-*"))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' remarks to developers; what users must know is raised or reported."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            # peft looks for a config next to GGUF files; no embedding changes its size here
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels; on a GPU a warning where none exist, as for Mamba's sums."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    # too late for some versions of torch, which read it at the first matrix product and then warn
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
