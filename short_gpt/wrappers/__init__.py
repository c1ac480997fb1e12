"""A model with its scores; `open_model` opens any source as one."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.wrappers.opening import open_model
    from short_gpt.wrappers.options import OpenOptions
    from short_gpt.wrappers.own_text import own_samples, own_text_writer
    from short_gpt.wrappers.scored_model import ScoredModel
    from short_gpt.wrappers.short_hf import ShortHFModel
    from short_gpt.wrappers.short_llama import ShortLlama
    from short_gpt.wrappers.short_model import ShortModel
    from short_gpt.wrappers.streamed_llama import StreamedLlama, open_stream
    from short_gpt.wrappers.streamed_transformer import Batch, StreamedTransformer
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["Batch", "OpenOptions", "ScoredModel", "ShortHFModel", "ShortLlama", "ShortModel"]
__all__ += ["StreamedLlama", "StreamedTransformer", "open_model", "open_stream"]
__all__ += ["own_samples", "own_text_writer"]
