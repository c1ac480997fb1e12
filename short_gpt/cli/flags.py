"""What a command takes, read from its signature: flags, their types, defaults and descriptions.

A parameter that is a dataclass is a group: each of its fields is a flag of its own, so that flags
which several commands share are written down once. `short_gpt.runtime.settings` has what a field
says of its flag.
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
from typing import get_args, get_type_hints

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import CHOOSE, READ, RUN, WRITE, Needs, flag_of

Command = Callable[..., None]
BOOLEANS = {"true": True, "false": False, "yes": True, "no": False}
DASHED = r"--?[A-Za-z]"

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
    "n_prune_layers": "n",
    "ckpt_dir": "model",
    "model_dir": "model",
    "out_dir": "out",
    "out": "json",
}


@dataclass(frozen=True)
class Flag:
    """One argument of a command.

    Attributes:
        name: as in ``--name``.
        kinds: types that a value may have; ``object`` is any.
        default: None where there is none too; see ``required``.
        heading: of the part of the help that it stands in.
        positional: whether its value may stand without its name.
        required: whether it has no default.
        text: what it means.
        value: what stands for its value in the help.
        needs: what it does nothing without.
        place: the parameter whose field it is, and the field; None for a parameter itself.
    """

    name: str
    kinds: tuple[object, ...]
    default: object
    heading: str
    positional: bool = False
    required: bool = False
    text: str = ""
    value: str = "NAME"
    needs: tuple[Needs, ...] = ()
    place: tuple[str, str] | None = None

    def read(self, text: str) -> object:
        """The value that a text stands for; ShortGPTError if it is of none of the types."""
        if NoneType in self.kinds and text.lower() == "none":
            return None
        if str in self.kinds:
            if text == "":
                raise ShortGPTError(f"--{self.name} is empty")
            # a shell expands no ~ after an equals sign; a prompt alone is no name of anything
            return text if self.name == "prompt" else os.path.expanduser(text)
        value: object = BOOLEANS.get(text.lower(), text) if bool in self.kinds else text
        value = _python(value) if isinstance(value, str) else value
        if object in self.kinds:
            return value
        if float in self.kinds and type(value) in (int, float):
            return self._finite(str(value))
        if type(value) not in self.kinds:
            names: dict[object, str] = {int: "a whole number", float: "a number"}
            names |= {bool: "True or False"}
            expected = " or ".join(names.get(kind, "none") for kind in self.kinds)
            raise ShortGPTError(f"--{self.name} expects {expected}, got {value!r}")
        if type(value) is int and abs(value) >= 2**63:
            raise ShortGPTError(f"--{self.name} expects a number below 2**63, got {value}")
        return value

    def _finite(self, value: str) -> float:
        if not math.isfinite(number := float(value)):
            raise ShortGPTError(f"--{self.name} expects a finite number, got {value}")
        return number


def _python(text: str) -> object:
    """A text as fire reads it; as it is where fire fails, as on sets of lists and deep nesting."""
    from fire.parser import DefaultParseValue

    try:
        return DefaultParseValue(text)
    except (TypeError, RecursionError, MemoryError):
        return text


def flags_of(command: Command) -> dict[str, Flag]:
    """All arguments of a command by their names, in the order of its signature."""
    hints, texts = get_type_hints(command), described(command)
    flags: dict[str, Flag] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        default = parameter.default
        if is_dataclass(default) and not isinstance(default, type):
            flags |= _fields(command.__name__, name, default)
            continue
        positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        heading = WRITE if name in ("out", "overwrite") else READ if positional else CHOOSE
        required = default is parameter.empty
        flags[name] = Flag(
            name,
            get_args(hints.get(name)) or (hints.get(name, object),),
            None if required else default,
            heading,
            positional,
            required,
            texts.get(name, ""),
        )
    return flags


def _fields(command: str, group: str, defaults: object) -> dict[str, Flag]:
    """The fields of a group that are flags of the command."""
    kind = type(defaults)
    hints, texts = get_type_hints(kind), described(kind)
    flags = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if (name := flag_of(field, command)) is not None:
            said = field.metadata
            heading = str(said.get("heading") or getattr(kind, "HEADING", RUN))
            flags[name] = Flag(
                name,
                get_args(hints[field.name]) or (hints[field.name],),
                getattr(defaults, field.name),
                WRITE if name == "overwrite" else heading,
                text=texts.get(field.name, ""),
                value=said.get("value") or "NAME",
                needs=said.get("needs", ()),
                place=(group, field.name),
            )
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


def prepared(argv: list[str], commands: Mapping[str, Command]) -> list[str]:
    """The arguments, checked, in a form that fire cannot misread: ``--flag=value`` each.

    Fire would run the command first and complain about a mistyped flag afterwards.

    Raises:
        ShortGPTError: an unknown command or flag, a flag without its value, or a missing argument.
    """
    name, words = argv[0], argv[1:]
    flags = flags_of(commands[name])
    values, positional = _split(name, words, flags)
    free = [f for f in flags.values() if f.positional and f.name not in values]
    if len(positional) > len(free):
        places = " ".join(f.name.upper() for f in flags.values() if f.positional)
        raise ShortGPTError(
            f"{name} takes {places}; what is {positional[len(free)]!r}? Quote texts with spaces"
        )
    if missing := [f.name.upper() for f in free[len(positional) :] if f.required]:
        raise ShortGPTError(f"{name} needs {' '.join(missing)}; see {name} --help")
    values |= {f.name: value for f, value in zip(free, positional, strict=False)}
    return [name, *(f"--{flag}={value}" for flag, value in values.items())]


def _split(
    command: str, words: list[str], flags: Mapping[str, Flag]
) -> tuple[dict[str, str], list[str]]:
    """Values by flag, and those without one."""
    values: dict[str, str] = {}
    positional: list[str] = []
    rest = iter(enumerate(words))
    for i, word in rest:
        if not re.match(DASHED, word):
            positional.append(word)
            continue
        written, equals, value = word.partition("=")
        flag = named(command, written, flags)
        following = words[i + 1] if i + 1 < len(words) else None
        if not equals and bool in flags[flag].kinds and str(following).lower() not in BOOLEANS:
            value = "True"
        elif not equals:
            if following is None or re.match(DASHED, following):
                raise ShortGPTError(
                    f"{written} needs a value; write {written}=VALUE if it has dashes"
                )
            value, _ = following, next(rest)
        values[flag] = value
    return values, positional


def named(command: str, written: str, flags: Mapping[str, Flag]) -> str:
    """The flag that a user means by --batch-size, by its older name, or by -n."""
    flag = written.lstrip("-").replace("-", "_")
    if not written.startswith("--") and len(flag) == 1:  # short for the only flag that begins so
        matches = [f for f in flags if f == flag] or [f for f in flags if f.startswith(flag)]
        if len(matches) == 1:
            return matches[0]
    own = ALSO.get(command, {}).get(flag)
    names = [own] if own else [flag, ALSO_EVERYWHERE.get(flag)]
    exists = [f for f in names if f in flags]
    if not exists or not written.startswith("--"):
        if said := REMOVED.get((command, flag)):
            raise ShortGPTError(f"{command} {written} was removed: {said}")
        close = similar(f"--{flag}", [f"--{f}" for f in flags])
        raise ShortGPTError(f"{command} has no flag {written}{close}; see {command} --help")
    return str(exists[0])


def typed(command: Command) -> Command:
    """The command as a function of its flags, each of which reads its own text.

    Raises:
        ShortGPTError: when called, for a value of another type, or a flag without what it needs.
    """
    from fire.decorators import SetParseFns

    flags = flags_of(command)
    defaults = {p.name: p.default for p in inspect.signature(command).parameters.values()}

    @wraps(command)
    def checked(**values: object) -> None:
        refuse_unused(flags, values)
        places = {name: flags[name].place or (name, "") for name in values}
        own = {group: values[name] for name, (group, field) in places.items() if not field}
        for group in {flag.place[0] for flag in flags.values() if flag.place}:
            part = {f: values[name] for name, (g, f) in places.items() if g == group and f}
            own[group] = replace(defaults[group], **part)
        command(**own)

    own, empty = inspect.Parameter, inspect.Parameter.empty
    parameters = [
        own(f.name, own.KEYWORD_ONLY, default=empty if f.required else f.default)
        for f in flags.values()
    ]
    # read by inspect, and so by fire, in place of the command's own
    vars(checked)["__signature__"] = inspect.Signature(parameters)
    return SetParseFns(**{name: flag.read for name, flag in flags.items()})(checked)


def refuse_unused(flags: Mapping[str, Flag], values: Mapping[str, object]) -> None:
    """Raises ShortGPTError for a flag that does nothing without another.

    Args:
        flags: of the command.
        values: of the flags that a user wrote; None and False ask for nothing.
    """
    every = {name: flag.default for name, flag in flags.items()} | {**values}
    for name, value in values.items():
        unmet = [need.what for need in flags[name].needs if not need.met(every)]
        if unmet and value is not None and value is not False:
            raise ShortGPTError(
                f"--{name} has no effect without {unmet[0]}: add that, or leave --{name} out"
            )


def similar(word: str, words: Iterable[str]) -> str:
    """What the user may have meant, as the end of a message; empty if nothing is close."""
    close = get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""
