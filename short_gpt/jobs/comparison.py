"""All methods x numbers of layers x healing on one checkpoint, nothing measured twice.

`LoraHealing` and `DistillHealing` are the healings that train: for each set of layers the model is
opened anew and healed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from llama.io.files import check_writable
from llama.ranks import several_ranks
from short_gpt.data import demo
from short_gpt.data.disjoint import check_disjoint, without_overlap
from short_gpt.data.windows import windows
from short_gpt.evaluation.paired import losses
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import lora, refit
from short_gpt.healing.distillation import Distillation, LiveTeacher, Predictor
from short_gpt.healing.recipe import Recipe
from short_gpt.healing.trainer import begun
from short_gpt.jobs.cases import Cases, LoraSettings, Shares
from short_gpt.jobs.comparing import Compared, compare
from short_gpt.jobs.inputs import Tasks, TextSource, check_model, source_of
from short_gpt.jobs.rows import DISTILL, LORA, PATCHED, RAW, TRAINED, Windows
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import hold, joined
from short_gpt.wrappers.opening import open_model, open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_model import ShortModel

MOST_VALIDATION = 8  # windows by which the best checkpoint is kept
DEFAULT_CASES = Cases(healings=(RAW, PATCHED))


def compare_checkpoint(
    model: str | None,
    data: str | TextSource = "pg19",
    *,
    cases: Cases | None = None,
    shares: Shares | None = None,
    lora: LoraSettings | None = None,
    tasks: Tasks | None = None,
    opening: OpenOptions | None = None,
    saving: Saving | None = None,
) -> Compared:
    """What `compare` does, for a checkpoint and texts by their names.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file; None
            compares on the demo's small model and book.
        data: texts to choose layers and to heal by.
        cases, shares, lora, tasks, opening: what is compared, on what, and how.
        saving: where the run is saved, to be continued.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> compare_checkpoint("llama-2-7b", cases=Cases("bi", 9)).rows[1].n  # doctest: +SKIP
        9
    """
    cases, shares, opening = cases or DEFAULT_CASES, shares or Shares(), opening or OpenOptions()
    tasks, saving, settings = tasks or Tasks(), saving or Saving(), lora or LoraSettings()
    if several_ranks():
        raise ShortGPTError("compare runs on one rank; start it alone")
    tasks.check()
    if saving.state is not None:
        check_writable(Path(saving.state))
    settings.check()
    shares.check()
    if model is not None:
        check_model(model, max(cases.numbers), name="`counts`")
    source, calibration, evaluation = _material(model, source_of(data), shares)
    check_model(source, max(cases.numbers), name="`counts`")
    short = open_model(source, opening, max_seq_len=_longest(cases, shares, settings))
    held = shares.cut(short, evaluation, shares.eval_windows)
    chosen = shares.cut(short, calibration, shares.max_windows)
    how = (settings, opening, shares.seed, bos := shares.bos or short.bos)
    train = partial(LoraHealing, source, calibration, short.encode, held, *how)
    heals = _trained(cases.heals, train, short, chosen)
    with interruptible():
        found = compare(
            short,
            chosen,
            held,
            cases=cases,
            lora=heals.get(LORA),
            distill=heals.get(DISTILL),
            tasks=tasks.suite(),
            state=saving.state,
        )
    return replace(found, bos=bos)


def _longest(cases: Cases, shares: Shares, lora: LoraSettings) -> int:
    learned = lora.size or Recipe.size
    return max(shares.size, learned) if DISTILL in cases.heals else shares.size


def _trained(
    healings: Sequence[str],
    train: Callable[[], LoraHealing],
    short: ShortModel,
    fitted_on: Windows,
) -> dict[str, LoraHealing]:
    """What heals by training; refuses at once what would go wrong after all else is measured.

    Args:
        healings: of the comparison.
        train: makes what heals by LoRA.
        short: the original model, from which distillation learns.
        fitted_on: windows of the refit before it.
    """
    if not {*TRAINED} & {*healings}:
        return {}
    heals = {LORA: train()}
    if DISTILL in healings:
        heals[DISTILL] = DistillHealing(**vars(heals[LORA]), teacher=short, fitted_on=fitted_on)
    return {name: heal for name, heal in heals.items() if name in healings}


def _material(
    model: str | None, texts: TextSource, shares: Shares
) -> tuple[str, list[str], list[str]]:
    if model is None:
        return str(demo.checkpoint()), demo.bible("calibration"), demo.bible("held_out")
    return model, *texts.read_apart(shares.eval_data, seed=shares.seed)


@dataclass(frozen=True)
class LoraHealing:
    """Heals a model without some layers by LoRA, from its files, and evaluates it.

    The model is opened anew for each set of layers, through transformers, and is whole in memory
    until they go. Windows that share text with those to evaluate on, or with those to validate on,
    are not trained on.

    Args:
        source: checkpoint directory in either format, a hub id, or a GGUF file.
        texts: to learn from.
        encode: from a text to its token ids, such as ``short.encode``.
        evaluation: windows of token ids; no window to learn from shares text with them.
        settings: of the training.
        options: how the model is opened.
        seed: of the order of the windows.
        bos: which windows begin with it, such as ``short.bos``.
        progress: whether to show bars.

    Raises:
        ShortGPTError: the texts give fewer than two windows.
        MissingPackageError: peft is missing.

    Example:
        >>> lora = LoraHealing(path, texts, short.encode, held_out)  # doctest: +SKIP
        >>> cases = Cases(["bi"], [8], healings=["raw", "lora"])  # doctest: +SKIP
        >>> compare(short, calibration, held_out, cases=cases, lora=lora)  # doctest: +SKIP
    """

    source: str
    texts: Sequence[str]
    encode: Callable[[str], Sequence[int]]
    evaluation: Windows
    settings: LoraSettings = field(default_factory=LoraSettings)
    options: OpenOptions = field(default_factory=OpenOptions)
    seed: int = 0
    bos: str = "first"
    progress: bool = True

    def __post_init__(self) -> None:
        lora.require_packages()
        self.settings.check()
        size = self.settings.size or Recipe.size
        if len(self._cut(size, 2)) < 2:  # now rather than after all else is measured
            raise ShortGPTError(
                f"lora needs two windows of {size} tokens or more, one of them to validate on: "
                "give more text to heal by, or a smaller `lora_size`"
            )

    def identity(self) -> dict[str, object]:
        """What the results depend on, beside the model and the evaluation windows.

        Texts are identified by their token ids, so that another tokenizer is another identity too.
        """
        read = json_digest([list(self.encode(text)) for text in self.texts])
        return joined(asdict(self.settings), {"seed": self.seed, "texts": read})

    def __call__(self, layers: list[int], work_dir: Path | None = None) -> list[Perplexity]:
        """Losses of the evaluation windows of the model without these layers, healed.

        Args:
            layers: original numbers.
            work_dir: keeps checkpoints of the training, which continues from them, and a folder of
                its name and ".refit" what a refit continues from; both go once the result is there.

        Raises:
            ShortGPTError, NotFiniteError: as those of `heal_lora` and `heal_refit`.
        """
        with _checkpoints(work_dir) as resume:
            short = open_trainable(self.source, self.options)
            self._cut_out(short, layers, None if work_dir is None else _refit_folder(work_dir))
            recipe = self.settings.recipe(short.trainable().config)
            training, validation = self._learning(recipe.size)
            parts = (training, validation, self.evaluation)
            lora.heal(
                short,
                *parts,
                recipe=recipe,
                work_dir=work_dir,
                resume=resume,
                progress=self.progress,
                distillation=self._distillation(),
            )
            return losses(short.decoder, self.evaluation, progress=False)

    def _distillation(self) -> Distillation | None:
        """What is learned in the place of the text; None learns the text."""
        return None

    def _cut_out(self, short: ShortHFModel, layers: list[int], refit_dir: Path | None) -> None:
        """Removes the layers, before anything is learned."""
        short.remove_layers(layers)

    def _read_before(self) -> Windows:
        """Windows that the model was fitted on before anything is learned."""
        return []

    def _learning(self, size: int) -> tuple[list[list[int]], list[list[int]]]:
        """Windows to train on and windows to validate on, the last tenth but at most 8.

        The latter are of text that nothing was fitted on, if there is such.
        """
        every, _ = without_overlap(self._cut(size, None), self.evaluation)
        count = max(1, min(len(every) // 10, MOST_VALIDATION))
        free, _ = without_overlap(every, self._read_before())
        validation = (free or every)[-count:]
        training, _ = without_overlap(every, validation)
        return training, validation

    def _cut(self, size: int, limit: int | None) -> list[list[int]]:
        cut = partial(windows, size=size, stride=size, seed=self.seed, limit=limit, bos=self.bos)
        return list(cut(self.texts, self.encode))


@dataclass(frozen=True)
class DistillHealing(LoraHealing):
    """A refit, and then LoRA on what the original model predicts; it is asked in every step.

    Args:
        teacher: the original model, such as the one that is compared; needed.
        fitted_on: windows of token ids to refit on before anything is learned; None trains the
            pruned model.

    Raises:
        ShortGPTError: there is no teacher, or it takes shorter windows than are learned from; the
            windows to refit on share text with those to evaluate on.

    Example:
        >>> given = {"teacher": short, "fitted_on": calibration}  # doctest: +SKIP
        >>> distill = DistillHealing(path, texts, encode, held_out, **given)  # doctest: +SKIP
        >>> compare(short, calibration, held_out, cases=cases, distill=distill)  # doctest: +SKIP
    """

    teacher: Predictor | None = None
    fitted_on: Windows | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.settings.size or Recipe.size
        if self.teacher is None:
            raise ShortGPTError("distillation learns from the original model: pass teacher=short")
        if size > self.teacher.decoder.max_seq_len:
            raise ShortGPTError(
                f"the original model takes {self.teacher.decoder.max_seq_len} tokens, windows to "
                f"learn from have {size}: open it with a larger max_seq_len, or give a smaller "
                "`lora_size`"
            )
        check_disjoint(self._read_before(), self.evaluation)

    def identity(self) -> dict[str, object]:
        """As of `LoraHealing`, and the windows to refit on."""
        fitted = self.fitted_on
        read = None if fitted is None else json_digest([list(w) for w in fitted])
        return joined(super().identity(), {"refitted on": read})

    def _cut_out(self, short: ShortHFModel, layers: list[int], refit_dir: Path | None) -> None:
        if self.fitted_on is None:
            super()._cut_out(short, layers, refit_dir)
        else:  # sorted, as another method may name the same set in another order
            show = self.progress
            refit.heal(short, sorted(layers), self.fitted_on, work_dir=refit_dir, progress=show)

    def _read_before(self) -> Windows:
        return self.fitted_on or []

    def _distillation(self) -> Distillation:
        assert self.teacher is not None
        return Distillation(LiveTeacher(self.teacher))


@contextmanager
def _checkpoints(work_dir: Path | None) -> Iterator[bool]:
    """Whether there are whole checkpoints to continue from; the folders go once all is done."""
    if work_dir is None:
        yield False
        return
    with hold(work_dir):
        resume = begun(work_dir)
        if not resume:
            shutil.rmtree(work_dir, ignore_errors=True)
        yield resume
        for folder in (work_dir, _refit_folder(work_dir)):
            for path in folder.glob("*.json"):  # first: nothing continues from half a folder
                path.unlink()
            shutil.rmtree(folder, ignore_errors=True)


def _refit_folder(work_dir: Path) -> Path:
    """What a refit continues from, beside the training's checkpoints."""
    return work_dir.with_name(f"{work_dir.name}.refit")
