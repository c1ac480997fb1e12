"""``python -m short_gpt`` and the console script ``short-gpt``."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from importlib import metadata
from types import NoneType
from typing import Any, get_args, get_type_hints

from llama.parallel import several_ranks
from short_gpt.cli import ALONE, COMMANDS
from short_gpt.runtime.abort import end_all
from short_gpt.runtime.errors import USER_ERRORS, ShortGPTError
from short_gpt.runtime.progress import first_rank


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 1 and one line on stderr if the user's input is at fault."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"short-gpt {metadata.version('short-gpt')}")
        return
    try:
        run(argv)
    except (Exception, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        line = said(error)
        if several_ranks():
            end_all(error, line=line, code=code)
        if line is None:
            raise
        print(line, file=sys.stderr)
        sys.exit(code)
    leave_group()


def said(error: BaseException) -> str | None:
    """The line that tells a user what went wrong; None where a traceback tells us."""
    if isinstance(error, KeyboardInterrupt):
        return "short-gpt: interrupted"
    if isinstance(error, USER_ERRORS) and not os.environ.get("SHORT_GPT_TRACEBACK"):
        return f"short-gpt: {error}"
    return None


def run(argv: list[str]) -> None:
    """Checks the arguments and gives them to fire."""
    os.environ.setdefault("PAGER", "cat")  # help goes to the terminal, not into a pager
    import fire

    argv = prepared(argv, COMMANDS)
    alone = argv[:1] == [] or argv[0] in ALONE or "--help" in argv
    if first_rank() or not alone:
        commands = {name: typed(command) for name, command in COMMANDS.items()}
        fire.Fire(commands, command=argv, name="short-gpt")


def leave_group() -> None:
    """Ends the process group of several ranks, if the command made one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def prepared(argv: list[str], commands: dict[str, Callable[..., None]]) -> list[str]:
    """The arguments, checked, in a form that fire cannot misread: ``--flag=value`` each.

    Fire would run the command first and complain about a mistyped flag afterwards, and it reads
    every value as Python: a path such as 2048 would arrive as a number, "a, b" as a tuple. Texts
    and paths are quoted for it here.

    Raises:
        ShortGPTError: an unknown command or flag, a flag without its value, or a missing argument.
    """
    if not argv or argv[0] in ("--help", "-h", "--"):
        return ["--help"] if argv else []
    name, given = argv[0], argv[1:]
    if name not in commands:
        raise ShortGPTError(f"no command {name!r}{_similar(name, commands)}; see --help")
    if "--help" in given or "-h" in given:
        return [name, "--help"]
    hints = get_type_hints(commands[name])
    parameters = inspect.signature(commands[name]).parameters
    values: dict[str, str] = {}
    positional: list[str] = []
    items = iter(enumerate(given))
    for i, item in items:
        if not re.match(r"--?[A-Za-z]", item):
            positional.append(item)
            continue
        written, equals, value = item.partition("=")
        flag = _flag(name, written, list(parameters))
        following = given[i + 1] if i + 1 < len(given) else None
        if not equals and _takes(hints[flag], bool) and str(following).lower() not in BOOLEANS:
            value = "True"
        elif not equals:
            if following is None or re.match(r"--?[A-Za-z]", following):
                raise ShortGPTError(
                    f"{written} needs a value; write {written}=VALUE if it has dashes"
                )
            value = following
            next(items)
        values[flag] = value
    free = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    free = [p for p in free if p.name not in values]
    if len(positional) > len(free):
        raise ShortGPTError(
            f"{name} takes {' '.join(_places(parameters.values()))}; "
            f"what is {positional[len(free)]!r}? Quote texts with spaces"
        )
    missing = [p.name.upper() for p in free[len(positional) :] if p.default is p.empty]
    if missing:
        raise ShortGPTError(f"{name} needs {' '.join(missing)}; see {name} --help")
    values |= {p.name: value for p, value in zip(free, positional, strict=False)}
    return [name, *(f"--{flag}={_quoted(value, hints[flag])}" for flag, value in values.items())]


BOOLEANS = {"true": "True", "false": "False", "yes": "True", "no": "False"}


def _takes(hint: Any, kind: type) -> bool:
    return kind in (hint, *get_args(hint))


def _quoted(value: str, hint: Any) -> str:
    if _takes(hint, bool):
        return BOOLEANS.get(value.lower(), value)
    if _takes(hint, str):
        return repr(value)
    return value


def _places(parameters: Iterable[inspect.Parameter]) -> list[str]:
    return [p.name.upper() for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _flag(name: str, given: str, parameters: list[str]) -> str:
    """The parameter that a flag such as --batch-size or -b names."""
    flag = given.lstrip("-").replace("-", "_")
    if not given.startswith("--") and len(flag) == 1:  # fire's short form
        matches = [p for p in parameters if p.startswith(flag)]
        if len(matches) == 1:
            return matches[0]
    if flag not in parameters or not given.startswith("--"):
        similar = _similar(f"--{flag}", [f"--{p}" for p in parameters])
        raise ShortGPTError(f"{name} has no flag {given}{similar}; see {name} --help")
    return flag


def typed(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with its arguments checked against their annotations first.

    Fire leaves text where a number belongs as text. ``none`` stands for None where allowed.
    """
    hints = get_type_hints(command)

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(command).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _as(hints[name], name, value)
        return command(*bound.args, **bound.kwargs)

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
        if value == "":
            raise ShortGPTError(f"--{name} is empty")
        return str(value)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        kinds = {int: "a whole number", float: "a number", bool: "True or False"}
        expected = " or ".join(kinds.get(kind, "none") for kind in allowed)
        raise ShortGPTError(f"--{name} expects {expected}, got {value!r}")
    return value


def _similar(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), n=1)
    return f"; did you mean {close[0]}?" if close else ""


if __name__ == "__main__":
    main()
