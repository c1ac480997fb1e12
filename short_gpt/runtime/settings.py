"""What a field of a settings class says of its flag: heading, placeholder, and what it needs.

Settings are frozen dataclasses. A class names its part of the help as ``HEADING``; what differs is
in a field's metadata, which `short_gpt.cli.flags` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field
from typing import Any, NamedTuple

READ, CHOOSE, RUN, WRITE = "what to read", "how to choose", "how to run", "what to write"
HEADINGS = (READ, CHOOSE, RUN, WRITE)
Values = Mapping[str, object]  # of all flags of a command, defaults included


class Needs(NamedTuple):
    """What a flag needs to have an effect."""

    what: str  # in words
    met: Callable[[Values], bool]  # whether a command's values have it, or it knows no such flag


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


def as_flags(text: str, known: Collection[str] | None = None) -> str:
    """A message whose settings, in backticks, are written as flags; None: all are."""

    def flag(match: re.Match[str]) -> str:
        return f"--{match[1]}" if known is None or match[1] in known else match[0]

    return re.sub(r"`(\w+)`", flag, text)
