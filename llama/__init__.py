"""The reference Llama API on fairscale's model-parallel layers, for CPU, CUDA and Apple MPS.

>>> from llama import Llama
>>> llama = Llama.build("llama-2-7b", "tokenizer.model", 2048, 4)  # doctest: +SKIP
>>> llama.text_completion(["I am an avid fan of "])  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from llama.lazy import lazy

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
