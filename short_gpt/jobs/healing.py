"""Layers removed and quality brought back: in closed form, by training, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llama.sources import find_source, is_gguf
from short_gpt.checkpoints.gguf import about_kinds, check_architecture, in_few_bits
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.scores import ChosenLayers, chosen
from short_gpt.checkpoints.target import Target, format_of
from short_gpt.evaluation.perplexity import (
    Difference,
    Perplexity,
    combined,
    difference,
    window_perplexities,
)
from short_gpt.healing import HealingEvidence, HealingJob, HealingWindows
from short_gpt.healing.context import VALIDATE
from short_gpt.healing.job import CLOSED, STEPS, TRAINING, check_order
from short_gpt.healing.settings import CLOSED_WINDOWS, Healing
from short_gpt.jobs.inputs import SIZE, WindowSettings, check_model
from short_gpt.jobs.saving import Running, Saving, interruptible
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError, check
from short_gpt.runtime.progress import is_first_rank
from short_gpt.runtime.state import hold
from short_gpt.selection.settings import Choice
from short_gpt.wrappers.opening import open_model, open_trainable
from short_gpt.wrappers.options import FLOAT32, OpenOptions
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.short_hf import ShortHFModel


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


@interruptible()
def heal(
    model: str,
    out: str,
    choice: Choice,
    windows: WindowSettings,
    healing: Healing,
    opening: OpenOptions,
    saving: Saving,
    running: Running,
) -> HealingResult:
    """What `jobs.heal` does."""
    methods = _methods(windows, healing, opening)
    # of a name such as demo, the file; names that begin with ``out`` follow: no slash at its end
    model, out = str(find_source(model)), str(Path(out))
    _check_target(model, out, saving)
    removal = _removal(model, choice, methods, healing)
    if is_gguf(out):
        check_architecture(model).kept(removal.layers)
    trains, folder = methods[-1] in TRAINING, None
    if trains or opening.stream:  # what takes hours continues from files beside the new directory
        folder = Path(f"{out}.training" if trains else f"{out}.refit")
    lock = None if folder is None else hold(folder)  # before the model is opened
    windows.check_texts()
    short = _opened(model, removal, opening, trains=trains, size=windows.size or SIZE)
    closed: dict[str, Any] = {n: healing.closed(STEPS[n].settings) for n in methods if n in CLOSED}
    recipe = None
    if trains:
        few_bits = is_gguf(out) and in_few_bits(model)
        how: Any = {"seed": windows.seed or 0, "few_bits": few_bits}
        trained = partial(healing.trained, short.trainable().config, **how)
        recipe = trained()
    size = windows.size or (recipe.size if recipe else SIZE)
    limit = None if trains else CLOSED_WINDOWS
    if healing.count is not None:  # each read once, and those of a closed form and to validate
        limit = -(-healing.count // size) + CLOSED_WINDOWS * len(closed) + VALIDATE
    parts = windows.learning(short, size, limit, validate=trains, beside=out)
    if recipe is not None and healing.count is not None:
        recipe = trained(steps=recipe.steps_for(-(-healing.count // size), len(parts.training)))
    job = HealingJob(
        short,
        parts,
        removal.layers,
        steps=closed | {name: recipe for name in methods if name in TRAINING},
        max_windows=CLOSED_WINDOWS if trains or windows.max_windows is None else None,
        teacher=_teacher(model, healing, opening, size),
        work_dir=folder,
        notify=running.tell,
    )
    texts: dict[str, Any] = {"data": windows.name, "eval_data": windows.eval_name}
    texts |= {"size": size, "bos": short.bos, **short.about_precision}
    remark = about_kinds(model, removal.layers) if is_gguf(out) else None
    done = HealingResult(Path(out), job.run(), parts.left_out, removal.unchecked, texts, remark)
    short.evidence |= {**removal.record.evidence, "eval_data": windows.eval_name, "size": size}
    facts = {**removal.record.facts, "data": windows.name}
    job.save(out, facts=facts, overwrite=saving.overwrite, release=isinstance(short, ShortHFModel))
    del short, job, lock  # makes room for the model that is read again
    if not is_first_rank():
        return done
    done = reread(done, parts, replace(opening, stream=False, precision=FLOAT32), size)
    return replace(done, address=saving.push(done.out, done))


def _methods(windows: WindowSettings, healing: Healing, opening: OpenOptions) -> list[str]:
    """The ways to heal; ShortGPTError for settings that do not go with them."""
    methods = healing.check(STEPS)
    check_order(methods)
    windows.check(shuffled=True)
    learns = windows.prompts is None or windows.asked
    check(learns, "prompts", windows.prompts, "some without right answers: heal asks no questions")
    if opening.stream and methods != ["refit"] and "distill" not in methods:
        raise ShortGPTError(
            "`stream` holds one layer at a time, of a model that refit alone heals, or of the "
            f"teacher of distill; got `heal_by` {healing.heal_by}"
        )
    return methods


def _opened(
    model: str, removal: ChosenLayers, opening: OpenOptions, *, trains: bool, size: int
) -> ScoredModel:
    """The model to heal, its layers and weights checked; where it trains, the teacher streams."""
    if trains:
        short: ScoredModel = open_trainable(model, opening)
    else:
        # each of several ranks has the whole model, and its own windows
        own = {} if opening.stream else {"model_parallel_size": 1}
        short = open_model(model, opening, max_seq_len=size, **own)
    short.check_weights()
    if removal.layers:
        check_layers(removal.layers, short.kept)
    if removal.importance is not None:  # its record tells what it rests on, as that of prune does
        short.importance = removal.importance
    return short


def _check_target(model: str, out: str, saving: Saving) -> None:
    check_model(model)
    if is_gguf(out) and not is_gguf(model):
        raise ShortGPTError(
            f"{out} is written from a GGUF file alone: heal into a directory and convert that, "
            f"short-gpt convert DIRECTORY {out}"
        )
    Target(out, saving.overwrite).check(source=Path(model))
    saving.check(out, format_of(model, out))


def _teacher(
    model: str, healing: Healing, opening: OpenOptions, size: int
) -> Callable[[], ScoredModel] | None:
    """What opens the teacher; None where that is the model itself, before its layers go."""
    if healing.teacher is None and not opening.stream:
        return None
    return lambda: open_model(healing.teacher or model, opening, max_seq_len=size)


def _removal(model: str, choice: Choice, methods: Sequence[str], healing: Healing) -> ChosenLayers:
    """The layers to remove; none where the methods heal a model that was pruned before."""
    if choice.layers is not None or choice.scores is not None:
        return chosen(model, **choice.checked())
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


def reread(
    done: HealingResult, parts: HealingWindows, opening: OpenOptions, size: int
) -> HealingResult:
    """The same, with the perplexity of a reread GGUF file, whose changed tensors were rounded."""
    if not is_gguf(done.out):
        return done
    short = open_model(str(done.out), opening, max_seq_len=size)
    written = combined(window_perplexities(short.decoder, parts.evaluation))
    change = difference([done.evidence.perplexity["healed"]], [written])
    return replace(done, written=written, quantization=change)
