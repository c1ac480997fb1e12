"""Commands as a user types them, for tests that run them in this process."""

from __future__ import annotations

import pytest

from short_gpt.cli.app import main

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
DATA = ("--data", "book.txt", "--size", 32, "--stride", 16)


def run(*argv: object) -> None:
    main([str(a) for a in argv])


def fails(capsys, *argv: object) -> str:
    """Runs a command that must exit with 1 and one line; returns the line."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert out == ""
    lines = [line for line in err.splitlines() if "/s]" not in line and line.strip()]
    assert len(lines) == 1 and lines[0].startswith("short-gpt: "), err
    return lines[0]
