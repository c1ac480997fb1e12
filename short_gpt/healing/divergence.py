"""How far a student's predictions are from a teacher's, by what is kept of the teacher's.

Of every prediction the teacher's K likeliest tokens are kept, and the total of all others as one
more event: the Kullback-Leibler divergence over these K + 1 events is at most that over all V
tokens, and equal to it for K = V.

Shapes: N predictions, V vocabulary, K tokens kept of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class Targets:
    """What a teacher predicts at N places, natural logarithms of probabilities.

    Attributes:
        ids: (N, K) int64, the likeliest tokens.
        logs: (N, K), of their probabilities.
        rest: (N,), of the probability of all other tokens together; -inf where there is none.
    """

    ids: Tensor
    logs: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> Targets:
        """What logits (N, V) say, of which all tokens are kept where K is V or more.

        Example:
            >>> Targets.of(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), 2).rest.exp()
            tensor([0.5000])
        """
        scaled = _scaled(logits, temperature)
        total = scaled.logsumexp(-1)
        logs, ids = scaled.topk(min(k, scaled.shape[-1]), dim=-1)
        return cls(ids, logs - total[:, None], _others(scaled, ids) - total)

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets(self.ids.to(device), self.logs.to(device), self.rest.to(device))

    def normalized(self) -> Targets:
        """The same with probabilities that sum to 1, as those of rounded logarithms do not."""
        total = torch.logaddexp(self.logs.logsumexp(-1), self.rest)
        return Targets(self.ids, self.logs - total[:, None], self.rest - total)


def divergence(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats of every prediction.

    Args:
        logits: (N, V), the student's.
        targets: the teacher's, by logits over the same vocabulary and at the same temperature.
        temperature: by which both divide their logits. The result is not multiplied by its
            square.

    Returns:
        (N,), at least 0, and 0 where the student predicts what the teacher does. Its gradient is
        the student's probabilities less the teacher's, whose rest is spread as the student's is.
    """
    scaled = _scaled(logits, temperature)
    total = scaled.logsumexp(-1)
    logs = scaled.gather(-1, targets.ids) - total[:, None]  # (N, K)
    # 0 log 0 is 0, and not the NaN that 0 times infinity is
    least = torch.finfo(scaled.dtype).min
    found = (targets.logs.exp() * (targets.logs.clamp_min(least) - logs)).sum(-1)
    if targets.ids.shape[-1] == scaled.shape[-1]:
        return found
    rest = _others(scaled, targets.ids) - total
    return found + targets.rest.exp() * (targets.rest.clamp_min(least) - rest)


def check_temperature(temperature: float) -> None:
    """Raises ShortGPTError for what logits cannot be divided by."""
    if not 0 < temperature < float("inf"):
        raise ShortGPTError(f"temperature = {temperature}: expected a number above 0, such as 1")


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """(N, V), in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


def _others(scaled: Tensor, ids: Tensor) -> Tensor:
    """Logarithm of the sum over all tokens but these, (N,); -inf where there is none."""
    # 1 less the sum over these would be noise where they are nearly all
    return scaled.scatter(-1, ids, -torch.inf).logsumexp(-1)
