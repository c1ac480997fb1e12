"""Layers removed and quality brought back: a closed-form patch, or LoRA."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llama.checkpoint.meta import PROVENANCE
from llama.formats.convert import meta_to_hf
from llama.io.files import check_new
from llama.io.sources import is_meta
from short_gpt.checkpoints.healed import save_healed
from short_gpt.evaluation.paired import Difference, difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing.linear_patch import RIDGE, Patch, fit, fold
from short_gpt.healing.lora import heal as heal_lora
from short_gpt.healing.recipe import Recipe
from short_gpt.healing.texts import Learning, Source
from short_gpt.jobs.choice import Choice, Chosen, chosen
from short_gpt.jobs.healing_settings import Learned, Settings
from short_gpt.jobs.inputs import Cut, Opening, TextSource, check_model, source_of
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.short_model import ShortModel

SIZE, PATCH_WINDOWS = 1024, 64  # of the patch, and of lora where its recipe names no size


@dataclass(frozen=True)
class Healing:
    """What `heal` did.

    Attributes:
        out: the new directory.
        how: what healed the model, ready for JSON.
        quality: perplexity of the evaluation windows by the state of the model, in order.
        change: of the loss by the healing alone, paired over the windows.
        left_out: what was not learned from because it is evaluated on, in words; None if all was.
        texts: names of the texts learned from and evaluated on, and tokens in a window.
    """

    out: Path
    how: Mapping[str, object]
    quality: dict[str, Perplexity]
    change: Difference
    left_out: str | None = None
    texts: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        values = {name: p.value for name, p in self.quality.items()}
        found = {"healing": self.how, "perplexity": values, "change": asdict(self.change)}
        return {**found, **self.texts}


def heal(
    model: str,
    out: str,
    method: str = "patch",
    *,
    choice: Choice | None = None,
    data: str | TextSource = "pg19",
    learned: Learned | None = None,
    settings: Settings | None = None,
    opening: Opening | None = None,
    overwrite: bool = False,
) -> Healing:
    """Removes layers of a checkpoint and brings quality back.

    The patch takes minutes and one pass over the windows. LoRA also heals a model whose layers
    are already removed; a Meta checkpoint goes to Hugging Face's format and back. No text that is
    evaluated on is learned from.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id.
        out: new directory; appears whole or not at all.
        method: patch, or lora.
        choice: which layers to remove; lora may do without.
        data: texts to learn from.
        learned, settings, opening: windows, settings of the method, how the model is opened.
        overwrite: whether an earlier pruned checkpoint is replaced.

    Raises:
        FileExistsError: ``out`` exists.
        ShortGPTError: a setting, the choice, or texts that are learned from and evaluated on.

    Example:
        >>> done = heal("llama-2-7b", "llama-2-5b", choice=Choice([21, 22]))  # doctest: +SKIP
        >>> done.quality["healed"].value  # doctest: +SKIP
        6.1
    """
    learned, settings = learned or Learned(), settings or Settings()
    opening, texts = opening or Opening(), source_of(data)
    settings.check(method)
    check_new(Path(out), replaces=PROVENANCE if overwrite else None, source=Path(model))
    found = _selection(model, method, choice or Choice())
    check_model(model)
    Cut(learned.size or SIZE, learned.max_windows).check()
    with interruptible(), _opened(model, method, learned.size or SIZE, opening) as short:
        recipe = settings.recipe(short, learned.seed) if method == "lora" else None
        size = learned.size or (recipe.size if recipe else SIZE)
        parts = _windows(short, texts, learned, size, recipe)
        ridge = RIDGE if settings.ridge is None else settings.ridge
        job = _Job(short, found.layers, parts, recipe, ridge, f"{out}.training", settings.resume)
        names = {"data": texts.data, "eval_data": learned.eval_data, "size": size}
        done = replace(job.run(Path(out)), left_out=parts.left_out, texts=names)
        _save(job, out, found.facts | done.to_dict(), model, opening, overwrite)
    return done


def _selection(model: str, method: str, choice: Choice) -> Chosen:
    """The layers to remove, if any, and how they were chosen."""
    named = choice.layers is not None or choice.scores is not None
    if method == "lora" and not named:
        if choice.n is not None or choice.wanted is not None:
            raise ShortGPTError("--n and --angular choose from --scores FILE")
        return Chosen([], {})
    if not named:
        raise ShortGPTError(
            "the patch reads the whole model and removes layers itself: give --layers 21,22,23 or "
            "--scores FILE --n N"
        )
    return chosen(model, choice)


@contextmanager
def _opened(model: str, method: str, size: int, opening: Opening) -> Iterator[ShortModel]:
    """The model; for lora as one of Hugging Face's."""
    if method == "patch" or not is_meta(model):
        yield opening.whole(model, size=size)
        return
    with tempfile.TemporaryDirectory() as folder:
        converted = f"{folder}/converted"
        meta_to_hf(model, converted, tokenizer_path=opening.tokenizer_path)
        yield replace(opening, tokenizer_path=None).whole(converted, size=size)


def _windows(
    short: ShortModel, texts: TextSource, learned: Learned, size: int, recipe: Recipe | None
) -> Learning:
    """Windows to learn from and others to evaluate on, which share no text."""
    place = (texts.split, texts.column, texts.max_texts, learned.seed)
    limit = learned.max_windows or (None if recipe else PATCH_WINDOWS)
    source = Source(texts.data, learned.eval_data, *place)
    counts = (limit, learned.eval_windows, learned.drop_overlap)
    return source.windows(short, size, *counts, lora=recipe is not None)


def _save(
    job: _Job,
    out: str,
    facts: Mapping[str, object],
    source: str,
    opening: Opening,
    overwrite: bool,
) -> None:
    save_healed(
        job.short,
        out,
        facts,
        source=source,
        as_meta=job.recipe is not None and is_meta(source),
        overwrite=overwrite,
        tokenizer_path=opening.tokenizer_path,
    )
    if job.recipe is not None:
        shutil.rmtree(job.work_dir, ignore_errors=True)


@dataclass
class _Job:
    """One healing, measured before and after. Without a recipe it is the patch."""

    short: ShortModel
    drop: list[int]
    windows: Learning
    recipe: Recipe | None
    ridge: float
    work_dir: str
    resume: bool

    def run(self, out: Path) -> Healing:
        """Removes, heals and measures."""
        count = len(self.short.kept)
        patch = self._patch() if self.drop and self.recipe is None else None
        found: dict[str, list[Perplexity]] = {}
        if self.drop:
            found[f"whole, {count} layers"] = self._measure()
            self.short.remove_layers(self.drop)
        raw = f"pruned, {len(self.short.kept)} layers" if self.drop else f"before, {count} layers"
        found[raw] = self._measure()
        how = self._train() if patch is None else self._fold(patch)
        found["healed"] = self._measure()
        totals = {name: together(parts) for name, parts in found.items()}
        return Healing(out, how, totals, difference(found[raw], found["healed"]))

    def _patch(self) -> Patch:
        # before the layers go: the patch is fitted to what they add
        return fit(self.short, self.drop, self.windows.training, ridge=self.ridge)

    def _fold(self, patch: Patch) -> dict[str, object]:
        fold(self.short, patch)
        return patch.to_dict()

    def _train(self) -> dict[str, object]:
        parts = (self.windows.training, self.windows.validation, self.windows.evaluation)
        return heal_lora(
            self.short, *parts, recipe=self.recipe, work_dir=self.work_dir, resume=self.resume
        ).to_dict()

    def _measure(self) -> list[Perplexity]:
        return losses(self.short.decoder, self.windows.evaluation)
