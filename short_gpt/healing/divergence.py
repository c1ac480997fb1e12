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
from torch.autograd.function import BackwardCFunction, FunctionCtx

from short_gpt.evaluation.perplexity import AT_ONCE
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
    found: Tensor = _Divergence.apply(scaled, targets.ids, targets.logs, targets.rest)
    return found


class _Divergence(torch.autograd.Function):
    """The same with its gradient in closed form: autograd would hold several (N, V) instead of one.

    A few rows at a time pass through the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, scaled: Tensor, ids: Tensor, logs: Tensor, rest: Tensor
    ) -> Tensor:
        rows, values, gradients = max(1, AT_ONCE // scaled.shape[-1]), [], []
        for part in zip(*(x.split(rows) for x in (scaled, ids, logs, rest)), strict=True):
            value, gradient = _with_gradient(*part)
            values.append(value)
            gradients += [gradient] if scaled.requires_grad else []
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: BackwardCFunction, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradients[0][:, None] * gradient, None, None, None


def _with_gradient(
    scaled: Tensor, ids: Tensor, logs: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """The divergence of some rows (N,), and its gradient by their logits (N, V)."""
    limits = torch.finfo(scaled.dtype)
    total = scaled.logsumexp(-1)
    own = scaled.gather(-1, ids) - total[:, None]  # (N, K)
    # 0 log 0 is 0, and not the NaN that 0 times infinity is
    value = (logs.exp() * (logs.clamp_min(limits.min) - own)).sum(-1)
    q = (scaled - total[:, None]).exp_()  # (N, V)
    # summed without these: 1 less their sum would be noise where they are nearly all
    others = q.scatter_(-1, ids, 0.0).sum(-1).clamp_min(limits.tiny)
    value += rest.exp() * (rest.clamp_min(limits.min) - others.log())
    # q less p, whose rest is spread as that of q is
    q *= (1 - rest.exp() / others)[:, None]
    return value, q.scatter_(-1, ids, own.exp() - logs.exp())


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
