"""Any words behind any command: it runs, or ends with 1 and one line; never with a traceback."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest

from short_gpt.cli import COMMANDS, app
from short_gpt.cli.app import main
from short_gpt.cli.flags import flags_of

# What Python, fire, a shell or argparse would take for something of its own.
ODD = ["-", "--", "---", "-1", "=", "'", '"', "\\", " ", "\u2028", "\U0001f600", "\udcff", "\x00"]
ODD += ["nan", "-inf", "1e999", "1_0", "1j", "9" * 5000, "a" * 97, "a--b", "None", "f''", "#", "~"]
ODD += ["[", "[1,2", "{1:2}", "{[1]:2}", "{{1}}", "{{}:1}", "(" * 300, "[" * 5000, "-" * 5000 + "1"]
ODD += ["lambda:0", "a.b()", "1 if 1 else 2", "...", "*a", "--trace", "--interactive", "-h--help"]


@pytest.fixture
def idle(monkeypatch) -> None:
    """All commands with their own flags and nothing behind them."""
    monkeypatch.setattr(app, "call", lambda *_: None)


def one_line_or_none(argv: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()  # which take half a surrogate pair, as `lenient` does
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(argv)
        except SystemExit as stop:
            assert (stop.code, out.getvalue()) == (1, ""), (argv, err.getvalue())
            assert re.fullmatch(r"short-gpt: .+\n", err.getvalue()), (argv, err.getvalue())
            return
    assert err.getvalue() == "", argv


def flag_of_each_kind() -> dict[tuple, tuple[str, str]]:
    """A command and its flag for every kind of value, which all commands read alike."""
    flags = {command: flags_of(function) for command, function in COMMANDS.items()}
    fewest_last = sorted(flags, key=lambda command: -len(flags[command]))
    return {
        flag.kinds: (command, name)
        for command in fewest_last
        for name, flag in flags[command].items()
        if not flag.required
    }


@pytest.mark.parametrize(("command", "name"), flag_of_each_kind().values())
def test_every_kind_of_flag_takes_or_refuses_odd_values(idle, command, name):
    needed = ["x"] * sum(flag.required for flag in flags_of(COMMANDS[command]).values())
    for value in ODD:
        one_line_or_none([command, *needed, f"--{name}={value}"])
        one_line_or_none([command, *needed, f"--{name}", value])
