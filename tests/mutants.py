"""Mutants: wrong programs that the tests must notice; one place of the library is changed in each.

    python tests/mutants.py                  # all
    python tests/mutants.py --only teacher   # those whose lines or test say so

`mutant_table.py` lists them. Each is put into a copy of the tree, never into the checkout, and the
test that guards its line runs there. Survivors are listed, and the exit code is 1: a test is
missing. The exit code is 1, too, if a line is not found or a test fails on the tree as it is.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import importlib
import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NamedTuple

from mutant_table import MUTANTS

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ("short_gpt", "llama")
COPIED = (*LIBRARY, "tests", "benchmarks", "pyproject.toml")
WORKERS, LIMIT = 2, 300  # processes, and seconds for a test
# what takes seconds to import and is not ours: once here, not in every mutant's process
HEAVY = ("torch", "scipy.stats", "hypothesis", "transformers", "peft")
HEAVY += ("transformers.models.llama.modeling_llama", "fairscale.nn.model_parallel")
KILLED, SURVIVED, NOT_FOUND = "killed", "SURVIVED", "LINE NOT FOUND"
FORK = multiprocessing.get_context("fork")


class Mutant(NamedTuple):
    """One wrong program.

    Attributes:
        function: a function, with its classes and without its module, such as `Importance.add`.
        old: a part of its source; line breaks and spaces do not count.
        new: what replaces it.
        test: the name of the test that must fail.
    """

    function: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        return f"{self.function}: {self.old}  ->  {self.new}"


def sources(root: Path) -> dict[Path, str]:
    """The modules of the library and their text."""
    files = [path for name in LIBRARY for path in (root / name).rglob("*.py")]
    return {path: path.read_text(encoding="utf-8") for path in files}


def scopes(node: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """The functions and classes of a module, by their qualified names."""
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{outer}.{child.name}".lstrip(".")
            yield name, child
        yield from scopes(child, name)


def spans(name: str, path: Path, text: str) -> Iterator[tuple[int, int]]:
    """First and last character of all that has this name: functions, classes, the module."""
    if name == path.stem:
        yield 0, len(text)
    elif re.search(rf"(def|class) {name.rpartition('.')[2]}\b", text):
        starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
        for found, node in scopes(ast.parse(text)):
            if found == name:
                yield starts[node.lineno - 1], starts[node.end_lineno or -1]


def places(mutant: Mutant, texts: Mapping[Path, str]) -> list[tuple[Path, int, int]]:
    """The files and the characters, from start to end, where a mutant's old text stands."""
    # a formatter breaks lines between any two tokens, and adds a comma before a closing bracket
    tokens = re.findall(r"\w+|\S", mutant.old)
    each = [rf",?\s*\{token}" if token in ")]}" else re.escape(token) for token in tokens]
    pattern = re.compile(r"\s*".join(each))
    return [
        (path, match.start(), match.end())
        for path, text in texts.items()
        for span in spans(mutant.function, path, text)
        for match in pattern.finditer(text, *span)
    ]


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
            source, target = root / name, self.folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, target)
        # by their content: two writes within a second look like one to a file's time
        hashed = PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(self.folder, quiet=2, invalidation_mode=hashed)

    def judge(self, mutant: Mutant) -> Outcome:
        """Puts the mutant in, runs its test, and takes it out again."""
        begun = time.monotonic()
        texts = sources(self.folder)
        found = places(mutant, texts)
        if len(found) != 1:
            return Outcome(mutant, NOT_FOUND, 0.0, f"the library has it {len(found)} times")
        path, start, end = found[0]
        whole = texts[path]
        path.write_text(whole[:start] + mutant.new + whole[end:], encoding="utf-8")
        try:
            state, log = self.run([mutant.test])
        finally:
            path.write_text(whole, encoding="utf-8")
        return Outcome(mutant, state, time.monotonic() - begun, log)

    def run(self, tests: Sequence[str]) -> tuple[str, str]:
        """Runs tests in a process of their own: the state of what they ran on, and the output."""
        log = self.folder / "log"
        child = FORK.Process(target=self._pytest, args=(self._nodes(tests), log))
        child.start()
        child.join(LIMIT * len(tests))
        code, state = child.exitcode, "TIMED OUT"
        if code is None:
            child.kill()
            child.join()
        else:
            states = {0: SURVIVED, 1: KILLED}
            state = states.get(code, f"NO VERDICT (pytest ended with {code})")
        return state, log.read_text(errors="replace")

    def _nodes(self, tests: Sequence[str]) -> list[str]:
        """Tests as pytest is told of them: the file that has each, and its name."""
        files = {path: path.read_text() for path in (self.folder / "tests").rglob("test_*.py")}
        nodes = []
        for test in tests:
            start = re.compile(rf"^ *def {re.escape(test.split('[')[0])}\(", re.MULTILINE)
            has_it = [path for path, text in files.items() if start.search(text)]
            nodes += [f"{path.relative_to(self.folder)}::{test}" for path in has_it] or [test]
        return nodes

    def _pytest(self, nodes: Sequence[str], log: Path) -> None:
        """Ends this process with pytest's exit code in the copy; 1 only where a test failed."""
        code = 70
        try:
            os.chdir(self.folder)
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = self._code(nodes)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _code(self, nodes: Sequence[str]) -> int:
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
        code = int(pytest.main([*options, *nodes], plugins=[Watch()]))
        package = sys.modules.get("short_gpt")
        if package and not str(package.__file__).startswith(str(self.folder)):
            return 71  # what ran is not the copy
        return code if code != 1 or failures else 72  # a file that could not be read is no failure


def _begin(folder: str) -> None:
    """Makes this process its tree."""
    global tree
    tree = Tree(Path(tempfile.mkdtemp(dir=folder)))


def _run(tests: Sequence[str]) -> tuple[str, str]:
    return tree.run(tests)


def _judge(mutant: Mutant) -> Outcome:
    outcome = tree.judge(mutant)
    print(f"{outcome.state:<8} {outcome.seconds:5.1f} s  {mutant}", flush=True)
    return outcome


def judge(mutants: Sequence[Mutant]) -> list[Outcome]:
    """The outcome of every mutant.

    Raises:
        SystemExit: a test does not pass on the tree as it is.
    """
    for name in HEAVY:
        importlib.import_module(name)
    tests = sorted({mutant.test for mutant in mutants})
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as folder,
        ProcessPoolExecutor(WORKERS, FORK, _begin, (folder,)) as processes,
    ):
        parts = [part for i in range(WORKERS) if (part := tests[i::WORKERS])]
        for state, log in processes.map(_run, parts):
            if state != SURVIVED:
                raise SystemExit(f"{log}\n{state}\nthese tests must pass on the tree as it is")
        return [*processes.map(_judge, mutants)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Changes the library; the tests must notice.")
    parser.add_argument("--only", default="", help="mutants whose lines or test say this")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    mutants = [m for m in (Mutant(*row) for row in MUTANTS) if options.only in f"{m} {m.test}"]
    outcomes = judge(mutants)
    others = [outcome for outcome in outcomes if outcome.state != KILLED]
    for outcome in others:
        print(f"\n{outcome.state}: {outcome.mutant}\n  {outcome.mutant.test}")
        print("\n".join(f"  {line}" for line in outcome.log.splitlines()[-6:]))
    seconds = time.monotonic() - begun
    print(f"\n{len(outcomes) - len(others)} of {len(outcomes)} killed in {seconds:.0f} s")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
