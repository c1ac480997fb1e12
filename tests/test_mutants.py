"""Whether `mutants.py` tells killed from survived, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mutants
from mutant_table import MUTANTS
from mutants import KILLED, NOT_FOUND, SURVIVED, Mutant, Outcome

PROGRAM = """def lowest(scores):
    return min(scores)
"""
TESTS = """from short_gpt import lowest

def test_lowest():
    assert lowest([2, 1, 3]) == 1

def test_weak():
    assert lowest([2, 1, 3]) > 0
"""
FILE, GUARD = "short_gpt/__init__.py", "test_lowest"
# in a process of its own, which has not imported the library
JUDGE = """
import hypothesis, json, pytest, sys  # pytest and its slow plugin, which each fork has then
from pathlib import Path
from mutants import Mutant, Tree
folder = Path(sys.argv[1])
tree = Tree(folder / "copy", folder / "root")
print(json.dumps([tree.judge(Mutant(*one)).state for one in json.loads(sys.argv[2])]))
"""


def mutant(new: str, test: str = GUARD, *, old: str = "min(scores)") -> Mutant:
    return Mutant("lowest", old, new, test)


def test_a_mutant_is_killed_by_the_test_that_guards_its_line_alone(tmp_path):
    for name, text in ((FILE, PROGRAM), ("tests/test_it.py", TESTS)):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "copy").mkdir()
    expected = [
        (mutant("max(scores)"), KILLED),
        (mutant("max(scores)", "test_weak"), SURVIVED),
        (mutant("max(scores)", "test_none"), "NO VERDICT (pytest ended with 4)"),
        (mutant("max(scores"), "NO VERDICT (pytest ended with 4)"),  # no Python at all
        (mutant("max(scores)", old="max(values)"), NOT_FOUND),
        (mutant("x", old="scores"), NOT_FOUND),  # twice
        (mutant("min(scores[1:])"), SURVIVED),  # each was taken out again: 1 is still the lowest
    ]
    command = [sys.executable, "-c", JUDGE, str(tmp_path), json.dumps([one for one, _ in expected])]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [state for _, state in expected]
    for root in ("root", "copy"):
        assert (tmp_path / root / FILE).read_text() == PROGRAM


def test_survivors_are_listed_and_fail(monkeypatch, capsys):
    pair = [mutant("max(scores)"), mutant("sorted(scores)[0]")]
    outcomes = [Outcome(pair[0], KILLED, 1.0), Outcome(pair[1], SURVIVED, 1.0, "1 passed")]
    monkeypatch.setattr(mutants, "MUTANTS", pair)
    monkeypatch.setattr(mutants, "judge", lambda run: outcomes[: len(run)])
    assert mutants.main([]) == 1
    out = capsys.readouterr().out
    assert "SURVIVED: lowest: min(scores)  ->  sorted(scores)[0]" in out and "1 of 2 killed" in out
    assert mutants.main(["--only", "max(scores)"]) == 0


def test_every_row_is_one_place_of_the_library_and_one_test():
    library = mutants.sources(mutants.ROOT)
    tests = "\n".join(path.read_text() for path in (mutants.ROOT / "tests").rglob("test_*.py"))
    for row in (Mutant(*row) for row in MUTANTS):
        assert len(mutants.places(row, library)) == 1 and row.old != row.new, row
        assert tests.count(f"def {row.test.split('[')[0]}(") == 1, row.test


def test_a_row_outlives_a_new_format_and_a_change_elsewhere():
    text = """
class Sums:
    def add(self):
        return self.total(
            self.first,
            [self.second],
        )
    def other(self):
        return self.total(self.first, [self.second])
"""
    row = Mutant("Sums.add", "total(self.first, [self.second])", "0", GUARD)
    ((_, start, end),) = mutants.places(row, {Path(): text})
    assert "".join(text[start:end].split()) == "total(self.first,[self.second],)"


def test_the_table_is_for_what_no_generator_writes():
    assert 50 <= len(MUTANTS) == len({*MUTANTS}) <= 80
