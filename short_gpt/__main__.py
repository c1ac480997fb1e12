"""``python -m short_gpt`` and the console script ``short-gpt``."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from importlib import metadata
from types import NoneType
from typing import Any, get_args, get_type_hints

# What a user can cause; anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 1 and one line on stderr if the user's input is at fault."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("PAGER", "cat")  # help goes to the terminal, not into a pager
    import fire

    from short_gpt.cli import ALONE, COMMANDS
    from short_gpt.progress import first_rank

    if argv == ["--version"]:
        print(f"short-gpt {metadata.version('short-gpt')}")
        return
    try:
        check(argv, COMMANDS)
        if not first_rank() and argv[:1] and argv[0] in ALONE:
            return
        commands = {name: typed(command) for name, command in COMMANDS.items()}
        fire.Fire(commands, command=argv, name="short-gpt")
    except USER_ERRORS as error:
        if os.environ.get("SHORT_GPT_TRACEBACK"):
            raise
        print(f"short-gpt: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("short-gpt: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        leave_group()


def leave_group() -> None:
    """Ends the process group of several ranks, if the command made one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def check(argv: list[str], commands: dict[str, Callable[..., None]]) -> None:
    """Raises ValueError for an unknown command or flag, or a missing argument.

    Fire would run the command first and complain about a mistyped flag afterwards.
    """
    if not argv or argv[0] in ("--help", "-h", "--"):
        return
    if argv[0] not in commands:
        raise ValueError(f"no command {argv[0]!r}{_similar(argv[0], commands)}; see --help")
    name, given = argv[0], argv[1:]
    if "--help" in given or "-h" in given:
        return
    parameters = inspect.signature(commands[name]).parameters
    positional: list[str] = []
    named: set[str] = set()
    waiting = False  # whether the flag before may still take a value
    for item in given:
        if re.match(r"--?[A-Za-z]", item):
            named.add(_flag(name, item.split("=")[0], parameters))
            waiting = "=" not in item
        elif waiting:
            waiting = False
        else:
            positional.append(item)
    _check_positional(name, parameters, positional, named)


def _flag(name: str, given: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """The parameter that a flag such as --batch-size or -b names."""
    flag = given.lstrip("-").replace("-", "_")
    if not given.startswith("--") and len(flag) == 1:  # fire's short form
        matches = [p for p in parameters if p.startswith(flag)]
        if len(matches) == 1:
            return matches[0]
    if flag not in parameters or not given.startswith("--"):
        similar = _similar(f"--{flag}", [f"--{p}" for p in parameters])
        raise ValueError(f"{name} has no flag {given}{similar}; see {name} --help")
    return flag


def _check_positional(
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    positional: list[str],
    named: set[str],
) -> None:
    places = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    free = [p for p in places if p.name not in named]
    if len(positional) > len(free):
        raise ValueError(
            f"{name} takes {' '.join(p.name.upper() for p in places)}; "
            f"what is {positional[len(free)]!r}? Quote texts with spaces"
        )
    missing = [p.name.upper() for p in free[len(positional) :] if p.default is p.empty]
    if missing:
        raise ValueError(f"{name} needs {' '.join(missing)}; see {name} --help")


def typed(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with its arguments checked against their annotations first.

    Fire reads every argument as Python: a path such as 2048 would arrive as a number, "a, b" as
    a tuple, and text where a number belongs stays text. ``none`` stands for None where allowed.
    """
    from fire.decorators import SetParseFns

    hints = get_type_hints(command)
    hints.pop("return", None)

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(command).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _as(hints[name], name, value)
        return command(*bound.args, **bound.kwargs)

    # texts and paths are taken as they are, not read as Python
    as_given = {name: str for name, hint in hints.items() if str in (hint, *get_args(hint))}
    checked = SetParseFns(**as_given)(checked)
    # what the help shows as types: str for str | None
    signature = inspect.signature(command)
    shown = [
        p.replace(annotation=(get_args(hints[name]) or (hints[name],))[0])
        for name, p in signature.parameters.items()
    ]
    checked.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return checked


def _as(hint: Any, name: str, value: Any) -> Any:
    allowed = get_args(hint) or (hint,)
    if Any in allowed:
        return value
    if NoneType in allowed and (value is None or str(value).lower() == "none"):
        return None
    if str in allowed:
        return str(value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        kinds = {int: "a whole number", float: "a number", bool: "True or False"}
        expected = " or ".join(kinds.get(kind, "none") for kind in allowed)
        raise ValueError(f"--{name} expects {expected}, got {value!r}")
    return value


def _similar(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


if __name__ == "__main__":
    main()
