"""The help: an example, what the command does, and its flags in groups, within 80 columns."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping

from short_gpt.cli.flags import Command, Flag, flags_of
from short_gpt.runtime.settings import HEADINGS

WIDTH, INDENT = 80, 26


def overview(commands: Mapping[str, Command]) -> str:
    """All commands in the order of use, a line each."""
    wide = max(map(len, commands)) + 2
    lines = [
        f"  {name:<{wide}}{(inspect.getdoc(command) or '').partition(chr(10))[0]}"
        for name, command in commands.items()
    ]
    head = ["short-gpt COMMAND ...: the commands, in the order of use", ""]
    return "\n".join([*head, *lines, "", "short-gpt COMMAND --help says what a command takes."])


def help_of(name: str, command: Command) -> str:
    """The help of one command."""
    text, _, _ = (inspect.getdoc(command) or "").partition("\n\nArgs:")
    text, _, example = text.partition("\n\nExample: ")
    flags = flags_of(command).values()
    names = [f.name.upper() if f.required else f"[{f.name.upper()}]" for f in flags if f.positional]
    parts = [f"Example:\n  {example}"]
    parts += [textwrap.fill(part, WIDTH) for part in text.split("\n\n")]
    parts += [f"Usage: short-gpt {name} {' '.join(names)} [flags]"]
    for heading in HEADINGS:
        if rows := [_row(flag) for flag in flags if flag.heading == heading]:
            parts.append("\n".join([f"{heading.capitalize()}:", *rows]))
    return "\n\n".join(parts)


def _row(flag: Flag) -> str:
    name, text = f"  --{flag.name}", flag.text.rstrip(".")
    if flag.positional:
        name = f"  {flag.name.upper()}"
    elif bool not in flag.kinds:
        name += f" {'N' if {int, float} & {*flag.kinds} else flag.value}"
    if flag.default is not None and flag.default is not False:
        parts = flag.default if isinstance(flag.default, tuple) else [flag.default]
        default = ",".join(map(str, parts))  # as it is written in a command line
        text += f" (default: {default if len(default) <= 50 else default.replace(',', ', ')})"
    text = textwrap.fill(text, WIDTH - INDENT, break_on_hyphens=False)
    text = textwrap.indent(text, " " * INDENT)
    return f"{name}\n{text}" if len(name) > INDENT - 2 else f"{name:<{INDENT}}{text[INDENT:]}"
