"""Processes that need no seconds to import torch: one alone, or the ranks of a run.

A server imports what is not ours, once, and the processes are forked from it. Each imports our own
packages anew, has the environment, the folder and the path of the test that starts it, and prints
into files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

# what takes seconds to import and is not ours
HEAVY = ["torch", "fairscale.nn.model_parallel", "transformers.models.llama.modeling_llama"]
_FORKS = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_FORKS.set_forkserver_preload(HEAVY)


class Ended(NamedTuple):
    """What became of a run: each process's exit code, and what they printed."""

    codes: list[int]
    out: str
    err: str


class Running:
    """Processes of one run.

    Args:
        folder: gets what they print.
        environments: for each process, the variables that differ from those here.
        target, args: what each of them calls: a function that they can import by its name.
        store: kept until they end.
    """

    def __init__(
        self,
        folder: Path,
        environments: list[Mapping[str, str]],
        target: Callable[..., object],
        args: tuple[object, ...],
        store: object = None,
    ) -> None:
        self._printed, self._store = [folder / "stdout", folder / "stderr"], store
        folder.mkdir()
        self.processes: list[BaseProcess] = []
        for own in environments:
            given = ({**os.environ, **own}, self._printed, target, args)
            self.processes.append(_FORKS.Process(target=_enter, args=given, daemon=True))
            self.processes[-1].start()

    def end(self, *, launcher: bool = True, seconds: float = 120) -> Ended:
        """Waits for all; ends the others where one fails, as a launcher does."""
        limit, asked = time.monotonic() + seconds, not launcher
        while running := [p for p in self.processes if p.exitcode is None]:
            running[0].join(0.05)
            if time.monotonic() > limit:
                for process in running:
                    process.kill()
            elif not asked and any(process.exitcode for process in self.processes):
                asked = True
                for process in running:
                    process.terminate()
        return Ended(
            [process.exitcode or 0 for process in self.processes],
            *(path.read_text() if path.exists() else "" for path in self._printed),
        )


def _enter(
    environment: Mapping[str, str],
    printed: list[Path],
    target: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(printed, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    target(*args)


def alone(folder: Path, target: Callable[..., object], *args: object) -> Running:
    """One process that calls the function; ``folder`` is new, and gets what it prints."""
    return Running(folder, [{}], target, args)


def started(folder: Path, target: Callable[..., object], *args: object) -> Running:
    """One that has told by a file, its last argument, that it has come so far."""
    ready = folder.with_suffix(".ready")
    running = alone(folder, target, *args, ready)
    limit = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < limit and running.processes[0].exitcode is None, folder
        time.sleep(0.02)
    return running


def ranks(count: int, folder: Path, target: Callable[..., object], *args: object) -> Running:
    """Ranks that call the function, with the variables and the store that torchrun gives them."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    own = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return Running(folder, own, target, args, store)


WRITES = {"mkdir", "open", "write", "replace", "rename", "unlink", "rmdir", "truncate"}
WRITES |= {"serialize_file", "flock", "close"}


def killed_at(call: int, work: Callable[[], object]) -> int | None:
    """Does something in another process, which is killed in front of a call that may write.

    Returns:
        The calls of a process that came to its end before; None of one that was killed.
    """
    child = os.fork()
    if not child:
        tqdm.set_lock(threading.RLock())  # whose own may be held here
        count = [0]

        def look(_: object, event: str, function: object) -> None:
            if event == "c_call" and getattr(function, "__name__", "") in WRITES:
                count[0] += 1
                if count[0] == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 255
        try:
            sys.setprofile(look)
            work()
            sys.setprofile(None)
            code = min(count[0] // 10, 254)
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) < 255, "the process failed"
    return 10 * os.WEXITSTATUS(status)
