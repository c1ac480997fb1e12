"""The passages of LAMBADA, which are from novels, as the text file that benchmarks judge by.

python benchmarks/lib/passages.py tasks/lambada_openai.jsonl lambada_passages.txt
"""

from __future__ import annotations

import json
from pathlib import Path

import fire

from llama.files import new_file


def main(source: str, out: str) -> None:
    """Writes the passages in their order, with an empty line between two.

    Args:
        source: a JSON document a line, with context and continuation.
        out: the text file; it must not exist.
    """
    with new_file(Path(out), overwrite=False, replaces=lambda _: False) as path:
        path.write_text("\n\n".join(passages(Path(source))), encoding="utf-8", newline="\n")


def passages(source: Path) -> list[str]:
    """Every passage with its last word, which is the continuation."""
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row['context']} {row['continuation']}" for row in rows]


if __name__ == "__main__":
    fire.Fire(main)
