"""The settings of jobs that choose, remove or heal layers; `jobs.inputs` has the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from short_gpt.jobs.inputs import SIZE, Cut, TextSource, layer_list, listed, name_texts
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.settings import (
    CHOOSE,
    READ,
    WRITE,
    Needs,
    Values,
    needs_one_of,
    setting,
)

if TYPE_CHECKING:
    from short_gpt.healing import DistillSettings, Recipe
    from short_gpt.healing.refit import RefitSettings
    from short_gpt.healing.texts import Learning
    from short_gpt.scoring.stopping import Stop
    from short_gpt.wrappers.scored_model import ScoredModel

RANK, PRUNE = ("rank",), ("prune",)
SEED, CONFIDENCE = needs_one_of("a `seed`", "seed"), needs_one_of("a `confidence`", "confidence")


def _settled(values: Values) -> bool:
    if "method" not in values:  # reproduce chooses both itself
        return True
    return can_settle(values["n"], values["seed"], values["method"])


def can_settle(n: object, seed: object, method: object) -> bool:
    """Whether the layers chosen may be known before all windows are read."""
    return n is not None and seed is not None and method in ("bi", "angular")


def _by_loss(method: object) -> bool:
    from short_gpt.selection.methods import BY_LOSS

    return method in BY_LOSS


SETTLED = Needs("`n`, a `seed` and `method` bi or angular", _settled)
SLEB = Needs("`method` sleb", lambda v: v["method"] == "sleb")
NEEDS_AUTO = Needs("`method` auto", lambda v: v["method"] == "auto")
SCORES = Needs(
    "a `method` that scores (not perplexity, sleb or auto)", lambda v: not _by_loss(v.get("method"))
)


@dataclass(frozen=True)
class Answer:
    """What a ranking must answer.

    Args:
        n: number of layers to remove; also print which ones each method would remove.
        method: bi, angular, angular_all, deepest, relative_magnitude, norm, sequential, reverse,
            random, perplexity, sleb or auto, which refits the sets of several methods and takes
            the one of lowest held-out loss.
        candidates: sleb only tries this many layers, of lowest Block Influence; all if not
            given.
        budget: what auto may take, in passes over the windows that it begins with; 60 if not given.
        confidence: of all runs, at most 1 - confidence end early with an answer that differs from
            the answer on all windows, except where a smaller share of the windows than rare
            decides it; of those that end early, more may be wrong. none reads all windows.
        rare: the smallest share of unusual windows that this promise covers; the smaller, the more
            is read.
        sublayers: also score the attention and the MLP of every layer.
        paper_model: which of the paper's models this is; by its shape if not given.

    Raises:
        ShortGPTError: there is no such method, or it needs a number of layers.
    """

    HEADING: ClassVar = CHOOSE
    n: int | None = setting(None, commands=RANK)
    method: str = setting("bi", commands=RANK)
    candidates: int | None = setting(None, commands=RANK, needs=SLEB)
    budget: int | None = setting(None, commands=RANK, needs=NEEDS_AUTO)
    confidence: float | None = setting(0.99, needs=(SETTLED, SEED))
    rare: float = setting(0.02, needs=(SETTLED, SEED, CONFIDENCE))
    sublayers: bool = setting(False, commands=RANK, needs=SCORES)
    paper_model: str | None = setting(None, commands=("reproduce",))

    def __post_init__(self) -> None:
        if self.method != Answer.method:  # the default is known to be valid, without an import
            from short_gpt.selection.methods import check_method

            check_method(self.method)
            if self.by_loss and self.n is None:
                raise ShortGPTError(f"`method` {self.method} needs `n`")

    @property
    def by_loss(self) -> bool:
        return _by_loss(self.method)

    def rule(self, seed: int | None) -> Stop | None:
        """The rule that ends a run early, where the answer can be settled.

        That takes a method that chooses n layers by means over windows, which a seed shuffles.
        """
        from short_gpt.scoring.stopping import Stop

        if self.confidence is None:
            return None
        rule = Stop(self.n or 1, self.method == "angular", self.confidence, rare=self.rare)
        return rule if can_settle(self.n, seed, self.method) else None


@dataclass(frozen=True)
class Choice:
    """Layers to remove: named, or chosen by saved scores.

    Args:
        layers: numbers of the layers to remove, as in 21,22,23; or choose them by scores.
        scores: JSON file that rank wrote.
        n: how many layers to remove by the scores.
        angular: remove the best block of consecutive layers, short for the method angular.
        method: by which method of rank; the one that the scores were ranked by if not given.

    Example:
        >>> Choice([21, 22]).check().named
        [21, 22]
    """

    HEADING: ClassVar = CHOOSE
    layers: object = setting(None, value="N,N")
    scores: str | None = setting(None, value="FILE")
    n: int | None = None
    angular: bool = False
    method: str | None = setting(None, commands=PRUNE)

    def check(self) -> Choice:
        """Itself; ShortGPTError unless it names either layers or scores to choose them by."""
        from short_gpt.selection.methods import check_method

        if (self.layers is None) == (self.scores is None):
            raise ShortGPTError("expected either `layers`, as in 21,22,23, or `scores` and `n`")
        if self.by is not None:
            check_method(self.by)
        if self.layers is not None and self.by is not None:
            name = "angular" if self.angular else "method"
            raise ShortGPTError(f"`{name}` chooses from `scores`, not from `layers`")
        return self

    @property
    def by(self) -> str | None:
        """The method to choose by; None takes the one that ranked."""
        if self.angular and self.method not in (None, "angular"):
            raise ShortGPTError(f"`angular` and `method` {self.method} contradict each other")
        return "angular" if self.angular else self.method

    @property
    def named(self) -> list[int] | None:
        return None if self.layers is None else layer_list(self.layers)


@dataclass(frozen=True)
class PruneOutput:
    """How a pruned checkpoint is written.

    Args:
        to: the format to write: meta or gguf (a Llama only, except from GGUF to GGUF) or hf. If not
            given, gguf where OUT ends with .gguf, else the source's, or hf from GGUF. From GGUF,
            Meta's is in float32, which holds what quantized weights stand for exactly.
        verify: whether to prove the result: the same logits as the source with the layers removed
            in memory, and the same greedy generation with and without the cache. If not given,
            yes, but no from Meta's to Meta's and to GGUF. Files of these two formats are read again
            and compared with what was written in any case.
        overwrite: replace an earlier pruned checkpoint.
    """

    HEADING: ClassVar = WRITE
    to: str | None = None
    verify: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class HealingWindows:
    """Windows that a healing learns from, and others to evaluate on.

    Args:
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out,
            or the end of a lone text.
        size: tokens in a window; if not given, 512 in shrink, 1024 in a closed form, else the
            recipe's.
        max_windows: windows to learn from; 64 for a closed form, all for training (192 in shrink
            where the model writes text of its own). Before training, a closed form reads 64 of them
            at most, and the training begins with others.
        eval_windows: windows to evaluate on.
        drop_overlap: leave out windows that share text with those to evaluate on, instead of
            refusing them; on if no eval_data is given.
        seed: of the choice of texts and windows, and of training.
        bos: which windows begin with BOS; see rank.
    """

    HEADING: ClassVar = READ
    eval_data: str | None = setting(None, value="TEXTS")
    size: int | None = None
    max_windows: int | None = None
    eval_windows: int = 32
    drop_overlap: bool | None = None
    seed: int = 0
    bos: str | None = None

    def __post_init__(self) -> None:
        name_texts(self, "eval_data")

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        size = SIZE if self.size is None else self.size
        Cut(size, self.max_windows, self.seed, bos=self.bos).check()
        at_least(1, eval_windows=self.eval_windows)

    def read(
        self,
        texts: TextSource,
        short: ScoredModel,
        size: int,
        limit: int | None,
        *,
        validate: bool,
        beside: str | Path,
    ) -> Learning:
        """The windows of ``size``, ``limit`` of them to learn from, as `HealingTexts.windows`.

        Text that the model writes is kept ``beside`` a file.
        """
        from short_gpt.healing.texts import HealingTexts
        from short_gpt.wrappers.own_text import own_text_writer

        write = own_text_writer(short, size, seed=self.seed, beside=beside)
        place = (texts.split, texts.column, texts.max_texts, self.seed)
        return HealingTexts(texts.data, self.eval_data, *place).windows(
            short.encode,
            size,
            bos=self.bos or short.bos,
            limit=self.max_windows or limit,
            eval_windows=self.eval_windows,
            drop_overlap=self.drop_overlap,
            validate=validate,
            write=write,
        )


# the settings of a recipe, and all of distillation alone
RECIPE = ["rank", "alpha", "learning_rate", "steps", "warmup", "batch", "micro_batch"]
RECIPE += ["eval_every", "patience", "four_bit", "gradient_checkpointing", "report_to"]
FITTED = ("ridge", "parts", "aim")  # of closed forms
DISTILLING = ("teacher", "stream_teacher", "live_teacher", "top_k", "temperature", "kl_share")


@dataclass(frozen=True)
class Settings:
    """How the model is healed.

    Args:
        ridge: of a closed form, relative to the mean square of the inputs; if not given, in the
            refit 2 F / N, twice the inputs of the matrix divided by the tokens, and in the patch
            what held-out windows choose.
        parts: of the refit: attention, mlp or both by a comma, whose output projections are
            solved; both if not given.
        aim: step size of the refit: the share of the solved change that is applied, above 0 and at
            most 1; 0.5 if not given.
        preset: of lora and distill, paper, demo or small; each of the following changes one of its
            settings.
        rank: of the LoRA changes that are trained.
        alpha: of LoRA, whose changes are scaled by alpha / rank; the rank if not given.
        learning_rate: at its peak.
        steps: optimizer steps.
        warmup: steps until the peak; if not given, a tenth of all steps, at most 100 (paper).
        batch: windows a step.
        micro_batch: windows read at once.
        eval_every: steps between evaluations and checkpoints.
        patience: stop after this many evaluations without a better one.
        four_bit: train over weights in 4 bits; needs bitsandbytes and CUDA.
        gradient_checkpointing: less memory, more time.
        report_to: services that the training reports to, such as wandb or tensorboard, whose logs
            stay in OUT.training/METHOD/runs.
        resume: training must continue an interrupted run, from OUT.training; where there is one,
            the same command continues it anyway.
        teacher: the original model of which MODEL is a part; MODEL itself, before layers go, if not
            given.
        stream_teacher: hold one layer of the teacher at a time in memory, as for rank --stream.
        live_teacher: ask the teacher in every step, as a second model in memory; otherwise it
            is asked once and its predictions stay on disk, in OUT.training, until the model is
            saved.
        top_k: tokens kept of each prediction, beside the total of all others; 64 if not given.
        temperature: by which both models' logits are divided; 1 if not given.
        kl_share: of the divergence in the loss, above 0 and at most 1; 1 if not given. The rest is
            the text's own.
    """

    ridge: float | None = None
    parts: str | None = None
    aim: float | None = None
    preset: str = "paper"
    rank: int | None = None
    alpha: int | None = None
    learning_rate: float | None = None
    steps: int | None = None
    warmup: int | None = None
    batch: int | None = None
    micro_batch: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    four_bit: bool = False
    gradient_checkpointing: bool = False
    report_to: str | None = setting(None, value="A,B")
    resume: bool = False
    teacher: str | None = None
    stream_teacher: bool = False
    live_teacher: bool = False
    top_k: int | None = None
    temperature: float | None = None
    kl_share: float | None = None

    def _changed(self, names: Sequence[str]) -> dict[str, Any]:
        return {n: v for n in names if (v := getattr(self, n)) != getattr(Settings, n)}

    @property
    def changes(self) -> dict[str, object]:
        return self._changed(RECIPE)

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError or MissingPackageError for what none of the methods can do."""
        from short_gpt.healing import lora
        from short_gpt.healing.closed_form import ClosedForm
        from short_gpt.healing.distillation import check_share, check_targets
        from short_gpt.healing.job import KINDS, TRAINING
        from short_gpt.healing.recipe import PRESETS, Recipe

        closed = [kind for kind in KINDS if issubclass(kind, ClosedForm)]
        for names, users in (
            ((*RECIPE, "resume", "preset"), TRAINING),
            (DISTILLING, ("distill",)),
            *(((name,), [kind.name for kind in closed if name in kind.options]) for name in FITTED),
        ):
            if (changed := self._changed(names)) and not {*users} & {*methods}:
                raise ShortGPTError(f"`{next(iter(changed))}` is for `method` {' or '.join(users)}")
        if self.ridge is not None and not 0 < self.ridge < math.inf:  # by the name of the flag
            raise ShortGPTError(f"ridge = {self.ridge}: expected above 0, such as 0.1")
        if "refit" in methods:
            self.refit()
        if self.preset not in PRESETS:
            raise ShortGPTError(f"`preset` {self.preset}: expected one of {', '.join(PRESETS)}")
        if not {*TRAINING} & {*methods}:
            return
        Recipe(**{**PRESETS[self.preset], **self.changes})  # raises for values out of range
        lora.require_packages()
        lora.check_reports(self.report_to)
        if self.four_bit:
            lora.require_four_bit()
        if "distill" in methods:
            if self.stream_teacher and self.live_teacher:
                raise ShortGPTError(
                    "`stream_teacher` reads the teacher's files once: leave out `live_teacher`, "
                    "which asks it in every step"
                )
            step = self.distill(None, None)
            check_targets(step.top_k, step.temperature)
            check_share(step.kl_share)

    def refit(self, max_windows: int | None = None) -> RefitSettings:
        """The refit's settings; ShortGPTError for one out of range."""
        from short_gpt.healing.refit import RefitSettings
        from short_gpt.healing.solver import PARTS

        ridges = None if self.ridge is None else (self.ridge,)
        parts = PARTS if self.parts is None else tuple(listed(self.parts))
        if not {*parts} <= {*PARTS}:
            raise ShortGPTError(
                f"parts = {self.parts}: expected {', '.join(PARTS)} or {','.join(PARTS)}"
            )
        step_size = RefitSettings.step_size if self.aim is None else self.aim
        if not 0 < step_size <= 1:  # by the name of the flag
            raise ShortGPTError(f"aim = {step_size}: expected above 0 and at most 1")
        return RefitSettings(parts, ridges, step_size=step_size, max_windows=max_windows)

    def recipe(self, short: ScoredModel, seed: int, *, few_bits: bool = False) -> Recipe:
        """The recipe for a model of transformers, with the changes.

        ``few_bits``: what it changes is rounded again, and so preset small changes little.
        """
        from short_gpt.healing.recipe import OUTPUTS, recipe_for

        own = {"modules": OUTPUTS} if few_bits and self.preset == "small" else {}
        changes = {**own, **self.changes, "seed": seed}
        return recipe_for(short.trainable().config, self.preset, **changes)

    def distill(
        self, recipe: Recipe | None, teacher: Callable[[], ScoredModel] | None
    ) -> DistillSettings:
        from short_gpt.healing import DistillSettings

        changed = self._changed(("top_k", "temperature", "kl_share"))
        return DistillSettings(recipe, teacher=teacher, live=self.live_teacher, **changed)


def methods_of(text: str) -> list[str]:
    """The methods in a comma list; ShortGPTError unless each can follow the one before."""
    from short_gpt.healing.job import STEPS, check_order

    methods = listed(text)
    for name in methods:
        if name not in STEPS:
            raise ShortGPTError(
                f"`method` {text}: expected one of {', '.join(STEPS)}, or several by commas, got "
                f"{name!r}"
            )
    check_order([STEPS[name] for name in methods])
    return methods
