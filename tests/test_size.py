"""The library stays small: what it has at most, counted in its source.

A commit that raises a number says what for; one that deletes lowers it.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from short_gpt.cli import COMMANDS
from short_gpt.cli.flags import flags_of

ROOT = Path(__file__).parents[1]
MOST = {
    "lines": 29556,
    "modules": 148,
    "dataclasses": 78,
    "raises": 647,
    "functions over 60 lines": 11,
    "lines of jobs": 5146,
    "flags of shrink": 42,
    "flags of rank": 33,
    "flags of heal": 54,
    "flags": 92,
}


@cache
def counted() -> dict[str, int]:
    files = [path for name in ("short_gpt", "llama") for path in (ROOT / name).rglob("*.py")]
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in files}
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
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
        "functions over 60 lines": sum(n.end_lineno - n.lineno >= 60 for n in functions),
        "lines of jobs": sum(n for path, n in lines.items() if "jobs" in path.parts),
        **{f"flags of {name}": len(flags[name]) for name in ("shrink", "rank", "heal")},
        "flags": len(set().union(*flags.values())),
    }


@pytest.mark.parametrize("what", MOST)
def test_the_library_is_no_larger_than_it_was(what):
    assert counted()[what] <= MOST[what]
