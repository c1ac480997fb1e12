"""Where jobs save their work: a long run's state, a model on the hub; and requests to end."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from llama.files import check_writable, is_stream
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import is_first_rank
from short_gpt.runtime.settings import WRITE, needs_one_of, setting
from short_gpt.wrappers.options import AUTO, TOKENIZER, OpenOptions

NAMED = needs_one_of("`state` or `json`", "state", "json")


@dataclass(frozen=True)
class Saving:
    """Where and how often a run is saved, to be continued.

    Args:
        state: file that the run is saved in and continued from; if not given, that of the result
            with .state appended to its name.
        save_every: seconds between two saves; 0 saves after every batch.
    """

    HEADING: ClassVar = WRITE
    state: str | None = setting(None, value="FILE")
    save_every: float = setting(120.0, commands=("rank", "reproduce"), needs=NAMED)

    def beside(self, result: str | None) -> Saving:
        """The same, by default with a file next to the result's; a pipe or device has none."""
        named = self.state is not None or result in (None, "-") or is_stream(Path(str(result)))
        return self if named else replace(self, state=f"{result}.state")

    def check(self) -> None:
        """Raises OSError where the file could not be written."""
        if self.state is not None:
            check_writable(Path(self.state))

    def __post_init__(self) -> None:
        if not 0 <= self.save_every < math.inf:
            raise ShortGPTError(
                f"`save_every` {self.save_every}: expected seconds, 0 to save after every batch"
            )


@dataclass(frozen=True)
class Hub:
    """Where a written model is uploaded.

    Args:
        push_to_hub: also upload the model, with its card, to this repository of the hub, as in
            USER/MODEL; after hf auth login. A model's weights there in other files are deleted.
        private: whether a repository that is made for it is private.
    """

    HEADING: ClassVar = WRITE
    push_to_hub: str | None = setting(None, value="REPO")
    private: bool = setting(False, needs=needs_one_of("`push_to_hub`", "push_to_hub"))

    def check(self, out: str | Path, format: str | None) -> None:
        """Raises what would prevent the upload, before the model is made."""
        if self.push_to_hub is not None:
            from short_gpt.checkpoints.hub import check_push

            check_push(self.push_to_hub, out, format)

    def later(self) -> Hub:
        """The same, also checked early, for a job that leaves the upload to its caller."""
        return _Later(self.push_to_hub, self.private)

    def push(self, out: Path) -> str | None:
        """Uploads a model that was written; its address, or None where none was asked for."""
        from short_gpt.checkpoints.hub import push

        if (repo := self.push_to_hub) is None or not is_first_rank():
            return None
        try:
            return push(out, repo, private=self.private)
        except ConnectionError as error:
            raise ConnectionError(f"{error}; it is written: hf upload {repo} {out}") from error


class _Later(Hub):
    def push(self, out: Path) -> None:
        """Uploads nothing."""


@dataclass(frozen=True)
class Conversion:
    """How a converted model is written.

    Args:
        to: the format to write: meta, hf or gguf. If not given, gguf where OUT ends with .gguf,
            else Meta's; Hugging Face's from Meta's and from a GGUF file that is not a Llama.
        type: of matrices in GGUF, from another format: f32, f16, bf16 or q8_0; the source's if not
            given.
        dtype: of the weights written for Meta, or read from GGUF; the source's if not given,
            float32 from GGUF, which keeps what quantized weights stand for exactly.
        shards: write Meta's format in this many files. The embedding stays cut as it is; that of
            one file is cut by vocabulary if that is Llama 3's or tied to the output head, else by
            width, as Llama 2's. Any number of files runs on any number of ranks all the same.
        tokenizer_path: tokenizer of a Meta checkpoint; looked for beside it if not given.
        trust_remote_code: run the Python files that come with a Hugging Face model, to prove the
            result; look at them first.
        verify: prove the result by loading source and result, one after the other. If not given,
            yes, but no from Meta's to Meta's and to GGUF. Files of these two formats are read again
            and compared with what was written in any case.
        overwrite: replace an earlier conversion.
    """

    HEADING: ClassVar = WRITE
    to: str | None = None
    type: str | None = None
    dtype: str | None = None
    shards: int | None = None
    tokenizer_path: str | None = setting(None, value="FILE", needs=TOKENIZER)
    trust_remote_code: bool = False
    verify: bool | None = None
    overwrite: bool = False


def as_begun(opening: OpenOptions, *states: str | Path | None) -> OpenOptions:
    """The options with the precision of a continued run, where `auto` would choose one."""
    from short_gpt.runtime.state import USUAL, read_record

    for path in states if opening.precision == AUTO else ():
        run = None
        with suppress(ShortGPTError):  # a damaged state is refused when it is continued
            run = read_record(path).get("run") if path and Path(path).is_file() else None
        if isinstance(run, dict):
            return replace(opening, precision=str({**USUAL, **run}["precision"]))
    return opening


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGTERM and a closed terminal count as Ctrl-C, so that work is saved."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # nohup ignores SIGHUP
        if number is None or signal.getsignal(number) in (None, signal.SIG_IGN):
            continue
        with suppress(ValueError):  # only the main thread may
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
