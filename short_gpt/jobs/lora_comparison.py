"""Healing by LoRA inside a comparison: of every set of layers, from the checkpoint's files."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from short_gpt.checkpoints.prune import prune_checkpoint
from short_gpt.data.disjoint import overlapping
from short_gpt.evaluation.paired import losses
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing.lora import heal, require_packages
from short_gpt.healing.recipe import Recipe, recipe_for
from short_gpt.healing.trainer import whole_checkpoints
from short_gpt.jobs.cases import Shares, Windows
from short_gpt.jobs.inputs import Opening
from short_gpt.opening import open_model
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.short_model import ShortModel


@dataclass(frozen=True)
class LoraSettings:
    """How lora heals in a comparison.

    Args:
        steps: steps of lora, a tenth of them warm-up but at most 100; the recipe's 5000 if not
            given.
        lora_rank: its rank; the recipe's if not given.
        lora_learning_rate: its peak; the recipe's if not given.
        lora_batch: windows a step; the recipe's 16 if not given.
        lora_size: tokens in a window of lora; the recipe's if not given.
    """

    steps: int | None = None
    lora_rank: int | None = None
    lora_learning_rate: float | None = None
    lora_batch: int | None = None
    lora_size: int | None = None

    def recipe(self, short: ShortModel) -> Recipe:
        """The recipe for a model of transformers, with what is given here."""
        changes: dict[str, object] = {"steps": self.steps, "rank": self.lora_rank}
        changes |= {"alpha": self.lora_rank, "learning_rate": self.lora_learning_rate}
        changes |= {"batch": self.lora_batch, "size": self.lora_size}
        if self.steps is not None:
            changes["warmup"] = min(100, self.steps // 10)
        given = {name: value for name, value in changes.items() if value is not None}
        found = recipe_for(short.model.config)  # type: ignore[attr-defined]
        return replace(found, **given)  # type: ignore[arg-type]


@dataclass(frozen=True)
class LoraHealer:
    """Heals a checkpoint without some layers, from its files, and evaluates it.

    Checkpoints of the training lie beside the state until it is done.

    Args:
        source: the checkpoint directory.
        calibration: texts to learn from.
        evaluation: windows that are not learned from.
        shares, lora, opening: how it is cut, trained and opened.
        state: of the comparison.
    """

    source: str
    calibration: list[str]
    evaluation: Windows
    shares: Shares
    lora: LoraSettings
    opening: Opening
    state: StateFile | None = None

    def check(self, short: ShortModel) -> None:
        """Raises what would go wrong after all else is measured."""
        require_packages()
        check_directory(self.source)
        size = self.lora.lora_size or Recipe.size
        if len(self.shares.cut(short, self.calibration, 2, size)) < 2:
            raise ShortGPTError(
                f"lora needs two windows of {size} tokens or more, one of them to validate on: "
                "give more text to heal by, or a smaller --lora_size"
            )

    def healed(self, layers: list[int]) -> list[Perplexity]:
        """The loss of every evaluation window, of the model healed without these layers."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.opening.tokenizer_path
            pruned = prune_checkpoint(
                self.source, f"{folder}/pruned", layers, to="hf", tokenizer_path=path
            )
            device, dtype = self.opening.device, self.opening.dtype
            short: ShortModel = open_model(str(pruned), device=device, dtype=dtype)
            work = self._work_dir(layers)
            self._train(short, work)
            found = losses(short.decoder, self.evaluation, progress=False)
            if work:  # kept until the healed model is measured: training takes hours
                shutil.rmtree(work, ignore_errors=True)
            return found

    def _train(self, short: ShortModel, work: Path | None) -> None:
        """Heals a model; continues where checkpoints of an interrupted training lie."""
        recipe = self.lora.recipe(short)
        learned = self.shares.cut(short, self.calibration, None, recipe.size)
        learned = _without(learned, self.evaluation)
        count = max(1, min(len(learned) // 10, 8))  # windows to validate on
        parts = (_without(learned[:-count], learned[-count:]), learned[-count:], self.evaluation)
        begun = bool(work and whole_checkpoints(work))
        if work and not begun:
            shutil.rmtree(work, ignore_errors=True)
        heal(short, *parts, recipe=recipe, work_dir=work, resume=begun)

    def _work_dir(self, layers: list[int]) -> Path | None:
        if self.state is None:
            return None
        name = "-".join(map(str, sorted(layers)))
        return self.state.path.with_name(f"{self.state.path.name}.lora-{name}")


def check_directory(source: str) -> None:
    """Raises ShortGPTError for a file: lora heals checkpoint directories."""
    if Path(source).is_file():
        raise ShortGPTError(
            f"lora heals checkpoint directories, not {source}; convert it first: "
            f"short-gpt convert {source} model-meta"
        )


def _without(windows: Windows, others: Windows) -> Windows:
    """The windows that share no text with the others."""
    shared = overlapping(windows, others)
    return [window for i, window in enumerate(windows) if i not in shared]
