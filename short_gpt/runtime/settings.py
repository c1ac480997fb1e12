"""Settings: frozen dataclasses, whose fields are arguments in Python and flags in the shell.

A class of settings stands beside the work it sets and imports no torch, so that a help appears at
once. `setting` says what a field means; `flat` lets a job take the fields by their names.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields, replace
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from short_gpt.runtime.errors import ShortGPTError, check, check_numbers

T = TypeVar("T")
S = TypeVar("S", bound="Settings")

READ, CHOOSE, RUN, WRITE = "what to read", "how to choose", "how to run", "what to write"
HEADINGS = (READ, CHOOSE, RUN, WRITE)
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD


def setting(
    default: object,
    words: str,
    *,
    heading: str | None = None,
    value: str | None = None,
    rare: bool = False,
    needs: str | None = None,
    flag: bool = True,
) -> Any:
    """A field of a class of settings.

    Args:
        default: Value of the field.
        words: Meaning, for the help in the shell and in Python.
        heading: Part of the help, one of `HEADINGS`. Default: the class's.
        value: Placeholder in the help, as in FILE. Default: N for a number, else NAME.
        rare: Show the flag under ``--help all`` alone.
        needs: Name of another setting of the call, without which this one has no effect.
        flag: Take it in the shell too. Default: yes.
    """
    metadata = {"words": words, "heading": heading, "value": value, "rare": rare, "needs": needs}
    return field(default=default, metadata={**metadata, "flag": flag})


class Settings:
    """Base of the classes of settings."""

    HEADING: ClassVar[str] = RUN
    _left_out: frozenset[str] = frozenset()  # fields that a job does not take

    def without(self: S, *names: str) -> S:
        """The same settings for a job that does not take some fields: these keep their values."""
        assert {*names} <= {one.name for one in fields(self)}, names  # type: ignore[arg-type]
        return self.changed({}, self._left_out | {*names})

    def only(self: S, *names: str) -> S:
        """The same settings for a job that takes these fields alone."""
        every = {one.name for one in fields(self)}  # type: ignore[arg-type]
        return self.without(*every.difference(names))

    def changed(self: S, changes: Mapping[str, Any], left_out: frozenset[str] | None = None) -> S:
        """The settings with changes, for the same job or one that does not take other fields."""
        other = replace(self, **changes)  # type: ignore[type-var]
        object.__setattr__(other, "_left_out", self._left_out if left_out is None else left_out)
        return other

    def taken(self) -> list[Field[Any]]:
        """The fields that a job takes."""
        return [one for one in fields(self) if one.name not in self._left_out]  # type: ignore[arg-type]

    def parameters(self, positional: Collection[str] = ()) -> list[inspect.Parameter]:
        """The same as parameters of a job, keyword-only except for the ``positional`` ones."""
        types, parameters = get_type_hints(type(self)), list[inspect.Parameter]()
        for one in self.taken():
            named = one.name not in positional
            kind = inspect.Parameter.KEYWORD_ONLY if named else POSITIONAL
            how: Any = {"default": getattr(self, one.name), "annotation": types[one.name]}
            parameters.append(inspect.Parameter(one.name, kind, **how))
        return parameters


def flat(
    *positional: str, work: str | None = None
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Lets a job take the fields of its settings by their names: ``rank(model, data, size=512)``.

    Settings are the parameters whose defaults are of a class of settings. The job's signature and
    the Args of its docstring show the fields in their place, typed, keyword-only except for the
    ``positional`` ones. What it does is the function of its name in the module ``work``, which
    the first call imports; the job itself is then its signature and its docstring.
    """

    def wrap(job: Callable[..., T]) -> Callable[..., T]:
        own = inspect.signature(job).parameters
        groups = {n: p.default for n, p in own.items() if isinstance(p.default, Settings)}
        homes = {one.name: (name, one) for name, group in groups.items() for one in group.taken()}
        signature = _flattened(job, groups, positional)
        defaults = {name: p.default for name, p in own.items() if p.default is not p.empty}

        @wraps(job)
        def call(*args: Any, **named: Any) -> T:
            for name in named.keys() - signature.parameters.keys():
                near = get_close_matches(name, signature.parameters, n=1)
                hint = f": did you mean {near[0]}?" if near else f"; see help({job.__name__})"
                raise ShortGPTError(f"{job.__name__} has no setting {name!r}{hint}")
            arguments = signature.bind(*args, **named).arguments
            single = {name: arguments.pop(name) for name in [*arguments] if name in homes}
            for name, value in single.items():
                annotation = signature.parameters[name].annotation
                if float in (annotation, *get_args(annotation)):
                    check_numbers(**{name: value})
            for group, default in groups.items():
                mine = {name: value for name, value in single.items() if homes[name][0] == group}
                arguments[group] = default.changed(mine)
            for name, value in single.items():
                need = homes[name][1].metadata["needs"]
                if need is None or value is None or value is False:  # these ask for nothing
                    continue
                place = arguments[homes[need][0]] if need in homes else SimpleNamespace(**arguments)
                if getattr(place, need, None) is None:
                    raise ShortGPTError(
                        f"`{name}` has no effect without `{need}`: add that, or leave `{name}` out"
                    )
            if work is None:
                return job(**arguments)
            return getattr(import_module(work), job.__name__)(**{**defaults, **arguments})

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _documented(job, groups)
        call.settings = groups  # type: ignore[attr-defined]
        return call

    return wrap


def _flattened(
    job: Callable[..., object], groups: Mapping[str, Settings], positional: Collection[str]
) -> inspect.Signature:
    own = inspect.signature(job)
    annotations = {name: p.annotation for name, p in own.parameters.items()}  # not of the result
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), job.__globals__)
    every: list[inspect.Parameter] = []
    for name, parameter in own.parameters.items():
        if name in groups:
            every += groups[name].parameters(positional)
        else:
            every.append(parameter.replace(annotation=hints[name]))
    return own.replace(parameters=sorted(every, key=lambda p: p.kind))


def _documented(job: Callable[..., object], groups: Mapping[str, Settings]) -> str:
    """The docstring of a job, whose Args end with the fields of its settings.

    A field that the job describes itself is left out.
    """
    text, args, rest = inspect.cleandoc(job.__doc__ or "").partition("\nArgs:\n")
    own, _, rest = rest.partition("\n\n")
    every = [
        (one.name, _words(group, one))
        for group in groups.values()
        for one in group.taken()
        if one.name not in described(job)
    ]
    how: Any = {"subsequent_indent": " " * 8, "break_on_hyphens": False}
    wrapper = textwrap.TextWrapper(96, initial_indent="    ", **how)
    entries = [wrapper.fill(f"{name}: {words}") for name, words in every]
    return f"{text}\nArgs:\n" + "\n".join([*([own] if args else []), *entries]) + f"\n\n{rest}"


def _words(group: Settings, one: Field[Any]) -> str:
    """What a field means, without the class's default where the job has another."""
    words: str = one.metadata["words"]
    if getattr(group, one.name) == one.default:
        return words
    return re.sub(r" Default: .*?\.(?= |$)", "", words)


def described(thing: object) -> dict[str, str]:
    """The entries of a docstring's ``Args``, each in one line."""
    _, _, args = (inspect.getdoc(thing) or "").partition("\nArgs:\n")
    entries = re.split(r"^    (?=\w)", args.partition("\n\n")[0], flags=re.MULTILINE)
    pairs = (entry.partition(":") for entry in entries[1:])
    return {name: " ".join(text.split()) for name, _, text in pairs}


def as_flags(text: str, known: Collection[str] | None = None) -> str:
    """A message whose settings, in backticks, are written as flags; None: all are."""

    def flag(match: re.Match[str]) -> str:
        return f"--{match[1]}" if known is None or match[1] in known else match[0]

    return re.sub(r"`([a-z_]+)`", flag, text)


def listed(names: str | Iterable[str]) -> list[str]:
    """Names as a list, of a text with commas between, with or without spaces."""
    return [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]


def whole_numbers(
    numbers: object, name: str, example: str, *, what: str = "whole numbers", empty: bool = False
) -> list[int]:
    """One number or several as a list; ShortGPTError for anything else, and for an empty list.

    A string of numbers, as in "3 4", is several.
    """
    several = [numbers] if isinstance(numbers, int) else numbers
    if isinstance(numbers, str):
        listed_so = re.fullmatch(r"\s*\d{1,9}([\s,]+\d{1,9})*[\s,]*", numbers)
        several = [int(number) for number in re.findall(r"\d+", numbers)] if listed_so else None
    right = isinstance(several, Sequence) and all(type(i) is int for i in several)
    if not right or not (several or empty):
        raise ShortGPTError(f"expected {what} as in `{name}` {example}, got {numbers!r}")
    return list(several)  # type: ignore[call-overload]


def count_of(text: str | int, name: str) -> int:
    """A number of parameters or tokens, or of a text like "400k", "1.6M" or "1.2B".

    Example:
        >>> count_of("1.6M", "tokens")
        1600000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", str(text).strip().lower())
    check(match is not None, f"`{name}`", text, "a number, such as 400k, 1.6M or 1.2B")
    assert match is not None
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]])
