"""How every benchmark begins and ends: the JSON file, what was missed, the exit status."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from llama.io.outputs import check_output
from short_gpt.runtime.results import is_record, write_record


def begin(out: str | None, *, overwrite: bool) -> None:
    """Raises what would keep the result from being written, before anything is measured.

    Args:
        out, overwrite: as for `finish`.
    """
    if out is not None:
        check_output(Path(out), overwrite=overwrite, ours=is_record)


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
        content: what the JSON file holds beside command, versions and machine.
        held: what is printed where nothing was missed.
        out: the JSON file; None writes none.
        overwrite: replace an existing file.
    """
    print("\n".join(f"MISSED: {text}" for text in missed) or held)
    if out is not None:
        command = " ".join(["python", f"benchmarks/{script}.py", *sys.argv[1:]])
        write_record(out, {"command": command, **content}, overwrite=overwrite)
    sys.exit(bool(missed))
