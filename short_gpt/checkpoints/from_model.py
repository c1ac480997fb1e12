"""What a model in memory knows of itself, for its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from short_gpt.checkpoints.entries import Measured, numbers
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.weight_changes import REMOVED_SUBLAYERS, WeightChange
from short_gpt.scoring.importance import Importance


def remembered(short: ModelRecord) -> dict[str, Perplexity]:
    """What a model remembers of its perplexity whole and as it is, by the number of layers."""
    states = (tuple(range(short.n_layers)), tuple(short.kept))
    return {f"{len(s)} layers": short.quality[s] for s in states if s in short.quality}


def kept_quality(quality: Mapping[str, Perplexity]) -> dict[str, Measured]:
    """Perplexities as a record keeps them."""
    return {
        name: Measured(found.value, found.tokens, _error(found)) for name, found in quality.items()
    }


def _error(found: Perplexity) -> dict[str, object]:
    """The interval of a perplexity and what it is over; empty where no error is known."""
    if found.error is None or not found.error.known:
        return {}
    over = {"windows": found.error.windows, "texts": found.error.texts}
    return {"interval_95": list(found.interval()), **over}


def counts_of(importance: Importance) -> dict[str, int]:
    """What scores rest on; nothing if there are none."""
    if not importance.n_windows:
        return {}
    return {"windows": importance.n_windows, "tokens": importance.n_tokens}


def removed_halves(changes: Iterable[WeightChange], kept: Sequence[int]) -> dict[str, list[int]]:
    """The layers left that lost a half; nothing if none did."""
    gone: dict[str, list[int]] = {"attention": [], "mlp": []}
    for change in changes:
        if change.how["method"] == REMOVED_SUBLAYERS:
            for half, layers in gone.items():
                layers += [i for i in numbers(change.how[half], half, "the model") if i in kept]
    return gone if any(gone.values()) else {}
