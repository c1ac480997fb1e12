"""One healing from beginning to end: measured, pruned, healed, measured again, saved."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama.files import tidy
from short_gpt.evaluation.perplexity import Difference, Perplexity, combined, difference
from short_gpt.healing.closed_form import ClosedForm, Heal, HealingContext, Step
from short_gpt.healing.distillation import CONTENT, IDENTITY
from short_gpt.healing.lora import TEACHER, DistillSettings, LoraSettings
from short_gpt.healing.refit import PatchSettings, RefitSettings
from short_gpt.healing.refit_state import STATE, is_name
from short_gpt.healing.texts import Learning
from short_gpt.healing.trainer import LAST, LOGS, RECIPE
from short_gpt.models.numbering import layer_numbers, span
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import (
    USER_ERRORS,
    NotFiniteError,
    NotSavedError,
    ShortGPTError,
    shortage,
)
from short_gpt.runtime.state import Lock, hold
from short_gpt.wrappers.scored_model import ScoredModel

# All steps by the names that ``heal --method`` knows. A new closed form is a line here.
KINDS: tuple[type[Step], ...] = (RefitSettings, PatchSettings, LoraSettings, DistillSettings)
STEPS = {kind.name: kind for kind in KINDS}
CLOSED = tuple(kind.name for kind in KINDS if not kind.trains)  # closed forms
TRAINING = tuple(kind.name for kind in KINDS if kind.trains)
# of the Trainer, in a step's folder
CHECKPOINT = re.compile(
    r"checkpoint-\d+(/((adapter_model|adapter_config|trainer_state|digests)\.(json|safetensors|bin)"
    r"|README\.md|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin))?"
)


def holds_a_run(short: ScoredModel, folder: Path | None) -> bool:
    """Whether a folder held more than logs when all ranks had arrived here; all must call it."""
    files = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    own = any(LOGS not in path.relative_to(folder or path).parts for path in files)
    return replicas.current(short.decoder.device).gather(own)[0]


def keeps(name: str) -> bool:
    """Whether a step keeps a file, or a folder, by this name relative to that of the healing."""
    step, _, rest = name.partition("/")
    own = rest in ("", IDENTITY, CONTENT, RECIPE) or is_name(rest) or CHECKPOINT.fullmatch(rest)
    return step in (*STEPS, TEACHER) and bool(own)


def check_order(steps: Sequence[Step | type[Step]]) -> None:
    """Raises ShortGPTError unless steps can follow each other."""
    names = [step.name for step in steps]
    chain = ",".join(names)
    if not names or len(set(names)) != len(names):
        raise ShortGPTError(f"expected different methods of healing, got {chain or 'none'}")
    late = [step.name for step in steps[1:] if not step.trains]
    if late:
        raise ShortGPTError(
            f"{chain}: {late[0]} is fitted on the original model, so nothing may heal before it; "
            "put one closed form first, and training after it"
        )


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

    @property
    def how(self) -> Mapping[str, object]:
        return self.steps[-1]

    @property
    def unchanged(self) -> list[str]:
        """Lines on the steps that left all or a part of the model as it was."""
        return [line for step in self.steps for line in unchanged(step)]

    @property
    def worse(self) -> bool:
        return self.change.nats > 0

    def to_dict(self) -> dict[str, object]:
        return {
            "healing": [dict(step) for step in self.steps],
            "perplexity": {name: measured.value for name, measured in self.perplexity.items()},
            "change": asdict(self.change),
            "changes": {name: asdict(change) for name, change in self.changes.items()},
            "worse": self.worse,
        }


def unchanged(step: Mapping[str, Any]) -> list[str]:
    """What a step has left unchanged, in lines with the reasons."""
    if step.get("kept_step") == 0:
        why = "no step lowered the loss on the validation windows"
        return [f"{step['method']} changed nothing: {why}; train longer, or on more text"]
    fits = step.get("fits", [])
    same = [fit for fit in fits if fit["ridge"] is None and fit["norm_ridge"] is None]
    names = ", ".join(f"{fit['part']} of {fit['layer']}" for fit in same)
    why = f"no ridge lowered the held-out error ({names})"
    lines = [f"{len(same)} of {len(fits)} matrices unchanged: {why}"] if same else []
    for own in step.get("unsolved", []):
        lines.append(f"{own['part']} of {span(own['layers'])} not solved: {own['why']}")
    return lines


class HealingJob:
    """Removes layers, heals the pruned model in steps, and measures before and after.

    Replicas (torchrun) share the windows, and a ``work_dir`` that all must see; all call `run` and
    get the same model. The first one saves it.

    Args:
        short: the opened model, changed in place; training needs a `ShortHFModel` (``from_meta``).
        windows: to learn from, validate by and evaluate on.
        layers: to remove first, original numbers; training may also heal without removing any.
        settings: one step or several: one closed form at most, before training.
        work_dir: keeps what an interrupted healing continues from, until the model is saved; None
            keeps nothing.
        resume: whether to continue what is in ``work_dir``; if not, it must hold no earlier run.
        progress: whether to show bars.
        notify: called with every perplexity when it is measured, in words.

    Example:
        >>> short = ShortHFModel("llama-2-7b-hf")  # doctest: +SKIP
        >>> data = HealingTexts("pg19").windows(short.encode, 1024, validate=True)  # doctest: +SKIP
        >>> steps = [PatchSettings(max_windows=64), DistillSettings()]  # doctest: +SKIP
        >>> job = HealingJob(short, data, [21, 22, 25], settings=steps)  # doctest: +SKIP
        >>> print(job.run().change)  # doctest: +SKIP
        >>> job.save("llama-2-6b", facts={"data": "PG-19"})  # doctest: +SKIP
    """

    def __init__(
        self,
        short: ScoredModel,
        windows: Learning,
        layers: Sequence[int] = (),
        *,
        settings: Step | Sequence[Step] | None = None,
        work_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        notify: Callable[[str], object] | None = None,
    ) -> None:
        self.short, self.windows, self.layers = short, windows, layer_numbers(layers)
        chosen = RefitSettings() if settings is None else settings
        self.steps: list[Step] = list(chosen) if isinstance(chosen, Sequence) else [chosen]
        check_order(self.steps)
        self.work_dir = None if work_dir is None else Path(str(work_dir))
        self.resume, self.progress, self.notify = resume, progress, notify
        self.evidence: HealingEvidence | None = None  # of `run`
        self._team = replicas.current(short.decoder.device)
        self._lock: Lock | None = None  # of the folder, from the start of `run` until it is removed

    def plan_text(self) -> str | None:
        """What a refit among the steps takes in memory and on disk, if there is one."""
        for step in self.steps:
            if isinstance(step, RefitSettings) and step.where == "all":
                return step.plan(self.short, self.windows, self.work_dir).describe()
        return None

    def run(self, undos: ExitStack | None = None) -> HealingEvidence:
        """Runs everything except saving; after any error the model is as it was, with all layers.

        With ``undos``, closing that undoes all later, too; it keeps in memory what this needs.

        Raises:
            ShortGPTError: another process heals in ``work_dir``; or as those of the steps.
            NotFiniteError: a weight, a state or a loss is NaN or infinite.
            FileExistsError: ``work_dir`` holds an earlier run, and ``resume`` was not asked for.
        """
        self.short.check_weights()
        parts: dict[str, list[Perplexity]] = {}
        with self._folder() as folder:
            kept = (folder, self.work_dir is not None)
            shared = (self.short, self.windows, self.layers, *kept, self.progress)
            first = self.steps[0]  # the only one that may be a closed form
            most = first.max_windows if isinstance(first, ClosedForm) else 0
            context = HealingContext(*shared, fitted=len(self.windows.training[:most]))
            ready = [step.prepare(context) for step in self.steps]
            if self.layers:
                self._measure(f"original, {len(self.short.kept)} layers", parts)
            done = self._heal(ready, parts, undos)
        pruned, *healed = [*parts.values()][-len(done) - 1 :]
        names, before = [step.name for step in self.steps], [pruned, *healed[:-1]]
        kinds = self.windows.kinds  # of the windows to evaluate on
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
        )
        self.short.evidence["change"] = asdict(self.evidence.change)
        return self.evidence

    def _heal(
        self, ready: Sequence[Heal], parts: dict[str, list[Perplexity]], later: ExitStack | None
    ) -> list[dict[str, object]]:
        """Removes layers, heals and measures; returns how. All is undone after an error."""
        names, count = [step.name for step in self.steps], len(self.short.kept)
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
            ShortGPTError: what was to be written is refused, and will be again.
        """
        if self.evidence is None:
            raise RuntimeError("nothing was healed yet; call run first")
        measured = self.evidence.perplexity
        if self._team.rank:
            return Path(out_dir)
        try:
            how: dict[str, Any] = {"facts": facts, "measured": measured, "overwrite": overwrite}
            how |= {"release": True} if release else {}
            out = self.short.save(out_dir, **how)
        except Exception as error:
            # another name has another folder, which holds nothing to continue from
            short = shortage(error, elsewhere=False)
            if self.work_dir is None or not (short or isinstance(error, USER_ERRORS)):
                raise
            what = f"{out_dir} was not written: {short or error}"
            kept = f"{what}; {self.work_dir} keeps what was healed"
            if short is None and not isinstance(error, OSError):  # of what was to be written
                again = "but the same call is refused again until that is mended"
                raise ShortGPTError(f"{kept}, {again}") from error
            again = "and once there is a way to write, the same call continues"
            raise NotSavedError(f"{kept}, {again}") from error
        if self.work_dir is not None:
            self._clear(self.work_dir)
        return out

    def _clear(self, folder: Path) -> None:
        """Removes what the steps keep; logs and files of others stay, and the folders of these."""
        for own in (folder / TEACHER, *(folder / step.name for step in self.steps)):
            for work in own.glob(".*.writing-*"):  # of a kill
                tidy(own / work.name[1:].rpartition(".writing-")[0])
            # in this order nothing that a kill here leaves blocks a later run: a state before
            # the weights that it names, a recipe after the checkpoints that it belongs to
            first = [*own.rglob(STATE), *own.glob(f"checkpoint-*/{LAST}")]
            first += [*own.glob("checkpoint-*/*"), own / CONTENT]
            for path in [*first, *own.rglob("*")]:
                if path.is_file() and keeps(path.relative_to(folder).as_posix()):
                    path.unlink()
            for place, _, _ in os.walk(own, topdown=False):
                with suppress(OSError):
                    os.rmdir(place)
        with suppress(OSError):
            folder.rmdir()
        self._lock = None

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The folder that steps continue from; a temporary one where nothing is kept."""
        if self.work_dir is None:
            if self.resume:
                raise ShortGPTError("to resume, name the work_dir that holds what was done")
            with tempfile.TemporaryDirectory() as name:
                yield Path(self._team.gather(name)[0])
            return
        folder = self.work_dir
        self._lock = hold(folder)
        try:
            any_there = holds_a_run(self.short, folder)
            if any_there and not self.resume:
                raise FileExistsError(f"{folder} holds an earlier run; resume it, or remove it")
            if self.resume and not any_there:
                raise ShortGPTError(f"{folder} holds nothing to resume; start without resume")
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        except BaseException as error:
            again = any(step.trains for step in self.steps) or self._team.rank > 0
            if isinstance(error, NotFiniteError) and not again:
                self._clear(folder)  # the same call would fail again
            self._lock = None  # else it is needed until the model is saved
            raise
        finally:
            with suppress(OSError):  # a folder with files stays
                folder.rmdir()

    def _measure(self, state: str, parts: dict[str, list[Perplexity]]) -> None:
        parts[state] = self.short.window_perplexities(
            self.windows.evaluation, progress=self.progress
        )
        if self.notify is not None:
            self.notify(f"{state}: perplexity {combined(parts[state]).value:.3f}")
