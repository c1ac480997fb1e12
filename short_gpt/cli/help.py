"""The help: an example, what the command does, and its flags in groups, within 80 columns."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping

from short_gpt.cli.flags import HEADINGS, Command, Flag, flags_of

WIDTH, INDENT = 80, 26
# What stands behind a flag that takes neither a number nor just a name.
VALUES = {
    **dict.fromkeys(("json", "state", "scores", "recipe", "tokenizer_path", "prompts"), "FILE"),
    **dict.fromkeys(("plots", "include_path"), "FOLDER"),
    **dict.fromkeys(("data", "eval_data", "source"), "TEXTS"),
    **dict.fromkeys(("layers", "counts", "sizes", "skip_prefill"), "N,N"),
    **dict.fromkeys(("methods", "healing", "tasks"), "A,B"),
    "lora_only": "A:N",
    "max_memory": "SIZE",
}


def overview(commands: Mapping[str, Command]) -> str:
    """All commands in the order of use, a line each."""
    wide = max(map(len, commands)) + 2
    lines = ["short-gpt COMMAND ...: the commands, in the order of use", ""]
    lines += [f"  {name:<{wide}}{_first(command)}" for name, command in commands.items()]
    return "\n".join([*lines, "", "short-gpt COMMAND --help says what a command takes."])


def help_of(name: str, command: Command) -> str:
    """The help of one command."""
    text, _, _ = (inspect.getdoc(command) or "").partition("\n\nArgs:")
    text, _, example = text.partition("\n\nExample: ")
    flags = flags_of(command)
    places = " ".join(_place(f) for f in flags.values() if f.positional)
    parts = [f"Example:\n  {example}" if example else "", _paragraphs(text)]
    parts += [f"Usage: short-gpt {name} {places} [flags]"]
    for heading in HEADINGS:
        rows = [_row(f) for f in flags.values() if f.heading == heading]
        parts += ["\n".join([f"{heading.capitalize()}:", *rows])] if rows else []
    return "\n\n".join(part for part in parts if part)


def _first(command: Command) -> str:
    return (inspect.getdoc(command) or "").partition("\n")[0]


def _place(flag: Flag) -> str:
    return flag.name.upper() if flag.required else f"[{flag.name.upper()}]"


def _paragraphs(text: str) -> str:
    return "\n\n".join(textwrap.fill(part, WIDTH) for part in text.split("\n\n"))


def _row(flag: Flag) -> str:
    """One flag: its name, its meaning, its default."""
    name = flag.name.upper() if flag.positional else f"--{flag.name}"
    if not flag.positional and bool not in flag.kinds:
        name += f" {_value(flag)}"
    text = flag.text.rstrip(".")
    if flag.default is not None and flag.default is not False:
        text += f" (default: {_shown(flag.default)})"
    body = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False)
    start = f"  {name}"
    if len(start) > INDENT - 2:
        return "\n".join([start, *(" " * INDENT + line for line in body)])
    first, *rest = body or [""]
    return "\n".join([f"{start:<{INDENT}}{first}", *(" " * INDENT + line for line in rest)])


def _value(flag: Flag) -> str:
    """What stands behind the flag: N for numbers, else a word for what is given."""
    if int in flag.kinds or float in flag.kinds:
        return "N"
    return VALUES.get(flag.name, "NAME")


def _shown(default: object) -> str:
    if isinstance(default, tuple | list):
        return ",".join(map(str, default))
    return str(default).replace(",", ", ") if len(str(default)) > 50 else str(default)
