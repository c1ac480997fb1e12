"""How fast models are beside the original: measured in turns, because a machine's speed varies.

Reading a prompt is arithmetic, which removed layers save; writing a token reads every weight once,
which fewer bits make less.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from short_gpt.models.decoder import wait
from short_gpt.runtime.errors import ShortGPTError, one_line, required
from short_gpt.wrappers.short_model import ShortModel

TURNS = 9  # fewest whose interval leaves out the outermost ratios, which others' programs make
WORK = ("prompt", "generation")
AN_HOUR = 3600  # seconds after which llama.cpp is stopped, if it hangs
TIMED = 3  # tokens by which the time of writing is foretold
FEWEST, MOST_NEW = (32, 4), 32  # tokens that a turn reads and writes
# Reads a prompt and writes so many tokens; returns tokens a second of both.
Timer = Callable[[Sequence[int], int], tuple[float, float]]


class Speed(NamedTuple):
    """Of one model and one kind of work."""

    per_second: float  # tokens, the median turn's
    ratio: float  # to the original's in the same turn, the median of these
    low: float  # of the ratio's interval, see `interval`
    high: float
    tokens: int  # in a turn


Speeds = dict[str, dict[str, Speed]]  # by model's name and `WORK`


def speeds(
    timers: Mapping[str, Timer],
    window: Sequence[int],
    *,
    most: Mapping[str, float],
    seconds: float = 8.0,
    turns: int = TURNS,
) -> Speeds:
    """Speeds of several models, each turn of all, every second one in reverse.

    Args:
        timers: `llama_cpp` or `pytorch` of each model by its name, the original's first.
        window: Token ids of the longest prompt.
        most: Ratios that a model cannot exceed, by name: all layers by the kept ones. Everything is
            measured once more where an interval is above; `beyond` names what stays so.
        seconds: What all turns may take, from which the tokens of a turn follow. The fewest, 32 and
            4, may take longer.
        turns: At least 6, for an interval of 95%.
    """
    rates = []
    for timer in [*timers.values()][::-1] * 2:  # the first time, weights are read from the disk
        rates.append(timer(window[: FEWEST[0]], FEWEST[1]))
    share = seconds / (turns * len(timers) * 2)  # of each kind of work in a turn
    read, new = (max(few, int(share * rate)) for few, rate in zip(FEWEST, rates[-1], strict=True))
    prompt, new = window[:read], min(new, MOST_NEW)
    measured = _measured(timers, prompt, new, turns)
    return _measured(timers, prompt, new, turns) if beyond(measured, most) else measured


def _measured(timers: Mapping[str, Timer], prompt: Sequence[int], count: int, turns: int) -> Speeds:
    rates = np.empty((turns, len(timers), 2))
    for turn in range(turns):
        for index in range(len(timers))[:: -1 if turn % 2 else 1]:
            rates[turn, index] = [*timers.values()][index](prompt, count)
    measured = Speeds()
    for row, name in enumerate(timers):
        measured[name] = {}
        for column, tokens in enumerate((len(prompt), count)):
            own = rates[:, row, column]
            ratios = own / rates[:, 0, column]
            values = (np.median(own), np.median(ratios), *interval(ratios))
            middle, ratio, low, high = map(float, values)
            measured[name][WORK[column]] = Speed(middle, ratio, low, high, tokens)
    return measured


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the median of what the rows are drawn from is, at least 95% sure, whatever its law.

    Of 6 to 8 rows the least and the largest, of 9 to 11 the second of each end.
    """
    from scipy.stats import binom

    end = max(1, int(binom.ppf(0.025, len(values), 0.5)))
    ordered = np.sort(values, axis=0)
    return ordered[end - 1], ordered[-end]


def beyond(measured: Mapping[str, Mapping[str, Speed]], most: Mapping[str, float]) -> list[str]:
    """A sentence on every ratio whose whole interval is above what is possible."""
    return [
        f"{name}, {work}: {own.ratio:.2f} times as fast ({own.low:.2f} to {own.high:.2f}), while "
        f"its layers allow {most[name]:.2f}: other programs disturbed the measurement"
        for name, works in measured.items()
        for work, own in works.items()
        if own.low > most.get(name, np.inf)
    ]


def llama_cpp(path: Path, longest: int) -> Timer:
    """A GGUF file, loaded in llama.cpp for prompts of at most ``longest`` tokens.

    MissingPackageError without xllamacpp. One core is left to other programs: llama.cpp's threads
    wait for each other busily, and one that waits for a core holds up all.
    """
    with required("xllamacpp", by="llama.cpp in Python"):
        import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = str(path), longest + 2 * MOST_NEW
    params.n_parallel, params.verbosity = 1, -1
    params.warmup = params.fit_params = False
    threads = max(1, torch.get_num_threads() - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def timer(prompt: Sequence[int], count: int) -> tuple[float, float]:
        asked: dict[str, Any] = {"prompt": [*prompt], "n_predict": count, "temperature": 0}
        asked |= {"ignore_eos": True, "cache_prompt": False}  # each prompt is read as a new one
        times = server.handle_completions(asked)["timings"]
        return times["prompt_per_second"], 1000 * (count - 1) / times["predicted_ms"]

    return timer


def pytorch(short: ShortModel, state: Callable[[], AbstractContextManager[object]]) -> Timer:
    """An opened model in a state, such as ``lambda: short.without_layers(layers)``."""

    def timer(prompt: Sequence[int], count: int) -> tuple[float, float]:
        with state():
            start = time.perf_counter()
            short.decoder.run(torch.tensor([[*prompt]], device=short.decoder.device))  # (1, S)
            wait(short.decoder.module)
            read = time.perf_counter() - start
            return len(prompt) / read, 1 / seconds_a_token(short, [[prompt[0]]], count)

    return timer


def seconds_a_token(
    short: ShortModel, starts: Sequence[Sequence[int]], count: int = TIMED
) -> float:
    """Seconds that it takes to write a token after each start, with the cache, over so many."""
    times: list[float] = []

    def likeliest(logits: Tensor) -> Tensor:  # (B, V) to (B,)
        tokens = logits.argmax(-1)
        tokens[0].item()  # which a device may not have computed until it is read
        times.append(time.perf_counter())
        return tokens

    short.continued(starts, count, likeliest)
    return (times[-1] - times[0]) / (count - 1)


def of_files(paths: Mapping[str, Path], window: Sequence[int], **how: Any) -> Speeds:
    """`speeds` of GGUF files in llama.cpp, in a process of its own: a crash there ends only that.

    Keywords as there, ``most`` and ``seconds``.

    Raises:
        ShortGPTError: llama.cpp did not open one of them.
        subprocess.TimeoutExpired: it took an hour.
    """
    work = {"paths": {name: str(path) for name, path in paths.items()}, "how": how}
    command = [sys.executable, "-m", "short_gpt.costs.speeds"]
    asked = json.dumps({**work, "window": [*window], "threads": torch.get_num_threads()})
    piped: dict[str, Any] = {"input": asked, "capture_output": True, "errors": "replace"}
    done = subprocess.run(command, text=True, check=False, timeout=AN_HOUR, **piped)
    if done.returncode:
        raise ShortGPTError(f"llama.cpp gave no speeds: {one_line(done.stderr[-300:])}")
    content = json.loads(done.stdout.splitlines()[-1])
    return {name: {w: Speed(*s) for w, s in works.items()} for name, works in content.items()}


def main() -> None:
    """What `of_files` asks of another process."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    window = asked["window"]
    timers = {name: llama_cpp(Path(path), len(window)) for name, path in asked["paths"].items()}
    print("\n" + json.dumps(speeds(timers, window, **asked["how"])))


if __name__ == "__main__":
    main()
