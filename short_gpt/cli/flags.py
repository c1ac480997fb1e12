"""What a command takes: the parameters of its job as flags, with their types, defaults and help."""

from __future__ import annotations

import inspect
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from types import NoneType
from typing import Any, NamedTuple, get_args

from llama.args import some
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import (
    CHOOSE,
    HEADINGS,
    READ,
    RUN,
    WRITE,
    Settings,
    as_flags,
    described,
)

BOOLEANS = {"true": True, "false": False, "yes": True, "no": False}
EXPECTED: dict[object, str] = {int: "a whole number", float: "a number", bool: "True or False"}
DASHED = r"--?[A-Za-z]"
SIZE = r"(?i)[\d.]+[kmgt]i?b"  # after a flag that stands alone or has a size, such as 3GB
WIDTH, INDENT = 80, 26  # of the help
# of parameters of a job that are no fields of settings: part of the help, and whether it is rare
PLACES = {"dry_run": (RUN, True), "out": (WRITE, False), "source": (READ, True)}
PLACES |= {"to": (WRITE, False), "verify": (WRITE, True)}


class Command(NamedTuple):
    """A command of the shell."""

    job: Callable[..., Any]  # whose parameters are its flags
    example: str  # of its arguments
    show: Callable[..., object]  # prints a result; gets it and a `commands.Run`
    output: Settings | None = None  # the files that it writes of the result, beside the job's
    pictures: tuple[str, ...] = ()  # their names in the folder ``plots``
    alone: bool = False  # of several ranks, only the first runs it


class Flag(NamedTuple):
    """One argument of a command, which reads its own text."""

    name: str
    kinds: tuple[object, ...]  # types that a value may have; object is any
    default: object  # None where there is none too
    heading: str  # of the part of the help that it stands in
    text: str  # what it means
    value: str = "NAME"  # what stands for its value in the help
    rare: bool = False  # whether only the whole help shows it
    positional: bool = False  # whether its value may stand without its name
    required: bool = False

    def read(self, text: str) -> object:
        """The value that a text stands for; ShortGPTError if it is of none of the types."""
        if text == "":
            raise ShortGPTError(f"--{self.name} is empty")
        if NoneType in self.kinds and text.lower() == "none":
            return None
        if bool in self.kinds and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if str in self.kinds:
            # a shell expands no ~ after an equals sign; a prompt alone names nothing
            return text if self.name == "prompt" else os.path.expanduser(text)
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
        elif {bool, str} <= {*self.kinds}:
            name += f" [{self.value}]"
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
    """All arguments of a command by their names, in the order of its job's signature."""
    job: Any = command.job
    groups: list[Settings] = [*job.settings.values()]
    groups += [] if command.output is None else [command.output]
    fields = {one.name: (group, one) for group in groups for one in group.taken()}
    parameters = dict(inspect.signature(job).parameters)
    if command.output is not None:
        parameters |= {p.name: p for p in command.output.parameters() if p.name not in parameters}
    words, flags = described(job), dict[str, Flag]()
    for name, parameter in parameters.items():
        if name == "tokenizer" or (name in fields and not fields[name][1].metadata["flag"]):
            continue
        kinds = get_args(parameter.annotation) or (parameter.annotation,)
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        if name in fields:
            group, one = fields[name]
            told, heading = one.metadata, one.metadata["heading"] or group.HEADING
            text = as_flags(words.get(name, told["words"]))  # the output's are not the job's
            more = (text, told["value"] or "NAME", told["rare"])
            flags[name] = Flag(name, kinds, default, heading, *more)
            continue
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        heading, rare = PLACES.get(name, (READ if positional else CHOOSE, False))
        about = (heading, as_flags(words.get(name, "")), "NAME", rare, positional, required)
        flags[name] = Flag(name, kinds, default, *about)
    return flags


def prepared(argv: list[str], commands: Mapping[str, Command]) -> dict[str, str]:
    """The text of every flag in the arguments of a command, by the flag's name.

    Raises:
        ShortGPTError: an unknown flag, a flag without its value, or a missing argument.
    """
    name, *rest = argv
    flags = flags_of(commands[name])
    values: dict[str, str] = {}
    positional: list[str] = []
    after: dict[str, str] = {}  # words after a flag that is yes or no, and what it takes
    while rest:
        word = rest.pop(0)
        if not re.match(DASHED, word):
            positional.append(word)
            continue
        written, equals, value = word.partition("=")
        flag = named(name, written, flags, commands)
        following = rest[0] if rest else "--end"
        kinds = flags[flag].kinds
        its_own = following.lower() in BOOLEANS or (str in kinds and re.fullmatch(SIZE, following))
        if not equals and bool in kinds and not its_own:
            value = "True"
            after[following] = f"{written} takes yes or no{', or a size' * (str in kinds)}"
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
            raise ShortGPTError(f"{after[surplus]}, got {surplus!r}")
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


def values_of(command: Command, texts: Mapping[str, str]) -> dict[str, Any]:
    """What the texts of flags stand for; ShortGPTError for a value of another type."""
    flags = flags_of(command)
    return {name: flags[name].read(text) for name, text in texts.items()}


def similar(word: str, words: Iterable[str]) -> str:
    """What the user may have meant, as the end of a message; empty if nothing is close."""
    close = get_close_matches(word, list(words), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def overview(commands: Mapping[str, Command]) -> str:
    """The help of all commands, in the order of use, a line each."""
    wide = max(map(len, commands)) + 2
    about = {name: inspect.getdoc(command.job) or "" for name, command in commands.items()}
    lines = [
        f"  {name:<{wide}}{as_flags(text.partition(chr(10))[0])}" for name, text in about.items()
    ]
    head = ["short-gpt COMMAND ...: the commands, in the order of use", ""]
    ends = [
        "short-gpt COMMAND --help says what a command takes, --help all every flag.",
        "Each takes --quiet (no bars and no notes); --max-windows is --max_windows.",
    ]
    return "\n".join([*head, *lines, "", *ends])


def help_of(name: str, command: Command, *, whole: bool = False) -> str:
    """The help of one command: an example, what it does, and its flags in groups.

    The ``whole`` help has its rare flags too.
    """
    text = as_flags((inspect.getdoc(command.job) or "").partition("\n\nArgs:")[0])
    flags = flags_of(command).values()
    names = [f.name.upper() if f.required else f"[{f.name.upper()}]" for f in flags if f.positional]
    parts = [f"Example:\n  short-gpt {name} {command.example}".rstrip()]
    parts += [textwrap.fill(part, WIDTH) for part in text.split("\n\n")]
    parts += [f"Usage: short-gpt {name} {' '.join(names)} [flags]"]
    for heading in HEADINGS:
        shown = [flag for flag in flags if flag.heading == heading and (whole or not flag.rare)]
        if shown:
            parts.append("\n".join([f"{heading.capitalize()}:", *(flag.row() for flag in shown)]))
    if rare := sum(flag.rare for flag in flags):
        parts += [] if whole else [f"{rare} more flags: short-gpt {name} --help all"]
    return "\n\n".join(parts)
