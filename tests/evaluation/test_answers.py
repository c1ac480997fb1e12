"""Questions with short answers: what counts as right, what a model writes, and its windows."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import CharTokenizer, make_transformer, refuses, save_chat_llama
from families import FAMILIES, make

from short_gpt import ShortLlama, open_model
from short_gpt.data.texts import Conversation
from short_gpt.data.windows import Answer
from short_gpt.evaluation.answers import (
    Question,
    Reply,
    answer_windows,
    ask,
    is_right,
    questions,
    to_learn,
)
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.wrappers.short_hf import ShortHFModel

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}A:"
ASKED = [Question("Say a"), Question("Say b, and more", ("b",))]


ROLES = {"u": "user", "a": "assistant", "s": "system"}


def turns(text: str) -> list[dict[str, str]]:
    """Messages of a text as in "u:Hi a:Yes?"."""
    said = re.findall(r"(\w):(.*?)(?= \w:|$)", text)
    return [{"role": ROLES[role], "content": content} for role, content in said]


@pytest.fixture(scope="module")
def chat(tmp_path_factory, one_rank):
    path = tmp_path_factory.mktemp("chat")
    save_chat_llama(path, 3, TEMPLATE)
    return open_model(str(path / "hf"), device="cpu")


CASES = [
    ("Paris", "The capital is PARIS.", True),
    ("Paris", "Parisian", False),
    ("ice", "nice", False),
    ("ice", "“ice”", True),
    ("carbon dioxide", "Carbon\n dioxide", True),
    ("c-a-t", "c-a-t!", True),
    ("(tree)", "Here: (tree).", True),
    ("1, 2, 3", "1, 2, 3, 4", True),
    ("1,2,3", "0,1,2,3", False),
    ("42", "It is 42.", True),
    ("42", "6 * 7 = **42**", True),
    *[("42", text, False) for text in ("142", "421", "42.5", "42,5", "3.42", "-42", "\u221242")],
    ("42", "1,042", False),
    ("1024", "1,024 bytes", True),
    ("1,024", "1024", True),
    ("24", "1,024", False),
    ("1024000", "1,024,000", True),
    ("1024", "1,024,000", False),
    ("-3", "x = -3", True),
]


@pytest.mark.parametrize("right, text, expected", CASES)
def test_a_right_answer_stands_as_whole_words_and_numbers(right, text, expected):
    assert is_right(Question("", ("something else", right)), text) is expected


def test_without_a_right_answer_nothing_is_known():
    assert is_right(Question("Why?"), "Because.") is None


def test_own_questions_are_40_and_none_holds_its_answer():
    own = questions()
    assert len({q.prompt for q in own}) == 40
    assert not [q for q in own if is_right(q, q.prompt)]


def test_questions_are_read_from_lines_with_and_without_answers(tmp_path):
    file = tmp_path / "own.jsonl"
    rows = [{"prompt": "a"}, {"prompt": "b", "right": "c"}, {"prompt": "d", "right": ["e", "f"]}]
    rows.append({"messages": turns("u:g a:h s:i")})
    rows.append({"messages": turns("s:i u:j a:k u:l"), "right": "m"})
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    known = [Question("a"), Question("b", ("c",)), Question("d", ("e", "f")), Question("g")]
    assert questions(file)[:4] == known and len(questions(file)) == 5
    last = questions(file)[4]
    assert last.prompt.messages == turns("s:i u:j a:k u:l") and last.right == ("m",)
    plain = tmp_path / "own.txt"
    plain.write_text("Why?\n\n  How? \n")
    assert questions(str(plain)) == [Question("Why?"), Question("How?")]


def test_what_judges_is_not_learned(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "right": "c"}, {"prompt": "b"}, {"prompt": "d"}]
    rows.append({"prompt": questions()[0].prompt})  # of ours, with a right answer
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert to_learn(tmp_path / "own.jsonl") == ["a", "d"]


def test_earlier_messages_are_the_context_of_a_prompt(chat):
    prompt = Conversation.of(turns("s:Be kind. u:Hi a:Yes? u:Say a"))
    (reply,) = ask(chat, [Question(prompt)], max_new_tokens=2)
    assert chat.decode(reply.prompt_ids) == "<s>Be kind.</s><s>Hi</s><s>Yes?</s><s>Say a</s>A:"
    plain = ShortLlama(SimpleNamespace(model=make_transformer(), tokenizer=CharTokenizer()))
    refuses("a conversation needs a model with a chat template", ask, plain, [Question(prompt)])


WRONG = ["{", "[1]", '{"question": "a"}', '{"prompt": " "}', '{"prompt": "a", "right": 4}']
WRONG += ['{"prompt": "a", "right": ["b", ""]}', '{"prompt": 3}', '{"messages": []}']
WRONG += ['{"messages": [{"role": "assistant", "content": "a"}]}']
WRONG += ['{"messages": [{"role": "user"}]}']


@pytest.mark.parametrize("line", WRONG)
def test_another_line_is_named(line, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n' + line)
    refuses(r"own\.jsonl, line 2: expected .*; got", questions, tmp_path / "own.jsonl")


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_questions_is_one_line(content, tmp_path):
    (tmp_path / "own.txt").write_bytes(content)
    refuses(r"own\.txt(: 'utf-8'| has no question)", questions, tmp_path / "own.txt")


def test_answers_are_those_of_generate_after_the_chat_template(chat):
    for question, reply in zip(ASKED, ask(chat, ASKED, max_new_tokens=9), strict=True):
        text = f"<s>{question.prompt}</s>A:"
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([ids])
        new = chat.model.generate(tokens, do_sample=False, max_new_tokens=9)[0, len(ids) :]
        assert (reply.prompt_ids, reply.ids) == (ids, new.tolist())
        assert reply.text == chat.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert reply.right is is_right(question, reply.text)


def test_an_end_token_belongs_to_the_answer_and_not_to_its_text(chat, monkeypatch):
    written = [*chat.tokenizer("so", add_special_tokens=False)["input_ids"], 1]
    monkeypatch.setattr(chat, "greedy_many", lambda prompts, count: [written])
    (reply,) = ask(chat, [Question("Is it?", ("so",))], progress=False)
    assert (reply.ids, reply.text, reply.right) == (written, "so", True)


def test_without_a_template_a_line_break_or_an_end_token_ends_the_answer(monkeypatch):
    class Lines(CharTokenizer):
        def decode(self, ids):
            return super().decode(ids).replace("|", "\n")

    transformer = make_transformer()
    short = ShortLlama(SimpleNamespace(model=transformer, tokenizer=Lines()))
    asked, written = [], [Lines().encode("b|c", bos=False, eos=False), [40, 2, 41], [40, 41]]

    def greedy(ids, count):
        asked.append((ids, count))
        return written[len(asked) - 1]

    monkeypatch.setattr(short, "greedy", greedy)
    replies = ask(short, [Question("a")] * 3, max_new_tokens=50)
    prompt = [1, *Lines().encode("Question: a\nAnswer:", bos=False, eos=False)]
    assert asked == [(prompt, min(50, 64 - len(prompt)))] * 3
    assert [reply.ids for reply in replies] == [written[0][:2], [40, 2], [40, 41]]
    assert replies[0].text == "b"


def test_a_prompt_that_fills_the_context_is_named(chat):
    most = chat.decoder.max_seq_len
    refuses(f"but the model's context is {most:,}; shorten it", ask, chat, [Question("a" * most)])


def test_of_a_window_the_answer_alone_is_predicted(chat):
    replies = [Reply([0, 5], [], "", None), *ask(chat, ASKED, max_new_tokens=6)]
    windows = answer_windows(replies)
    assert [type(window) for window in windows] == [Answer, Answer]
    assert [(w.text, w.start) for w in windows] == [(i, len(replies[i].prompt_ids)) for i in (1, 2)]
    assert all(w.counted == bytes(w.start) + b"\1" * (len(w) - w.start) for w in windows)
    reference = chat.reference(windows)
    found = perplexity(chat.decoder, [windows], reference=reference)
    assert found.tokens == sum(len(reply.ids) for reply in replies)
    assert found.same_top.value == 1.0 and found.kld.value == pytest.approx(0, abs=1e-6)
    nats = 0.0
    for window in windows:
        logs = chat.decoder.logits(torch.tensor([window]))[0].log_softmax(-1)  # (S, V)
        nats -= float(logs[range(window.start - 1, len(window) - 1), window[window.start :]].sum())
    assert found.nats == pytest.approx(nats, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_answered_together_get_the_answers_of_each_alone(family):
    short = ShortHFModel(make(family))
    vocab, draw = min(short.decoder.vocab_size, 96), random.Random(0)
    prompts = [[draw.randrange(3, vocab) for _ in range(n)] for n in (9, 4, 12, 7)]
    assert short.greedy_many(prompts, 8) == [short.greedy(ids, 8) for ids in prompts]


def test_padding_after_an_end_token_belongs_to_no_answer():
    short, prompts = ShortHFModel(make("llama")), [[5, 6, 7], [9]]
    free = short.greedy_many(prompts, 8)
    short.model.generation_config.eos_token_id = [free[0][1], 95]  # ends one of the two early
    first, second = short.greedy_many(prompts, 8)
    assert first == free[0][:2] and second == short.greedy([9], 8)
