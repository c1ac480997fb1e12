"""Distillation: a student learns what its teacher predicts, not only the text.

The loss is the mean over the tokens that count (all predicted ones, except in dialogs of the
model's own, where its answers count alone) of

    (1 - a) (-log q(next token)) + a t^2 KL(p || q)

with q the student's and p the teacher's probabilities, in the KL at temperature t (Hinton et al.
2015, arXiv:1503.02531). Of each prediction the K likeliest tokens are kept, and the total of all
others as one more event: the KL over these K + 1 events is at most that over all V tokens.

Shapes: B windows of a batch, S tokens of the longest, N predictions, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.utils.rnn import pad_sequence

from short_gpt.data.windows import TokenIds, batches, learned
from short_gpt.evaluation.perplexity import AT_ONCE, Perplexity, check_loss
from short_gpt.healing.settings import Recipe
from short_gpt.models.decoder import Decoder, padded
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import json_digest, windows_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile, hold, joined
from short_gpt.wrappers.scored_model import ScoredModel

IGNORED = -100  # a label that cross entropy passes over
IDENTITY, CONTENT = "teacher.json", "predictions.bin"


class Example(TypedDict):
    """One window, as the Trainer takes it."""

    input_ids: list[int]
    counted: bytes  # as `learned`
    index: int  # among all windows of the run


def examples(windows: Sequence[Sequence[int]], *, first: int = 0) -> list[Example]:
    numbered = enumerate(windows, start=first)
    return [Example(input_ids=[*w], counted=learned(w), index=i) for i, w in numbered]


def learned_digest(windows: Sequence[TokenIds]) -> str:
    """A digest of windows and of which of their tokens count."""
    return windows_digest([*windows, *map(learned, windows)])


def collate(batch: Sequence[Example]) -> dict[str, Tensor]:
    """Windows as one batch (B, S), padded on the right; tokens that do not count are no targets."""
    longest = max(len(e["input_ids"]) for e in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.long)  # (B, S)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(batch):
        ids = torch.tensor(example["input_ids"])
        counted = torch.tensor([*example["counted"]], dtype=torch.bool)
        tokens[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.where(counted, IGNORED)
    return {"input_ids": tokens, "labels": labels}


def _predicting(logits: Tensor, counted: Sequence[bool | int]) -> Tensor:
    """What predicts the counted tokens of a window: of logits (S, V) those before each, (N, V)."""
    rows = [row for row, counts in enumerate(counted[1:]) if counts]
    # a slice takes no second copy of the logits
    return logits[: len(rows)] if rows[-1:] == [len(rows) - 1] else logits[rows]


class Targets(NamedTuple):
    """What a teacher predicts for N tokens, natural logarithms of probabilities."""

    ids: Tensor  # the likeliest tokens, (N, K) int64
    logs: Tensor  # of their probabilities, (N, K)
    rest: Tensor  # of the probability of all other tokens together, (N,); -inf where there is none

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> Targets:
        """The targets from logits (N, V); all tokens are kept where K is V or more.

        Example:
            >>> Targets.of(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), 2).rest.exp()
            tensor([0.5000])
        """
        scaled = _scaled(logits, temperature)  # (N, V)
        total = scaled.logsumexp(-1)  # (N,)
        logs, ids = scaled.topk(min(k, scaled.shape[-1]), dim=-1)  # (N, K) each
        # 1 minus the sum over these would be noise where they are nearly all
        others = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1)  # (N,)
        return cls(ids, logs - total[:, None], others - total)

    def to(self, device: torch.device) -> Targets:
        return Targets(*(part.to(device) for part in self))

    def normalized(self) -> Targets:
        """The same, scaled to sum to 1, which rounded logarithms do not."""
        total = torch.logaddexp(self.logs.logsumexp(-1), self.rest)  # (N,)
        return Targets(self.ids, self.logs - total[:, None], self.rest - total)


def divergence(logits: Tensor, targets: Targets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats of every prediction, (N,), not multiplied by t^2.

    Its gradient is the student's probabilities minus the teacher's, whose rest is spread as the
    student's is. The student's ``logits`` are (N, V); ``temperature`` is that of the targets.
    """
    nats: Tensor = _Divergence.apply(_scaled(logits, temperature), *targets)  # (N,)
    return nats


class _Divergence(torch.autograd.Function):
    """The same with its gradient in closed form: autograd would hold several (N, V), not one."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, scaled: Tensor, ids: Tensor, logs: Tensor, rest: Tensor
    ) -> Tensor:
        # a few rows at a time pass through the processor's cache
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
    total = scaled.logsumexp(-1)  # (N,)
    own = scaled.gather(-1, ids) - total[:, None]  # (N, K)
    # 0 log 0 is 0, and not the NaN that 0 times infinity is
    value = (logs.exp() * (logs.clamp_min(limits.min) - own)).sum(-1)  # (N,)
    q = (scaled - total[:, None]).exp_()  # (N, V)
    # (N,), summed without these: 1 minus their sum would be noise where they are nearly all
    others = q.scatter_(-1, ids, 0.0).sum(-1).clamp_min(limits.tiny)
    value += rest.exp() * (rest.clamp_min(limits.min) - others.log())
    # q minus p, whose rest is spread as that of q is
    q *= (1 - rest.exp() / others)[:, None]
    return value, q.scatter_(-1, ids, own.exp() - logs.exp())


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


class Distillation:
    """What LoRA learns besides the text, or instead of it: a teacher's predictions.

    They are kept in a file that is mapped into memory, 6 K + 2 bytes a token. Tokens that do not
    count (`data.windows.learned`), such as a user's in a dialog of the model's own, have none.

    Args:
        folder: Folder of the file; one with predictions for the same is continued.
        model: Teacher, with all its layers. Only `fill` asks it, and it may be changed after that.
        windows: Token ids of all windows of training, then of validation.
        recipe: Its ``top_k``, ``temperature`` and ``kl_share`` count. Default: `Recipe`'s.

    Raises:
        ShortGPTError: the folder holds predictions of another model, other windows or settings.
    """

    def __init__(
        self,
        folder: str | Path,
        model: ScoredModel,
        windows: Sequence[TokenIds],
        recipe: Recipe | None = None,
    ) -> None:
        recipe = recipe or Recipe()
        self._model: ScoredModel | None = model
        self._windows, known = windows, model.identity()
        self._teacher = json_digest(known)
        self.k, self.temperature = min(recipe.top_k, model.decoder.vocab_size), recipe.temperature
        self.kl_share = recipe.kl_share
        K = (self.k,)
        self._record = np.dtype([("ids", "<i4", K), ("logs", "<f2", K), ("rest", "<f2")])
        # in the file, of each window: records of the tokens that count
        sizes = [sum(learned(window)) * self._record.itemsize for window in windows]
        self._ends = [0, *accumulate(sizes)]
        self._file = Path(folder) / CONTENT
        digest = {"windows": learned_digest(windows)}
        about = joined(known, digest, {"top_k": self.k, "temperature": self.temperature})
        path = Path(folder) / IDENTITY
        self._state = StateFile(path, about, lock=hold(folder), folder=Path(folder))

    def identity(self) -> dict[str, object]:
        """What a resumed training must share with the earlier one."""
        own = {"top_k": self.k, "temperature": self.temperature, "kl_share": self.kl_share}
        return joined({"teacher": self._teacher}, own)

    def fill(self, *, batch_size: int = 1, progress: bool = True) -> None:
        """Asks the model for what the file lacks.

        Replicas share the windows, and the first writes the predictions of all.

        Raises:
            ShortGPTError: several model-parallel ranks share the model.
        """
        replicas.require_whole_model("a teacher")  # else each of several ranks would write
        team = replicas.current(None if self._model is None else self._model.decoder.device)
        team.gather(None)  # all have looked for a file before one is written
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self._state.content is None and not team.rank:
            self._file.unlink(missing_ok=True)
            self._state.save({})
        done = team.gather(0 if team.rank else self._drop_unfinished())[0]
        rest, model = self._windows[done:], self._model
        mine = team.own_items(rest)
        every = iter(model.window_logits(mine, batch_size=batch_size) if mine and model else ())
        read = iter(mine)
        with (
            open(self._file, "ab") as file,
            bar("teacher", total=len(self._windows), unit="window", show=progress) as shown,
        ):
            shown.update(done)
            for _ in range(0, len(rest), team.count):
                logits = next(every, None)  # (S, V)
                own = b"" if logits is None else self._content(next(read), logits)
                del logits  # before the next ones, which are as large
                for content in team.gather(own):
                    file.write(b"" if team.rank else content)
                    shown.update(bool(content))
        team.gather(None)  # the first has written all
        self._model = None

    def _content(self, window: TokenIds, logits: Tensor) -> bytes:
        """The records of a window by its logits, (S, V)."""
        targets = Targets.of(_predicting(logits, learned(window)), self.k, self.temperature)
        if targets.logs.isnan().any():
            raise NotFiniteError(
                "the teacher gave a NaN or infinite logit; check the weights, or another dtype"
            )
        record = np.empty(len(targets.rest), self._record)
        for name, part in targets._asdict().items():
            record[name] = part.cpu().numpy()
        return record.tobytes()

    def targets(self, indices: Sequence[int], windows: Sequence[TokenIds]) -> list[Targets]:
        """Its predictions of every token that counts in these windows.

        The indices are those among all windows of training, then of validation.
        """
        if self._written() < self._ends[-1]:
            raise RuntimeError(f"{self._file} lacks predictions: call fill first")
        for index, window in zip(indices, windows, strict=True):
            if list(self._windows[index]) != list(window):
                raise ShortGPTError(
                    f"window {index} is not that of {self._file}: expected the windows in their "
                    "order there, those to train on before those that validate"
                )
        mapped = np.memmap(self._file, mode="r")  # bytes
        parts = (mapped[self._ends[i] : self._ends[i + 1]] for i in indices)
        return [self._read(part.view(self._record)) for part in parts]

    def _read(self, part: np.ndarray) -> Targets:
        ids = torch.from_numpy(part["ids"].astype(np.int64))  # (N, K)
        logs, rest = (torch.from_numpy(part[name].astype(np.float32)) for name in ("logs", "rest"))
        return Targets(ids, logs, rest).normalized()

    def _written(self) -> int:
        return self._file.stat().st_size if self._file.exists() else 0

    def _drop_unfinished(self) -> int:
        """Truncates a window that a kill left unfinished; the number of finished ones."""
        finished = bisect_right(self._ends, self._written()) - 1
        if self._file.exists():
            os.truncate(self._file, self._ends[finished])
        return finished

    def collate(self, batch: Sequence[Example]) -> dict[str, Tensor]:
        """Windows with their targets, padded to N: ids and logs (B, N, K), rest (B, N)."""
        parts = zip(*self._of(batch), strict=True)  # each of all windows
        padded_parts = [pad_sequence([*part], batch_first=True) for part in parts]
        return collate(batch) | dict(zip(Targets._fields, padded_parts, strict=True))

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum over the counted tokens of a batch of `collate`, for logits (B, S, V)."""
        total = logits.new_zeros((), dtype=batch["logs"].dtype)
        # unbound at once: indexing each row would make a gradient as large as the batch for each
        rows = zip(logits.unbind(0), batch["labels"], strict=True)
        for row, (every, labels) in enumerate(rows):
            counted = labels.ne(IGNORED)  # (S,)
            own = _predicting(every, counted.tolist())  # (N, V)
            targets = Targets(*(batch[name][row, : len(own)] for name in Targets._fields))
            total = total + self._scale * self._divergence(own, targets).sum()
            if self.kl_share < 1:
                text = F.cross_entropy(own.float(), labels[counted], reduction="sum")
                total = total + (1 - self.kl_share) * text
        return total

    def measure(
        self, decoder: Decoder, windows: Sequence[TokenIds], *, first: int, batch_size: int
    ) -> dict[str, float]:
        """A student's mean loss, divergence and perplexity over the tokens that count.

        ``first`` is the index of the first window.
        """
        apart = nats = 0.0
        for batch in batches(examples(windows, first=first), batch_size):
            every = [example["input_ids"] for example in batch]
            for indices, tokens, _ in padded(every, decoder):
                few, logits = [batch[i] for i in indices], decoder.logits(tokens)
                for row, (example, targets) in enumerate(zip(few, self._of(few), strict=True)):
                    counted = torch.tensor([*example["counted"]], dtype=torch.bool)  # (S,)
                    own = _predicting(logits[row], counted.tolist())  # (N, V)
                    labels = tokens[row, : len(counted)][counted]  # (N,)
                    apart += float(self._divergence(own, targets.to(own.device)).sum())
                    nats += float(F.cross_entropy(own, labels, reduction="sum"))
        check_loss(apart + nats)
        count = sum(sum(learned(window)) for window in windows)
        value = Perplexity(nats, count, len(windows)).value
        loss = (self._scale * apart + (1 - self.kl_share) * nats) / count  # as it is trained
        return {"eval_loss": loss, "eval_divergence": apart / count, "eval_perplexity": value}

    @property
    def _scale(self) -> float:
        """The factor of the divergence in the loss."""
        return self.kl_share * self.temperature**2

    def _of(self, batch: Sequence[Example]) -> list[Targets]:
        return self.targets([e["index"] for e in batch], [e["input_ids"] for e in batch])

    def _divergence(self, logits: Tensor, targets: Targets) -> Tensor:
        return divergence(logits, targets, temperature=self.temperature)
