"""Import paths of the last version, which still work and warn with the new path."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# the old path, and the modules that have its names now
MOVED = {
    "short_gpt.cli.results": ("short_gpt.cli.tables",),
    "short_gpt.experiments": ("short_gpt.jobs",),
    "short_gpt.jobs.choice": ("short_gpt.jobs.scores",),
    "short_gpt.jobs.choice_settings": ("short_gpt.jobs.settings", "short_gpt.jobs"),
    "short_gpt.jobs.healing_settings": ("short_gpt.jobs.settings", "short_gpt.jobs"),
    "short_gpt.jobs.scored": ("short_gpt.jobs.scores",),
    "short_gpt.opening": ("short_gpt.wrappers.opening",),
    "short_gpt.report": ("short_gpt.plots", "short_gpt.cli.tables", "short_gpt.cli"),
    "short_gpt.scoring.differences": ("short_gpt.scoring.importance",),
    "short_gpt.scoring.following": ("short_gpt.scoring.run",),
    "short_gpt.scoring.state": ("short_gpt.scoring.run",),
    "short_gpt.scoring.timing": ("short_gpt.scoring.measuring",),
    "short_gpt.selection.found": ("short_gpt.selection.search",),
    "short_gpt.selection.trials": ("short_gpt.selection.search",),
    "short_gpt.short_hf": ("short_gpt.wrappers.short_hf",),
    "short_gpt.short_llama": ("short_gpt.wrappers.short_llama",),
    "short_gpt.short_model": ("short_gpt.wrappers.short_model",),
    "short_gpt.streaming": ("short_gpt.wrappers", "short_gpt.runtime.memory"),
    "short_gpt.surgery": ("short_gpt.models", "short_gpt.wrappers"),
}


class OldPaths(MetaPathFinder, Loader):
    """Imports a module of `MOVED` as one that takes its names from the new modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

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
