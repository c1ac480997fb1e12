"""What commands share: the files they write, and what they print."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from llama.files import check_output, new_file
from short_gpt.cli.flags import Command, flags_of
from short_gpt.jobs.settings import SCORES
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import is_first_rank, is_quiet, print_above_bars
from short_gpt.runtime.settings import RUN, WRITE, Needs, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE_FLAGS, DRAWING = ("json", "plots"), ("rank", "compare", "reproduce")
LONG = ("rank", "heal", "compare", "evaluate", "reproduce")
STDOUT = "-"  # in place of a file
_alone: list[TextIO] = []  # the stdout that a result has for itself
WRITTEN = Needs(  # of heal, the model
    "a file to write, such as --json FILE",
    lambda v: "out" in v or any(v.get(n) is not None for n in FILE_FLAGS),
)


@dataclass(frozen=True)
class Output:
    """The result as a file, and as pictures.

    Args:
        json: JSON file for the result, with all arguments, versions and the seed; - is stdout,
            where nothing else is printed then.
        overwrite: replace what an earlier run has written.
        plots: folder for the pictures.
        picture_names: of the files in plots.
        dry_run: check everything and open the model, say what would be done and how long a window
            takes, and end with nothing written.
    """

    HEADING: ClassVar = WRITE
    json: str | None = setting(None, value="FILE")
    overwrite: bool = setting(False, needs=WRITTEN)
    plots: str | None = setting(None, value="FOLDER", commands=DRAWING, needs=SCORES)
    picture_names: tuple[str, ...] = setting((), commands=())
    dry_run: bool = setting(False, heading=RUN, commands=LONG)

    @property
    def pictures(self) -> list[Path]:
        names = self.picture_names if self.plots is not None else ()
        return [Path(str(self.plots)) / name for name in names]

    @property
    def targets(self) -> list[Path]:
        return [*([] if self.file is None else [self.file]), *self.pictures]

    @property
    def file(self) -> Path | None:
        """The file of the result; None where it has none."""
        return None if self.json in (None, STDOUT) else Path(str(self.json))

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises what would keep a file from being written, before the work."""
        if self.plots is not None:
            from short_gpt.plots.figures import is_picture, require_matplotlib

            require_matplotlib()
            for picture in self.pictures:
                check_output(picture, overwrite=self.overwrite, replaces=is_picture)
        if self.file is not None:
            from short_gpt.runtime.state import is_record

            check_output(self.file, overwrite=self.overwrite, replaces=is_record)
        out = arguments.get("out")
        named = {k: v for k, v in arguments.items() if k not in FILE_FLAGS}
        places = [target.resolve() for target in self.targets]
        for target in self.targets:
            if places.count(target.resolve()) > 1:
                raise ShortGPTError(f"{target} is named for two results; name another file for one")
            for name in ("state", "out"):
                value = arguments.get(name)
                if value is not None and Path(value).resolve() == target.resolve():
                    raise ShortGPTError(f"{target} is {name.upper()} too; name another file")
            if files := [parent for parent in target.parents if parent in self.targets]:
                raise ShortGPTError(f"{target} cannot be written into the file {files[0]}")
            if out is not None and Path(out).resolve() in target.resolve().parents:
                raise ShortGPTError(
                    f"{target} lies in {out}, which holds the model alone: else it could not be "
                    "replaced later; name a file beside it"
                )
            for name, value in named.items() if target.is_file() else ():
                if isinstance(value, str) and os.path.realpath(value) == os.path.realpath(target):
                    raise ShortGPTError(
                        f"{target} is what --{name} reads, so it is not written over; choose "
                        "another name"
                    )

    def checked(
        self, command: Command, values: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`record_of` a command, checked as by `check`; and what its job takes of the ``values``.

        These are the command's arguments by their names, which are the job's too.
        """
        record = record_of(command, values)
        self.check(record["arguments"])
        given = {name: value for name, value in values.items() if name not in ("output", "table")}
        if "saving" in given:
            given["saving"] = given["saving"].beside(self.json)
        return record, given | ({"dry_run": self.dry_run} if command.__name__ in LONG else {})

    def write(self, record: Mapping[str, object]) -> None:
        """Writes the result, if it has a name; of several ranks, only the first does."""
        from short_gpt.runtime.state import is_record, record_text

        if self.json is None or not is_first_rank():
            return
        text = record_text(record)
        if self.json == STDOUT:
            print(text, end="", flush=True, file=_alone[-1] if _alone else None)
            return
        file = Path(self.json)
        with new_file(file, overwrite=self.overwrite, replaces=is_record) as partial:
            partial.write_text(text, encoding="utf-8")

    def finish(
        self, record: Mapping[str, object], draw: Callable[[], Sequence[Figure]] | None = None
    ) -> None:
        """Writes the result, and its pictures if they were asked for, and names all files."""
        self.write(record)
        if draw is not None and self.plots is not None and is_first_rank():
            from short_gpt.plots.figures import save

            for figure, path in zip(draw(), self.pictures, strict=True):
                save(figure, path)
        print_done("written", *self.targets)


@contextmanager
def result_alone() -> Iterator[None]:
    """Keeps stdout for a result inside the block: all that is printed goes to stderr."""
    _alone.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _alone.pop()


def record_of(command: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a result is kept with: the command, its arguments (its locals) by flag, and the seed."""
    arguments: dict[str, object] = {}
    for name, flag in flags_of(command).items():
        value = values[flag.parameter]
        value = getattr(value, flag.field) if flag.field else value
        if isinstance(value, tuple) and all(isinstance(part, str) for part in value):
            value = ",".join(value)
        if isinstance(value, str | int | float | tuple | list | None):
            arguments[name] = value
    seed = {"seed": arguments["seed"]} if "seed" in arguments else {}
    return {"command": command.__name__, "arguments": arguments, **seed}


def print_result(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if is_first_rank():
        print(text, flush=True)


def print_note(text: str) -> None:
    """Prints what a quiet run leaves out."""
    if not is_quiet():
        print_result(text)


def print_progress(text: str) -> None:
    """Prints to stderr what a user must know of a long run, above its bars; of ranks the first."""
    if is_first_rank():
        print_above_bars(text)


def print_done(what: str, *targets: Path | str | None) -> None:
    """Notes what was done with each target; None is skipped."""
    for target in filter(None, targets):
        print_note(f"{what}: {target}")
