"""Distillation: a student learns what its teacher predicts, and not just the text.

The loss of a prediction is

    (1 - a) (-log q(next token)) + a t^2 KL(p || q)

with q the student's and p the teacher's probabilities, the latter two at temperature t (Hinton et
al. 2015, arXiv:1503.02531), and their mean over all predicted tokens what is minimised.

Shapes: B windows of a batch, S tokens of the longest, V vocabulary, K tokens kept of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from short_gpt.data.windows import batches
from short_gpt.evaluation.perplexity import Perplexity, check_loss
from short_gpt.healing.teacher import Targets, Teacher, divergence
from short_gpt.healing.texts import IGNORED, Example, collate, examples
from short_gpt.models.decoder import Decoder, padded
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import joined

Window = Sequence[int]
PARTS = ("ids", "logs", "rest")  # of targets, in their order


@dataclass(frozen=True)
class Distillation:
    """What LoRA learns instead of the text alone.

    Args:
        teacher: the original model's predictions on the windows of training and validation.
        kl_share: a, of the divergence in the loss; the rest is the text's own.

    Raises:
        ShortGPTError: ``kl_share`` is not above 0 and at most 1.

    Example:
        >>> heal_lora(short, *windows, distillation=Distillation(teacher))  # doctest: +SKIP
    """

    teacher: Teacher
    kl_share: float = 1.0

    def __post_init__(self) -> None:
        check_share(self.kl_share)

    def identity(self) -> dict[str, object]:
        """What a resumed run must share with the earlier one, ready for JSON."""
        return joined(self.teacher.identity(), {"kl_share": self.kl_share})

    def collate(self, batch: Sequence[Example]) -> dict[str, Tensor]:
        """Windows with their targets, padded: ids and logs (B, S - 1, K), rest (B, S - 1)."""
        targets = self._of(batch)
        parts = {name: [getattr(t, name) for t in targets] for name in PARTS}
        tensors = collate(batch)
        # versions of transformers count the first token as predicted or not: here none does
        tensors["labels"][:, 0] = IGNORED
        return tensors | {name: pad_sequence(p, batch_first=True) for name, p in parts.items()}

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum over a batch's predicted tokens.

        Args:
            logits: (B, S, V), the student's.
            batch: from `collate`.
        """
        total = logits.new_zeros((), dtype=batch["logs"].dtype)
        scale = self.kl_share * self.teacher.temperature**2
        # unbound at once: indexing each row would make a gradient as large as the batch for each
        rows = zip(logits.unbind(0), batch["labels"], strict=True)
        for row, (every, labels) in enumerate(rows):
            count = int(labels.ne(IGNORED).sum())  # the padding follows them
            own = every[:count]  # (N, V)
            targets = Targets(*(batch[name][row, :count] for name in PARTS))
            total = total + scale * self._divergence(own, targets).sum()
            if self.kl_share < 1:
                text = F.cross_entropy(own.float(), labels[1 : count + 1], reduction="sum")
                total = total + (1 - self.kl_share) * text
        return total

    def measure(
        self, decoder: Decoder, windows: Sequence[Window], *, first: int, batch_size: int
    ) -> dict[str, float]:
        """The mean divergence of a student, and its perplexity, by the Trainer's names.

        Args:
            decoder: the student.
            windows: that are read, each of at least two tokens.
            first: the index of the first of them among all windows of the run.
            batch_size: windows read at once.
        """
        apart = nats = 0.0
        for batch in batches(examples(windows, first=first), batch_size):
            every = [example["input_ids"] for example in batch]
            for indices, tokens, _ in padded(every, decoder):
                few, logits = [batch[i] for i in indices], decoder.logits(tokens)
                for row, (example, targets) in enumerate(zip(few, self._of(few), strict=True)):
                    labels = tokens[row, 1 : len(example["input_ids"])]
                    own = logits[row, : len(labels)]
                    apart += float(self._divergence(own, targets.to(own.device)).sum())
                    nats += float(F.cross_entropy(own, labels, reduction="sum"))
        check_loss(apart + nats)
        count = sum(len(window) - 1 for window in windows)
        value = Perplexity(nats, count, len(windows)).value
        return {"eval_loss": apart / count, "eval_perplexity": value}

    def _of(self, batch: Sequence[Example]) -> list[Targets]:
        return self.teacher.targets([e["index"] for e in batch], [e["input_ids"] for e in batch])

    def _divergence(self, logits: Tensor, targets: Targets) -> Tensor:
        return divergence(logits, targets, temperature=self.teacher.temperature)


def check_share(kl_share: float) -> None:
    """Raises ShortGPTError for a share of the loss that cannot be."""
    if not 0 < kl_share <= 1:
        raise ShortGPTError(f"kl_share = {kl_share}: expected above 0 and at most 1")
