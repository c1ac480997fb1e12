"""What the commands share: checks before the work, the model, the texts, the files."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama.io.files import check_writable
from short_gpt.data.windows import windows
from short_gpt.opening import layers_of, open_model
from short_gpt.report.plots import angular_heatmap, importance_bars, require_matplotlib, save
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import first_rank
from short_gpt.runtime.replicas import of_model
from short_gpt.runtime.results import refuse_existing
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import BY_LOSS
from short_gpt.short_llama import ShortLlama

PICTURES = ("block_influence.png", "angular.png")
PLAIN = (str, int, float, bool, type(None))


def arguments_of(values: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments for its record: its locals, taken first thing."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, str | int | float | bool | None)
    }


def open_short(
    source: str,
    tokenizer_path: str | None,
    size: int,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    n_prune_layers: int | None,
    model_parallel_size: int | None = None,
    *,
    stream: bool = False,
    max_memory: str | None = None,
) -> Any:
    if stream:
        if model_parallel_size is not None:
            raise ShortGPTError(
                f"--model_parallel_size {model_parallel_size}: --stream holds one layer on one "
                "rank; leave one of them out"
            )
        return ShortLlama.from_checkpoint(
            source,
            n_prune_layers,
            tokenizer_path=tokenizer_path,
            max_seq_len=size,
            max_batch_size=batch_size,
            device=device,
            dtype=dtype,
            stream=True,
            max_memory=max_memory,
        )
    return open_model(
        source,
        n_prune_layers=n_prune_layers,
        tokenizer_path=tokenizer_path,
        max_seq_len=size,
        max_batch_size=batch_size,
        device=device,
        dtype=dtype,
        model_parallel_size=model_parallel_size,
    )


def say_plan(short: Any, batch_size: int) -> None:
    """Tells on stderr what a streamed run will take in memory; nothing of a model in memory."""
    if hasattr(short, "stream") and first_rank():
        print(short.plan(batch_size).describe(), file=sys.stderr, flush=True)


def check_run(
    ckpt_dir: str, n_prune_layers: int | None, size: int, stride: int, max_windows: int | None
) -> None:
    """Raises what would go wrong after the model is loaded."""
    n_layers = layers_of(ckpt_dir)
    if n_layers and n_prune_layers is not None and not 1 <= n_prune_layers < n_layers:
        raise ShortGPTError(
            f"--n_prune_layers {n_prune_layers}; the model has {n_layers} layers: "
            f"expected 1 to {n_layers - 1}"
        )
    windows([], lambda _: [], size=size, stride=stride, limit=max_windows)


def numbers_of(given: Any, flag: str = "--counts 2,4,8") -> list[int]:
    """Whole numbers above 0 that a flag lists."""
    numbers = [given] if isinstance(given, int) else given
    if not isinstance(numbers, list | tuple) or not all(type(i) is int and i > 0 for i in numbers):
        raise ShortGPTError(f"expected whole numbers as in {flag}, got {given!r}")
    return list(numbers)


def run_state(
    short: Any, state: str | None, out: str | None, arguments: Mapping[str, Any], *, every: float
) -> StateFile | None:
    """The file that a run is saved in; None if neither it nor ``out`` has a name."""
    if state is None and out is None:
        return None
    path = Path(state if state is not None else f"{out}.state")
    check_writable(path)
    names = ("ckpt_dir", "data", "split", "column", "max_texts", "size", "stride", "seed")
    identity = {name: arguments[name] for name in names}
    identity |= {"batch_size": arguments["batch_size"], "sublayers": arguments["sublayers"]}
    method = arguments["method"]
    if method in BY_LOSS:
        identity |= {n: arguments[n] for n in ("method", "n_prune_layers", "candidates")}
        identity |= {n: arguments[n] for n in ("max_windows", "max_memory")}
    identity |= {"method of all tokens": method == "angular_all"}
    model = getattr(short, "stream", None) or next(iter(short.decoder.layers.parameters()))
    identity |= {"dtype": str(model.dtype), "device": model.device.type}
    identity |= {"stream": hasattr(short, "stream"), "model_parallel_size": len(of_model(None))}
    whole = short.decoder.model
    settings = str(getattr(whole, "params", None) or getattr(whole, "config", None))
    identity |= {"configuration": hashlib.sha256(settings.encode()).hexdigest()[:16]}
    identity |= {"weights": short.weights_digest()}
    return StateFile(path, identity, every=every)


@contextmanager
def interruptible() -> Iterator[None]:
    """A request to end (SIGTERM) inside the block counts as Ctrl-C, so that work is saved."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def total(chosen: object, limit: int | None) -> int | None:
    """How many windows are to come, as far as that is known."""
    return len(chosen) if hasattr(chosen, "__len__") else limit


def targets_of(out: str | None, plots: str | None, *, overwrite: bool) -> list[Path]:
    """The files that a command will write, none of which may exist unless ``overwrite``."""
    targets = [Path(out)] if out is not None else []
    if plots is not None:
        require_matplotlib()
        targets += [Path(plots) / name for name in PICTURES]
    for target in targets:
        refuse_existing(target, overwrite=overwrite)
        if target.parent in targets:
            raise ShortGPTError(f"{target} cannot be written into the file {target.parent}")
    return targets


def importance_of(record: dict[str, Any], source: str) -> Importance:
    if "importance" not in record:
        raise ShortGPTError(f"{source} holds no scores; expected a file written by short-gpt rank")
    return Importance.from_dict(record["importance"])


def draw(importance: Importance, targets: Sequence[Path], n: int | None) -> None:
    """Writes the two pictures."""

    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    bars = importance_bars(
        importance.block_influence, standard_error=importance.standard_error, removed=removed
    )
    heat = angular_heatmap(importance.angular, block=block)
    for figure, target in zip((bars, heat), targets, strict=True):
        save(figure, target)


def say(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if first_rank():
        print(text, flush=True)


def say_written(targets: Sequence[Path]) -> None:
    for target in targets:
        say(f"written: {target}")
