"""lm-eval's class for transformers, with a context read once for all of its continuations.

The answers of a multiple choice stand one after the other in one sequence. Their positions continue
the context, and attention sees the context and the answer's own tokens. Logits are taken where an
answer is predicted, and nowhere else. This holds for Llama and Qwen2. It does not hold for models
that change logits after the output matrix, or whose layers get no mask.

Shapes: B contexts, S tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from short_gpt import ShortHFModel
from short_gpt.data.windows import batches
from short_gpt.runtime.progress import bar

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context, continuation
PADDING = -1


class SharedContexts:
    """A model, as `TaskSuite` asks it."""

    def __init__(self, short: ShortHFModel) -> None:
        self.short, self.model = short, short.model

    def harness_model(self, *, batch_size: int = 1) -> object:
        lm: Any = self.short.harness_model(batch_size=batch_size)
        lm._loglikelihood_tokens = partial(self.scores, batch_size)
        return lm

    def scores(
        self, batch_size: int, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Nats and whether greedy, of every request in turn."""
        groups: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(dict)
        most = self.model.config.max_position_embeddings
        for i, (_, context, continuation) in enumerate(requests):
            if not (context and continuation and len(context) + len(continuation) <= most + 1):
                raise ValueError(f"expected 1 to {most} tokens, got {context}, {continuation}")
            groups[tuple(context)][i] = continuation
        sequences = [_Sequence(context, own) for context, own in groups.items()]
        sequences.sort(key=lambda s: len(s.ids), reverse=True)
        scores: dict[int, tuple[float, bool]] = {}
        with bar("tasks", total=len(requests), unit="request", show=not disable_tqdm) as shown:
            for batch in batches(sequences, batch_size):
                own = self._scored(batch)
                scores |= own
                shown.update(len(own))
        return [scores[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _scored(self, batch: Sequence[_Sequence]) -> dict[int, tuple[float, bool]]:
        """Nats and whether greedy, by the numbers of the requests."""
        device, dtype = self.model.device, self.model.dtype
        owners = _padded([s.owners for s in batch], PADDING)
        hidden = self.model.base_model(
            input_ids=_padded([s.ids for s in batch], 0).to(device),
            position_ids=_padded([s.positions for s in batch], 0).to(device),
            attention_mask=_mask(owners, dtype).to(device),
            use_cache=False,
        ).last_hidden_state
        places = [(n, at) for n, s in enumerate(batch) for at in s.predicted]
        rows, columns = map(list, zip(*places, strict=True))
        logits = self.model.get_output_embeddings()(hidden[rows, columns])
        chances = logits.float().log_softmax(-1).cpu()
        wanted = torch.tensor([t for s in batch for own in s.continuations.values() for t in own])
        nats = chances.gather(1, wanted[:, None])[:, 0]
        greedy = chances.argmax(-1) == wanted
        scores, start = {}, 0
        for s in batch:
            for i, own in s.continuations.items():
                part = slice(start, start := start + len(own))
                scores[i] = (float(nats[part].sum()), bool(greedy[part].all()))
        return scores


class _Sequence:
    """A context with all of its continuations but their last tokens, which nothing is read for."""

    def __init__(self, context: Sequence[int], continuations: dict[int, list[int]]) -> None:
        self.continuations, end = continuations, len(context)
        self.ids, self.positions, self.owners = [*context], [*range(end)], [0] * end
        self.predicted: list[int] = []  # where each token of a continuation is, one after another
        for number, own in enumerate(continuations.values(), start=1):
            read, start = own[:-1], len(self.ids)
            self.predicted += [end - 1, *range(start, start + len(read))]
            self.ids += read
            self.positions += range(end, end + len(read))
            self.owners += [number] * len(read)


def _padded(rows: Sequence[list[int]], fill: int) -> Tensor:
    size = max(map(len, rows))
    return torch.tensor([own + [fill] * (size - len(own)) for own in rows])  # (B, S)


def _mask(owners: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds, (B, 1, S, S): each token sees the context and its own continuation."""
    asked, seen = owners[:, :, None], owners[:, None, :]
    earlier = torch.ones(owners.shape[1], owners.shape[1], dtype=torch.bool).tril()
    allowed = earlier & ((seen == 0) | (seen == asked))
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)[
        :, None
    ]
