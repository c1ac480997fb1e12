"""What commands share: the files they write, and what they print."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TextIO, get_type_hints

from llama.files import check_output, new_file
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import is_first_rank, is_quiet, print_above_bars
from short_gpt.runtime.settings import WRITE, Settings, as_flags, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STDOUT = "-"  # in place of a file
_alone: list[TextIO] = []  # the stdout that a result has for itself


@dataclass(frozen=True)
class Output(Settings):
    """The result as a file, and as pictures."""

    HEADING: ClassVar = WRITE
    json: str | None = setting(
        None,
        "JSON file for the result, with all arguments, versions and the seed; - is stdout, where "
        "nothing else is printed then.",
        value="FILE",
    )
    overwrite: bool = setting(False, "Replace what an earlier run has written.", rare=True)
    plots: str | None = setting(None, "Folder for the pictures.", value="FOLDER")

    def parameters(self) -> list[inspect.Parameter]:
        """The flags, as parameters of a job."""
        types, kind = get_type_hints(type(self)), inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter(
                one.name, kind, default=getattr(self, one.name), annotation=types[one.name]
            )
            for one in self.taken()
        ]


class Run(NamedTuple):
    """One run of a command: its arguments by flag, defaults included, and the files it writes."""

    command: str
    values: Mapping[str, Any]
    pictures: Sequence[Path] = ()

    @property
    def file(self) -> Path | None:
        """The file of the result; None where it has none."""
        json = self.values.get("json")
        return None if json in (None, STDOUT) else Path(json)

    @property
    def state(self) -> str | None:
        """The file that a long run is saved in, next to the result's."""
        return None if self.file is None else f"{self.file}.state"

    @property
    def targets(self) -> list[Path]:
        return [*([] if self.file is None else [self.file]), *self.pictures]

    @property
    def overwrite(self) -> bool:
        return bool(self.values.get("overwrite"))

    @property
    def record(self) -> dict[str, Any]:
        """What a result is kept with: the command, its arguments by flag, and the seed."""
        kept = str | int | float | tuple | list | None
        arguments = {name: v for name, v in self.values.items() if isinstance(v, kept)}
        seed = {"seed": arguments["seed"]} if "seed" in arguments else {}
        return {"command": self.command, "arguments": arguments, **seed}

    def check(self) -> None:
        """Raises what would keep a file from being written, before the work."""
        if self.pictures:
            from short_gpt.plots import is_picture

            for picture in self.pictures:
                check_output(picture, overwrite=self.overwrite, replaces=is_picture)
        if self.file is not None:
            from short_gpt.runtime.state import is_record

            check_output(self.file, overwrite=self.overwrite, replaces=is_record)
        out = self.values.get("out")
        for target in self.targets:
            if out is not None and Path(out).resolve() in (
                target.resolve(),
                *target.resolve().parents,
            ):
                raise ShortGPTError(
                    f"{target} lies in OUT, which holds the model alone; name a file beside it"
                )

    def write(self, content: Mapping[str, object]) -> None:
        """Writes the result with its record; of several ranks, only the first does."""
        from short_gpt.runtime.state import is_record, record_text

        if self.values.get("json") is None or not is_first_rank():
            return
        text = record_text({**self.record, **content})
        if self.file is None:
            print(text, end="", flush=True, file=_alone[-1] if _alone else None)
            return
        with new_file(self.file, overwrite=self.overwrite, replaces=is_record) as partial:
            partial.write_text(text, encoding="utf-8")

    def finish(
        self, content: Mapping[str, object], draw: Callable[[], Sequence[Figure]] | None = None
    ) -> None:
        """Writes the result, and its pictures if they were asked for, and names all files."""
        self.write(content)
        if draw is not None and self.pictures and is_first_rank():
            from short_gpt.plots import save

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
        print_above_bars(as_flags(text))


def print_done(what: str, *targets: Path | str | None) -> None:
    """Notes what was done with each target; None is skipped."""
    for target in filter(None, targets):
        print_note(f"{what}: {target}")
