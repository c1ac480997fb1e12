"""Where completions part, how often they repeat themselves, and the loss of answers in a chat."""

from __future__ import annotations

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows

from short_gpt import ShortLlama
from short_gpt.evaluation import leading, losses, repetition, turn, turn_losses


class Tiny:
    def __init__(self) -> None:
        self.model, self.tokenizer = make_transformer(), CharTokenizer()


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2], [1, 2, 3], 2), ([1, 2], [3, 2], 0), ([], [1], 0)],
)
def test_leading_tokens_are_counted_up_to_the_first_that_differs(first, second, count):
    assert leading(first, second) == leading(second, first) == count


def test_repetition_is_the_share_of_n_grams_that_stood_there_before():
    assert repetition(range(20)) == 0
    assert repetition([7] * 20, n=4) == 16 / 17
    assert repetition([1, 2, 3, 1, 2, 3, 4], n=3) == 1 / 5
    for tokens, n in (([1, 2], 3), ([1], 0)):
        with pytest.raises(ValueError, match="have no .-grams"):
            repetition(tokens, n=n)


def test_the_loss_of_an_answer_is_that_of_its_tokens_alone():
    decoder = ShortLlama(Tiny()).decoder
    (window,) = random_windows(1, 12)
    (found,) = turn_losses(decoder, [(window[:8], window[8:])])
    logs = decoder.logits(torch.tensor([window]))[0].log_softmax(-1)
    expected = -sum(float(logs[i - 1, window[i]]) for i in range(8, 12))
    assert found.nats == pytest.approx(expected, rel=1e-5) and found.tokens == 4
    (whole,) = turn_losses(decoder, [(window[:1], window[1:])])
    assert whole.nats == pytest.approx(losses(decoder, [window], progress=False)[0].nats, rel=1e-5)
    with pytest.raises(ValueError, match="tokens in front of every answer, and of the answer"):
        turn_losses(decoder, [(window, [])])


class Template:
    """Stands in for a tokenizer with a chat template."""

    def __init__(self, rewrites: bool = False) -> None:
        self.rewrites = rewrites

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in conversation)
        start = "!" if self.rewrites and conversation[-1]["role"] == "user" else ""
        return start + text + "<assistant>" * add_generation_prompt


DIALOG = [{"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "Yes"}]


def test_an_answer_is_what_the_template_writes_behind_its_prompt():
    front, answer = turn(Template(), lambda text: [ord(c) for c in text], DIALOG)
    assert "".join(map(chr, front)) == "<user>Hot?</><assistant>"
    assert "".join(map(chr, answer)) == "Yes</>"


def test_dialogs_without_an_answer_and_templates_that_rewrite_are_refused():
    with pytest.raises(ValueError, match="whose last message is the assistant's"):
        turn(Template(), list, DIALOG[:1])
    with pytest.raises(ValueError, match="writes a dialog otherwise once it is answered"):
        turn(Template(rewrites=True), list, DIALOG)
