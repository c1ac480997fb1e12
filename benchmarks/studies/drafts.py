"""How many of a smaller model's greedy tokens the whole model would have written as well.

In speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) a draft model writes some tokens
ahead, and the whole model, in one pass over them, accepts those in front of the first that is not
its own likeliest, and writes one itself. Here the share that is accepted is a measure of quality.

A greedy draft is right as long as it writes the whole model's greedy text. So one reading of that
text tells where every draft ends, of any length and wherever it begins; no draft is written.

    python benchmarks/studies/drafts.py smollm2.gguf less-4.gguf --data held_out --out draft_4.json

Shapes: S tokens of a prompt, T written after it, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import torch

from benchmarks.lib.outcome import begin, finish
from short_gpt import open_model, texts, windows
from short_gpt.data.windows import at_least, text_number
from short_gpt.evaluation.perplexity import Sample, SamplingError, sampling_error
from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)  # of drafts, in tokens
PROBES = (  # texts that tokenizers split by different rules, without special tokens
    "The quick brown fox, aged 12, didn't jump; THEY'LL say in 1984.",
    "  two  spaces\n\n\ttab 1,234.50 caf\u00e9 na\u00efve \u4f60\u597d \U0001f600",
    "def f(x):\r\n    return x ** 2  # or x*x, by http://example.org/?a=1&b=2",
)


def main(
    model: str,
    pruned: str,
    data: str = "pg19",
    size: int = 128,
    count: int = 32,
    tokens: int = 64,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Counts the greedy tokens of a pruned model that the original accepts, in drafts of 1 to 8.

    Args:
        model: the original, a checkpoint of any format.
        pruned: the one that drafts, of any format, with the same tokenizer.
        data: texts, whose windows are the prompts.
        size, count: tokens of a prompt, and how many are read.
        tokens: that the original model writes after every prompt; fewer where it ends its text.
        out, overwrite: as of the other benchmarks.
    """
    begin(out, overwrite=overwrite)
    whole, small = (open_model(name, max_seq_len=size + tokens) for name in (model, pruned))
    check_same_tokens(whole, small, (model, pruned))
    prompts = list(windows(texts(data), whole.encode, size=size, stride=size, seed=0, limit=count))
    found = draft_agreement(whole, small, prompts, tokens=tokens, progress=True)
    lengths = [found.at(length).to_dict() for length in LENGTHS]
    for row in lengths:
        print(f"{row['length']:>3}  {row['share']:.1%} accepted, {row['tokens_per_pass']:.2f}")
    content = {"prompts": len(prompts), "lengths": lengths}
    finish("drafts", [], content, held="counted", out=out, overwrite=overwrite)


class Writer(Protocol):
    """What writes a text: any `ShortModel`."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text, where `greedy` does not stop at them itself."""

    def encode(self, text: str) -> list[int]: ...

    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Acceptance:
    """What the whole model accepts of drafts of one length.

    Attributes:
        length: tokens of a draft; less where the text ends.
        drafted, accepted: tokens of all drafts.
        passes: of the whole model, one a draft.
        written: tokens of the text, by both.
        error: of the share that is accepted, prompts being the samples, or their texts if several.
    """

    length: int
    drafted: int
    accepted: int
    passes: int
    written: int
    error: SamplingError

    @property
    def share(self) -> float:
        """Accepted of the drafted tokens, from 0 to 1: 1 where the draft is always right."""
        return self.accepted / self.drafted

    @property
    def tokens_per_pass(self) -> float:
        """Tokens written in a pass of the whole model, from 1 to ``length`` + 1; alone it is 1."""
        return self.written / self.passes

    def to_dict(self) -> dict[str, float | int | None]:
        """All of it, ready for JSON."""
        alone = math.isnan(self.error.standard_error)
        return {
            "length": self.length,
            "share": self.share,
            "standard_error": None if alone else self.error.standard_error,
            "reach_95": self.error.margin() if self.error.known else None,
            "tokens_per_pass": self.tokens_per_pass,
            **{name: getattr(self, name) for name in ("drafted", "accepted", "passes", "written")},
        }


@dataclass(frozen=True)
class Agreement:
    """Where a draft model agrees with the whole model's greedy text.

    Attributes:
        agreed: for every prompt, whether each token written behind it is the draft's own next.
        texts: that the prompts were cut from, by number; None where that is not known.
    """

    agreed: tuple[tuple[bool, ...], ...]
    texts: tuple[int | None, ...]

    def at(self, length: int) -> Acceptance:
        """What is accepted of drafts of so many tokens, the next one behind the whole model's own.

        Example:
            >>> found = Agreement(((True, False, True, True, True),), (0,)).at(2)
            >>> (found.accepted, found.drafted, found.passes)
            (3, 4, 2)
        """
        at_least(1, length=length)
        each = [_drafts(agreed, length) for agreed in self.agreed]
        pairs = zip(self.texts, each, strict=True)
        samples = [Sample(text, accepted, drafted) for text, (accepted, drafted, _) in pairs]
        accepted, drafted, passes = (sum(part) for part in zip(*each, strict=True))
        written = sum(map(len, self.agreed))
        return Acceptance(length, drafted, accepted, passes, written, sampling_error(samples))


def _drafts(agreed: Sequence[bool], length: int) -> tuple[int, int, int]:
    """Accepted and drafted tokens of one text, and passes of the whole model."""
    accepted = drafted = passes = start = 0
    while start < len(agreed):
        draft = agreed[start : start + length]
        right = next((i for i, same in enumerate(draft) if not same), len(draft))
        accepted, drafted, passes = accepted + right, drafted + len(draft), passes + 1
        start += right + 1  # behind the accepted ones the whole model writes one itself
    return accepted, drafted, passes


def draft_agreement(
    whole: Writer,
    draft: Writer,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 64,
    progress: bool = False,
) -> Agreement:
    """Where a smaller model would have written the whole model's greedy text.

    Both read the text in one pass each, so that a model agrees with itself in any dtype.

    Args:
        whole: writes behind every prompt.
        draft: with the same tokens; see `check_same_tokens`.
        prompts: token ids, each read on its own.
        tokens: to write behind each; fewer where the whole model ends its text.
        progress: whether to show a bar.

    Raises:
        ShortGPTError: there is no prompt, or it is empty or with its text too long for a model.

    Example:
        >>> found = draft_agreement(whole, pruned, prompts)  # doctest: +SKIP
        >>> found.at(4).share  # doctest: +SKIP
        0.5
    """
    at_least(1, tokens=tokens)
    check_prompts(prompts, tokens, min(m.decoder.max_seq_len for m in (whole, draft)))
    agreed: list[tuple[bool, ...]] = []
    with bar("drafting", total=len(prompts), unit="prompt", show=progress) as shown:
        for prompt in prompts:
            written = _ended(whole.greedy(list(prompt), tokens), whole.stop_tokens)
            text = [*prompt, *written]
            pairs = zip(*(likeliest(m, text, len(prompt)) for m in (whole, draft)), strict=True)
            agreed.append(tuple(ours == theirs for ours, theirs in pairs))
            shown.update()
    return Agreement(tuple(agreed), tuple(text_number(prompt) for prompt in prompts))


def check_prompts(prompts: Sequence[Sequence[int]], tokens: int, most: int) -> None:
    """Raises ShortGPTError for what a model cannot read with so many tokens behind it."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) < 1:
        raise ShortGPTError("expected prompts of at least one token each")
    if max(lengths) + tokens > most:
        raise ShortGPTError(
            f"a prompt of {max(lengths)} tokens and `tokens` {tokens} are more than the model "
            f"takes, {most}: give shorter prompts or fewer `tokens`"
        )


def _ended(written: list[int], stop_tokens: frozenset[int]) -> list[int]:
    """The text up to the first token that ends one, with it."""
    stops = [place for place, token in enumerate(written) if token in stop_tokens]
    return written[: stops[0] + 1] if stops else written


@torch.no_grad()
def likeliest(model: Writer, text: list[int], start: int) -> list[int]:
    """What a model holds for the next token in front of every token from ``start`` on."""
    tokens, _ = pad([text], model.decoder)
    logits = model.decoder.logits(tokens)[0, start - 1 : -1]  # (T, V)
    return logits.argmax(-1).tolist()


def check_same_tokens(whole: Writer, draft: Writer, names: tuple[str, str]) -> None:
    """Raises ShortGPTError unless two models have as many tokens and split texts alike.

    Args:
        whole, draft: the models.
        names: what they are called in the error.
    """
    sizes = [model.decoder.vocab_size for model in (whole, draft)]
    told = f"{names[1]} cannot draft for {names[0]}: expected the same tokenizer, but"
    if sizes[0] != sizes[1]:
        raise ShortGPTError(f"{told} it has {sizes[1]} tokens instead of {sizes[0]}")
    for text in PROBES:
        if whole.encode(text) != draft.encode(text):
            raise ShortGPTError(f"{told} it splits texts otherwise, such as {text!r}")


if __name__ == "__main__":
    fire.Fire(main)
