"""Names of settings of the last version, which still work and warn with the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from short_gpt.jobs.cases import Cases, LoraSettings
from short_gpt.jobs.choice_settings import Choice
from short_gpt.jobs.inputs import Cut, Running, Tasks
from short_gpt.jobs.saving import Saving
from short_gpt.wrappers.options import OpenOptions


def _with(new: Callable[..., object], order: str, **defaults: object) -> Callable[..., object]:
    """A class with the order of arguments and the defaults that it had."""

    def make(*values: object, **options: object) -> object:
        options |= dict(zip(order.split(), values, strict=False))
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
    "FewShotTasks": ("Tasks", Tasks),
    "LoraNames": (
        "LoraSettings",
        _with(LoraSettings, "steps rank learning_rate batch lora_size"),
    ),
    "MethodChoice": ("Choice", Choice),
    "Opening": ("OpenOptions", OpenOptions),
    "Scoring": ("Running", Running),
    "Streaming": ("Running", _with(Running, "stream max_memory")),
    "StridedCut": ("Cut", _with(Cut, "size max_windows seed stride", stride=256)),
    "TimedSaving": ("Saving", Saving),
}


def old(name: str) -> object:
    """What an old name of `OLD` stands for."""
    new, make = OLD[name]
    message = f"short_gpt.jobs.{name} is now {new}: import that from short_gpt.jobs"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return make
