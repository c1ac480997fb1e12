"""Packages whose names are imported at their first use (PEP 562)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec


def lazy(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of the package of this ``__name__``.

    Its names are those that its ``if TYPE_CHECKING:`` imports; they are read from its source.

    Example:
        >>> __getattr__, __dir__ = lazy("llama")
        >>> __getattr__("ModelArgs").__module__
        'llama.args'
    """
    loader = sys.modules[package].__spec__.loader  # type: ignore[union-attr]
    tree = ast.parse(loader.get_source(package))  # type: ignore[union-attr]
    checked = [n for n in tree.body if isinstance(n, ast.If)]
    (block,) = (n for n in checked if ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {a.asname or a.name: (str(n.module), a.name) for n in imports for a in n.names}

    def __getattr__(name: str) -> object:
        if name in homes:
            module, original = homes[name]
            value = getattr(import_module(module), original)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            value = import_module(f"{package}.{name}")  # as if all had been imported at once
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        vars(sys.modules[package])[name] = value  # cached: Python does not ask again
        return value

    return __getattr__, lambda: sorted(homes)
