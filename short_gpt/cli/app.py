"""``python -m short_gpt`` and the console script ``short-gpt``: all that is wrapped around fire."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from traceback import clear_frames

from llama.ranks import several_ranks
from short_gpt.cli import ALONE, COMMANDS, REMOVED
from short_gpt.cli.flags import flags_of, prepared, similar, typed
from short_gpt.cli.help import help_of, overview
from short_gpt.cli.streams import lenient
from short_gpt.runtime.errors import (
    USER_ERRORS,
    NotSavedError,
    ShortGPTError,
    one_line,
    shortage,
)
from short_gpt.runtime.progress import first_rank

HELP = ("--help", "-h")


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 1 and one line on stderr if the user's input is at fault."""
    argv = sys.argv[1:] if argv is None else argv
    lenient()
    try:
        run(argv)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        line = said(error, argv)
        if several_ranks():
            from short_gpt.runtime.replicas import end_all

            end_all(error, line=line, code=code)
        if line is None:
            raise
        clear_frames(error.__traceback__)  # they hold the locks of states
        print(line, file=sys.stderr)
        sys.exit(code)
    leave_group()


def said(error: BaseException, argv: Sequence[str] = ()) -> str | None:
    """The line that tells a user what went wrong; None where a traceback tells us.

    A setting that a message puts in backticks is named as the command's flag; so is one that it
    begins with, as in ``counts = 0``, where the flag was given.
    """
    if isinstance(error, KeyboardInterrupt):
        return "short-gpt: interrupted"
    if os.environ.get("SHORT_GPT_TRACEBACK"):
        return None
    if isinstance(error, NotSavedError):
        line = one_line(f"short-gpt: {in_shell(str(error), argv)}")
        return f"{line}: {shlex.join(['short-gpt', *argv])}"
    short = shortage(error)
    if short is not None:
        return one_line(f"short-gpt: {short}")
    if not isinstance(error, USER_ERRORS):
        return None
    name = str(error).split(" = ")[0]
    given = any(part.split("=")[0] == f"--{name}" for part in argv)
    return one_line(f"short-gpt: {'--' * given}{in_shell(str(error), argv)}")


def in_shell(message: str, argv: Sequence[str]) -> str:
    """A message in the shell's words: settings in backticks become flags of the command.

    Args:
        message: in Python's words, as in "`n` chooses from `scores`".
        argv: of the command.
    """
    flags = flags_of(COMMANDS[argv[0]]) if argv and argv[0] in COMMANDS else {}
    return re.sub(r"`(\w+)`", lambda m: f"--{m[1]}" if m[1] in flags else m[0], message)


def run(argv: list[str]) -> None:
    """Answers what needs no command; else checks the arguments and gives them to fire."""
    text = answer(argv)
    if text is not None:
        if first_rank():
            print(text)
        return
    arguments = prepared(argv, COMMANDS)
    if not first_rank() and argv[0] in ALONE:
        return
    import fire

    fire.Fire({argv[0]: typed(COMMANDS[argv[0]])}, command=arguments, name="short-gpt")


def answer(argv: list[str]) -> str | None:
    """What is printed in the place of a run: the version or a help; None where a command runs.

    Raises:
        ShortGPTError: there is no such command.
    """
    if argv == ["--version"]:
        from importlib import metadata

        return f"short-gpt {metadata.version('short-gpt')}"
    if not argv or argv[0] in (*HELP, "--"):
        return overview(COMMANDS)
    name = argv[0]
    if name in REMOVED:
        raise ShortGPTError(f"the command {name} was removed: {REMOVED[name]}")
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ShortGPTError(f"no command {name!r}{similar(name, COMMANDS)}; there are {known}")
    return help_of(name, COMMANDS[name]) if {*HELP} & {*argv} else None


def leave_group() -> None:
    """Ends the process group of several ranks, if the command made one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
