"""What a reader of completions notices: where they part from the whole model's, and repetition.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from short_gpt.evaluation.perplexity import Perplexity, Sample, check_loss
from short_gpt.models.decoder import Decoder, pad
from short_gpt.runtime.errors import ShortGPTError

Message = Mapping[str, str]
Turn = tuple[list[int], list[int]]  # token ids in front of an answer, and of the answer


class ChatTokenizer(Protocol):
    """What is asked of a tokenizer of transformers that has a chat template."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class Encode(Protocol):
    """From a text to its token ids."""

    def __call__(self, text: str) -> list[int]: ...


def leading(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two completions share from their beginning on.

    Example:
        >>> leading([5, 6, 7], [5, 6, 8, 9])
        2
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def repetition(tokens: Sequence[int], *, n: int = 4) -> float:
    """The share of a text's n-grams that stood in it before: 0 for none, near 1 for a loop.

    Args:
        tokens: at least n.
        n: tokens of an n-gram, at least 1.

    Raises:
        ShortGPTError: there are fewer tokens, or n is below 1.

    Example:
        >>> repetition([1, 2, 1, 2, 1, 2], n=2)
        0.6
    """
    if n < 1 or len(tokens) < n:
        raise ShortGPTError(
            f"{len(tokens)} tokens have no {n}-grams: give more tokens, a smaller n"
        )
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return (len(grams) - len({*grams})) / len(grams)


def turn(tokenizer: ChatTokenizer, encode: Encode, dialog: Sequence[Message]) -> Turn:
    """The last message of a dialog as an answer, under the model's chat template.

    Args:
        tokenizer: of transformers, which has the template.
        encode: from the template's text to token ids; it adds no bos.
        dialog: messages with "role" and "content", an assistant's last.

    Raises:
        ShortGPTError: the last message is no assistant's, or the template writes the messages in
            front of an answer otherwise where one follows.
    """
    if not dialog or dialog[-1].get("role") != "assistant":
        raise ShortGPTError("expected a dialog whose last message is the assistant's")
    messages = [dict(message) for message in dialog]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    front = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if not whole.startswith(front) or whole == front:
        raise ShortGPTError("this chat template writes a dialog otherwise once it is answered")
    return encode(front), encode(whole[len(front) :])


@torch.no_grad()
def turn_losses(decoder: Decoder, turns: Sequence[Turn]) -> list[Perplexity]:
    """The loss of every answer, given what stands in front of it.

    Args:
        decoder: the model.
        turns: at least one token on either side, within what the model takes.

    Raises:
        ShortGPTError: a turn lacks one side; or as in `decoder.pad`.
        NotFiniteError: a logit is NaN or infinite.
    """
    found = []
    for front, answer in turns:
        if not front or not answer:
            raise ShortGPTError("expected tokens in front of every answer, and of the answer")
        tokens, _ = pad([[*front, *answer]], decoder)
        logits = decoder.logits(tokens)[0, len(front) - 1 : -1]  # (S, V), S of the answer
        each = torch.nn.functional.cross_entropy(
            logits.float(), tokens[0, len(front) :], reduction="none"
        )
        nats = float(each.double().sum())
        check_loss(nats)
        found.append(Perplexity.of([Sample(None, nats, len(answer))]))
    return found
