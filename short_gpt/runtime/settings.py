"""Settings: frozen dataclasses, whose fields are flags in the shell and arguments in Python.

A class names its part of the help as ``HEADING``. What differs is in a field's metadata, which
`short_gpt.cli.flags` reads: heading, placeholder, and what the flag needs. `takes_fields` lets a
function take the fields as arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from llama.errors import short_repr
from short_gpt.runtime.errors import ShortGPTError, check_numbers

P = ParamSpec("P")
T = TypeVar("T")

READ, CHOOSE, RUN, WRITE = "what to read", "how to choose", "how to run", "what to write"
HEADINGS = (READ, CHOOSE, RUN, WRITE)
Values = Mapping[str, object]  # of all flags of a command, defaults included


class Needs(NamedTuple):
    """What a flag needs to have an effect."""

    what: str  # in words
    met: Callable[[Values], bool]  # whether a command's values have it, or it knows no such flag
    commands: tuple[str, ...] | None = None  # that have this need; None is all


def needs_one_of(what: str, *names: str) -> Needs:
    """A need of one of several flags."""

    def met(values: Values) -> bool:
        known = [values[name] for name in names if name in values]
        return not known or any(value is not None for value in known)

    return Needs(what, met)


def setting(
    default: object,
    *,
    heading: str | None = None,
    value: str | None = None,
    flag: str | None = None,
    commands: tuple[str, ...] | None = None,
    needs: Needs | tuple[Needs, ...] = (),
    more: Mapping[str, str] | None = None,
) -> Any:
    """A field of a settings class.

    Args:
        heading: of `HEADINGS`; None is the class's.
        value: what stands for its value in the help, as in FILE; None is N for a number, else NAME.
        flag: its name as a flag; None is the field's.
        commands: that have it as a flag; None is all that take the class, none hides it.
        needs: what it needs to have an effect; the first unmet one is named.
        more: what else it means in some commands.
    """
    parts: dict[str, object] = {"heading": heading, "value": value, "flag": flag}
    parts |= {"commands": commands, "more": more or {}}
    needs = (needs,) if isinstance(needs, Needs) else needs
    return field(default=default, metadata={**parts, "needs": needs})


def flag_of(one: Field[Any], command: str) -> str | None:
    """The name of a field's flag in a command; None where it has none."""
    commands = one.metadata.get("commands")
    hidden = commands is not None and command not in commands
    return None if hidden else one.metadata.get("flag") or one.name


def takes_fields(command: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Lets a job take fields of its settings by their names: ``rank(model, data, size=512)``.

    Settings are the parameters whose defaults are dataclasses; None stands for the default. The job
    has a parameter ``**fields``, which it finds empty: they replace fields of the settings, which
    the ``command`` may know by other names, those of its flags.
    """

    def wrap(run: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(run)
        every = {name: one.default for name, one in signature.parameters.items()}
        groups: dict[str, Any] = {n: value for n, value in every.items() if is_dataclass(value)}
        known = _places(groups, command)
        # annotations are text; a float's bounds are its own settings' to check
        numbers = {
            (group, field.name)
            for group, own in groups.items()
            for field in fields(own)
            if str(field.type).startswith("float")
        }

        @wraps(run)
        def with_fields(*args: Any, **named: Any) -> T:
            arguments = signature.bind(*args, **named).arguments
            singles = arguments.pop("fields", {})
            for name in singles:
                if name not in known:
                    near = get_close_matches(name, [*known, *every], n=1)
                    hint = f": did you mean {near[0]}?" if near else f"; see help({run.__name__})"
                    raise ShortGPTError(f"{run.__name__} has no setting {name!r}{hint}")
                value = singles[name]
                if known[name] in numbers:
                    check_numbers(**{name: value})
            for group, default in groups.items():
                value = default if arguments.get(group) is None else arguments[group]
                if not isinstance(value, type(default)):  # of the field of this name, as of data
                    if group not in {field.name for field in fields(default)}:
                        name = next(name for name, (own, _) in known.items() if own == group)
                        raise ShortGPTError(
                            f"`{group}` = {short_repr(value)}: expected {type(default).__name__}, "
                            f"or its fields by their names, such as {name}=..."
                        )
                    value = replace(default, **{group: value})
                own = {known[n][1]: single for n, single in singles.items() if known[n][0] == group}
                arguments[group] = replace(value, **own)
            return run(**arguments)  # type: ignore[call-arg]

        return with_fields

    return wrap


def _places(groups: dict[str, Any], command: str) -> dict[str, tuple[str, str]]:
    """The parameter and field that a name stands for: of a flag, else of a field."""
    every = [(group, field) for group, value in groups.items() for field in fields(value)]
    flags = [(flag_of(field, command), group, field.name) for group, field in every]
    known = {flag: (group, name) for flag, group, name in flags if flag is not None}
    for flag, group, name in flags:  # a name that is another's flag is that one
        if flag is not None:
            known.setdefault(name, (group, name))
    return known


def as_flags(text: str, known: Collection[str] | None = None) -> str:
    """A message whose settings, in backticks, are written as flags; None: all are."""

    def flag(match: re.Match[str]) -> str:
        return f"--{match[1]}" if known is None or match[1] in known else match[0]

    return re.sub(r"`(\w+)`", flag, text)
