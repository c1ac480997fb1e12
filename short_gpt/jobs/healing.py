"""Layers removed and quality brought back: in closed form, by training, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llama.io.files import check_new
from llama.io.sources import is_gguf
from short_gpt.checkpoints.gguf import about_kinds, about_types, check_saved
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.records import PROVENANCE
from short_gpt.checkpoints.target import check_new_gguf, out_paths
from short_gpt.evaluation import Difference, Perplexity, difference, losses, together
from short_gpt.healing import (
    DistillSettings,
    HealingEvidence,
    HealingJob,
    Learning,
    LoraSettings,
    PatchSettings,
    Recipe,
    Source,
    Step,
)
from short_gpt.healing.job import STEPS
from short_gpt.healing.solver import RIDGES
from short_gpt.jobs.choice import Chosen, chosen
from short_gpt.jobs.choice_settings import Choice
from short_gpt.jobs.healing_settings import (
    Distilling,
    Learned,
    Settings,
    kinds_of_methods,
    methods_of,
)
from short_gpt.jobs.inputs import Notify, Running, TextSource, check_model, ignore, source_of
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import hold
from short_gpt.wrappers.opening import check_tokenizer, of_source, open_model, open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.scored_model import ScoredModel

SIZE, CLOSED_WINDOWS = 1024, 64  # of closed forms
CLOSED, TRAINING = kinds_of_methods()


@dataclass(frozen=True)
class Healing:
    """What `heal` did.

    Attributes:
        out: the new directory or file.
        evidence: what healed the model, and what that brought.
        left_out: what was not learned from because it is evaluated on, in words; None if all was.
        unchecked: what could not be checked of the scores, in words; None if nothing.
        texts: names of the texts learned from and evaluated on, tokens in a window, and which
            windows began with bos.
        remark: what a GGUF file holds otherwise than its source; None if nothing.
        written: of a GGUF file, read again, what it gives on the windows of the evidence; None
            of a directory, and of several files, which transformers does not read.
        quantization: how far that is from the healed model before its changed tensors went back
            to their own types.
    """

    out: Path
    evidence: HealingEvidence
    left_out: str | None = None
    unchecked: str | None = None
    texts: Mapping[str, object] = field(default_factory=dict)
    remark: str | None = None
    written: Perplexity | None = None
    quantization: Difference | None = None

    @property
    def perplexity(self) -> dict[str, Perplexity]:
        """Of every state of the model, and of what was written where that was read again."""
        found = dict(self.evidence.perplexity)
        return found if self.written is None else {**found, "as written": self.written}

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        values = {name: found.value for name, found in self.perplexity.items()}
        content = {**self.evidence.to_dict(), "perplexity": values, **self.texts}
        if self.quantization is not None:
            content["quantization"] = asdict(self.quantization)
        return content


def heal(
    model: str,
    out: str,
    method: str = "refit",
    *,
    choice: Choice | None = None,
    data: str | TextSource = "pg19",
    learned: Learned | None = None,
    settings: Settings | None = None,
    distilling: Distilling | None = None,
    opening: OpenOptions | None = None,
    streaming: Running | None = None,
    overwrite: bool = False,
    notify: Notify = ignore,
) -> Healing:
    """Removes layers of a checkpoint and brings quality back.

    Refit and patch are closed forms and take minutes. LoRA learns the text, distillation what the
    original model predicts; both also heal a model that was pruned before, and take a Meta
    checkpoint to Hugging Face's format and back. All except the patch continue when interrupted.
    No text is both learned and evaluated on.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        out: new directory, or from a GGUF file another if it ends with .gguf; appears whole or
            not at all.
        method: refit, patch, lora or distill, or several by commas, which follow each other.
        choice: which layers to remove; lora may do without, and distill with a teacher.
        data: texts to learn from.
        learned, settings, distilling, opening: of windows and methods; how models are opened.
        streaming: whether one layer at a time is in memory.
        overwrite: whether an earlier pruned checkpoint is replaced.
        notify: called with what a refit will take in memory and on disk, before it starts, and with
            every perplexity when it is measured.

    Raises:
        FileExistsError: ``out`` exists.
        ShortGPTError: a setting, the choice, or texts that are learned from and evaluated on.
        NotSavedError: the healed model could not be written; the same call continues.

    Example:
        >>> done = heal("llama-2-7b", "llama-2-5b", choice=Choice([21, 22]))  # doctest: +SKIP
        >>> done.evidence.perplexity["healed"].value  # doctest: +SKIP
        6.1
    """
    learned, settings, opening = (
        learned or Learned(),
        settings or Settings(),
        opening or OpenOptions(),
    )
    distilling, streaming = distilling or Distilling(), streaming or Running()
    texts, methods = source_of(data), methods_of(method)
    _check(methods, learned, settings, distilling)
    streaming.check_healing(methods)
    teacher = distilling.teacher or model
    named, streams = opening.tokenizer_path, streaming.stream or distilling.stream_teacher
    check_tokenizer(named, model, teacher, stream=streams)
    _check_target(model, out, overwrite=overwrite)
    found = _selection(model, choice or Choice(), methods, distilling)
    if is_gguf(out):
        check_saved(model, found.layers, found.record.block_influence)
    run = _Run(model, out, texts, methods, learned, settings, distilling, opening, streaming)
    with interruptible():
        return run.healed(found, overwrite=overwrite, notify=notify)


@dataclass(frozen=True)
class _Run:
    model: str
    out: str
    texts: TextSource
    methods: Sequence[str]
    learned: Learned
    settings: Settings
    distilling: Distilling
    opening: OpenOptions
    streaming: Running

    def healed(self, found: Chosen, *, overwrite: bool, notify: Notify) -> Healing:
        """Opens the model, heals it without the layers that were chosen, and saves it."""
        model, learned, trains = self.model, self.learned, self.methods[-1] in TRAINING
        folder = _work_dir(self.out, self.methods)
        # before the model is opened; where nothing is there yet, nobody works either
        lock = hold(folder) if folder is not None and folder.parent.is_dir() else None
        size = learned.size or SIZE
        short = _opened(model, found, size, self.opening, self.streaming, trains=trains)
        recipe = self.settings.recipe(short, learned.seed) if trains else None
        size = learned.size or (recipe.size if recipe else SIZE)
        parts = _windows(short, self.texts, learned, size, trains=trains)
        teacher = _teacher(model, self.distilling, self.opening, size)
        distill = self.distilling.step(recipe, teacher)
        steps = _steps(self.methods, self.settings, learned, recipe, distill)
        again = self.settings.resume
        job = _job(short, parts, found.layers, steps, folder, resume=again, notify=notify)
        if plan := job.plan_text():
            notify(plan)
        bos, data = learned.bos or short.bos, self.texts.data
        names = {"data": data, "eval_data": learned.eval_data, "size": size, "bos": bos}
        done = Healing(Path(self.out), job.run(), parts.left_out, found.unchecked, names)
        short.evidence |= {**found.record.evidence, "eval_data": learned.eval_data, "size": size}
        job.save(self.out, facts={**found.record.facts, "data": data}, overwrite=overwrite)
        del short, job, steps, lock  # which makes room for what is read again
        remark = _remark(model, self.out, found)
        return reread(replace(done, remark=remark), parts, self.opening, size)


def _check_target(model: str, out: str, *, overwrite: bool) -> None:
    check_model(model)
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
    said = (
        [about_types(model, out), about_kinds(model, found.layers, found.record.block_influence)]
        if is_gguf(out)
        else []
    )
    return "\n".join(line for line in said if line) or None


def _check(
    methods: Sequence[str], learned: Learned, settings: Settings, distilling: Distilling
) -> None:
    learned.check()
    settings.check(methods)
    distilling.check(methods)


def _steps(
    methods: Sequence[str],
    settings: Settings,
    learned: Learned,
    recipe: Recipe | None,
    distill: DistillSettings,
) -> list[Step]:
    ridges = RIDGES if settings.ridge is None else (settings.ridge,)
    few = CLOSED_WINDOWS if learned.max_windows is None else None
    made: dict[str, Step] = {
        "refit": settings.refit(max_windows=few),
        "patch": PatchSettings(ridges=ridges, max_windows=few),
        "lora": LoraSettings(recipe),
        "distill": distill,
    }
    return [made.get(name) or STEPS[name]() for name in methods]


def _work_dir(out: str, methods: Sequence[str]) -> Path | None:
    """What training and a refit continue from, beside the new directory; None for the patch."""
    kind = "training" if methods[-1] in TRAINING else "refit" if "refit" in methods else None
    return None if kind is None else Path(f"{out}.{kind}")


def _job(
    short: ScoredModel,
    parts: Learning,
    layers: Sequence[int],
    steps: Sequence[Step],
    folder: Path | None,
    *,
    resume: bool,
    notify: Notify,
) -> HealingJob:
    """The healing, continued from what the folder holds."""
    again = resume or (folder is not None and folder.is_dir() and any(folder.iterdir()))
    return HealingJob(
        short, parts, layers, settings=steps, work_dir=folder, resume=again, notify=notify
    )


def _teacher(
    model: str, distilling: Distilling, opening: OpenOptions, size: int
) -> Callable[[], ScoredModel] | None:
    """What opens the teacher; None where it is the model itself before its layers go."""
    if distilling.teacher is None and not distilling.live_teacher and not distilling.stream_teacher:
        return None
    source, stream = distilling.teacher or model, distilling.stream_teacher
    own = of_source(opening, source, stream=stream)
    return lambda: open_model(source, own, stream=stream, max_seq_len=size)


def _windows(
    short: ScoredModel, texts: TextSource, learned: Learned, size: int, *, trains: bool
) -> Learning:
    place = (texts.split, texts.column, texts.max_texts, learned.seed)
    return Source(texts.data, learned.eval_data, *place).windows(
        short.encode,
        size,
        bos=learned.bos or short.bos,
        limit=learned.max_windows or (None if trains else CLOSED_WINDOWS),
        eval_windows=learned.eval_windows,
        drop_overlap=learned.drop_overlap,
        validate=trains,
    )


def _selection(
    model: str, choice: Choice, methods: Sequence[str], distilling: Distilling
) -> Chosen:
    if choice.layers is not None or choice.scores is not None:
        return chosen(model, choice)
    ask = "give `layers`, as in 21,22,23, or `scores` and `n`"
    if methods[0] in CLOSED:
        raise ShortGPTError(
            f"the {methods[0]} reads the whole model and removes layers itself: {ask}"
        )
    if "distill" in methods and distilling.teacher is None:
        raise ShortGPTError(
            f"distill learns from the model with all its layers: {ask}, or a `teacher` that "
            "still has them"
        )
    if choice.n is not None or choice.by is not None:
        raise ShortGPTError("`n` and `angular` choose from `scores`")
    return Chosen([], Provenance())


def _opened(
    model: str, found: Chosen, size: int, opening: OpenOptions, streaming: Running, *, trains: bool
) -> ScoredModel:
    """The model, with the scores its layers were chosen by; for training one of Hugging Face's."""
    opening = of_source(opening, model, stream=streaming.stream)
    short = open_trainable(model, opening) if trains else streaming.open(model, opening, size)
    if found.importance is not None:  # its record tells what it rests on, as that of prune does
        short.importance = found.importance
    return short


def reread(done: Healing, parts: Learning, opening: OpenOptions, size: int) -> Healing:
    """The same with what a written GGUF file gives on the windows that the model was judged by.

    Changed tensors were rounded to their own types after all that was measured before.

    Args:
        done: what was done; unchanged where a directory was written, or several files.
        parts: the windows.
        opening, size: of the file as a model, and of a window.
    """
    if not is_gguf(done.out) or len(out_paths(done.out)) > 1:
        return done
    own = of_source(opening, str(done.out))
    short = open_model(str(done.out), own, max_seq_len=size)
    found = together(losses(short.decoder, parts.evaluation))
    change = difference([done.evidence.perplexity["healed"]], [found])
    return replace(done, written=found, quantization=change)
