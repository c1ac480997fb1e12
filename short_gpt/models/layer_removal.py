"""Taking layers out of a live model, for good or for a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from short_gpt.models.decoder import Decoder
from short_gpt.models.numbering import check_layers


def remove_layers(decoder: Decoder, drop: Sequence[int]) -> Callable[[], None]:
    """Removes layers from the model in place.

    Args:
        decoder: the model.
        drop: positions in the model as it is now, in any order.

    Returns:
        A function that puts them back.

    Raises:
        ShortGPTError: a layer does not exist or is named twice, or none would stay; the model is
            unchanged.
    """
    count = len(decoder.layers)
    check_layers(drop, range(count))
    return decoder.keep_layers([i for i in range(count) if i not in set(drop)])


@contextmanager
def without_layers(decoder: Decoder, drop: Sequence[int]) -> Iterator[None]:
    """The model without some layers inside a ``with`` block, whole again after it.

    Args and errors as in `remove_layers`; an empty ``drop`` changes nothing.
    """
    if not drop:
        yield
        return
    undo = remove_layers(decoder, drop)
    try:
        yield
    finally:
        undo()
