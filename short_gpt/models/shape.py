"""The size of a model, by its files alone and before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from llama.checkpoint.meta import Checkpoint
from llama.io.sources import hub_failure, kind_of
from short_gpt.models.config_file import read_config
from short_gpt.models.loading import explained
from short_gpt.runtime.errors import ShortGPTError

SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")  # of a config, and more of them
WIDTHS = ("num_attention_heads", "intermediate_size")
GROUPED = "num_key_value_heads"


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's sizes.

    Attributes:
        dim: width of the hidden states.
        n_layers: layers.
        vocab_size: rows of the embedding.
        n_heads, kv_heads: heads of queries, and of keys and values.
        ffn_dim: width inside the MLP.

    Example:
        >>> Shape(4096, 32, 32000, 32, 32, 11008).parameters
        6738415616
    """

    dim: int
    n_layers: int
    vocab_size: int
    n_heads: int
    kv_heads: int
    ffn_dim: int

    @property
    def parameters(self) -> int:
        """Numbers of all weights, embedding and output head apart."""
        grouped = self.dim // self.n_heads * self.kv_heads  # width of all keys, and of all values
        attention = 2 * self.dim * (self.dim + grouped)  # q and o, k and v
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim  # MLP, two norms
        return self.n_layers * layer + 2 * self.vocab_size * self.dim + self.dim


def shape_of(source: str, *, trust_remote_code: bool = False) -> Shape:
    """The shape of a Meta or Hugging Face directory, or of a model on the hub by its config alone.

    Args:
        source: the checkpoint; GGUF files are refused.
        trust_remote_code: whether the Python files of a Hugging Face model may run to tell it.

    Raises:
        OSError, ShortGPTError: no such model, a damaged one, or one whose config says no shape.
    """
    kind = kind_of(source)
    if kind == "gguf":
        raise ShortGPTError(
            f"{source} is a GGUF file; expected a model in Meta's or Hugging Face's format"
        )
    if kind == "meta":
        args = Checkpoint(source).args
        sizes = (args.dim, args.n_layers, args.vocab_size, args.n_heads, args.kv_heads)
        return Shape(*sizes, args.ffn_dim)
    try:
        config = read_config(source, {"trust_remote_code": trust_remote_code})
        text = config.get_text_config(decoder=True)
    except Exception as error:
        if kind == "hub" and (failure := hub_failure(source, error)) is not None:
            raise failure from None
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    said = {name: getattr(text, name, None) for name in (*SIZES, *WIDTHS)}
    if missing := [name for name, value in said.items() if value is None]:
        raise ShortGPTError(
            f"{source} is a {text.model_type}, whose config does not say {', '.join(missing)}; "
            "expected a Llama"
        )
    dim, layers, words, heads, wide = (int(value) for value in said.values() if value is not None)
    grouped = int(getattr(text, GROUPED, None) or heads)
    return Shape(dim, layers, words, heads, grouped, wide)
