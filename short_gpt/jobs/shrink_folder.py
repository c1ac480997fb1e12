"""The folder ``OUT.shrinking``: what a run of `shrink` keeps, to be continued if it is killed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from short_gpt.checkpoints.provenance import Provenance
from short_gpt.healing.job import clear
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import ShortGPTError

MARKER = "shrinking.txt"  # which only the folder of a run has
STATE, HEALING, WRITTEN = "state.json", "healing", "written"
# its parts, own texts, and what a killed save leaves of both
STATES = (f"{STATE}*", "self-*.json", f".{STATE}*", ".self-*")


class ShrinkFolder:
    """What a run keeps beside its output, and nothing else: files of the user's stay."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, Path(f"{out}.shrinking")
        self.state, self.healing = self.path / STATE, self.path / HEALING
        self.built = self.path / WRITTEN / out.name  # the model while it is written
        self.scratch = self.path / WRITTEN / f"{out.stem}-hf"  # of which a GGUF file is made
        self._marker = self.path / MARKER

    def check(self) -> None:
        """Raises ShortGPTError for a folder of this name that is not from a run."""
        names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        if names and MARKER not in names:
            raise ShortGPTError(
                f"{self.path} holds {min(names)}, and is not from a run of shrink: move it away, "
                "or choose another output"
            )

    def begin(self) -> None:
        """Makes the folder, or continues what it holds."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._marker.exists():
            self._marker.write_text("the same command continues this run\n", encoding="utf-8")

    def note_built(self, command: str) -> None:
        """Notes what is about to be placed, so that a run killed afterwards is known as ended."""
        self._marker.write_text(self._placed(command, self.built), encoding="utf-8")

    def is_placed(self, command: str) -> bool:
        """Whether a run of this command was killed after the output was complete."""
        if not self._marker.is_file() or not self.out.exists():
            return False
        return self._marker.read_text(encoding="utf-8") == self._placed(command, self.out)

    def _placed(self, command: str, out: Path) -> str:
        record = Provenance.of_checkpoint(out)
        return f"{command}\n{record and json_digest(record.to_dict())}\n"

    def clear_built(self) -> None:
        """Deletes the model that was being written."""
        for path in (self.built, self.scratch):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes what the run kept; the marker goes last, so that a kill here is continued."""
        for pattern in STATES:
            for path in self.path.glob(pattern):
                if path.is_file():
                    path.unlink()
        clear(self.healing)
        self.clear_built()
        self._marker.unlink(missing_ok=True)
        self.tidy()

    def tidy(self) -> None:
        """Removes empty folders, and the marker where nothing was measured."""
        if self.path.is_dir() and [path.name for path in self.path.iterdir()] == [MARKER]:
            self._marker.unlink()
        for path in (self.healing, self.built.parent, self.path):
            with suppress(OSError):  # it holds a file
                path.rmdir()
