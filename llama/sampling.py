"""The loop that continues a batch of prompts, and the choice of the next token.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.errors import InputError
from llama.model import Transformer

COLDEST = 1e-6  # temperatures below take the likeliest token: they could round to 0 in float32


def check_logits(logits: Tensor) -> None:
    """Raises InputError for logits of which no token can be chosen; -inf forbids a token."""
    if not (logits < torch.inf).all():  # NaN is not below it either
        raise InputError(
            "the model gives NaN or infinite logits, of which no token can be chosen: a weight is "
            "damaged, or its dtype cannot hold its values; fetch the weights anew, or open it in "
            "float32"
        )


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; higher values sample more evenly.
        top_p: see `sample_top_p`.
        generator: of the random numbers.
        logprobs: whether the log probabilities of all tokens are computed.
    """

    temperature: float
    top_p: float
    generator: torch.Generator
    logprobs: bool = False

    def choose(self, logits: Tensor) -> Tensor:
        """A token for each row of logits: (B, V) to (B,); InputError if they are NaN."""
        check_logits(logits)
        if self.temperature < COLDEST:
            return logits.argmax(-1)
        # the largest is 0 after the shift, so that no temperature makes it overflow
        shifted = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        return sample_top_p(torch.softmax(shifted, dim=-1), self.top_p, generator=self.generator)


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws a token from the nucleus (Holtzman et al. 2019, arXiv:1904.09751).

    That is the smallest set of likeliest tokens whose probability exceeds p.

    Args:
        probs: (B, V), rows sum to 1.
        p: in [0, 1]; 0 always takes the likeliest token.
        generator: of the random numbers.

    Returns:
        (B,) token ids.
    """
    ordered, index = probs.sort(dim=-1, descending=True)  # (B, V) each
    # Exclusive sums: the token with which p is passed still belongs, the first one always does.
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before > p, 0.0, ordered)
    # (B, 1) places in the order; multinomial itself divides the rows by their sums
    choice = torch.multinomial(kept, 1, generator=generator)
    return index.gather(-1, choice).squeeze(-1)


def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    total: int,
    stop_tokens: Sequence[int],
    *,
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:
    """Fills T positions left to right, until every prompt has met a stop token.

    Args:
        model: the decoder.
        prompts: B lists of token ids.
        total: T.
        stop_tokens: ids that end a generation.
        sampling: how tokens are chosen.

    Returns:
        (B, T) tokens, and their (B, T) log probabilities in nats, zeros unless asked for.
    """
    device, logprobs = next(model.parameters()).device, sampling.logprobs
    tokens, given = (t.to(device) for t in _laid_out(prompts, total))  # (B, T) each
    scores = torch.zeros(tokens.shape, device=device)
    stop = torch.tensor(stop_tokens, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    previous, shortest = 0, min(len(p) for p in prompts)
    # A prompt that fills all positions still gets its own log probabilities.
    for position in range(shortest, total + (logprobs and shortest == total)):
        # only the positions that are not in the cache: the prompts at first, then one at a time
        states = model.hidden(tokens[:, previous:position], previous)  # (B, S, D)
        logits = model.head(states if logprobs else states[:, -1:])  # (B, S or 1, V)
        if position < total:
            own = given[:, position]  # where a longer prompt has a token of its own
            chosen = torch.where(own, tokens[:, position], sampling.choose(logits[:, -1]))
            tokens[:, position] = chosen
            done |= ~own & torch.isin(chosen, stop)
        if logprobs:
            targets = tokens[:, previous + 1 : position + 1]
            scores[:, previous + 1 : position + 1] = _log_probabilities(logits, targets)
        previous = position
        if done.all():
            break
    return tokens, scores


def _laid_out(prompts: Sequence[Sequence[int]], total: int) -> tuple[Tensor, Tensor]:
    """The prompts' tokens on the left of (B, T) zeros, and where they are."""
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    given = torch.zeros(len(prompts), total, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        given[row, : len(prompt)] = True
    return tokens, given


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the tokens that follow: (B, S, V) and (B, S) or, at the end, (B, S - 1), in nats."""
    nats = F.cross_entropy(logits[:, : targets.shape[1]].transpose(1, 2), targets, reduction="none")
    return -nats
