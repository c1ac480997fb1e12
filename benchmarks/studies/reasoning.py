"""Whether models with fewer layers still solve word problems, as their GGUF files answer them.

The original model, and for every file that ``larger.py --keep`` wrote, the pruned model and the
healed one answer svamp's problems and gsm8k's in llama.cpp: greedily, in the chat template, without
examples. gsm8k's are asked only where the original solves one in twenty. Changes are paired over
the problems.

    python benchmarks/studies/reasoning.py --source tasks --model 0.5b --files larger-0.5b

llama.cpp answers ten problems at once. Products of several rows may round otherwise than those of
one, and so a few answers may differ in another run. What a model answered is kept in a state beside
the file, and the same command continues from it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire

from benchmarks.lib import word_problems
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from benchmarks.lib.task_results import Documents, metrics
from benchmarks.lib.word_problems import ABLE, HARD, Problem
from benchmarks.studies.larger import client
from short_gpt.checkpoints import Provenance, prune_checkpoint
from short_gpt.healing.choosing import ResultCache
from short_gpt.runtime.digest import files_digest, json_digest
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile

SLOTS = 10  # problems at once, in less time than one after the other
PROMPT = 512  # tokens of a question and its template, at most


def main(
    source: str,
    model: str = "0.5b",
    files: str = "larger-0.5b",
    most: int = 6,
    problems: int = 50,
    tokens: int = 256,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        source: folder with svamp.jsonl and gsm8k.jsonl.
        model: a name of ``real_models.py``, or a GGUF file.
        files: folder of the healed GGUF files.
        most: layers removed, at most, of the files that are asked.
        problems: of each kind, from the first.
        tokens: of an answer at most.
    """
    begin(out, overwrite=overwrite)
    original = MODELS[model]() if model in MODELS else Path(model)
    counts = {path: len(removed(path)) for path in sorted(Path(files).glob("*.gguf"))}
    healed = sorted((path for path in counts if counts[path] <= most), key=counts.__getitem__)
    if not healed:
        few = f"with {most} layers removed or fewer"
        raise FileNotFoundError(f"{files} has no file of larger.py --keep {few}")
    kinds = {name: word_problems.read(source, name, problems) for name in word_problems.NAMES}
    identity = {"original": files_digest([original]), "tokens": tokens, "asked": json_digest(kinds)}
    cells = ResultCache(StateFile(f"{out or 'reasoning.json'}.state", identity, every=0.0))

    def answered(name: str, opened: Callable[[], AbstractContextManager[Path]]) -> Documents:
        def ask(problems: Sequence[Problem]) -> dict[str, list[float]]:
            with opened() as path:
                return asked(path, problems, tokens)

        return {k: cells.value(f"{k}, {name}", partial(ask, kinds[k])) for k in able}

    able = [*kinds]
    found = {"original": answered("original", lambda: nullcontext(original))}
    able = [kind for kind in kinds if kind != HARD or mean(found["original"][kind]) >= ABLE]
    layers = {"original": list[int]()}
    for path in healed:
        states = {"pruned": partial(cut, original, path), "healed": partial(nullcontext, path)}
        for state, opened in states.items():
            name = f"{path.stem}, {state}"
            found[name] = answered(f"{name} {files_digest([path])}", opened)
            layers[name] = sorted(removed(path))
    rows = {
        name: {"layers": layers[name], "from original": metrics(own, found["original"])}
        for name, own in found.items()
    }
    for path in healed:
        after, before = (f"{path.stem}, {state}" for state in ("healed", "pruned"))
        rows[after]["from pruned"] = metrics(found[after], found[before])
    print(table(rows))
    content = {"model": original.name, "problems": problems, "tokens": tokens, "rows": rows}
    finish("reasoning", [], content, out=out, overwrite=overwrite)


def removed(path: Path) -> list[int]:
    """The layers that a written file lacks."""
    record = Provenance.of_checkpoint(path)
    if record is None:
        raise ValueError(f"{path} has no record of its layers: expected files of larger.py --keep")
    return record.all_removed


@contextmanager
def cut(original: Path, healed: Path) -> Iterator[Path]:
    """The original model's file without the layers that a healed one lacks."""
    with tempfile.TemporaryDirectory() as folder:
        yield prune_checkpoint(original, Path(folder, "pruned.gguf"), removed(healed))


def mean(own: Mapping[str, Sequence[float]]) -> float:
    return sum(own["exact_match"]) / len(own["exact_match"])


def asked(path: Path, problems: Sequence[Problem], tokens: int) -> dict[str, list[float]]:
    """`word_problems.judged`, of a GGUF file's answers in llama.cpp."""
    server = client(path, PROMPT + tokens, SLOTS)

    def answer(problem: Problem) -> str:
        turns = [{"role": "user", "content": problem.question}]
        how = {"max_tokens": tokens, "temperature": 0}
        found = server.handle_chat_completions({"messages": turns, **how})
        shown.update()
        return found["choices"][0]["message"]["content"] or ""

    shown = bar(path.name, total=len(problems), unit="problem")
    with shown, ThreadPoolExecutor(SLOTS) as threads:
        return word_problems.judged(problems, [*threads.map(answer, problems)])


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for every model: shares of problems, and the paired change from the original."""
    lines = []
    for name, found in rows.items():
        cells = [
            f"{kind} {own['value']:.2f} {own['change']:+.2f} ({own['standard_error']:.2f})"
            for kind, own in found["from original"].items()
        ]
        lines.append(f"{name:<24}{'; '.join(cells)}")
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
