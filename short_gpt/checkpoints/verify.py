"""Whether two models are the same: by their logits, and by what they generate."""

from __future__ import annotations

import torch

from short_gpt.short_model import ShortModel


def fingerprint(short: ShortModel, count: int = 8) -> tuple[torch.Tensor, list[int], list[int]]:
    """What two models must share to be the same: logits, and greedy tokens with and without cache.

    Args:
        short: the model.
        count: tokens read, and tokens generated.

    Returns:
        Logits (1, count, V), and the tokens generated with and without the cache.
    """
    ids = [i % short.decoder.vocab_size for i in range(count)]
    logits = short.decoder.logits(torch.tensor([ids], device=short.decoder.device)).cpu()
    cached, uncached = (short.greedy(ids, count, use_cache=c) for c in (True, False))
    return logits, cached, uncached
