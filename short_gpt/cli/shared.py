"""What the commands share: checks before the work, the model, the texts, the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from short_gpt.data import pg19, texts, windows
from short_gpt.importance import Importance
from short_gpt.models import layers_of, open_model
from short_gpt.plots import require_matplotlib
from short_gpt.progress import bar, first_rank
from short_gpt.record import refuse_existing

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
) -> Any:
    return open_model(
        source,
        n_prune_layers=n_prune_layers,
        tokenizer_path=tokenizer_path,
        max_seq_len=size,
        max_batch_size=batch_size,
        device=device,
        dtype=dtype,
    )


def check_run(
    ckpt_dir: str, n_prune_layers: int | None, size: int, stride: int, max_windows: int | None
) -> None:
    """Raises what would go wrong after the model is loaded."""
    n_layers = layers_of(ckpt_dir)
    if n_layers and n_prune_layers is not None and not 1 <= n_prune_layers < n_layers:
        raise ValueError(
            f"--n_prune_layers {n_prune_layers}; the model has {n_layers} layers: "
            f"expected 1 to {n_layers - 1}"
        )
    windows([], lambda _: [], size=size, stride=stride, limit=max_windows)


def read_texts(data: str, split: str, column: str, limit: int | None) -> Iterable[str]:
    if limit is not None and limit < 1:
        raise ValueError(f"--max_texts expects at least 1, got {limit}")
    found = pg19(split) if data == "pg19" else texts(data, split=split, column=column)
    return shown(islice(found, limit))


def shown(found: Iterable[str]) -> Iterator[str]:
    """The same texts, with a progress bar while they are read."""
    with bar("reading", total=None, unit="text") as shown:
        for text in found:
            yield text
            shown.update()


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
            raise ValueError(f"{target} cannot be written into the file {target.parent}")
    return targets


def importance_of(record: dict[str, Any], source: str) -> Importance:
    if "importance" not in record:
        raise ValueError(f"{source} holds no scores; expected a file written by short-gpt rank")
    return Importance.from_dict(record["importance"])


def draw(importance: Importance, targets: Sequence[Path], n: int | None) -> None:
    """Writes the two pictures."""
    from short_gpt.plots import angular_heatmap, importance_bars

    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    bars = importance_bars(
        importance.block_influence, standard_error=importance.standard_error, removed=removed
    )
    heat = angular_heatmap(importance.angular, block=block)
    for figure, target in zip((bars, heat), targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}")
        figure.savefig(partial, format="png", dpi=150)
        partial.replace(target)


def say(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if first_rank():
        print(text, flush=True)


def say_written(targets: Sequence[Path]) -> None:
    for target in targets:
        say(f"written: {target}")
