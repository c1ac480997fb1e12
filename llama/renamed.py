"""Names of the last version, which still work and warn with the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
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
    """A decorator: a keyword argument works by its old name; of a dataclass the field, too."""

    def warn(owner: Callable[..., Any]) -> None:
        message = f"{old} of {owner.__name__} is now {new}"
        warnings.warn(message, DeprecationWarning, stacklevel=3)

    def decorate(owner: F) -> F:
        called = owner.__init__ if isinstance(owner, type) else owner  # type: ignore[misc]

        @wraps(called)
        def call(*args: object, **kwargs: object) -> object:
            if old in kwargs:
                if new in kwargs and not is_dataclass(owner):  # `replace` passes every field
                    raise TypeError(f"{owner.__name__} takes {new}, formerly {old}; got both")
                warn(owner)
                kwargs[new] = kwargs.pop(old)
            return called(*args, **kwargs)

        if not isinstance(owner, type):
            return cast("F", call)

        def read(self: object) -> object:
            warn(owner)
            return getattr(self, new)

        def write(self: object, value: object) -> None:
            warn(owner)
            setattr(self, new, value)

        owner.__init__ = call  # type: ignore[misc]
        if is_dataclass(owner):
            setattr(owner, old, property(read, write))
        return owner

    return decorate


class OldPaths(MetaPathFinder, Loader):
    """Imports a module that has moved as one that takes its names from the new modules.

    Args:
        moved: the new modules by the old path.
    """

    def __init__(self, moved: Mapping[str, Sequence[str]]) -> None:
        self.moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # as a package, of which modules may have moved
        return ModuleSpec(fullname, self, is_package=True) if fullname in self.moved else None

    def exec_module(self, module: ModuleType) -> None:
        new = self.moved[module.__name__]
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


def install(moved: Mapping[str, Sequence[str]]) -> None:
    """Makes the old paths of a table importable."""
    sys.meta_path.insert(0, OldPaths(moved))  # first: an old folder may be left beside the new ones
