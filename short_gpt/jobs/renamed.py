"""Names of settings of the last version, which still work and warn with the new name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from short_gpt.jobs.cases import DEFAULT_METHODS, Cases, LoraSettings
from short_gpt.jobs.choice_settings import Choice
from short_gpt.jobs.inputs import Cut, Running, Tasks
from short_gpt.jobs.saving import Saving
from short_gpt.wrappers.options import OpenOptions


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


# the old name: the new one, and what makes it of the old arguments
OLD = {
    "CaseNames": ("Cases", case_names),
    "FewShotTasks": ("Tasks", Tasks),
    "LoraNames": ("LoraSettings", lora_names),
    "MethodChoice": ("Choice", Choice),
    "Opening": ("OpenOptions", OpenOptions),
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
