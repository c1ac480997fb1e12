"""All methods x numbers of layers x healings on one checkpoint, and the healings that train."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from short_gpt.data import check_disjoint, demo, windows, without_overlap
from short_gpt.data.windows import Text, tokens_of
from short_gpt.evaluation import Perplexity, losses
from short_gpt.healing import choosing, refit
from short_gpt.healing import lora as training
from short_gpt.healing.distillation import Distillation, LiveTeacher
from short_gpt.healing.recipe import Recipe
from short_gpt.healing.trainer import begun
from short_gpt.jobs.cases import (
    DISTILL,
    LORA,
    PATCHED,
    RAW,
    TRAINED,
    Cases,
    LoraOptions,
    Shares,
    Windows,
)
from short_gpt.jobs.comparing import ComparisonResult, compare
from short_gpt.jobs.inputs import Data, Tasks, TextSource, check_model, source_of
from short_gpt.jobs.ranking import end_dry_run
from short_gpt.jobs.saving import Saving, as_begun, interruptible
from short_gpt.runtime.digest import json_digest, windows_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import check_alone
from short_gpt.runtime.settings import takes_fields
from short_gpt.runtime.state import hold, joined
from short_gpt.wrappers.opening import open_model, open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.own_text import own_text_writer, split_own_text
from short_gpt.wrappers.scored_model import ScoredModel

MOST_VALIDATION = 8  # windows by which the best checkpoint is kept


@takes_fields("compare")
@interruptible()
def compare_checkpoint(
    model: str | None,
    data: Data = TextSource(),
    *,
    cases: Cases = Cases(healings=(RAW, PATCHED)),
    shares: Shares = Shares(),
    lora: LoraOptions = LoraOptions(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    saving: Saving = Saving(),
    dry_run: bool = False,
    **fields: Any,
) -> ComparisonResult:
    """What `compare` does, for a checkpoint and texts by their names.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; None
            compares on the demo's small model and book.
        data: texts to choose layers and to heal by.
        lora: settings of the healings that train.
        tasks: also run on the models without healing.
        dry_run: raise `DryRun`, which says what would be done, in place of the work.
        fields: single settings by their names, in place of objects: ``counts=[4, 8]``.

    Example:
        >>> compare_checkpoint("llama-2-7b", cases=Cases("bi", 9)).rows[1].n  # doctest: +SKIP
        9
    """
    check_alone("compare")
    tasks.check()
    saving.check()
    if model is None and (source_of(data) != TextSource() or shares.eval_data is not None):
        raise ShortGPTError(
            "without a MODEL, the demo's model reads its own book: name a MODEL, or leave out "
            "`data` and `eval_data`"
        )
    lora.check()
    shares.check()
    source = str(demo.checkpoint()) if model is None else model
    if (n_layers := check_model(source)) is not None:
        cases = cases.within(n_layers)
    kinds: Sequence[Iterable[Text]]
    held: Sequence[Sequence[Text]]
    if model is None:
        kinds, held = [demo.bible()], [demo.bible("held_out")]
    else:
        kinds, held = source_of(data).kinds(), shares.held(source_of(data).column)
    size = max(shares.size, (lora.size or Recipe.size) if DISTILL in cases.heals else 0)
    short = open_model(source, as_begun(opening, saving.state), max_seq_len=size)
    cases = cases.within(len(short.kept))
    opening = replace(opening, precision=short.precision)  # also of the models that are trained
    if dry_run:
        closed = [healing for healing in cases.heals if healing not in TRAINED]
        seeds = {"random": cases.seeds}
        sets = len(cases.numbers) * sum(seeds.get(name, 1) for name in cases.names)
        models = 1 + sets * len(closed)
        work = f"compare {models} models of {source}: {', '.join(cases.names)} x {cases.numbers} "
        work += f"layers x {', '.join(cases.heals)}; searches, training and writing own text take "
        work += "more"
        refits = sum(healing != RAW for healing in closed) * choosing.REFIT_PASSES * sets
        count = models * shares.eval_windows + (1 + refits) * shares.max_windows
        end = partial(end_dry_run, short, work, shares.size, count)
    own = own_text_writer(short, size, seed=shares.seed, beside=saving.state)
    write = (lambda *_: end()) if dry_run else own
    limits = (shares.max_windows, shares.seed)
    calibration, evaluation = split_own_text(kinds, held, write, *limits)
    held_out = shares.cut(short, evaluation, shares.eval_windows)
    fit_on = shares.cut(short, calibration, shares.max_windows)
    if dry_run:
        end()
    every, bos = [text for kind in calibration for text in kind], shares.bos or short.bos
    options = (source, every, short.encode, held_out, lora, opening, shares.seed, bos)
    # made before anything is measured, because they check settings
    lora_healing = LoraHealing(*options) if LORA in cases.heals else None
    distill_healing = None
    if DISTILL in cases.heals:
        distill_healing = DistillHealing(*options, teacher=short, fitted_on=fit_on)
    how: Any = {"lora": lora_healing, "distill": distill_healing, "tasks": tasks.suite()}
    result = compare(short, fit_on, held_out, cases=cases, **how, state=saving.state)
    return replace(result, bos=bos, precision=short.about_precision)


@dataclass(frozen=True)
class LoraHealing:
    """Heals a model without some layers by LoRA, from its files, and evaluates it.

    transformers opens the model again for each set of layers, with all layers in memory until they
    are removed. No window is trained on that shares text with those to evaluate or validate on.

    Args:
        source: checkpoint directory in either format, a hub id, or a GGUF file.
        texts: to learn from, at least two windows.
        encode: from a text to its token ids, such as ``short.encode``.
        evaluation: windows of token ids.
        settings: of the training.
        options: how the model is opened.
        seed: of the order of the windows.
        bos: which windows begin with it, such as ``short.bos``.
        teacher: the original model, whose predictions are learned; None learns the text.
        fitted_on: windows of a refit before the training, for distillation; None refits nothing.

    Example:
        >>> lora = LoraHealing(path, texts, short.encode, held_out)  # doctest: +SKIP
        >>> cases = Cases(["bi"], [8], healings=["raw", "lora"])  # doctest: +SKIP
        >>> compare(short, calibration, held_out, cases=cases, lora=lora)  # doctest: +SKIP
    """

    source: str
    texts: Sequence[Text]
    encode: Callable[[str], Sequence[int]]
    evaluation: Windows
    settings: LoraOptions = field(default_factory=LoraOptions)
    options: OpenOptions = field(default_factory=OpenOptions)
    seed: int = 0
    bos: str = "first"
    progress: bool = True
    teacher: ScoredModel | None = None
    fitted_on: Windows | None = None

    def __post_init__(self) -> None:
        training.require_packages()
        self.settings.check()
        size = self.settings.size or Recipe.size
        if len(self._cut(size, 2)) < 2:  # before all others are measured
            raise ShortGPTError(
                f"lora needs two windows of {size} tokens or more, one of them to validate on: "
                "give more text to heal by, or a smaller `lora_size`"
            )
        if self.teacher is not None and size > (longest := self.teacher.decoder.max_seq_len):
            raise ShortGPTError(
                f"the original model takes {longest} tokens, windows to learn from have {size}: "
                "open it with a larger max_seq_len, or give a smaller `lora_size`"
            )
        check_disjoint(self.fitted_on or [], self.evaluation)

    def identity(self) -> dict[str, object]:
        """What the results depend on, except the model and the evaluation windows."""
        # of the token ids: another tokenizer is another identity, too
        read = json_digest([list(tokens_of(text, self.encode)) for text in self.texts])
        own = joined(asdict(self.settings), {"seed": self.seed, "texts": read})
        if self.teacher is None and self.fitted_on is None:
            return own
        fitted = None if self.fitted_on is None else windows_digest(self.fitted_on)
        return joined(own, {"refitted on": fitted})

    def __call__(self, layers: list[int], work_dir: Path | None = None) -> list[Perplexity]:
        """Losses of the evaluation windows of the model without these layers, healed.

        ``work_dir`` keeps what an interrupted training continues from, and a folder of its name and
        ".refit" what a refit does; both are deleted once the result is known.
        """
        show = self.progress
        with _checkpoints(work_dir) as resume:
            short = open_trainable(self.source, self.options)
            if self.fitted_on is None:
                short.remove_layers(layers)
            else:  # sorted, as another method may name the same set in another order
                refit_dir = None if work_dir is None else _refit_folder(work_dir)
                refit.heal(short, sorted(layers), self.fitted_on, work_dir=refit_dir, progress=show)
            recipe = self.settings.recipe(short.trainable().config)
            distillation = None if self.teacher is None else Distillation(LiveTeacher(self.teacher))
            training.heal(
                short,
                *self._learning(recipe.size),
                self.evaluation,
                recipe=recipe,
                work_dir=work_dir,
                resume=resume,
                progress=show,
                distillation=distillation,
            )
            return losses(short.decoder, self.evaluation, progress=False)

    def _learning(self, size: int) -> tuple[list[list[int]], list[list[int]]]:
        """Windows to train and to validate on: the last tenth, if possible not refitted on."""
        every, _ = without_overlap(self._cut(size, None), self.evaluation)
        count = max(1, min(len(every) // 10, MOST_VALIDATION))
        free, _ = without_overlap(every, self.fitted_on or [])
        validation = (free or every)[-count:]
        return without_overlap(every, validation)[0], validation

    def _cut(self, size: int, limit: int | None) -> list[list[int]]:
        cut = partial(windows, size=size, stride=size, seed=self.seed, limit=limit, bos=self.bos)
        return list(cut(self.texts, self.encode))


class DistillHealing(LoraHealing):
    """A refit, and then LoRA on what the original model, ``teacher``, predicts in every step.

    Example:
        >>> given = {"teacher": short, "fitted_on": calibration}  # doctest: +SKIP
        >>> distill = DistillHealing(path, texts, encode, held_out, **given)  # doctest: +SKIP
        >>> compare(short, calibration, held_out, cases=cases, distill=distill)  # doctest: +SKIP
    """

    def __post_init__(self) -> None:
        if self.teacher is None:  # before texts are encoded
            raise ShortGPTError("distillation learns from the original model: pass teacher=short")
        super().__post_init__()


@contextmanager
def _checkpoints(work_dir: Path | None) -> Iterator[bool]:
    """Whether there are complete checkpoints to continue from; deletes the folders at the end."""
    if work_dir is None:
        yield False
        return
    with hold(work_dir):
        resume = begun(work_dir)
        if not resume:
            shutil.rmtree(work_dir, ignore_errors=True)
        yield resume
        for folder in (work_dir, _refit_folder(work_dir)):
            for path in folder.glob("*.json"):  # first: nothing continues from part of a folder
                path.unlink()
            shutil.rmtree(folder, ignore_errors=True)


def _refit_folder(work_dir: Path) -> Path:
    return work_dir.with_name(f"{work_dir.name}.refit")
