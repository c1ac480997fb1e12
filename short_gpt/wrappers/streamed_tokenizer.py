"""The tokenizers of models that are streamed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from llama.tokenizer import Tokenizer
from short_gpt.models.loading import load_tokenizer
from short_gpt.models.pretrained import PretrainedTokenizer
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError
from short_gpt.wrappers.streamed_transformer import StreamedTransformer
from short_gpt.wrappers.streamed_weights import HFSource


def hf_tokenizer(directory: Path, *, trust_remote_code: bool) -> PretrainedTokenizer:
    """The tokenizer of a Hugging Face directory, by transformers."""
    try:
        found = load_tokenizer(str(directory), {"trust_remote_code": trust_remote_code})
    except ModuleNotFoundError:
        raise MissingPackageError(
            'Hugging Face directories need: pip install "short-gpt[hf]"; or pass tokenizer_path'
        ) from None
    except ShortGPTError as error:
        raise ShortGPTError(f"{directory} cannot be loaded: {error}") from error
    return cast(PretrainedTokenizer, found)


def meta_tokenizer(path: Path, stream: StreamedTransformer) -> Tokenizer:
    """The tokenizer, if it has as many words as the model."""
    tokenizer, most = Tokenizer(path), stream.vocab_size
    padded = isinstance(stream.source, HFSource)  # the embedding may have rows to spare
    if tokenizer.n_words > most or (tokenizer.n_words < most and not padded):
        raise ShortGPTError(
            f"the tokenizer {path} has {tokenizer.n_words} words, the checkpoint "
            f"{stream.source.directory} {most}; they do not belong together"
        )
    return tokenizer
