"""What a command takes, read from its signature: flags, their types, defaults and help.

A parameter that is a dataclass is a group, and each of its fields a flag of its own; what a field
says of its flag stands in its metadata, as `short_gpt.runtime.settings` describes.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from functools import partial
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from llama.args import some
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import CHOOSE, HEADINGS, READ, RUN, WRITE, Needs, flag_of

Command = Callable[..., None]
BOOLEANS = {"true": True, "false": False, "yes": True, "no": False}
EXPECTED: dict[object, str] = {int: "a whole number", float: "a number", bool: "True or False"}
DASHED = r"--?[A-Za-z]"
WIDTH, INDENT = 80, 26  # of the help

USUAL = {  # what arguments mean where a command does not say otherwise
    "model": "Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.",
    "out": "new directory, or GGUF file if it ends with .gguf; must not exist.",
}


class Flag(NamedTuple):
    """One argument of a command, which reads its own text."""

    name: str
    kinds: tuple[object, ...]  # types that a value may have; object is any
    default: object  # None where there is none too
    heading: str  # of the part of the help that it stands in
    text: str  # what it means
    parameter: str  # of the command
    field: str = ""  # of the parameter, where that is a group
    value: str = "NAME"  # what stands for its value in the help
    needs: tuple[Needs, ...] = ()  # what it does nothing without
    positional: bool = False  # whether its value may stand without its name
    required: bool = False

    def read(self, text: str) -> object:
        """The value that a text stands for; ShortGPTError if it is of none of the types."""
        if text == "":
            raise ShortGPTError(f"--{self.name} is empty")
        if NoneType in self.kinds and text.lower() == "none":
            return None
        if str in self.kinds:
            # a shell expands no ~ after an equals sign; a prompt alone names nothing
            return text if self.name == "prompt" else os.path.expanduser(text)
        if bool in self.kinds and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        value = _python(text)
        if object in self.kinds:
            return value
        if float in self.kinds and type(value) in (int, float):
            if math.isfinite(number := float(str(value))):
                return number
            raise ShortGPTError(f"--{self.name} expects a finite number, got {value}")
        if type(value) not in self.kinds:
            # where none is the default, nobody has to write it
            kinds = [kind for kind in self.kinds if kind in EXPECTED or self.default is not None]
            expected = " or ".join(EXPECTED.get(kind, "none") for kind in kinds)
            raise ShortGPTError(f"--{self.name} expects {expected}, got {value!r}")
        return value

    def row(self) -> str:
        """Its part of the help."""
        name, text = f"  --{self.name}", self.text.rstrip(".")
        if self.positional:
            name = f"  {self.name.upper()}"
        elif {bool, NoneType} <= {*self.kinds}:
            name += " yes|no"
        elif bool not in self.kinds:
            number = {int, float} & {*self.kinds} and str not in self.kinds
            name += f" {'N' if number else self.value}"
        if self.default is not None and self.default is not False:
            parts = self.default if isinstance(self.default, tuple) else [self.default]
            default = ",".join(map(str, parts))  # as it is written in a command line
            text += f" (default: {default if len(default) <= 50 else default.replace(',', ', ')})"
        text = textwrap.fill(text, WIDTH - INDENT, break_on_hyphens=False)
        text = textwrap.indent(text, " " * INDENT)
        return f"{name}\n{text}" if len(name) > INDENT - 2 else f"{name:<{INDENT}}{text[INDENT:]}"


def _python(text: str) -> object:
    """A text as fire reads it; as it is where fire fails, as on sets of lists and deep nesting."""
    from fire.parser import DefaultParseValue

    try:
        return DefaultParseValue(text)
    except (TypeError, RecursionError, MemoryError):
        return text


def flags_of(command: Command) -> dict[str, Flag]:
    """All arguments of a command by their names, in the order of its signature."""
    hints, texts = get_type_hints(command), USUAL | described(command)
    flags: list[Flag] = []
    for name, parameter in inspect.signature(command).parameters.items():
        default = parameter.default
        if is_dataclass(default):
            flags += _fields(command.__name__, name, default)
            continue
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        required = default is parameter.empty
        heading = WRITE if name in ("out", "overwrite") else READ if positional else CHOOSE
        about = (None if required else default, heading, texts.get(name, ""), name)
        kinds = get_args(hint := hints.get(name, object)) or (hint,)
        flags.append(Flag(name, kinds, *about, positional=positional, required=required))
    return {flag.name: flag for flag in flags}


def _fields(command: str, parameter: str, group: Any) -> list[Flag]:
    kind, flags = type(group), []
    hints, texts = get_type_hints(kind), described(kind)
    for field in fields(kind):
        if (name := flag_of(field, command)) is not None:
            about, own = field.metadata, field.name
            kinds, default = get_args(hints[own]) or (hints[own],), getattr(group, own)
            heading = str(about.get("heading") or getattr(kind, "HEADING", RUN))
            text = f"{texts.get(own, '')} {about.get('more', {}).get(command, '')}".strip()
            every = about.get("needs", ())
            needs = tuple(n for n in every if n.commands is None or command in n.commands)
            more = (about.get("value") or "NAME", needs)
            flags.append(Flag(name, kinds, default, heading, text, parameter, own, *more))
    return flags


def described(thing: object) -> dict[str, str]:
    """The entries of a docstring's ``Args``, each in one line; a class adds those of its bases."""
    bases = reversed(thing.__mro__[1:-1]) if isinstance(thing, type) else ()
    texts: dict[str, str] = {}
    for each in (*bases, thing):
        _, _, args = (inspect.getdoc(each) or "").partition("\nArgs:\n")
        entries = re.split(r"^    (?=\w)", args.partition("\n\n")[0], flags=re.MULTILINE)
        for entry in entries[1:]:
            name, _, text = entry.partition(":")
            texts[name] = " ".join(text.split())
    return texts


def prepared(argv: list[str], commands: Mapping[str, Command]) -> dict[str, str]:
    """The text of every flag in the arguments of a command, by the flag's name.

    Raises:
        ShortGPTError: an unknown flag, a flag without its value, or a missing argument.
    """
    name, *rest = argv
    flags = flags_of(commands[name])
    values: dict[str, str] = {}
    positional: list[str] = []
    after: dict[str, str] = {}  # words after a flag that is yes or no, and the flag
    while rest:
        word = rest.pop(0)
        if not re.match(DASHED, word):
            positional.append(word)
            continue
        written, equals, value = word.partition("=")
        flag = named(name, written, flags, commands)
        following = rest[0] if rest else "--end"
        if not equals and bool in flags[flag].kinds and following.lower() not in BOOLEANS:
            value, after[following] = "True", written
        elif not equals:
            if re.match(DASHED, following):
                text = f"{written} needs a value; write {written}=VALUE if it has dashes"
                raise ShortGPTError(text)
            value = rest.pop(0)
        values[flag] = value
    free = [f for f in flags.values() if f.positional and f.name not in values]
    if len(positional) > len(free):
        places = " ".join(f.name.upper() for f in flags.values() if f.positional)
        surplus = positional[len(free)]
        if surplus in after:
            raise ShortGPTError(f"{after[surplus]} takes yes or no, got {surplus!r}")
        raise ShortGPTError(
            f"{name} takes {places}; what is {surplus!r}? Quote texts with spaces, and write lists "
            "without spaces, as in 4,5"
        )
    if missing := [f.name.upper() for f in free[len(positional) :] if f.required]:
        raise ShortGPTError(f"{name} needs {' '.join(missing)}; see {name} --help")
    return values | {f.name: value for f, value in zip(free, positional, strict=False)}


def named(
    command: str, written: str, flags: Mapping[str, Flag], commands: Mapping[str, Command]
) -> str:
    """The flag that a user means by --batch-size or by -n."""
    flag = written.lstrip("-").replace("-", "_")
    if not written.startswith("--") and len(flag) == 1:  # short for the only flag that begins so
        matches = [f for f in flags if f == flag] or [f for f in flags if f.startswith(flag)]
        if len(matches) == 1:
            return matches[0]
    if flag in flags and written.startswith("--"):
        return flag
    others = [name for name, other in commands.items() if flag in flags_of(other)]
    if "n" in flags and re.fullmatch(r"(n|num|number)_\w+", flag):
        hint = "; did you mean --n?"
    elif others:
        hint = f"; {some(others)} {'has' if len(others) == 1 else 'have'} it"
    else:
        hint = similar(f"--{flag}", [f"--{f}" for f in flags]) or f"; see {command} --help"
    raise ShortGPTError(f"{command} has no flag {written}{hint}")


def call(command: Command, texts: Mapping[str, str]) -> None:
    """Calls a command with what the texts of its flags stand for.

    Raises:
        ShortGPTError: a value is of another type, or a flag lacks what it needs.
    """
    flags, parameters = flags_of(command), inspect.signature(command).parameters
    values: dict[str, Any] = {name: flags[name].read(text) for name, text in texts.items()}
    refuse_unused(flags, values)
    arguments = {name: v for name, v in values.items() if not flags[name].field}
    for group in {flags[name].parameter for name in values} - {*arguments}:
        own = {f.field: values[n] for n in values if (f := flags[n]).parameter == group}
        arguments[group] = replace(parameters[group].default, **own)
    command(**arguments)


def for_completion(command: Command) -> Command:
    """A function whose keyword arguments are the command's flags, which fire completes."""
    names = [*flags_of(command), "quiet", "help"]
    flag = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=None)

    def named(**_: object) -> None: ...

    named.__signature__ = inspect.Signature([flag(name) for name in names])  # type: ignore[attr-defined]
    return named


def refuse_unused(flags: Mapping[str, Flag], values: Mapping[str, object]) -> None:
    """Raises ShortGPTError for a flag that has a value but does nothing without another."""
    every = {name: flag.default for name, flag in flags.items()} | {**values}
    for name, value in values.items():
        unmet = [need.what for need in flags[name].needs if not need.met(every)]
        if unmet and value is not None and value is not False:  # these ask for nothing
            raise ShortGPTError(
                f"--{name} has no effect without {unmet[0]}: add that, or leave --{name} out"
            )


def similar(word: str, words: Iterable[str]) -> str:
    """What the user may have meant, as the end of a message; empty if nothing is close."""
    close = get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def overview(commands: Mapping[str, Command]) -> str:
    """The help of all commands, in the order of use, a line each."""
    wide = max(map(len, commands)) + 2
    about = {name: inspect.getdoc(command) or "" for name, command in commands.items()}
    lines = [f"  {name:<{wide}}{text.partition(chr(10))[0]}" for name, text in about.items()]
    head = ["short-gpt COMMAND ...: the commands, in the order of use", ""]
    ends = [
        "short-gpt COMMAND --help says what a command takes.",
        "Each takes --quiet (no bars and no notes); --max-windows is --max_windows.",
        "short-gpt -- --completion prints a script by which bash (or: fish) completes.",
    ]
    return "\n".join([*head, *lines, "", *ends])


def help_of(name: str, command: Command) -> str:
    """The help of one command: an example, what it does, and its flags in groups."""
    text, _, _ = (inspect.getdoc(command) or "").partition("\n\nArgs:")
    text, _, example = text.partition("\n\nExample: ")
    flags = flags_of(command).values()
    names = [f.name.upper() if f.required else f"[{f.name.upper()}]" for f in flags if f.positional]
    parts = [f"Example:\n  {example}"]
    parts += [textwrap.fill(part, WIDTH) for part in text.split("\n\n")]
    parts += [f"Usage: short-gpt {name} {' '.join(names)} [flags]"]
    for heading in HEADINGS:
        if rows := [flag.row() for flag in flags if flag.heading == heading]:
            parts.append("\n".join([f"{heading.capitalize()}:", *rows]))
    return "\n\n".join(parts)
