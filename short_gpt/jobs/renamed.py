"""Names of settings of the last version, which still work and warn with the new name."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from short_gpt.jobs.cases import DEFAULT_METHODS, Cases, LoraSettings
from short_gpt.jobs.inputs import Cut, Running, Tasks
from short_gpt.jobs.saving import Saving
from short_gpt.jobs.settings import DISTILLING, LIMITS, Answer, Choice, HealingWindows, Settings
from short_gpt.wrappers.options import OpenOptions

P = ParamSpec("P")
T = TypeVar("T")


def strided_cut(
    size: int = 1024,
    max_windows: int | None = None,
    seed: int | None = 0,
    stride: int = 256,
    *,
    bos: str | None = None,
) -> Cut:
    """A `Cut` whose windows overlap unless told otherwise."""
    return Cut(size, max_windows, seed, stride, bos)


def streaming(stream: bool = False, max_memory: str | None = None) -> Running:
    """A `Running` without a number of windows."""
    return Running(stream=stream, max_memory=max_memory)


def case_names(
    methods: str | Sequence[str] = DEFAULT_METHODS,
    counts: object = Cases.counts,
    healing: str = "raw,patched",
    seeds: int = 3,
    lora_only: str | None = None,
) -> Cases:
    """`Cases` in the order of arguments that a command line had."""
    return Cases(methods, counts, healing, seeds, lora_only=lora_only)


def lora_names(
    steps: int | None = None,
    rank: int | None = None,
    learning_rate: float | None = None,
    batch: int | None = None,
    lora_size: int | None = None,
) -> LoraSettings:
    """`LoraSettings`, whose size had another name."""
    return LoraSettings(steps, rank, learning_rate, batch, lora_size)


def _of(kind: Callable[..., T], names: Sequence[str]) -> Callable[..., T]:
    """What makes settings of some of their fields, which may be given in this order."""
    return lambda *values, **named: kind(**dict(zip(names, values, strict=False)), **named)


def takes_old(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Lets a function take settings by the names that its arguments had, as parts of the new."""

    def wrap(run: Callable[P, T]) -> Callable[P, T]:
        @wraps(run)
        def either(*args: Any, **named: Any) -> T:
            given = {names[old]: (old, named.pop(old)) for old in names if old in named}
            arguments = inspect.signature(run).bind_partial(*args, **named).arguments
            for new, (old, part) in given.items():
                message = f"{run.__name__}: {old} is now {new}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                if part is not None:
                    default = type(part)()
                    changes = {k: v for k, v in vars(part).items() if v != getattr(default, k)}
                    arguments[new] = replace(arguments.get(new) or default, **changes)
            return run(**arguments)  # type: ignore[call-arg]

        return either

    return wrap


# the old name: the new one, and what makes it of the old arguments
OLD = {
    "CaseNames": ("Cases", case_names),
    "Distilling": ("Settings", _of(Settings, DISTILLING)),
    "FewShotTasks": ("Tasks", Tasks),
    "Learned": ("HealingWindows", HealingWindows),
    "LoraNames": ("LoraSettings", lora_names),
    "MethodChoice": ("Choice", Choice),
    "Opening": ("OpenOptions", OpenOptions),
    "Paper": ("Answer", _of(Answer, ("paper_model", "confidence", "rare"))),
    "PerplexityLimit": ("Choice", _of(Choice, LIMITS)),
    "Scoring": ("Running", Running),
    "Streaming": ("Running", streaming),
    "StridedCut": ("Cut", strided_cut),
    "TimedSaving": ("Saving", Saving),
}


def old(name: str) -> object:
    """What an old name of `OLD` stands for."""
    new, made = OLD[name]
    message = f"short_gpt.jobs.{name} is now {new}: import that from short_gpt.jobs"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return made
