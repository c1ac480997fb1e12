"""Import paths of the last version, which still work and warn with the new path."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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
    "short_gpt.evaluation.documents": ("short_gpt.evaluation.tasks",),
    "short_gpt.experiments": ("short_gpt.jobs",),
    "short_gpt.models.computation": ("short_gpt.models.config_file",),
    "short_gpt.models.config_check": ("short_gpt.models.config_file",),
    "short_gpt.models.layer_removal": ("short_gpt.models.decoder",),
    "short_gpt.models.rotary": ("short_gpt.models.layer_config",),
    "short_gpt.models.shape": ("short_gpt.models.config_file",),
    "short_gpt.opening": ("short_gpt.wrappers.opening",),
    "short_gpt.report": ("short_gpt.plots", "short_gpt.cli.tables", "short_gpt.cli"),
    "short_gpt.runtime.results": ("short_gpt.runtime.state",),
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
    "short_gpt.streaming.memory": ("short_gpt.runtime.memory",),
    "short_gpt.surgery": ("short_gpt.models", "short_gpt.wrappers"),
    "short_gpt.wrappers.streamed_weights": ("short_gpt.wrappers.streamed_transformer",),
    "short_gpt.wrappers.sublayers": ("short_gpt.wrappers.short_model",),
}


def renamed(new: Any, old: str) -> Any:
    """A method under its old name, which warns with the new one."""
    if isinstance(new, classmethod):
        return classmethod(renamed(new.__func__, old))

    @wraps(new)
    def with_warning(*arguments: Any, **settings: Any) -> Any:
        warnings.warn(f"{old} is now {new.__name__}", DeprecationWarning, stacklevel=2)
        return new(*arguments, **settings)

    return with_warning


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
