"""Where a model is written, and how: one value that every writer takes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llama.files import StrPath, check_new, check_output, new_directory, new_file
from llama.formats.gguf_read import PART, has_key, part_paths
from llama.sources import Source, find_source, is_gguf
from short_gpt.checkpoints.hub import write_provenance
from short_gpt.checkpoints.provenance import PROVENANCE, RECORD, Provenance
from short_gpt.runtime.errors import check

# By a tensor's name in the source's files, a function that reads the new one when it is written.
Replaced = Mapping[str, Callable[[], Tensor]]
FORMATS = ("meta", "hf", "gguf")
# Whether a file is a GGUF file that this library pruned.
is_pruned_gguf = functools.partial(has_key, key=RECORD)


@dataclass(frozen=True)
class Target:
    """Where a model is written, and how.

    Attributes:
        out: the new directory, or file if its name ends with ``.gguf``; complete or not at all.
        overwrite: whether an earlier pruned model is replaced; nothing else ever is.
        verify: called with the finished directory or file before it takes its place; may raise.
    """

    out: StrPath
    overwrite: bool = False
    verify: Callable[[Path], object] | None = None

    @classmethod
    def of(cls, target: Target | StrPath) -> Target:
        """The target itself, or that of a path."""
        return target if isinstance(target, Target) else cls(target)

    @property
    def path(self) -> Path:
        return Path(str(self.out))

    def check(self, *, source: Path | None = None) -> None:
        """Raises FileExistsError or PermissionError where the model could not be written.

        Also with ``overwrite``, nothing replaces ``source``, or the directory that it lies in.
        """
        if is_gguf(self.out):
            of_gguf = source if source is not None and is_gguf(source) else None
            check_new_gguf(self.out, source=of_gguf, overwrite=self.overwrite)
        else:
            check_new(self.path, marker=PROVENANCE, overwrite=self.overwrite, source=source)

    @contextmanager
    def new_directory(
        self, record: Provenance | None = None, *, card: bool = False, marker: str = PROVENANCE
    ) -> Iterator[Path]:
        """The directory to write weights into; completed, verified and at ``out`` after the block.

        ``card`` adds a model card; ``marker`` is the file in it that lists the others.
        """
        expected = "the name of a directory, which short-gpt convert makes a GGUF file of"
        check(not is_gguf(self.out), "OUT", self.path.name, expected)
        with new_directory(self.path, marker=marker, overwrite=self.overwrite) as partial:
            yield partial
            if record is not None:
                write_provenance(partial, record, card=card)
            self.prove(partial)

    @contextmanager
    def new_file(self) -> Iterator[Path]:
        """The GGUF file to write; verified, and at ``out`` after the block."""
        with new_file(self.path, overwrite=self.overwrite, replaces=is_pruned_gguf) as partial:
            yield partial
            self.prove(partial)

    def prove(self, partial: Path) -> None:
        """Calls ``verify``, if there is one, with what was written."""
        if self.verify is not None:
            self.verify(partial)


def format_of(source: StrPath | Source, out: StrPath) -> str:
    """The format to write a model in: GGUF if ``out`` ends with ``.gguf``, else the source's.

    A model in GGUF is written in Hugging Face's.
    """
    if is_gguf(out):
        return "gguf"
    return "meta" if not is_gguf(source) and find_source(source).kind == "meta" else "hf"


def check_format(out: StrPath, to: str | None) -> None:
    """Raises ShortGPTError unless a format is known, and ``out`` is a name for it."""
    check(to in (None, *FORMATS), "`to`", to, f"one of {', '.join(FORMATS)}")
    name = Path(str(out)).name
    expected = "a name that ends with .gguf" if to == "gguf" else "the name of a directory"
    check(to is None or is_gguf(out) == (to == "gguf"), "OUT", name, f"{expected} for {to}")
    one = "the name of a single file, which llama.cpp's llama-gguf-split divides"
    check(PART.fullmatch(name) is None, "OUT", name, one)


def check_new_gguf(out: StrPath, *, source: StrPath | None = None, overwrite: bool) -> None:
    """Raises where a GGUF model could not be written, or would replace the one it is made from."""
    path = Path(str(out))
    check_format(out, "gguf")
    check_output(path, overwrite=overwrite, replaces=is_pruned_gguf)
    parts = [] if source is None else part_paths(Path(str(source)))
    if path.resolve() in [part.resolve() for part in parts]:
        raise FileExistsError(f"{path} is the source; choose another name")


def stored_names(names: Iterable[str], prefix: str, keep: Sequence[int]) -> dict[str, str]:
    """The stored name of every tensor that stays, by its new name with the layers renumbered.

    Example:
        >>> stored_names(["blk.0.a", "blk.1.a", "output.weight"], "blk", [1])
        {'blk.0.a': 'blk.1.a', 'output.weight': 'output.weight'}
    """
    new_number = {old: new for new, old in enumerate(keep)}
    stored: dict[str, str] = {}
    for name in names:
        match = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if match is None:  # of no layer: embedding, last norm, output head
            stored[name] = name
        elif int(match[1]) in new_number:
            stored[f"{prefix}.{new_number[int(match[1])]}.{match[2]}"] = name
    return stored
