"""Names of the last version, which still work and warn with the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

# the old path, and the modules that have its names now
MOVED = {
    "llama.checkpoint.reshard": ("llama.checkpoint.meta",),
    "llama.dialog": ("llama.tokenizer",),
    "llama.formats.gguf_from": ("llama.formats.gguf",),
    "llama.formats.gguf_header": ("llama.formats.gguf_read",),
    "llama.formats.gguf_parts": ("llama.formats.gguf_read",),
    "llama.formats.sentencepiece_model": ("llama.formats.tokenizers",),
    "llama.io.outputs": ("llama.io.files",),
    "llama.io.swap": ("llama.io.files",),
    "llama.loading": ("llama.generation",),
    "llama.rope": ("llama.model",),
    "llama.sampling": ("llama.generation",),
    "short_gpt.cli.results": ("short_gpt.cli.tables",),
    "short_gpt.evaluation.documents": ("short_gpt.evaluation.tasks",),
    "short_gpt.experiments": ("short_gpt.jobs",),
    "short_gpt.healing.moments": ("short_gpt.healing.solver",),
    "short_gpt.healing.refit_memory": ("short_gpt.healing.refit_state",),
    "short_gpt.healing.steps": ("short_gpt.healing.job", "short_gpt.healing.lora"),
    "short_gpt.healing.teacher": ("short_gpt.healing.distillation",),
    "short_gpt.jobs.calibrating": ("short_gpt.jobs.calibration",),
    "short_gpt.jobs.cells": ("short_gpt.jobs.comparing",),
    "short_gpt.jobs.choice": ("short_gpt.jobs.scores",),
    "short_gpt.jobs.choice_settings": ("short_gpt.jobs.settings", "short_gpt.jobs"),
    "short_gpt.jobs.healing_settings": ("short_gpt.jobs.settings", "short_gpt.jobs"),
    "short_gpt.jobs.published": ("short_gpt.jobs.reproduction",),
    "short_gpt.jobs.rows": ("short_gpt.jobs.cases",),
    "short_gpt.jobs.scored": ("short_gpt.jobs.scores",),
    "short_gpt.models.computation": ("short_gpt.models.config_file",),
    "short_gpt.models.config_check": ("short_gpt.models.config_file",),
    "short_gpt.models.layer_removal": ("short_gpt.models.decoder",),
    "short_gpt.models.rotary": ("short_gpt.models.layer_config",),
    "short_gpt.models.shape": ("short_gpt.models.config_file",),
    "short_gpt.opening": ("short_gpt.wrappers.opening",),
    "short_gpt.report": ("short_gpt.plots", "short_gpt.cli.tables", "short_gpt.cli"),
    "short_gpt.runtime.results": ("short_gpt.runtime.state",),
    "short_gpt.scoring.clusters": ("short_gpt.scoring.moments", "short_gpt.scoring.lists"),
    "short_gpt.scoring.differences": ("short_gpt.scoring.importance",),
    "short_gpt.scoring.following": ("short_gpt.scoring.run",),
    "short_gpt.scoring.halves": ("short_gpt.scoring.hooks",),
    "short_gpt.scoring.measuring": ("short_gpt.scoring.run",),
    "short_gpt.scoring.state": ("short_gpt.scoring.run",),
    "short_gpt.scoring.timing": ("short_gpt.scoring.run",),
    "short_gpt.selection.found": ("short_gpt.selection.search",),
    "short_gpt.selection.trials": ("short_gpt.selection.search",),
    "short_gpt.short_hf": ("short_gpt.wrappers.short_hf",),
    "short_gpt.short_llama": ("short_gpt.wrappers.short_llama",),
    "short_gpt.short_model": ("short_gpt.wrappers.short_model",),
    "short_gpt.streaming": ("short_gpt.wrappers", "short_gpt.runtime.memory"),
    "short_gpt.streaming.memory": ("short_gpt.runtime.memory",),
    "short_gpt.surgery": ("short_gpt.models", "short_gpt.wrappers"),
    "short_gpt.wrappers.streamed_weights": ("short_gpt.wrappers.streamed_transformer",),
    "short_gpt.wrappers.sublayers": ("short_gpt.wrappers.short_model",),
}


def renamed_function(old: str, new: F) -> F:
    """A function or method by its old name."""
    if isinstance(new, classmethod):
        return cast("F", classmethod(renamed_function(old, new.__func__)))

    @wraps(new)
    def call(*args: object, **kwargs: object) -> object:
        warnings.warn(f"{old} is now {new.__name__}", DeprecationWarning, stacklevel=2)
        return new(*args, **kwargs)

    return cast("F", call)


def renamed_argument(old: str, new: str) -> Callable[[F], F]:
    """A decorator: a keyword argument works by its old name; of a class the attribute, too."""

    def warn(owner: Callable[..., Any]) -> None:
        message = f"{old} of {owner.__name__} is now {new}"
        warnings.warn(message, DeprecationWarning, stacklevel=3)

    def decorate(owner: F) -> F:
        called = owner.__init__ if isinstance(owner, type) else owner  # type: ignore[misc]

        @wraps(called)
        def call(*args: object, **kwargs: object) -> object:
            if old in kwargs:
                warn(owner)
                kwargs[new] = kwargs.pop(old)
            return called(*args, **kwargs)

        if not isinstance(owner, type):
            return cast("F", call)

        def attribute(self: object) -> object:
            warn(owner)
            return getattr(self, new)

        owner.__init__ = call  # type: ignore[misc]
        setattr(owner, old, property(attribute))
        return owner

    return decorate


class OldPaths(MetaPathFinder, Loader):
    """Imports a module of `MOVED` as one that takes its names from the new modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # as a package, of which modules may have moved
        return ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        message = f"{module.__name__} has moved: import from {' or '.join(new)}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)

        def from_new(name: str) -> object:
            for source in map(import_module, new):
                if hasattr(source, name):
                    return getattr(source, name)
            for source_name in new:
                with suppress(ImportError):  # a module that nothing has imported so far
                    return import_module(f"{source_name}.{name}")
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = from_new


def install() -> None:
    """Makes the old paths importable."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, OldPaths())  # first: an old folder may be left beside the new ones
