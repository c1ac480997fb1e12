"""How fast, how large and how hungry a model is with fewer layers, in llama.cpp and transformers.

SmolLM2-135M-Instruct whole and without 2, 4, 8 and 12 layers, the lowest by Block Influence: as
GGUF of three types in llama.cpp (xllamacpp), and in float32 in transformers. Each reads a prompt
and writes behind it, in a process of its own, all of them in turn and in every repeat, so that
ratios are of neighbours in time. Then the whole model writes with a cut one as its draft.

    python benchmarks/studies/serving.py --out benchmarks/results/serving.json

What fewer layers are expected to bring: reading a prompt is the layers' work alone, as the head
is asked for the last token only. Writing a token reads every weight once, the head's too, so it
goes by the bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib.outcome import begin, finish
from benchmarks.studies.scoring import spread
from llama.formats.gguf import llama_to_gguf
from llama.formats.gguf_read import GGUFParts
from llama.formats.hf import meta_to_hf
from llama.formats.safetensors import open_weights
from llama.tokenizer import Tokenizer
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.data import demo
from short_gpt.runtime.progress import bar

LAYERS = (14, 13, 3, 12, 25, 17, 2, 15, 16, 26, 4, 11)  # by Block Influence on the book
KINDS = ("Q4_1", "Q8_0", "F16", "transformers, F32")
HF = KINDS[-1]
DRAFTS, LENGTH = (4, 8), 4  # layers that the draft lacks; tokens it writes ahead
Paths = dict[tuple[str, int], Path]
Runs = dict[tuple[str, int], list[dict[str, float]]]


def main(
    counts: Sequence[int] = (0, 2, 4, 8, 12),
    prompt: int = 512,
    tokens: int = 64,
    repeats: int = 3,
    threads: int = 2,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    asked = {"prompt": book(prompt), "count": tokens, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        paths = models(Path(folder), [0, *(n for n in counts if n)])
        runs = measured(paths, asked, repeats)
        rows = [row(key, runs, paths) for key in paths]
        drafts = drafted(paths, asked, repeats)
    print(table(rows, drafts))
    content = {"prompt_tokens": prompt, "written_tokens": tokens, "repeats": repeats}
    content |= {"threads": threads, "removed": list(LAYERS), "rows": rows, "drafts": drafts}
    finish("serving", limits(rows), content, out=out, overwrite=overwrite)


def book(size: int) -> list[int]:
    """Token ids of held-out chapters."""
    tokenizer = Tokenizer(demo.checkpoint() / "tokenizer.json")
    return tokenizer.encode(demo.bible("held_out")[0], bos=False, eos=False)[:size]


def models(folder: Path, counts: Sequence[int]) -> Paths:
    """All of them, written to a folder: by kind, and how many layers are gone."""
    whole = {"Q4_1": demo.gguf_file(), HF: folder / "hf-0"}
    for kind in ("Q8_0", "F16"):
        whole[kind] = folder / f"{kind}-0.gguf"
        llama_to_gguf(demo.checkpoint(), whole[kind], kind=kind.lower())
    meta_to_hf(demo.checkpoint(), whole[HF])
    paths: Paths = {}
    for kind in KINDS:
        paths[kind, 0] = whole[kind]
        for n in counts[1:]:
            paths[kind, n] = folder / (f"hf-{n}" if kind == HF else f"{kind}-{n}.gguf")
            prune_checkpoint(whole[kind], paths[kind, n], LAYERS[:n])
    return paths


def measured(paths: Paths, asked: Mapping[str, object], repeats: int) -> Runs:
    """What `serve_once.py` says of every model, in every repeat."""
    runs: Runs = {key: [] for key in paths}
    with bar("serving", total=repeats * len(paths), unit="run", delay=0) as shown:
        for _ in range(repeats):
            for (kind, n), path in paths.items():
                runs[kind, n].append(once(path, kind, asked))
                shown.update()
    return runs


def once(
    path: Path, kind: str, asked: Mapping[str, object], draft: Path | None = None
) -> dict[str, float]:
    """One run in a process of its own."""
    content = {**asked, "way": "transformers" if kind == HF else "llama.cpp", "path": str(path)}
    if kind != HF:
        content |= {"draft": None if draft is None else str(draft), "length": LENGTH}
    script = Path(__file__).parents[1] / "lib/serve_once.py"
    command = [sys.executable, str(script)]
    done = subprocess.run(command, input=json.dumps(content), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def weights(path: Path) -> tuple[int, int]:
    """Bytes of the tensors of the layers, and of all others."""
    if path.is_dir():
        opened = open_weights(path)
        sizes = {name: opened[name].read(name).nbytes for name in opened}
    else:
        sizes = {name: place.nbytes for name, place in GGUFParts(path).tensors.items()}
    layers = sum(n for name, n in sizes.items() if ".layers." in name or name.startswith("blk."))
    return layers, sum(sizes.values()) - layers


def size_of(path: Path) -> int:
    """Bytes of a file, or of a directory's files of weights."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.glob("*.safetensors")))


def row(key: tuple[str, int], runs: Runs, paths: Paths) -> dict[str, object]:
    """One model beside the whole one of its kind."""
    (kind, n), (layers, rest) = key, weights(paths[key[0], 0])
    left = weights(paths[key])[0]
    found: dict[str, object] = {"kind": kind, "removed": n}
    found["megabytes"] = size_of(paths[key]) / 1e6
    found["peak_mb"] = spread([run["peak_mb"] for run in runs[key]])
    for name in ("prompt", "generation"):
        values = [run[name] for run in runs[key]]
        pairs = zip(values, (run[name] for run in runs[kind, 0]), strict=True)
        found[name] = spread(values)
        found[f"{name}_ratio"] = spread([a / b for a, b in pairs])
    found["prompt_expected"] = layers / left
    found["generation_expected"] = (layers + rest) / (left + rest)
    found["layers_share"] = layers / (layers + rest)
    return found


def drafted(paths: Paths, asked: Mapping[str, object], repeats: int) -> list[dict[str, object]]:
    """The whole model alone and with cut ones that draft for it."""
    whole, rows = paths["Q4_1", 0], []
    cut = [n for n in DRAFTS if ("Q4_1", n) in paths]
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in (0, *cut)}
    for _ in range(repeats):
        for n, found in runs.items():
            found.append(once(whole, "Q4_1", asked, paths["Q4_1", n] if n else None))
    for n in cut:
        pairs = list(zip(runs[n], runs[0], strict=True))
        rows.append(
            {
                "removed": n,
                "length": LENGTH,
                "share": runs[n][0]["accepted"] / runs[n][0]["drafted"],
                "speed_ratio": spread([a["generation"] / b["generation"] for a, b in pairs]),
                "same_text": all(a["text"] == b["text"] for a, b in pairs),
            }
        )
    return rows


def limits(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Cut models of which a fifth or more is expected, and that bring less than half of it."""
    missed = []
    for found in rows:
        for name in ("prompt", "generation"):
            expected, ratio = found[f"{name}_expected"], found[f"{name}_ratio"]["median"]
            if expected >= 1.2 and ratio - 1 < (expected - 1) / 2:
                which = f"{found['kind']} without {found['removed']} layers"
                missed.append(f"{which}: {name} at {ratio:.2f}, expected {expected:.2f}")
    return missed


def table(rows: Sequence[Mapping[str, object]], drafts: Sequence[Mapping[str, object]]) -> str:
    """A line for every model, and one for every draft."""
    lines = [
        f"{'':<22}{'MB':>7}{'peak MB':>9}{'prompt/s':>10}{'ratio':>7}{'exp.':>6}"
        f"{'tokens/s':>10}{'ratio':>7}{'exp.':>6}"
    ]
    for r in rows:
        cells = f"{r['kind']} - {r['removed']}"
        line = f"{cells:<22}{r['megabytes']:>7.0f}{r['peak_mb']['median']:>9.0f}"
        for name in ("prompt", "generation"):
            speed, ratio = r[name]["median"], r[f"{name}_ratio"]["median"]
            line += f"{speed:>10.1f}{ratio:>7.2f}{r[f'{name}_expected']:>6.2f}"
        lines.append(line)
    for d in drafts:
        lines.append(
            f"draft without {d['removed']} layers: {d['share']:.0%} accepted, speed x "
            f"{d['speed_ratio']['median']:.2f}, same text: {d['same_text']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
