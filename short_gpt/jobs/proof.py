"""A written checkpoint beside its source, before it takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.io.sources import is_gguf, is_meta
from llama.ranks import several_ranks
from short_gpt.runtime.errors import MissingPackageError
from short_gpt.wrappers.opening import same_model
from short_gpt.wrappers.options import OpenOptions

TWICE = "not verified: that loads the model on one rank; run it without torchrun"


@dataclass
class Proof:
    """Compares a finished directory with its source, if that is to be; called with the directory.

    Attributes:
        source: the model that was read.
        out: what the directory will be called.
        opening: of both models.
        wanted: whether to compare them; None does where Hugging Face's format or GGUF is read or
            written, and the packages that read it are there.
        drop: the layers that the directory lacks.
        dtype: that the source's weights were rounded to; None if they were not.
        said: what was proved, in a sentence, or why nothing was; None if nothing was to be.
    """

    source: str
    out: str
    opening: OpenOptions
    wanted: bool | None
    drop: Sequence[int] = ()
    dtype: str | None = None
    said: str | None = None

    def __call__(self, directory: Path) -> None:
        # a GGUF file was read again by who wrote it, tensor by tensor
        only_meta = is_gguf(directory) or (is_meta(self.source) and is_meta(str(directory)))
        if not (self.wanted or (self.wanted is None and not only_meta)):
            return
        if several_ranks():
            self.said = TWICE
            return
        try:
            self.said = self._compared(str(directory))
        except MissingPackageError as error:
            if self.wanted:
                raise
            self.said = f"not verified: {error}"

    def _compared(self, directory: str) -> str:
        return same_model(
            self.source,
            directory,
            list(self.drop),
            tokenizer_path=self.opening.tokenizer_path,
            trust_remote_code=self.opening.trust_remote_code,
            name=self.out,
            dtype=self.dtype,
        )
