"""How every benchmark ends: what was missed, the JSON file, the exit status."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from short_gpt.runtime.results import write_record


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
