"""A Llama that runs straight from its files, one layer in memory at a time."""

from short_gpt.streaming.batch import Batch
from short_gpt.streaming.decoder import StreamedDecoder, open_stream
from short_gpt.streaming.memory import Plan, bytes_of
from short_gpt.streaming.transformer import StreamedTransformer

__all__ = ["Batch", "Plan", "StreamedDecoder", "StreamedTransformer", "bytes_of", "open_stream"]
