"""Names of settings of the last version, which still work and warn with the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from short_gpt.jobs.cases import Cases, LoraSettings
from short_gpt.jobs.inputs import Cut, Running, Tasks
from short_gpt.jobs.saving import Saving
from short_gpt.jobs.settings import DISTILLING, LIMITS, Answer, Choice, HealingWindows, Settings
from short_gpt.wrappers.options import OpenOptions


def _with(new: Callable[..., object], order: str, **defaults: object) -> Callable[..., object]:
    """A class with the arguments, their order and the defaults that it had."""
    names = order.split()

    def make(*values: object, **options: object) -> object:
        if len(values) > len(names) or (odd := sorted({*options} - {*names})):
            what = f"{len(values)} arguments" if len(values) > len(names) else odd[0]
            raise TypeError(f"expected {', '.join(names)}; got {what}")
        options |= dict(zip(names, values, strict=False))
        named: dict[str, Any] = {**defaults, **options}
        return new(**{NEW_SETTINGS.get(name, name): value for name, value in named.items()})

    return make


NEW_SETTINGS = {"healing": "healings", "lora_size": "size"}
# the old name: the new one, and what makes it of the old arguments
OLD = {
    "CaseNames": (
        "Cases",
        _with(Cases, "methods counts healing seeds lora_only", healing="raw,patched"),
    ),
    "Distilling": ("Settings", _with(Settings, " ".join(DISTILLING))),
    "FewShotTasks": ("Tasks", Tasks),
    "Learned": ("HealingWindows", HealingWindows),
    "LoraNames": ("LoraSettings", _with(LoraSettings, "steps rank learning_rate batch lora_size")),
    "MethodChoice": ("Choice", Choice),
    "Opening": ("OpenOptions", OpenOptions),
    "Paper": ("Answer", _with(Answer, "paper_model confidence rare")),
    "PerplexityLimit": ("Choice", _with(Choice, " ".join(LIMITS))),
    "Scoring": ("Running", Running),
    "Streaming": ("Running", _with(Running, "stream max_memory")),
    "StridedCut": ("Cut", _with(Cut, "size max_windows seed stride", stride=256)),
    "TimedSaving": ("Saving", Saving),
}


def old(name: str) -> object:
    """What an old name of `OLD` stands for."""
    new, made = OLD[name]
    message = f"short_gpt.jobs.{name} is now {new}: import that from short_gpt.jobs"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return made
