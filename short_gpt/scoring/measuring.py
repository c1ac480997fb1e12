"""The loop that scores all layers in one pass over windows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch

from short_gpt.data.windows import text_of
from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar, set_rate
from short_gpt.scoring import hooks
from short_gpt.scoring.clusters import next_number
from short_gpt.scoring.hooks import Scores
from short_gpt.scoring.importance import Importance

WARM_UP = 16  # tokens of a first pass, in which libraries make ready what they use


class ScoreWindows(Protocol):
    """Scores single windows of token ids in one pass, as `hooks.score` does for a decoder."""

    def __call__(
        self, windows: Sequence[Sequence[int]], *, sublayers: bool = False, all_tokens: bool = False
    ) -> Scores: ...


def measure(
    decoder: Decoder,
    batches: Iterable[Sequence[Sequence[int]]],
    *,
    into: Importance | None = None,
    total: int | None = None,
    progress: bool = False,
    sublayers: bool = False,
    all_tokens: bool = False,
    score: ScoreWindows | None = None,
    first_text: int | None = None,
    after: Callable[[Importance], bool] = lambda _: False,
) -> Importance:
    """Reads batches of windows and scores every layer: one pass, both papers' measures.

    Args:
        decoder: the model.
        batches: lists of windows of token ids; windows may differ in length.
        into: sums to add to, which also name the layers; None starts new ones from layer 0.
        total: number of windows to come, for the progress bar.
        progress: whether to show one.
        sublayers, all_tokens: further scores from the same pass, see `hooks.score`.
        score: scores the windows of a batch, where the model has a way of its own; None is
            `hooks.score`.
        first_text: number in ``into`` of the windows' text 0. None for the first one that is
            free: texts are numbered from 0 in every call of `data.windows`, and those of an
            earlier call are other texts. A text that is read again counts as one more, and the
            error is then too small; a call that continues with windows of the same texts is given
            the same number.
        after: called with the sums after every batch; True ends the run.

    Returns:
        ``into``. A batch counts whole or not at all: after an error or an interruption, the
        batches before it are in the sums.

    Raises:
        ShortGPTError: there is no window, or one is empty, too long or not in the vocabulary.
        NotFiniteError: a state is NaN or infinite; the message names the layer.

    Example:
        >>> scores = measure(short.decoder, batches(windows, 4))  # doctest: +SKIP
    """
    into = Importance.empty(range(len(decoder.layers))) if into is None else into
    score = score or partial(hooks.score, decoder, layers=into.layers)
    first_text = next_number(into.texts) if first_text is None else first_text
    before, begun = into.n_tokens, False
    with bar("scoring", total=total, unit="window", show=progress) as shown:
        for batch in batches:
            begun = True
            if batch:  # of several replicas, one may have nothing left
                scores = score(batch, sublayers=sublayers, all_tokens=all_tokens)
                texts = (text_of(window) for window in batch)
                into.add(scores, [None if text is None else first_text + text for text in texts])
            set_rate(shown, into.n_tokens - before)
            shown.update(len(batch))
            if after(into):
                break
    if not begun and not into.n_windows:
        raise ShortGPTError("expected at least one window of tokens, got none")
    return into


def seconds_a_pass(decoder: Decoder, windows: Sequence[Sequence[int]]) -> float:
    """Seconds in which windows pass embeddings and layers together, after a short one of them.

    Args:
        decoder: the model; of one that several ranks share, all must call this.
        windows: token ids.
    """
    decoder.run(pad([windows[0][:WARM_UP]], decoder)[0])
    tokens, _ = pad(windows, decoder)
    wait(decoder.device)
    started = time.perf_counter()
    decoder.run(tokens)
    wait(decoder.device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Waits for what an accelerator was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
