"""Where jobs save their work: a long run's state, a model on the hub; and requests to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from llama.files import check_writable
from short_gpt.runtime.progress import is_first_rank
from short_gpt.runtime.settings import WRITE, Settings, setting


class NotUploadedError(ConnectionError):
    """A written model could not be uploaded; ``result`` is what the job returns."""

    def __init__(self, message: str, result: object) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Running(Settings):
    """What a Python caller is told, and where a long run is saved; a command has its own."""

    state: str | PathLike[str] | None = setting(
        None, "File that the run is saved in, to be continued.", flag=False
    )
    notify: Callable[[str], object] | None = setting(
        None,
        "Called with what must be known before a long run starts, and how it goes.",
        flag=False,
    )

    def tell(self, message: str) -> None:
        if self.notify is not None:
            self.notify(message)

    def check(self) -> None:
        """Raises OSError where the run could not be saved."""
        if self.state is not None:
            check_writable(Path(self.state))


@dataclass(frozen=True)
class Saving(Settings):
    """How a model is written, and where it is uploaded."""

    HEADING: ClassVar = WRITE
    overwrite: bool = setting(False, "Replace an earlier output of the same kind.", rare=True)
    push_to_hub: str | None = setting(
        None,
        "Also upload the model, with its card, to this repository of the hub, as in USER/MODEL; "
        "after hf auth login. A model's weights there in other files are deleted.",
        value="REPO",
        rare=True,
    )

    def check(self, out: str | Path, format: str | None) -> None:
        """Raises what would prevent the upload, before the model is made."""
        if self.push_to_hub is not None:
            from short_gpt.checkpoints.hub import check_push

            check_push(self.push_to_hub, out, format)

    def push(self, out: Path, result: object) -> str | None:
        """Uploads a model that was written; its address, or None where none was asked for."""
        from short_gpt.checkpoints.hub import push

        if (repo := self.push_to_hub) is None or not is_first_rank():
            return None
        try:
            return push(out, repo)
        except ConnectionError as error:
            line = f"{error}; it is written: hf upload {repo} {out}"
            raise NotUploadedError(line, result) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM and a closed terminal count as Ctrl-C, so that work is saved."""
    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # nohup ignores SIGHUP
        if number is None or signal.getsignal(number) in (None, signal.SIG_IGN):
            continue
        with suppress(ValueError):  # only the main thread may
            before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
