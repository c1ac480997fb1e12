"""One healing from beginning to end: measured, cut, healed, measured again, saved."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from short_gpt.evaluation.paired import Difference, difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import linear_patch, lora
from short_gpt.healing.recipe import Recipe
from short_gpt.healing.texts import Learning
from short_gpt.short_model import ShortModel


@dataclass(frozen=True)
class PatchSettings:
    """Settings of the linear patch.

    Attributes:
        ridge: relative to the mean square of what the MLP gives.
        batch_size: windows read at once.
    """

    ridge: float = linear_patch.RIDGE
    batch_size: int = 1


@dataclass(frozen=True)
class LoraSettings:
    """Settings of LoRA.

    Attributes:
        recipe: None takes the paper's for the model.
        work_dir: keeps checkpoints to resume from, until the model is saved; None keeps none.
        resume: continue from the last checkpoint there.
    """

    recipe: Recipe | None = None
    work_dir: str | Path | None = None
    resume: bool = False


@dataclass(frozen=True)
class HealingEvidence:
    """What a healing brought, on windows that it did not learn from.

    Attributes:
        how: what healed the model, ready for JSON; "method" names it.
        perplexity: by the state of the model: whole, pruned (or before), healed.
        change: of the loss by the healing alone, paired over the windows.

    Example:
        >>> HealingEvidence({}, {}, Difference(0.02, 0.01, 32)).worse
        True
    """

    how: Mapping[str, object]
    perplexity: Mapping[str, Perplexity]
    change: Difference

    @property
    def worse(self) -> bool:
        """Whether the perplexity is higher than without the healing."""
        return self.change.nats > 0

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        values = {name: measured.value for name, measured in self.perplexity.items()}
        found = {"healing": self.how, "perplexity": values, "change": asdict(self.change)}
        return {**found, "worse": self.worse}


class HealingJob:
    """Removes layers, heals what is left, and measures before and after.

    Args:
        short: the opened model, which is changed in place; for LoRA a `ShortHFModel`, where a
            Meta checkpoint is opened by `ShortHFModel.from_meta`.
        windows: to learn from, validate by and evaluate on.
        layers: to remove first, in the original model's numbering; LoRA also heals a model from
            which nothing more is to go.
        settings: which method heals, and how.
        progress: whether to show bars.

    Attributes:
        evidence: of `run`; None before.

    Example:
        >>> short = open_model("llama-2-7b")  # doctest: +SKIP
        >>> windows = Source("pg19").windows(short.encode, 1024, limit=64)  # doctest: +SKIP
        >>> job = HealingJob(short, windows, [21, 22, 25])  # doctest: +SKIP
        >>> print(job.run().change)  # doctest: +SKIP
        >>> job.save("llama-2-6b", facts={"data": "PG-19"})  # doctest: +SKIP
    """

    def __init__(
        self,
        short: ShortModel,
        windows: Learning,
        layers: Sequence[int] = (),
        *,
        settings: PatchSettings | LoraSettings | None = None,
        progress: bool = True,
    ) -> None:
        self.short, self.windows, self.layers = short, windows, list(layers)
        self.settings = PatchSettings() if settings is None else settings
        self.progress = progress
        self.evidence: HealingEvidence | None = None

    def run(self) -> HealingEvidence:
        """Does it all but saving.

        Raises:
            ShortGPTError, NotFiniteError, MissingPackageError: as those of `linear_patch.fit` and
                `lora.heal`. After any error, or an interruption, the model is as it was, with all
                its layers.
        """
        count, parts = len(self.short.kept), {}
        patch = self._fit()
        if self.layers:
            parts[f"whole, {count} layers"] = self._measure()
        with ExitStack() as healing:  # undone unless all of it succeeds
            evidence = self._tried(patch, parts, healing)
            if self.layers:
                self.short.remove_layers(self.layers)
            healing.pop_all()
        self.evidence = evidence
        self.short.evidence["change"] = asdict(evidence.change)
        return evidence

    def _tried(
        self,
        patch: linear_patch.Patch | None,
        parts: dict[str, list[Perplexity]],
        healing: ExitStack,
    ) -> HealingEvidence:
        """Heals the model as cut, and measures it before and after.

        It is a trial: whatever happens in it, all layers are back behind it.
        """
        with self.short.without_layers(self.layers):
            left = len(self.short.present)
            raw = f"{'pruned' if self.layers else 'before'}, {left} layers"
            parts[raw] = self._measure()
            how = self._heal(patch, healing)
            parts["healed"] = self._measure()
        quality = {name: together(windows) for name, windows in parts.items()}
        return HealingEvidence(how, quality, difference(parts[raw], parts["healed"]))

    def save(
        self,
        out_dir: str | os.PathLike[str],
        *,
        facts: Mapping[str, object] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes the healed model with its evidence, and removes LoRA's checkpoints.

        Args and errors as in `ScoredModel.save`, and:

        Raises:
            RuntimeError: `run` was not called, or failed.
        """
        if self.evidence is None:
            raise RuntimeError("nothing was healed yet; call run first")
        measured = self.evidence.perplexity
        out = self.short.save(out_dir, facts=facts, measured=measured, overwrite=overwrite)
        if isinstance(self.settings, LoraSettings) and self.settings.work_dir is not None:
            shutil.rmtree(self.settings.work_dir, ignore_errors=True)
        return out

    def _fit(self) -> linear_patch.Patch | None:
        """The patch, which reads the whole model; None for LoRA."""
        if isinstance(self.settings, LoraSettings):
            return None
        return linear_patch.fit(
            self.short,
            self.layers,
            self.windows.training,
            ridge=self.settings.ridge,
            batch_size=self.settings.batch_size,
            progress=self.progress,
        )

    def _heal(self, patch: linear_patch.Patch | None, undo: ExitStack) -> dict[str, object]:
        """Heals the model as cut; returns how, and gives ``undo`` what takes it back."""
        if patch is not None:
            undo.callback(linear_patch.fold(self.short, patch))
            return patch.to_dict()
        assert isinstance(self.settings, LoraSettings)
        healed = lora.heal(
            self.short,
            self.windows.training,
            self.windows.validation,
            self.windows.evaluation,
            recipe=self.settings.recipe,
            work_dir=self.settings.work_dir,
            resume=self.settings.resume,
            progress=self.progress,
            undo=undo,
        )
        return healed.to_dict()

    def _measure(self) -> list[Perplexity]:
        return losses(self.short.decoder, self.windows.evaluation, progress=self.progress)
