"""What benchmarks share: how each begins and ends, and a command timed in its own process."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from llama.files import check_output
from short_gpt.runtime.state import is_record, write_record

ROOT = Path(__file__).parents[2]


def begin(out: str | None, *, overwrite: bool) -> None:
    """Raises what would keep the result from being written, before anything is measured.

    Args:
        out, overwrite: as for `finish`.
    """
    if out is not None:
        check_output(Path(out), overwrite=overwrite, replaces=is_record)


def finish(
    script: str,
    missed: Sequence[str],
    content: Mapping[str, object],
    *,
    held: str = "all limits held",
    out: str | None,
    overwrite: bool,
) -> NoReturn:
    """Says which limits were missed, writes the result with its command, and ends the process.

    Args:
        script: the benchmark's name, without ``.py``.
        missed: limits that did not hold; any makes the exit status 1.
        content: what the JSON file holds beside command, commit, versions and machine.
        held: what is printed where nothing was missed.
        out: the JSON file; None writes none.
        overwrite: replace an existing file.
    """
    print("\n".join(f"MISSED: {text}" for text in missed) or held)
    if out is not None:
        (path,) = ROOT.glob(f"benchmarks/*/{script}.py")
        command = shlex.join(["python", str(path.relative_to(ROOT)), *sys.argv[1:]])
        record = {"command": command, "commit": COMMIT, **content}
        write_record(out, record, overwrite=overwrite)
    sys.exit(bool(missed))


def commit(tree: Path = ROOT) -> str | None:
    """The commit of a tree, with ``-dirty`` after it if there are changes; None without git."""
    asked = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with suppress(OSError):
        found = subprocess.run(asked, cwd=tree, capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    return None


COMMIT = commit()  # of the code that runs, also if another one is checked out meanwhile


def apart(script: str, argv: Sequence[str], facts: Path) -> dict[str, Any]:
    """Runs a command in a process of its own, as a script's ``timed``; returns what that found.

    Args:
        script: the file, which takes "timed", a file for the facts, and the command.
        argv: of the command.
        facts: the JSON file that is written.
    """
    subprocess.run([sys.executable, script, "timed", str(facts), *argv], check=False)
    return json.loads(facts.read_text())
