"""The reference Llama API on fairscale's model-parallel layers, for CPU, CUDA and Apple MPS."""

from llama.args import ModelArgs
from llama.dialog import Dialog
from llama.generation import Llama
from llama.model import Transformer
from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
