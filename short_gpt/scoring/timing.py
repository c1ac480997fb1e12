"""What reading a window takes, measured on one."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from short_gpt.models.decoder import Decoder, pad

WARM_UP = 16  # tokens of a first pass, in which libraries make ready what they use


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
