"""The proof that a written checkpoint is its source, before it takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.io.sources import Source, find_source
from llama.ranks import several_ranks
from short_gpt.runtime.errors import MissingPackageError
from short_gpt.wrappers.opening import same_model
from short_gpt.wrappers.options import OpenOptions

TWICE = "not verified: that loads the model on one rank; run it without torchrun"


@dataclass
class Proof:
    """Compares a finished directory with its source, where asked for; called with the directory.

    Attributes:
        source: the model that was read.
        out: the name that the directory will have.
        opening: of both models.
        wanted: whether to compare them; None does where Hugging Face's format or GGUF is read or
            written, and the packages that read it are there.
        drop: the layers that the directory lacks.
        dtype: that the source's weights were rounded to; None if they were not.
        said: what was proved, in a sentence, or why nothing was; None if no proof was asked for.
    """

    source: Source
    out: str
    opening: OpenOptions
    wanted: bool | None
    drop: Sequence[int] = ()
    dtype: str | None = None
    said: str | None = None

    def __call__(self, directory: Path) -> None:
        written = find_source(directory)
        # a GGUF file was read again by its writer, tensor by tensor
        proved = written.kind == "gguf" or self.source.kind == written.kind == "meta"
        if not (self.wanted or (self.wanted is None and not proved)):
            return
        if several_ranks():
            self.said = TWICE
            return
        try:
            self.said = self._compared(written)
        except MissingPackageError as error:
            if self.wanted:
                raise
            self.said = f"not verified: {error}"

    def _compared(self, written: Source) -> str:
        return same_model(
            self.source,
            written,
            list(self.drop),
            tokenizer_path=self.opening.tokenizer_path,
            trust_remote_code=self.opening.trust_remote_code,
            name=self.out,
            dtype=self.dtype,
        )
