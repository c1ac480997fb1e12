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
    firsts = {name: (inspect.getdoc(c) or "").partition("\n")[0] for name, c in commands.items()}
    lines = ["short-gpt COMMAND ...: the commands, in the order of use", ""]
    lines += [f"  {name:<{wide}}{first}" for name, first in firsts.items()]
    return "\n".join([*lines, "", "short-gpt COMMAND --help says what a command takes."])


def help_of(name: str, command: Command) -> str:
    """The help of one command."""
    text, _, _ = (inspect.getdoc(command) or "").partition("\n\nArgs:")
    text, _, example = text.partition("\n\nExample: ")
    flags = flags_of(command).values()
    names = [f.name.upper() if f.required else f"[{f.name.upper()}]" for f in flags if f.positional]
    parts = [f"Example:\n  {example}"] if example else []
    parts += [textwrap.fill(part, WIDTH) for part in text.split("\n\n")]
    parts += [f"Usage: short-gpt {name} {' '.join(names)} [flags]"]
    for heading in HEADINGS:
        rows = [_row(f) for f in flags if f.heading == heading]
        parts += ["\n".join([f"{heading.capitalize()}:", *rows])] if rows else []
    return "\n\n".join(parts)


def _row(flag: Flag) -> str:
    name = flag.name.upper() if flag.positional else f"--{flag.name}"
    if not flag.positional and bool not in flag.kinds:
        name += f" {'N' if {int, float} & {*flag.kinds} else flag.value}"
    text = flag.text.rstrip(".")
    if flag.default is not None and flag.default is not False:
        text += f" (default: {_shown(flag.default)})"
    body = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False)
    start = f"  {name}"
    if len(start) > INDENT - 2:
        return "\n".join([start, *(" " * INDENT + line for line in body)])
    first, *rest = body or [""]
    return "\n".join([f"{start:<{INDENT}}{first}", *(" " * INDENT + line for line in rest)])


def _shown(default: object) -> str:
    """A default as it is written in a command line; a long list with spaces, where lines break."""
    parts = default if isinstance(default, tuple | list) else [default]
    text = ",".join(map(str, parts))
    return text.replace(",", ", ") if len(text) > 50 else text
