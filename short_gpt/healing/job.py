"""One healing from beginning to end: measured, pruned, healed, measured again, saved."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Difference, Perplexity, combined, difference
from short_gpt.healing.context import Heal, HealingContext, HealingWindows, Step, TokenWindows
from short_gpt.healing.distillation import CONTENT, IDENTITY
from short_gpt.healing.lora import TEACHER, prepare_training
from short_gpt.healing.refit import prepare_patch, prepare_refit
from short_gpt.healing.refit_state import STATE, STATES, VALUES
from short_gpt.healing.settings import PatchSettings, Recipe, RefitSettings
from short_gpt.healing.trainer import LAST, RECIPE
from short_gpt.models.decoder import in_own_dtype
from short_gpt.models.numbering import layer_numbers, span
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import (
    USER_ERRORS,
    NotFiniteError,
    NotSavedError,
    ShortGPTError,
    at_least,
    check,
    shortage,
)
from short_gpt.runtime.state import Lock, hold
from short_gpt.wrappers.scored_model import ScoredModel

# All ways to heal by the names that ``heal --heal_by`` knows. A new closed form is a line here.
STEPS = {
    "refit": Step(RefitSettings, prepare_refit),
    "patch": Step(PatchSettings, prepare_patch),
    "lora": Step(Recipe, partial(prepare_training, "lora"), trains=True),
    "distill": Step(Recipe, partial(prepare_training, "distill"), trains=True),
}
CLOSED = tuple(name for name, step in STEPS.items() if not step.trains)  # closed forms
TRAINING = tuple(name for name, step in STEPS.items() if step.trains)
RAW = "raw"  # pruned and not healed
HEALINGS = (RAW, *CLOSED)  # of a model without layers, in `pruned`
# What steps keep in their folders, in the order in which it is removed: nothing that a kill leaves
# blocks a later run, neither a state without the files that it names nor half of a checkpoint.
KEPT = f"{STATE} {STATES} {VALUES}* {CONTENT} {IDENTITY} checkpoint-*/{LAST} checkpoint-* {RECIPE}"


def clear(folder: Path) -> None:
    """Removes what the steps of a healing kept; logs and files of others stay."""
    for name in (TEACHER, *STEPS):
        own = folder / name
        # of checkpoints the newest first: a kill leaves those that a run continues from
        found = [[str(path) for path in own.glob(pattern)] for pattern in KEPT.split()]
        # checkpoint-10 is longer than checkpoint-8
        ordered = [sorted(paths, key=lambda name: (len(name), name)) for paths in found]
        for path in [Path(name) for paths in ordered for name in reversed(paths)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            own.rmdir()
    with suppress(OSError):
        folder.rmdir()


def check_order(names: Sequence[str]) -> None:
    """Raises ShortGPTError unless these are steps that can follow each other."""
    chain = ",".join(names)
    if not names or len({*names}) != len(names) or not {*names} <= {*STEPS}:
        raise ShortGPTError(
            f"ways to heal = {chain or 'none'}: expected different ones of {', '.join(STEPS)}"
        )
    if late := [name for name in names[1:] if name in CLOSED]:
        raise ShortGPTError(
            f"{chain}: {late[0]} is fitted on the original model, so nothing may heal before it; "
            "put one closed form first, and training after it"
        )


def _checked(steps: Mapping[str, Any]) -> dict[str, Any]:
    """The steps; ShortGPTError unless these can follow each other, each with its own settings."""
    check(isinstance(steps, Mapping), "steps", steps, "a dict, as in {'refit': None}")
    check_order([*steps])
    for name, settings in steps.items():
        kind = STEPS[name].settings  # exactly: a patch's settings are also a refit's
        ok = settings is None or type(settings) is kind
        check(ok, f"settings of {name}", settings, f"{kind.__name__} or None")
    return dict(steps)


@dataclass(frozen=True)
class HealingEvidence:
    """What a healing changed, on held-out windows."""

    steps: Sequence[Mapping[str, object]]  # oldest first, for JSON; "method" names each
    # by the model's state: original, pruned (or before), the names of the steps so far, healed
    perplexity: Mapping[str, Perplexity]
    change: Difference  # of the loss by the healing alone, paired over the windows
    changes: Mapping[str, Difference] = field(default_factory=dict)  # the same by step
    # by the kind of text, where that is known, and the model's state
    by_kind: Mapping[str, Mapping[str, Perplexity]] = field(default_factory=dict)
    # of the KL divergence from the original; None where no layer was removed, and none is known
    kld_change: Difference | None = None

    @property
    def how(self) -> Mapping[str, object]:
        return self.steps[-1]

    @property
    def unchanged(self) -> list[str]:
        """Lines on the steps that could not heal a part of the model, or changed nothing."""
        return [line for step in self.steps for line in unchanged(step)]

    @property
    def worse(self) -> bool:
        """Whether healing moved the model away from the original; else by the loss."""
        return (self.kld_change or self.change).nats > 0

    def to_dict(self) -> dict[str, object]:
        return {
            "healing": [dict(step) for step in self.steps],
            "perplexity": {name: measured.value for name, measured in self.perplexity.items()},
            "change": asdict(self.change),
            "changes": {name: asdict(change) for name, change in self.changes.items()},
            "kld_change": None if self.kld_change is None else asdict(self.kld_change),
            "worse": self.worse,
        }


def unchanged(step: Mapping[str, Any]) -> list[str]:
    """A part of the model that a step could not heal, or a training in vain, with the reasons."""
    if step.get("kept_step") == 0:
        why = "no step lowered the loss on the validation windows"
        return [f"{step['method']} changed nothing: {why}; train longer, or on more text"]
    return [
        f"{own['part']} of {span(own['layers'])} not solved: {own['why']}"
        for own in step.get("unsolved", [])
    ]


@contextmanager
def pruned(
    short: ScoredModel,
    layers: Sequence[int],
    heal_by: str = RAW,
    calibration: TokenWindows = (),
    *,
    progress: bool = False,
) -> Iterator[None]:
    """The model without some layers inside a ``with`` block, raw or healed by a closed form.

    Args:
        short: Model with all its layers, which it has again after the block.
        layers: Layers to remove, original numbers.
        heal_by: One of `HEALINGS`, with its default settings. Default: raw.
        calibration: Windows of token ids that the closed form reads.
        progress: Show bars.
    """
    heal: Heal | None = None
    if heal_by != RAW:  # fitted on the original model
        windows = HealingWindows(calibration, [], [])
        how: Any = {"calibration": calibration, "progress": progress}
        heal = STEPS[heal_by].prepare(HealingContext(short, windows, layers, **how), None)
    with short.without_layers(layers), ExitStack() as undos:
        if heal is not None:
            undos.callback(heal()[1])
        yield


class HealingJob:
    """Removes layers, heals the pruned model in steps, and measures before and after.

    Replicas (torchrun) share the windows, and a ``work_dir`` that all must see; all call `run` and
    get the same model. The first one saves it.

    Args:
        short: Opened model, changed in place; training needs a `ShortHFModel` (``from_meta``).
        windows: Windows to learn from, validate by and evaluate on.
        layers: Layers to remove first, original numbers; training may heal without removing any.
        steps: Settings of each step by its name in `STEPS`, in their order; None takes a step's
            defaults. One closed form at most, before training. Default: the refit.
        max_windows: Training windows, from the first, that the closed form reads; training begins
            with others. Default: all.
        teacher: Opens the model that distillation learns from. Default: the model with all layers.
        work_dir: Folder of what an interrupted healing continues from, until the model is saved.
            Default: none, and nothing is kept.
        progress: Show bars. Default: yes.
        notify: Called with every perplexity when it is measured, in words. Default: none.

    Example:
        >>> short = ShortHFModel("llama-2-7b-hf")  # doctest: +SKIP
        >>> data = healing_windows("pg19", short.encode, 1024, validate=True)  # doctest: +SKIP
        >>> steps = {"refit": None, "distill": Recipe(steps=400)}  # doctest: +SKIP
        >>> job = HealingJob(short, data, [21, 22], steps=steps, max_windows=64)  # doctest: +SKIP
        >>> print(job.run().change)  # doctest: +SKIP
        >>> job.save("llama-2-6b", facts={"data": "PG-19"})  # doctest: +SKIP
    """

    def __init__(
        self,
        short: ScoredModel,
        windows: HealingWindows,
        layers: Sequence[int] = (),
        *,
        steps: Mapping[str, Any] | None = None,
        max_windows: int | None = None,
        teacher: Callable[[], ScoredModel] | None = None,
        work_dir: str | Path | None = None,
        progress: bool = True,
        notify: Callable[[str], object] | None = None,
    ) -> None:
        at_least(1, optional=True, max_windows=max_windows)
        self.short, self.windows, self.layers = short, windows, layer_numbers(layers)
        self.steps = _checked({"refit": None} if steps is None else steps)
        self.max_windows, self.teacher = max_windows, teacher
        self.work_dir = None if work_dir is None else Path(str(work_dir))
        self.progress, self.notify = progress, notify
        self.evidence: HealingEvidence | None = None  # of `run`
        self._team = replicas.current(short.decoder.device)
        self._reference: Reference | None = None  # of the original on the evaluation windows
        self._lock: Lock | None = None  # of the folder, from the start of `run` until it is removed

    def run(self, undos: ExitStack | None = None) -> HealingEvidence:
        """Runs everything except saving; after any error the model is as it was, with all layers.

        With ``undos``, closing that undoes all later, too; it keeps in memory what this needs.

        Raises:
            ShortGPTError: another process heals in ``work_dir``; or as those of the steps.
            NotFiniteError: a weight, a state or a loss is NaN or infinite.
        """
        self.short.check_weights()
        parts: dict[str, list[Perplexity]] = {}
        with self._folder() as folder:
            ready = self._prepared(folder)
            if self.layers:
                self._measure(f"original, {len(self.short.kept)} layers", parts)
            done = self._heal(ready, parts, undos)
        pruned, *healed = [*parts.values()][-len(done) - 1 :]
        names, before = [*self.steps], [pruned, *healed[:-1]]
        kinds = self.windows.kinds  # of the windows to evaluate on
        known = all(part.kld is not None for part in (*pruned, *healed[-1]))
        self.evidence = HealingEvidence(
            done,
            {name: combined(windows) for name, windows in parts.items()},
            difference(pruned, healed[-1]),
            {n: difference(a, b) for n, a, b in zip(names, before, healed, strict=True)},
            {
                kind: {
                    state: combined([own for own, k in zip(each, kinds, strict=True) if k == kind])
                    for state, each in parts.items()
                }
                for kind in dict.fromkeys(kinds)
            },
            difference(pruned, healed[-1], by="kld") if self.layers and known else None,
        )
        self.short.evidence["change"] = asdict(self.evidence.change)
        return self.evidence

    def _prepared(self, folder: Path) -> list[Heal]:
        """The steps, which read the model with all its layers; the first may be a closed form."""
        closed = [name for name in self.steps if not STEPS[name].trains]
        if closed and not self.layers:
            raise ShortGPTError(f"{closed[0]} reads the original model: name the layers to remove")
        context = HealingContext(
            self.short,
            self.windows,
            self.layers,
            folder,
            lasting=self.work_dir is not None,
            calibration=self.windows.training[: self.max_windows] if closed else (),
            teacher=self.teacher,
            progress=self.progress,
        )
        return [STEPS[name].prepare(context, own) for name, own in self.steps.items()]

    def _heal(
        self, ready: Sequence[Heal], parts: dict[str, list[Perplexity]], later: ExitStack | None
    ) -> list[dict[str, object]]:
        """Removes layers, heals and measures; returns how. All is undone after an error."""
        names, count = [*self.steps], len(self.short.kept)
        done: list[dict[str, object]] = []
        # a trial: whatever happens in it, all layers are back after it
        with self.short.without_layers(self.layers), ExitStack() as undos:
            kept = len(self.short.present)
            raw = f"pruned, {kept} layers" if self.layers else f"before, {count} layers"
            self._measure(raw, parts)
            for number, heal in enumerate(ready, start=1):
                how, undo = heal()
                undos.callback(undo)
                done.append(how)
                state = ", ".join(names[:number]) if number < len(names) else "healed"
                self._measure(state, parts)
            undos = undos.pop_all()  # they outlive the trial
        with undos:
            if self.layers:
                undos.callback(self.short.remove_for_now(self.layers))
            stays = undos.pop_all()  # nothing failed: what was done stays
        if later is not None:
            later.enter_context(stays)
        return done

    def save(
        self,
        out_dir: str | os.PathLike[str],
        *,
        facts: Mapping[str, object] | None = None,
        overwrite: bool = False,
        release: bool = False,
    ) -> Path:
        """Writes the healed model with its evidence, and empties ``work_dir``.

        With ``release``, a model of transformers drops its weights before its copy is read, so
        that both are never in memory together; this one is of no use then.
        To go on with a streamed model, open ``out_dir``: this one reads what was solved from
        ``work_dir``. Arguments and errors as in `ScoredModel.save`, and:

        Raises:
            NotSavedError: nothing could be written; ``work_dir`` keeps all, to be continued.
        """
        if self.evidence is None:
            raise RuntimeError("nothing was healed yet; call run first")
        if self._team.rank:
            return Path(out_dir)
        how: dict[str, Any] = {"facts": facts, "measured": self.evidence.perplexity}
        how |= {"release": True} if release else {}
        try:
            out = self.short.save(out_dir, overwrite=overwrite, **how)
        except Exception as error:
            # another name has another folder, which holds nothing to continue from
            reason = shortage(error)
            if self.work_dir is None or not (reason or isinstance(error, USER_ERRORS)):
                raise
            raise NotSavedError(
                f"{out_dir} was not written: {reason or error}; {self.work_dir} keeps what was "
                "healed, and once that is mended, the same call continues"
            ) from error
        if self.work_dir is not None:
            clear(self.work_dir)
            self._lock = None
        return out

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The folder that steps continue from; a temporary one where nothing is kept."""
        if self.work_dir is None:
            with tempfile.TemporaryDirectory() as name:
                yield Path(self._team.gather(name)[0])
            return
        folder = self.work_dir
        self._lock = hold(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        except BaseException as error:
            again = any(STEPS[name].trains for name in self.steps) or self._team.rank > 0
            if isinstance(error, NotFiniteError) and not again:
                clear(folder)  # the same call would fail again
            self._lock = None  # else it is needed until the model is saved
            raise
        finally:
            with suppress(OSError):  # a folder with files stays
                folder.rmdir()

    def _measure(self, state: str, parts: dict[str, list[Perplexity]]) -> None:
        windows = self.windows.evaluation
        # products in bfloat16 alone put the original 0.001 nats from itself
        with in_own_dtype(self.short.decoder):
            if not parts:  # the original, from which the others differ
                self._reference = self.short.reference(windows, read=False)
            parts[state] = self.short.window_perplexities(
                windows, progress=self.progress, reference=self._reference
            )
        if self.notify is not None:
            self.notify(f"{state}: perplexity {combined(parts[state]).value:.3f}")
