"""What commands share: the files they write, and what they say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path

from llama.io.outputs import check_output
from short_gpt.plots.figures import is_picture, require_matplotlib
from short_gpt.plots.pictures import CROSSED, PUBLISHED, QUALITY, SCORES
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import above_bars, first_rank
from short_gpt.runtime.results import is_record, write_record


@dataclass(frozen=True)
class Output:
    """The result as a file.

    Args:
        json: JSON file for the result, with all arguments, versions and the seed.
        overwrite: replace what an earlier run has written.
    """

    json: str | None = None
    overwrite: bool = False

    @property
    def records(self) -> list[Path]:
        """The JSON file, if there is to be one."""
        return [] if self.json is None else [Path(self.json)]

    @property
    def pictures(self) -> list[Path]:
        """The pictures that the command will draw."""
        return []

    @property
    def targets(self) -> list[Path]:
        """The files that the command will write."""
        return [*self.records, *self.pictures]

    def check(self, arguments: Mapping[str, object] | None = None) -> None:
        """Raises what would keep a file from being written, before the work.

        Args:
            arguments: the command's; what they name is read and not written over.
        """
        for targets, ours in ((self.records, is_record), (self.pictures, is_picture)):
            for target in targets:
                check_output(target, overwrite=self.overwrite, ours=ours)
        out = (arguments or {}).get("out")
        for target in self.targets:
            if files := [parent for parent in target.parents if parent in self.targets]:
                raise ShortGPTError(f"{target} cannot be written into the file {files[0]}")
            if out is not None and Path(str(out)).resolve() in target.resolve().parents:
                raise ShortGPTError(
                    f"{target} lies in {out}, which holds the model alone: else it could not be "
                    "replaced later; name a file beside it"
                )
            _check_no_input(target, arguments or {})

    def write(
        self, command: str, arguments: Mapping[str, object], content: Mapping[str, object]
    ) -> None:
        """Writes the result, if it is to be; of several ranks, only the first does."""
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
    """

    plots: str | None = None

    @property
    def folder(self) -> Path | None:
        """Where this process draws; None if it does not."""
        return Path(self.plots) if self.plots is not None and first_rank() else None

    @property
    def pictures(self) -> list[Path]:
        return [] if self.plots is None else [Path(self.plots) / name for name in self._names]

    @property
    def _names(self) -> Sequence[str]:
        return SCORES

    def check(self, arguments: Mapping[str, object] | None = None) -> None:
        if self.plots is not None:
            require_matplotlib()
        super().check(arguments)


@dataclass(frozen=True)
class PaperPictures(Pictures):
    """The result as a file, and as the pictures of scores and published.png."""

    @property
    def _names(self) -> Sequence[str]:
        return (*SCORES, *PUBLISHED)


@dataclass(frozen=True)
class QualityPicture(Pictures):
    """The result as a file, and as the picture quality.png."""

    @property
    def _names(self) -> Sequence[str]:
        return QUALITY


@dataclass(frozen=True)
class CrossPicture(Pictures):
    """The result as a file, and as the picture calibration.png."""

    @property
    def _names(self) -> Sequence[str]:
        return CROSSED


def _check_no_input(target: Path, arguments: Mapping[str, object]) -> None:
    """Raises ShortGPTError if an argument other than those of `Pictures` names the same file."""
    for name, value in arguments.items():
        named = isinstance(value, str) and name not in ("json", "plots")
        if named and target.is_file() and os.path.realpath(str(value)) == str(target.resolve()):
            raise ShortGPTError(
                f"{target} is what --{name} reads, so it is not written over; choose another name"
            )


def arguments_of(values: Mapping[str, object]) -> dict[str, object]:
    """A command's arguments for its record: its locals, taken first thing, groups laid open."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= vars(value) if is_dataclass(value) else {name: value}
    return {k: v for k, v in flat.items() if isinstance(v, str | int | float | tuple | list | None)}


def say(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if first_rank():
        print(text, flush=True)


def tell(text: str) -> None:
    """Says on stderr what is to be known of a long run, above its bars; of ranks the first."""
    if first_rank():
        above_bars(text)


def say_written(targets: Sequence[Path]) -> None:
    """Names files that were written."""
    for target in targets:
        say(f"written: {target}")
