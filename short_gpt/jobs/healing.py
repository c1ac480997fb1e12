"""Layers removed and quality brought back: a closed-form patch, or LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llama.io.files import check_new
from llama.io.sources import is_gguf, is_meta
from short_gpt.checkpoints.gguf import about_kinds, check_new_gguf
from short_gpt.checkpoints.gguf_save import about_types
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.healing import HealingEvidence, HealingJob, Learning, Recipe, Source
from short_gpt.healing.job import LoraSettings, PatchSettings
from short_gpt.healing.linear_patch import RIDGE
from short_gpt.healing.trainer import begun
from short_gpt.jobs.choice import Choice, Chosen, chosen
from short_gpt.jobs.healing_settings import Learned, Settings
from short_gpt.jobs.inputs import Cut, Opening, TextSource, check_model, source_of
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.short_hf import ShortHFModel
from short_gpt.short_model import ShortModel

SIZE, PATCH_WINDOWS = 1024, 64  # of the patch, and of lora where its recipe names no size


@dataclass(frozen=True)
class Healing:
    """What `heal` did.

    Attributes:
        out: the new directory or file.
        evidence: what healed the model, and what that brought.
        left_out: what was not learned from because it is evaluated on, in words; None if all was.
        unchecked: what could not be checked of the scores, in words; None if nothing.
        texts: names of the texts learned from and evaluated on, and tokens in a window.
        remark: what a GGUF file holds otherwise than its source; None if nothing.
    """

    out: Path
    evidence: HealingEvidence
    left_out: str | None = None
    unchecked: str | None = None
    texts: Mapping[str, object] = field(default_factory=dict)
    remark: str | None = None

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        return {**self.evidence.to_dict(), **self.texts}


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
    evaluated on is learned from. LoRA that was interrupted continues from its last checkpoint.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        out: new directory, or from a GGUF file another if it ends with .gguf; appears whole or
            not at all.
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
        >>> done.evidence.perplexity["healed"].value  # doctest: +SKIP
        6.1
    """
    learned, settings = learned or Learned(), settings or Settings()
    texts, lora = source_of(data), method == "lora"
    settings.check(method)
    _check_target(model, out, overwrite=overwrite)
    found = _selection(model, choice or Choice(), lora=lora)
    check_model(model)
    Cut(learned.size or SIZE, learned.max_windows).check()
    with interruptible():
        short = _opened(model, found, learned.size or SIZE, opening or Opening(), lora=lora)
        recipe = settings.recipe(short, learned.seed) if lora else None
        size = learned.size or (recipe.size if recipe else SIZE)
        parts = _windows(short, texts, learned, size, lora=lora)
        job = HealingJob(short, parts, found.layers, settings=_how(recipe, settings, out))
        names = {"data": texts.data, "eval_data": learned.eval_data, "size": size}
        done = Healing(Path(out), job.run(), parts.left_out, found.unchecked, names)
        short.evidence |= {**found.record.evidence, "eval_data": learned.eval_data, "size": size}
        job.save(out, facts={**found.record.facts, "data": texts.data}, overwrite=overwrite)
    return replace(done, remark=_remark(model, out, found)) if is_gguf(out) else done


def _check_target(model: str, out: str, *, overwrite: bool) -> None:
    """Raises FileExistsError, or ShortGPTError for a GGUF file that is not made from one."""
    if is_gguf(out) and not is_gguf(model):
        raise ShortGPTError(
            f"{out} is written from a GGUF file alone: heal into a directory and convert that, "
            f"short-gpt convert DIRECTORY {out}"
        )
    if is_gguf(out):
        check_new_gguf(out, overwrite=overwrite)
    else:
        check_new(Path(out), marker=PROVENANCE, overwrite=overwrite, source=Path(model))


def _remark(model: str, out: str, found: Chosen) -> str | None:
    """What is to be said of a GGUF file: types that are others, and kinds of layers."""
    said = [about_types(model, out), about_kinds(model, found.layers)]
    return "\n".join(line for line in said if line) or None


def _how(recipe: Recipe | None, settings: Settings, out: str) -> LoraSettings | PatchSettings:
    """What the method takes; lora keeps its checkpoints beside the new directory, to continue."""
    if recipe is not None:
        work_dir = f"{out}.training"
        return LoraSettings(recipe, work_dir, settings.resume or begun(Path(work_dir)))
    return PatchSettings(RIDGE if settings.ridge is None else settings.ridge)


def _windows(
    short: ShortModel, texts: TextSource, learned: Learned, size: int, *, lora: bool
) -> Learning:
    """Windows to learn from and others to evaluate on, which share no text."""
    place = (texts.split, texts.column, texts.max_texts, learned.seed)
    return Source(texts.data, learned.eval_data, *place).windows(
        short.encode,
        size,
        bos=short.bos,
        limit=learned.max_windows or (None if lora else PATCH_WINDOWS),
        eval_windows=learned.eval_windows,
        drop_overlap=learned.drop_overlap,
        validate=lora,
    )


def _selection(model: str, choice: Choice, *, lora: bool) -> Chosen:
    """The layers to remove, if any, and how they were chosen."""
    if choice.layers is not None or choice.scores is not None:
        return chosen(model, choice)
    if not lora:
        raise ShortGPTError(
            "the patch reads the whole model and removes layers itself: give --layers 21,22,23 or "
            "--scores FILE --n N"
        )
    if choice.n is not None or choice.wanted is not None:
        raise ShortGPTError("--n and --angular choose from --scores FILE")
    return Chosen([], Provenance())


def _opened(model: str, found: Chosen, size: int, opening: Opening, *, lora: bool) -> ShortModel:
    """The model, with the scores that its layers were chosen by; for lora one of Hugging Face's."""
    short: ShortModel
    if lora and is_meta(model):
        place = {"device": opening.device, "dtype": opening.dtype}
        short = ShortHFModel.from_meta(model, tokenizer_path=opening.tokenizer_path, **place)
    else:
        short = opening.whole(model, size=size)
    if found.importance is not None:  # its record tells what it rests on, as that of prune does
        short.importance = found.importance
    return short
