"""Layers removed and quality brought back: in closed form, by training, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llama.files import check_new
from llama.sources import find_source, is_gguf
from short_gpt.checkpoints.gguf import about_kinds, about_types, check_writable_gguf, in_few_bits
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.checkpoints.scores import ChosenLayers
from short_gpt.checkpoints.target import check_new_gguf, format_of, out_paths
from short_gpt.evaluation.perplexity import (
    Difference,
    Perplexity,
    combined,
    difference,
    window_perplexities,
)
from short_gpt.healing import HealingEvidence, HealingJob, Learning
from short_gpt.healing.distillation import IDENTITY
from short_gpt.healing.job import CLOSED, TRAINING
from short_gpt.healing.refit_state import STATE
from short_gpt.healing.trainer import RECIPE
from short_gpt.jobs.costs import end_dry_run
from short_gpt.jobs.inputs import SIZE, Notify, Windows, check_model, ignore
from short_gpt.jobs.saving import Hub, as_begun, interruptible
from short_gpt.jobs.settings import Choice, Healing, methods_of
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import is_first_rank
from short_gpt.runtime.state import hold
from short_gpt.wrappers.opening import check_tokenizer, of_source, open_model, open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_hf import ShortHFModel

STATES = (STATE, IDENTITY, RECIPE)  # of the steps, which tell the precision of a run
CLOSED_WINDOWS = 64  # that a closed form reads; training after it begins with other windows


@dataclass(frozen=True, repr=False)
class HealingResult:
    """What `heal` did."""

    out: Path  # the new directory or file
    evidence: HealingEvidence  # how the model was healed, and with what effect
    left_out: str | None = None  # in words, windows dropped for text shared with evaluation
    unchecked: str | None = None  # what of the scores could not be checked, in words, if anything
    # names of the texts, tokens in a window, and which windows began with bos
    texts: Mapping[str, object] = field(default_factory=dict)
    remark: str | None = None  # how a GGUF file differs from its source, if at all
    written: Perplexity | None = None  # of one GGUF file, read again, on the same windows
    quantization: Difference | None = None  # of that, from the model before it was rounded
    address: str | None = None  # of the model on the hub, if it was uploaded

    def __repr__(self) -> str:
        values = "; ".join(f"{name} {own.value:.3f}" for name, own in self.perplexity.items())
        return f"HealingResult({self.out}, perplexity: {values})"

    @property
    def perplexity(self) -> dict[str, Perplexity]:
        """Of every state of the model, and of the written file if it was read again."""
        states = dict(self.evidence.perplexity)
        return states if self.written is None else {**states, "as written": self.written}

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        values = {name: perplexity.value for name, perplexity in self.perplexity.items()}
        change = self.quantization
        rounded = {} if change is None else {"quantization": asdict(change)}
        return {**self.evidence.to_dict(), "perplexity": values, **self.texts, **rounded}


def heal(
    model: str,
    out: str,
    choice: Choice,
    windows: Windows,
    healing: Healing,
    opening: OpenOptions,
    hub: Hub,
    *,
    overwrite: bool = False,
    notify: Notify = ignore,
    dry_run: bool = False,
) -> HealingResult:
    """What `jobs.heal` does."""
    methods = methods_of(healing.heal_by)
    windows.check()
    healing.check(methods)
    opening.check()
    if opening.stream and methods != ["refit"] and "distill" not in methods:
        raise ShortGPTError(
            "`stream` holds one layer at a time, of a model that refit alone heals, or of the "
            f"teacher of distill; got `heal_by` {healing.heal_by}"
        )
    model = str(find_source(model))  # of a name such as demo, the file that it stands for
    teacher = healing.teacher or model
    check_tokenizer(opening.tokenizer_path, model, teacher, stream=opening.stream)
    _check_target(model, out, overwrite=overwrite)
    hub.check(out, format_of(model, out))
    removal = _removal(model, choice, methods, healing)
    if is_gguf(out):
        check_writable_gguf(model, removal.layers)
    how = (windows, healing, opening)
    done = _heal(model, Path(out), methods, removal, *how, overwrite, notify, dry_run)
    return replace(done, address=hub.push(done.out, done))


@interruptible()
def _heal(
    model: str,
    out: Path,
    methods: Sequence[str],
    removal: ChosenLayers,
    windows: Windows,
    healing: Healing,
    opening: OpenOptions,
    overwrite: bool,
    notify: Notify,
    dry_run: bool,
) -> HealingResult:
    trains, folder = methods[-1] in TRAINING, None
    if trains or opening.stream:  # hours, which continue from files beside the new directory
        folder = Path(f"{out}.{'training' if trains else 'refit'}")
    # before the model is opened
    lock = None if folder is None or dry_run else hold(folder)
    windows.check_texts()
    states = [path for name in STATES for path in folder.rglob(name)] if folder else []
    opening = as_begun(opening, *states)
    short = _opened(model, opening, windows.size or SIZE, trains=trains)
    short.check_weights()
    if removal.layers:
        check_layers(removal.layers, short.kept)
    opening = replace(opening, precision=short.precision)  # for all models opened later
    if removal.importance is not None:  # its record tells what it rests on, as that of prune does
        short.importance = removal.importance
    few_bits = trains and is_gguf(out) and in_few_bits(model)
    recipe = healing.recipe(short, windows.seed or 0, few_bits=few_bits) if trains else None
    size = windows.size or (recipe.size if recipe else SIZE)
    limit = None if trains else CLOSED_WINDOWS
    read = partial(windows.learning, short, size, limit, validate=trains, beside=out)
    if dry_run:
        work = f"remove layers {removal.layers} of {model}, heal by {','.join(methods)} on "
        count = windows.max_windows or CLOSED_WINDOWS if windows.own else len(read().training)
        count = recipe.steps * recipe.batch_size if recipe else count
        work += f"{count:,} windows of {windows.name}, and write {out}; each is read twice or more"
        end_dry_run(short, work, size, count)
    parts = read()
    few = CLOSED_WINDOWS if trains or windows.max_windows is None else None
    steps = {name: healing.closed(name) if name in CLOSED else recipe for name in methods}
    job = HealingJob(
        short,
        parts,
        removal.layers,
        steps=steps,
        max_windows=few,
        teacher=_teacher(model, healing, opening, size),
        work_dir=folder,
        notify=notify,
    )
    if plan := job.plan_text():
        notify(plan)
    texts: dict[str, Any] = {"data": windows.name, "eval_data": windows.eval_name}
    texts |= {"size": size, "bos": short.bos, **short.about_precision}
    done = HealingResult(out, job.run(), parts.left_out, removal.unchecked, texts)
    short.evidence |= {**removal.record.evidence, "eval_data": windows.eval_name, "size": size}
    facts = {**removal.record.facts, "data": windows.name}
    job.save(out, facts=facts, overwrite=overwrite, release=isinstance(short, ShortHFModel))
    del short, job, steps, lock  # makes room for the model that is read again
    if not is_first_rank():
        return done
    if is_gguf(out):
        kinds = about_kinds(model, removal.layers)
        remarks = [line for line in (about_types(model, str(out)), kinds) if line]
        done = replace(done, remark="\n".join(remarks) or None)
    return reread(done, parts, replace(opening, stream=False, max_memory=None), size)


def _opened(model: str, opening: OpenOptions, size: int, *, trains: bool) -> ScoredModel:
    """The model to heal; where one trains, ``stream`` is its teacher's."""
    own = of_source(opening, model, stream=opening.stream and not trains)
    if trains:
        return open_trainable(model, own)
    if not opening.stream:  # each of several ranks has the whole model, and its own windows
        own = replace(own, model_parallel_size=1)
    return open_model(model, own, max_seq_len=size)


def _check_target(model: str, out: str, *, overwrite: bool) -> None:
    check_model(model)
    if not is_gguf(out):
        check_new(Path(out), marker=PROVENANCE, overwrite=overwrite, source=Path(model))
    elif is_gguf(model):
        check_new_gguf(out, source=model, overwrite=overwrite)
    else:
        raise ShortGPTError(
            f"{out} is written from a GGUF file alone: heal into a directory and convert that, "
            f"short-gpt convert DIRECTORY {out}"
        )


def _teacher(
    model: str, healing: Healing, opening: OpenOptions, size: int
) -> Callable[[], ScoredModel] | None:
    if healing.teacher is None and not healing.live_teacher and not opening.stream:
        return None
    source = healing.teacher or model
    own = of_source(opening, source, stream=opening.stream)
    return lambda: open_model(source, own, max_seq_len=size)


def _removal(model: str, choice: Choice, methods: Sequence[str], healing: Healing) -> ChosenLayers:
    """The layers to remove; none where the methods heal a model that was pruned before."""
    if choice.layers is not None or choice.scores is not None:
        return choice.check().chosen(model)
    ask = "give `layers`, as in 21,22,23, or `scores` and `n`"
    if methods[0] in CLOSED:
        raise ShortGPTError(
            f"the {methods[0]} reads the original model and removes layers itself: {ask}"
        )
    if "distill" in methods and healing.teacher is None:
        raise ShortGPTError(
            f"distill learns from the model with all its layers: {ask}, or a `teacher` that "
            "still has them"
        )
    if choice.n is not None or choice.method is not None:
        raise ShortGPTError("`n` and `method` choose from `scores`")
    return ChosenLayers([], Provenance())


def reread(done: HealingResult, parts: Learning, opening: OpenOptions, size: int) -> HealingResult:
    """The same, with the perplexity of one reread GGUF file, whose changed tensors were rounded."""
    if not is_gguf(done.out) or len(out_paths(done.out)) > 1:
        return done
    own = of_source(opening, str(done.out))
    short = open_model(str(done.out), own, max_seq_len=size)
    written = combined(window_perplexities(short.decoder, parts.evaluation))
    change = difference([done.evidence.perplexity["healed"]], [written])
    return replace(done, written=written, quantization=change)
