"""Wrong programs that the tests must notice: one line of the library is changed, some must fail.

    python tests/mutants.py                      # all
    python tests/mutants.py --share 3 --seed 7   # a third, drawn by the seed
    python tests/mutants.py --only stopping      # those whose file, lines or tests say so

`mutant_table.py` lists them. Each is put into a copy of the tree, never into the checkout, and the
tests that guard its line run there. Who survives is listed, and the exit code is 1: a test is
missing. So it is where a line is not found, or where a test fails on the tree as it is.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mutant_table import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("short_gpt", "llama", "tests", "benchmarks", "pyproject.toml")
WORKERS, LIMIT = 2, 300  # processes, and seconds for one mutant's tests
# what takes seconds to import and is not ours: once here, not in every mutant's process
HEAVY = (
    "torch",
    "scipy.stats",
    "hypothesis",
    "transformers",
    "peft",
    "fairscale.nn.model_parallel",
)
HEAVY += ("transformers.models.llama.modeling_llama",)
KILLED, SURVIVED = "killed", "SURVIVED"
NOT_FOUND = "LINE NOT FOUND"


class Mutant(NamedTuple):
    """One wrong line.

    Attributes:
        file: that has it, from the root.
        old, new: a part of the file that it has once, and what stands there instead.
        tests: node ids, of which at least one must fail.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())}  ->  {' '.join(self.new.split())}"


def listed() -> list[Mutant]:
    """All of `mutant_table`."""
    found = []
    for section in SECTIONS:
        for old, new, test in section.rows:
            node = test if "::" in test else f"{section.tests}::{test}"
            found.append(Mutant(section.file, old, new, (node,)))
    return found


class Outcome(NamedTuple):
    """What became of one mutant: `KILLED`, or another word; ``log`` is what pytest printed."""

    mutant: Mutant
    state: str
    seconds: float
    log: str = ""


class Tree:
    """A copy of the tree in which mutants live one after the other."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder, self._root = folder.resolve(), root
        for name in COPIED:
            source = root / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, self.folder / name, ignore=ignored)
            elif source.exists():
                shutil.copy2(source, self.folder / name)
        compileall.compile_dir(self.folder, quiet=2)

    def judge(self, mutant: Mutant) -> Outcome:
        """Puts the mutant in, runs its tests, and takes it out again."""
        path, begun = self.folder / mutant.file, time.monotonic()
        whole = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := whole.count(mutant.old)) != 1:
            return Outcome(mutant, NOT_FOUND, 0.0, f"it is {count} times in {mutant.file}")
        self._write(path, whole.replace(mutant.old, mutant.new))
        try:
            state, log = self.run(mutant.tests)
        finally:
            self._write(path, whole)
        return Outcome(mutant, state, time.monotonic() - begun, log)

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()  # two writes within a second may look like one

    def run(self, tests: Sequence[str]) -> tuple[str, str]:
        """Runs tests in a process of their own: the state of what they ran on, and the output."""
        log = self.folder / "log"
        child = os.fork()
        if not child:
            code = 70
            try:
                code = self._pytest(tests, log)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code, end = None, time.monotonic() + LIMIT
        while code is None:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return "TIMED OUT", log.read_text(errors="replace")
            else:
                time.sleep(0.02)
        states = {0: SURVIVED, 1: KILLED}
        state = states.get(code, f"NO VERDICT (pytest ended with {code})")
        return state, log.read_text(errors="replace")

    def _pytest(self, tests: Sequence[str], log: Path) -> int:
        """pytest's exit code in the copy; 1 only where a test ran and failed."""
        os.chdir(self.folder)
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        ours = {str(self._root), str(self._root / "tests"), ""}
        sys.path[:] = [str(self.folder), *(p for p in sys.path if p not in ours)]
        os.environ["PYTHONPATH"] = str(self.folder)
        sys.dont_write_bytecode = True
        import pytest

        failures = []

        class Watch:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                failures.extend([report.nodeid] * report.failed)

        options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--tb", "short"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported here
        code = int(pytest.main([*options, *tests], plugins=[Watch()]))
        package = sys.modules.get("short_gpt")
        if package and not str(package.__file__).startswith(str(self.folder)):
            return 71  # what ran is not the copy
        return code if code != 1 or failures else 72  # a file that could not be read is no failure


def each(jobs: Sequence[object], work: Callable[[Tree, object], object], root: Path) -> list:
    """What ``work`` gives for every job, as the processes finish them; each has a tree."""
    context = multiprocessing.get_context("fork")
    waiting, results = context.SimpleQueue(), context.SimpleQueue()

    def loop() -> None:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Tree(Path(folder), root)
            while (job := waiting.get()) is not None:
                results.put(work(tree, job))

    workers = [context.Process(target=loop) for _ in range(min(WORKERS, len(jobs)))]
    for worker in workers:
        worker.start()
    # a few at a time: pipes hold little, and who writes into a full one does not read the other
    ahead = iter([*jobs, *(None for _ in workers)])
    for job in islice(ahead, 2 * len(workers)):
        waiting.put(job)
    found = []
    while len(found) < len(jobs):
        if results.empty():
            if not any(worker.is_alive() for worker in workers):
                raise SystemExit("the processes ended before their work")
            time.sleep(0.02)
        else:
            found.append(results.get())
            for job in islice(ahead, 1):
                waiting.put(job)
            if isinstance(found[-1], Outcome):
                show(found[-1])
    for worker in workers:
        worker.join()
    return found


def show(outcome: Outcome) -> None:
    print(f"{outcome.state:<8} {outcome.seconds:5.1f} s  {outcome.mutant}", flush=True)


def broken(tests: Sequence[str], root: Path) -> list[str]:
    """What pytest says where these tests do not pass on the tree as it is."""
    parts = [list(tests[i::WORKERS]) for i in range(WORKERS)]
    results = each([p for p in parts if p], lambda tree, part: tree.run(part), root)
    return [f"{log}\n{state}" for state, log in results if state != SURVIVED]


def judge(mutants: Sequence[Mutant], root: Path = ROOT) -> list[Outcome]:
    """The outcome of every mutant, in the order of their ends.

    Raises:
        SystemExit: a test does not pass on the tree as it is.
    """
    for name in HEAVY:
        importlib.import_module(name)
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    if logs := broken(tests, root):
        raise SystemExit("\n".join([*logs, "these tests must pass on the tree as it is"]))
    print(f"{len(tests)} tests pass on the tree as it is", flush=True)
    return each(mutants, lambda tree, mutant: tree.judge(mutant), root)


def chosen(
    mutants: Sequence[Mutant], *, only: str = "", share: int = 1, seed: int = 0
) -> list[Mutant]:
    """The mutants that name ``only``, and of these one in ``share``, drawn by the seed."""
    fitting = [m for m in mutants if only in f"{m} {' '.join(m.tests)}"]
    count = -(-len(fitting) // share)
    return random.Random(seed).sample(fitting, count) if share > 1 else fitting


def main(arguments: Sequence[str] | None = None) -> int:
    mutants = listed()
    parser = argparse.ArgumentParser(description="Changes lines; the tests must notice.")
    parser.add_argument("--only", default="", help="mutants whose file, lines or tests say this")
    parser.add_argument("--share", type=int, default=1, help="run one in so many")
    parser.add_argument("--seed", type=int, default=0, help="of which these are")
    given = parser.parse_args(arguments)
    run = chosen(mutants, only=given.only, share=given.share, seed=given.seed)
    print(f"{len(run)} of {len(mutants)} mutants, seed {given.seed}", flush=True)
    begun = time.monotonic()
    outcomes = judge(run)
    others = [outcome for outcome in outcomes if outcome.state != KILLED]
    for outcome in others:
        print(f"\n{outcome.state}: {outcome.mutant}\n  {' '.join(outcome.mutant.tests)}")
        print("\n".join(f"  {line}" for line in outcome.log.splitlines()[-6:]))
    seconds = time.monotonic() - begun
    print(f"\n{len(outcomes) - len(others)} of {len(outcomes)} killed in {seconds:.0f} s")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
