"""README and the pages of ``docs``, the commands that they show, and the results of benchmarks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = sorted(path.stem for path in ROOT.glob("benchmarks/results/*.json"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md"))
}


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def commands(page: str, program: str) -> list[list[str]]:
    """The arguments of every command of a program that the page shows, in line or as a block."""
    text = PAGES[page].replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    text = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [shlex.split(line)[1:] for line in lines if line.split()[:1] == [program]]
