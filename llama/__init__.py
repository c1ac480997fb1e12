"""The reference Llama API on fairscale's model-parallel layers, for CPU, CUDA and Apple MPS.

>>> from llama import Llama
>>> llama = Llama.build("llama-2-7b", "tokenizer.model", 2048, 4)  # doctest: +SKIP
>>> llama.text_completion(["I am an avid fan of "])  # doctest: +SKIP
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING


def lazy(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The ``__getattr__`` and the ``__dir__`` of a package that imports names at their first use.

    See PEP 562. They are those that its ``if TYPE_CHECKING:`` imports, read from its source.

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


if TYPE_CHECKING:
    from llama.args import ModelArgs
    from llama.errors import InputError, MissingPackageError
    from llama.generation import Llama, load_model
    from llama.model import Transformer
    from llama.tokenizer import Dialog, Tokenizer
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Dialog", "InputError", "Llama", "MissingPackageError", "ModelArgs", "Tokenizer"]
__all__ += ["Transformer", "load_model"]
