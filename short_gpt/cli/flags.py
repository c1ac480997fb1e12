"""What a command takes, read from its signature: flags, their types, defaults and descriptions.

A parameter that is a dataclass is a group: each of its fields is a flag of its own, so that flags
which several commands share are written down once.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import wraps
from types import NoneType
from typing import TYPE_CHECKING, get_args, get_type_hints

from short_gpt.cli.unused import refuse_unused
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Command = Callable[..., None]
READ, CHOOSE, RUN, WRITE = "what to read", "how to choose", "how to run", "what to write"
HEADINGS = (READ, CHOOSE, RUN, WRITE)
# Groups of flags by the name of their class; the others are settings of how a command runs.
GROUPS = {
    **dict.fromkeys(("TextSource", "Cut", "Reading", "Readings", "Shares"), READ),
    **dict.fromkeys(("Learned", "DemoRun"), READ),
    **dict.fromkeys(("Answer", "Paper", "Ranked", "Choice"), CHOOSE),
    **dict.fromkeys(("PerplexityLimit", "CaseNames"), CHOOSE),
    **dict.fromkeys(("Tasks", "Sampling", "Settings", "Distilling", "LoraNames", "Opening"), RUN),
    **dict.fromkeys(("Written", "Output", "Conversion", "Saving"), WRITE),
}
# Flags that belong to another part of the help than the group that they stand in.
OWN_HEADINGS = {
    **dict.fromkeys(("eval_data", "eval_windows", "size"), READ),
    **dict.fromkeys(("device", "batch_size"), RUN),
    "overwrite": WRITE,
}
BOOLEANS = {"true": "True", "false": "False", "yes": "True", "no": "False"}
FLAG = r"--?[A-Za-z]"

# Other names of flags, so that earlier command lines still run: in one command, then in all.
ALSO = {
    "heal": {"out": "json"},
    "reproduce": {"model": "paper_model"},
    "evaluate": {"text": "data", "dense": "model"},
    "compare": {
        "lora_steps": "steps",
        "lora_rank": "rank",
        "lora_learning_rate": "learning_rate",
        "lora_batch": "batch",
    },
    "convert": {"source": "model"},
}
REMOVED = {
    ("rank", "healed"): "heal what --method sleb removes",
    ("rank", "budget"): "it was for --method evolution, which is gone; use sleb",
}
ALSO_EVERYWHERE = {
    "n_prune_layers": ("n",),
    "ckpt_dir": ("model",),
    "model_dir": ("model",),
    "out_dir": ("out",),
    "out": ("json",),
}


@dataclass(frozen=True)
class Flag:
    """One argument of a command.

    Attributes:
        name: as in ``--name``.
        kinds: types that a value may have; ``object`` is any.
        default: None where there is none too; see ``required``.
        heading: of the part of the help that it stands in.
        positional: whether it may be given without its name.
        required: whether it has no default.
        text: what it means.
        group: the parameter whose field it is; None for a parameter of the command's own.
    """

    name: str
    kinds: tuple[object, ...]
    default: object
    heading: str
    positional: bool = False
    required: bool = False
    text: str = ""
    group: str | None = None


def flags_of(command: Command) -> dict[str, Flag]:
    """All arguments of a command by their names, in the order of its signature."""
    hints, texts = get_type_hints(command), described(command)
    flags: dict[str, Flag] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(parameter.default) and not isinstance(parameter.default, type):
            flags |= _fields(name, parameter.default)
            continue
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        required = parameter.default is parameter.empty
        default = None if required else parameter.default
        kinds, text = _kinds(hints.get(name, object)), texts.get(name, "")
        heading = _heading(name, positional)
        flags[name] = Flag(name, kinds, default, heading, positional, required, text)
    return flags


def _fields(group: str, defaults: DataclassInstance) -> dict[str, Flag]:
    """The fields of a group, each a flag."""
    hints, texts = get_type_hints(type(defaults)), described(type(defaults))
    heading = heading_of(type(defaults))
    return {
        field.name: Flag(
            field.name,
            _kinds(hints[field.name]),
            getattr(defaults, field.name),
            OWN_HEADINGS.get(field.name, heading),
            text=texts.get(field.name, ""),
            group=group,
        )
        for field in fields(defaults)
    }


def heading_of(group: type) -> str:
    """The part of the help in which a group stands: its own, or that of the group it extends."""
    own = [GROUPS[base.__name__] for base in group.__mro__ if base.__name__ in GROUPS]
    return own[0] if own else RUN


def _kinds(hint: object) -> tuple[object, ...]:
    return get_args(hint) or (hint,)


def _heading(name: str, positional: bool) -> str:
    if name in ("out", "overwrite"):
        return WRITE
    return READ if positional else CHOOSE


def described(thing: object) -> dict[str, str]:
    """The entries of a docstring's ``Args``, each in one line; a class adds those of its bases."""
    bases = reversed(thing.__mro__[1:-1]) if isinstance(thing, type) else ()
    found: dict[str, str] = {}
    for each in (*bases, thing):
        _, _, args = (inspect.getdoc(each) or "").partition("\nArgs:\n")
        entries = re.split(r"^    (?=\w)", args.partition("\n\n")[0], flags=re.MULTILINE)
        for entry in entries[1:]:
            name, _, text = entry.partition(":")
            found[name] = " ".join(text.split())
    return found


def prepared(argv: list[str], commands: Mapping[str, Command]) -> list[str]:
    """The arguments, checked, in a form that fire cannot misread: ``--flag=value`` each.

    Fire would run the command first and complain about a mistyped flag afterwards, and it reads
    every value as Python: a path such as 2048 would arrive as a number, "a, b" as a tuple. Texts
    and paths are quoted for it here.

    Raises:
        ShortGPTError: an unknown command or flag, a flag without its value, or a missing argument.
    """
    name, given = argv[0], argv[1:]
    flags = flags_of(commands[name])
    values, positional = _split(name, given, flags)
    free = [f for f in flags.values() if f.positional and f.name not in values]
    if len(positional) > len(free):
        places = " ".join(f.name.upper() for f in flags.values() if f.positional)
        raise ShortGPTError(
            f"{name} takes {places}; what is {positional[len(free)]!r}? Quote texts with spaces"
        )
    if missing := [f.name.upper() for f in free[len(positional) :] if f.required]:
        raise ShortGPTError(f"{name} needs {' '.join(missing)}; see {name} --help")
    values |= {f.name: value for f, value in zip(free, positional, strict=False)}
    return [name, *(f"--{flag}={_quoted(value, flags[flag])}" for flag, value in values.items())]


def _split(
    name: str, given: list[str], flags: Mapping[str, Flag]
) -> tuple[dict[str, str], list[str]]:
    """Values by flag, and those without one."""
    values: dict[str, str] = {}
    positional: list[str] = []
    items = iter(enumerate(given))
    for i, item in items:
        if not re.match(FLAG, item):
            positional.append(item)
            continue
        written, equals, value = item.partition("=")
        flag = named(name, written, flags)
        following = given[i + 1] if i + 1 < len(given) else None
        if not equals and bool in flags[flag].kinds and str(following).lower() not in BOOLEANS:
            value = "True"
        elif not equals:
            value = _following(written, following)
            next(items)
        values[flag] = value
    return values, positional


def _following(written: str, following: str | None) -> str:
    if following is None or re.match(FLAG, following):
        raise ShortGPTError(f"{written} needs a value; write {written}=VALUE if it has dashes")
    return following


def _quoted(value: str, flag: Flag) -> str:
    """A value as fire reads it back: texts, and what fire cannot read, as they are."""
    if bool in flag.kinds:
        value = BOOLEANS.get(value.lower(), value)
    return repr(value) if str in flag.kinds or not _readable(value) else value


def _readable(value: str) -> bool:
    """Whether fire reads a value, which fails on sets of lists and on nesting that is too deep."""
    from fire.parser import DefaultParseValue

    try:
        DefaultParseValue(value)
    except (TypeError, RecursionError, MemoryError):
        return False
    return True


def named(command: str, written: str, flags: Mapping[str, Flag]) -> str:
    """The flag that a user means by --batch-size, by its older name, or by -n."""
    flag = written.lstrip("-").replace("-", "_")
    if not written.startswith("--") and len(flag) == 1:  # short for the only flag that begins so
        matches = [f for f in flags if f == flag] or [f for f in flags if f.startswith(flag)]
        if len(matches) == 1:
            return matches[0]
    also = {old: (new,) for old, new in ALSO.get(command, {}).items()}
    wanted = also.get(flag) or (flag, *ALSO_EVERYWHERE.get(flag, ()))
    exists = [f for f in wanted if f in flags]
    if not exists or not written.startswith("--"):
        if said := REMOVED.get((command, flag)):
            raise ShortGPTError(f"{command} {written} was removed: {said}")
        close = similar(f"--{flag}", [f"--{f}" for f in flags])
        raise ShortGPTError(f"{command} has no flag {written}{close}; see {command} --help")
    return exists[0]


def typed(command: Command) -> Command:
    """The command as a function of its flags, which are checked against their types first.

    Fire leaves text where a number belongs as text. ``none`` stands for None where allowed.
    """
    flags = flags_of(command)

    @wraps(command)
    def checked(**given: object) -> None:
        return command(**_grouped(command, flags, given))

    parameters = [_parameter(flag) for flag in flags.values()]
    # read by inspect, and so by fire, in place of the command's own
    vars(checked)["__signature__"] = inspect.Signature(parameters)
    return checked


def _parameter(flag: Flag) -> inspect.Parameter:
    default = inspect.Parameter.empty if flag.required else flag.default
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _grouped(
    command: Command, flags: Mapping[str, Flag], given: Mapping[str, object]
) -> dict[str, object]:
    """The command's own arguments: values of flags, those of a group in its dataclass.

    Raises:
        ShortGPTError: a value of another type, or a flag that counts only with another.
    """
    values = {name: _as(flags[name], value) for name, value in given.items()}
    defaults = {name: flag.default for name, flag in flags.items()}
    refuse_unused(command.__name__, values, defaults)
    own = {name: value for name, value in values.items() if flags[name].group is None}
    for group in {flag.group for flag in flags.values() if flag.group is not None}:
        part = {name: value for name, value in values.items() if flags[name].group == group}
        default = inspect.signature(command).parameters[group].default
        own[group] = replace(default, **part)
    return own


def _as(flag: Flag, value: object) -> object:
    """A value in one of the flag's types."""
    if object in flag.kinds:
        return value
    if NoneType in flag.kinds and (value is None or str(value).lower() == "none"):
        return None
    if str in flag.kinds:
        if value == "":
            raise ShortGPTError(f"--{flag.name} is empty")
        # a shell expands no ~ behind an equals sign; a prompt alone is no name of anything
        return str(value) if flag.name == "prompt" else os.path.expanduser(str(value))
    if float in flag.kinds and type(value) in (int, float):
        return _finite(flag, str(value))
    if type(value) not in flag.kinds:
        names: dict[object, str] = {int: "a whole number", float: "a number", bool: "True or False"}
        expected = " or ".join(names.get(kind, "none") for kind in flag.kinds)
        raise ShortGPTError(f"--{flag.name} expects {expected}, got {value!r}")
    if type(value) is int and abs(value) >= 2**63:
        raise ShortGPTError(f"--{flag.name} expects a number below 2**63, got {value}")
    return value


def _finite(flag: Flag, value: str) -> float:
    """A number of a setting that takes fractions."""
    if not math.isfinite(number := float(value)):
        raise ShortGPTError(f"--{flag.name} expects a finite number, got {value}")
    return number


def similar(word: str, words: Iterable[str]) -> str:
    """What the user may have meant, as the end of a message; empty if nothing is close."""
    close = get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""
