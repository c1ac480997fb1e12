"""Perplexity on C4 and on the Penn Treebank, of the pieces that LinearPatch reads (NeurIPS 2025).

As its repository has them (`datautils_block.py`): of C4, one piece at a random place of each of 256
random documents of the first file of the validation split, of those that are longer than a piece;
of the Penn Treebank, the validation split, its lines joined with two line breaks.
`short-gpt evaluate` reads neither so: its `c4` and `ptb` follow SLEB and GPTQ.

    python benchmarks/studies/published.py c4 MODEL,MODEL --out c4.json
    python benchmarks/studies/published.py ptb MODEL --source ptb.valid.txt --out ptb.json

``--source`` is a local copy: for C4 a file of JSON lines, `c4-validation.00000-of-00008.json.gz`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.outcome import begin, finish
from short_gpt import open_model, windows

C4 = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
PIECES = 256
Encode = Callable[[str], Sequence[int]]


def main(
    text: str,
    models: str | Sequence[str],
    source: str | None = None,
    size: int = 2048,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Prints the perplexity of every model, and writes the JSON file if ``out`` is given.

    Args:
        text: "c4" or "ptb".
        models: directories or GGUF files.
        source: a local copy of the text; C4 may come from the hub.
        size: tokens of a piece.
        out, overwrite: the JSON file.
    """
    if text not in ("c4", "ptb") or (text == "ptb" and source is None):
        raise ValueError(f"expected c4, or ptb with --source, got {text}")
    begin(out, overwrite=overwrite)
    documents = c4_documents(source) if text == "c4" else [Path(source or "").read_text("utf-8")]
    result = {}
    for name in models.split(",") if isinstance(models, str) else models:
        result[name] = {f"{text} perplexity": perplexity(name, text, documents, size)}
    finish("published", [], {"result": result}, held="", out=out, overwrite=overwrite)


def perplexity(model: str, text: str, documents: Sequence[str], size: int) -> float:
    """That of one model, which is gone from memory when the next one is opened."""
    short = open_model(model)
    if text == "c4":
        read = c4_pieces(documents, short.encode, size)
    else:
        read = ptb_pieces(documents[0], short.encode, size)
    value = short.perplexity(read).value
    print(f"{model}: {value:.2f} on {len(read)} pieces", flush=True)
    return value


def c4_documents(source: str | None) -> Sequence[str]:
    from datasets import load_dataset

    where = {"path": "allenai/c4", "data_files": C4}
    if source is not None:
        where = {"path": "json", "data_files": {"validation": source}}
    return load_dataset(**where, split="validation")["text"]


def c4_pieces(
    documents: Sequence[str], encode: Encode, size: int, pieces: int = PIECES
) -> list[list[int]]:
    """A piece of so many tokens of each of some documents, drawn as theirs are."""
    draw, read, short = random.Random(0), list[list[int]](), 0
    while len(read) < pieces:
        ids = encode(documents[draw.randint(0, len(documents) - 1)])
        if len(ids) > size:
            start = draw.randint(0, len(ids) - size - 1)
            read.append([*ids[start : start + size]])
            short = 0
        elif (short := short + 1) > 100 * pieces:
            raise ValueError(f"{short} documents in a row have {size} tokens or fewer")
    return read


def ptb_pieces(lines: str, encode: Encode, size: int) -> list[list[int]]:
    text = "\n\n".join(line.strip() for line in lines.splitlines())
    return [*windows([text], encode, size=size, stride=size)]


if __name__ == "__main__":
    fire.Fire(main)
