"""What commands share: the files they write, and what they print."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llama.io.files import check_output
from short_gpt.cli.flags import Command, flags_of
from short_gpt.jobs.choice_settings import SCORES
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import above_bars, first_rank
from short_gpt.runtime.settings import WRITE, Needs, Values, setting


def _written(values: Values) -> bool:
    """Whether there is anything to overwrite; of heal, the model."""
    return "out" in values or any(values.get(name) is not None for name in ("json", "plots"))


WRITTEN = Needs("--json or --plots", _written)


@dataclass(frozen=True)
class Output:
    """The result as a file.

    Args:
        json: JSON file for the result, with all arguments, versions and the seed.
        overwrite: replace what an earlier run has written.
    """

    HEADING: ClassVar = WRITE

    json: str | None = setting(None, value="FILE")
    overwrite: bool = setting(False, needs=WRITTEN)

    @property
    def pictures(self) -> list[Path]:
        """The pictures that the command will draw."""
        return []

    @property
    def targets(self) -> list[Path]:
        """The files that the command will write."""
        return [*([] if self.json is None else [Path(self.json)]), *self.pictures]

    def check(self, arguments: Mapping[str, object] | None = None) -> None:
        """Raises what would keep a file from being written, before the work.

        Args:
            arguments: the command's; what they name is read and not written over.
        """
        from short_gpt.runtime.state import is_record

        arguments = arguments or {}
        if self.json is not None:
            check_output(Path(self.json), overwrite=self.overwrite, ours=is_record)
        out = arguments.get("out")
        for target in self.targets:
            if files := [parent for parent in target.parents if parent in self.targets]:
                raise ShortGPTError(f"{target} cannot be written into the file {files[0]}")
            if out is not None and Path(str(out)).resolve() in target.resolve().parents:
                raise ShortGPTError(
                    f"{target} lies in {out}, which holds the model alone: else it could not be "
                    "replaced later; name a file beside it"
                )
            for name, value in arguments.items():
                named = isinstance(value, str) and name not in ("json", "plots")
                if named and target.is_file() and _real(value) == _real(target):
                    raise ShortGPTError(
                        f"{target} is what --{name} reads, so it is not written over; choose "
                        "another name"
                    )

    def write(
        self, command: str, arguments: Mapping[str, object], content: Mapping[str, object]
    ) -> None:
        """Writes the result, if it has a name; of several ranks, only the first does."""
        from short_gpt.runtime.state import write_record

        if self.json is None or not first_rank():
            return
        record: dict[str, object] = {"command": command, "arguments": arguments}
        record |= {"seed": arguments["seed"]} if "seed" in arguments else {}
        write_record(self.json, {**record, **content}, overwrite=self.overwrite)

    def say_written(self) -> None:
        """Names the files that were written."""
        say_written(self.targets)


@dataclass(frozen=True)
class Pictures(Output):
    """The result as a file, and as pictures.

    Args:
        plots: folder for the pictures.
        kinds: of `plots.pictures.FILES`.
    """

    plots: str | None = setting(None, value="FOLDER", needs=SCORES)
    kinds: tuple[str, ...] = setting(("scores",), commands=())

    @property
    def folder(self) -> Path | None:
        """Where this process draws; None if it does not."""
        return Path(self.plots) if self.plots is not None and first_rank() else None

    @property
    def pictures(self) -> list[Path]:
        if self.plots is None:
            return []
        from short_gpt.plots.pictures import FILES

        return [Path(self.plots) / name for kind in self.kinds for name in FILES[kind]]

    def check(self, arguments: Mapping[str, object] | None = None) -> None:
        if self.plots is not None:
            from short_gpt.plots.figures import is_picture, require_matplotlib

            require_matplotlib()
            for picture in self.pictures:
                check_output(picture, overwrite=self.overwrite, ours=is_picture)
        super().check(arguments)


def _real(path: object) -> str:
    return os.path.realpath(str(path))


def arguments_of(command: Command, values: Mapping[str, object]) -> dict[str, object]:
    """A command's arguments for its record, by their flags.

    Args:
        command: the command.
        values: its locals, taken first thing.
    """
    flat: dict[str, object] = {}
    for name, flag in flags_of(command).items():
        group, field = flag.place or (name, "")
        value = getattr(values[group], field) if field else values[group]
        names = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
        flat[name] = ",".join(value) if names else value  # type: ignore[arg-type]
    return {k: v for k, v in flat.items() if isinstance(v, str | int | float | tuple | list | None)}


def say(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if first_rank():
        print(text, flush=True)


def tell(text: str) -> None:
    """Prints to stderr what a user must know of a long run, above its bars; of ranks the first."""
    if first_rank():
        above_bars(text)


def say_written(targets: Sequence[Path]) -> None:
    """Names files that were written."""
    for target in targets:
        say(f"written: {target}")
