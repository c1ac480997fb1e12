"""The library, its tests and its benchmarks stay small: what they have at most, counted.

A commit that raises a number says what for; one that deletes lowers it.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from short_gpt.cli import COMMANDS
from short_gpt.cli.flags import flags_of

ROOT = Path(__file__).parents[1]
MOST = {
    "lines": 26685,
    "modules": 127,
    "dataclasses": 60,
    "raises": 347,
    "functions over 60 lines": 0,
    "lines of jobs": 3758,
    "flags of shrink": 28,
    "flags of rank": 18,
    "flags of heal": 28,
    "flags": 55,
    "lines of check functions": 894,
    "settings classes for windows": 1,
    "lines of tests": 25913,
    "lines of benchmarks": 8415,
    "scripts of benchmarks": 38,
}


def lines_of(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


@cache
def counted() -> dict[str, int]:
    files = [path for name in ("short_gpt", "llama") for path in (ROOT / name).rglob("*.py")]
    lines = {path: lines_of(path) for path in files}
    benchmarks = [path for kind in ("*.py", "*.sh") for path in (ROOT / "benchmarks").rglob(kind)]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    functions = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    ]
    settings = [
        {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}
        for node in nodes
        if isinstance(node, ast.ClassDef)
    ]
    decorators = [
        ast.unparse(decorator)
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
    ]
    flags = {name: {*flags_of(command)} for name, command in COMMANDS.items()}
    return {
        "lines": sum(lines.values()),
        "modules": len(files),
        "dataclasses": sum(name.startswith("dataclass") for name in decorators),
        "raises": sum(isinstance(node, ast.Raise) for node in nodes),
        "functions over 60 lines": sum(length >= 61 for _, length in functions),
        "lines of check functions": sum(
            length for name, length in functions if re.match("_*check(_|$)", name)
        ),
        "settings classes for windows": sum("max_windows" in names for names in settings),
        "lines of jobs": sum(n for path, n in lines.items() if "jobs" in path.parts),
        **{f"flags of {name}": len(flags[name]) for name in ("shrink", "rank", "heal")},
        "flags": len(set().union(*flags.values())),
        "lines of tests": sum(map(lines_of, (ROOT / "tests").rglob("*.py"))),
        "lines of benchmarks": sum(map(lines_of, benchmarks)),
        "scripts of benchmarks": len(benchmarks),
    }


@pytest.mark.parametrize("what", MOST)
def test_the_library_is_no_larger_than_it_was(what):
    assert counted()[what] <= MOST[what]
