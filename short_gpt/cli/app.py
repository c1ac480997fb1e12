"""``python -m short_gpt`` and the console script ``short-gpt``: helps, commands and errors."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from traceback import clear_frames
from typing import TextIO

from llama.ranks import environment, is_distributed
from short_gpt.cli.commands import COMMANDS, STDOUT, call
from short_gpt.cli.flags import flags_of, help_of, overview, prepared, similar, values_of
from short_gpt.runtime.errors import USER_ERRORS, NotSavedError, ShortGPTError, one_line, shortage
from short_gpt.runtime.progress import be_quiet, is_first_rank
from short_gpt.runtime.settings import as_flags


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 1 and one line on stderr if the user's input is at fault."""
    argv = sys.argv[1:] if argv is None else argv
    sys.stdout, sys.stderr = lenient(sys.stdout), lenient(sys.stderr)
    try:
        run(argv)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        line = message_of(error, argv)
        if is_distributed():
            from short_gpt.runtime.replicas import end_all

            end_all(error, line=line, code=code)
        if line is None:
            raise
        clear_frames(error.__traceback__)  # they hold the locks of states
        print(line, file=sys.stderr)
        sys.exit(code)
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def run(argv: list[str]) -> None:
    """Prints the version or a help, or runs the command."""
    be_quiet("--quiet" in argv)
    argv = [word for word in argv if word != "--quiet"]
    if valued := [word for word in argv if word.startswith("--quiet=")]:
        raise ShortGPTError(f"--quiet takes no value, got {valued[0]}")
    if (text := answer(argv)) is None:
        texts = prepared(argv, COMMANDS)
        single = COMMANDS[argv[0]].alone  # it waits for no other rank: these have ended
        if is_first_rank() or not single:
            stdout, alone = sys.stdout, texts.get("json") == STDOUT
            ranks = environment("WORLD_SIZE", None) if single else nullcontext()
            # a result on stdout is alone there
            with redirect_stdout(sys.stderr) if alone else nullcontext(), ranks:
                call(argv[0], values_of(COMMANDS[argv[0]], texts), stdout)
    elif is_first_rank():
        print(text)


def answer(argv: list[str]) -> str | None:
    """The version or a help; None where a command runs, ShortGPTError where there is none."""
    if argv == ["--version"]:
        from importlib import metadata

        return f"short-gpt {metadata.version('short-gpt')}"
    if argv[:1] == ["help"]:
        argv = [*(name for name in argv[1:2] if name != "help"), "--help"]
    if not argv or argv[0] in ("--help", "-h", "--"):
        return overview(COMMANDS)
    name = argv[0]
    if name not in COMMANDS:
        known = f"; there are {', '.join(COMMANDS)}"
        raise ShortGPTError(f"no command {name!r}{similar(name, COMMANDS) or known}")
    for word in {"--help", "-h"} & {*argv}:
        whole = argv[argv.index(word) + 1 :][:1] == ["all"]
        return help_of(name, COMMANDS[name], whole=whole)
    return None


def message_of(error: BaseException, argv: Sequence[str] = ()) -> str | None:
    """The line that tells a user what went wrong; None where a traceback does."""
    if isinstance(error, KeyboardInterrupt):
        return "short-gpt: interrupted"
    if os.environ.get("SHORT_GPT_TRACEBACK"):
        return None
    if isinstance(error, NotSavedError):
        line = one_line(f"short-gpt: {in_shell(str(error), argv)}")
        return f"{line}: {shlex.join(['short-gpt', *argv])}"
    if (text := shortage(error)) is None and isinstance(error, USER_ERRORS):
        text = in_shell(str(error), argv)
    return None if text is None else one_line(f"short-gpt: {text}")


def in_shell(message: str, argv: Sequence[str]) -> str:
    """A message whose settings are flags: `n` in backticks, or at its beginning, as in n = 0."""
    flags = flags_of(COMMANDS[argv[0]]) if argv and argv[0] in COMMANDS else {}
    name = message.split(" = ")[0]
    dashes = "--" if any(part.split("=")[0] == f"--{name}" for part in argv) else ""
    return dashes + as_flags(message, flags)


class PipeSafeStream(io.TextIOWrapper):
    """A stream that drops its output once the reader has closed the pipe."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self.flush()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # also what is still in the buffer
            os.close(null)
            super().flush()


def lenient(stream: TextIO | None) -> TextIO:
    """The stream, or one in its place that takes any text: a run goes on without a reader."""
    if stream is None:  # closed before the start: 2>&-
        return open(os.devnull, "w", encoding="utf-8")
    own = stream in (sys.__stdout__, sys.__stderr__)  # not one that somebody put in its place
    if own and isinstance(stream, io.TextIOWrapper) and type(stream) is not PipeSafeStream:
        lines, code = stream.line_buffering, stream.encoding
        buffer = os.fdopen(stream.fileno(), "wb", closefd=False)
        return PipeSafeStream(buffer, code, errors="backslashreplace", line_buffering=lines)
    return stream
