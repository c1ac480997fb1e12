"""Text that a model writes itself: drawn as the model predicts, whatever the batch, and kept."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import count, islice

import pytest
import torch
from conftest import BYTE_VOCAB, CharTokenizer, make_transformer, refuses, share_model
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama
from short_gpt import ShortHFModel, ShortLlama, open_model, own_samples
from short_gpt.data.prompts import in_turn
from short_gpt.data.texts import Conversation
from short_gpt.models import decoder
from short_gpt.wrappers import own_text as module
from short_gpt.wrappers.own_text import draw

quiet = partial(own_samples, progress=False)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SYSTEM = "{% if messages[0].role != 'system' %}<system>Be kind.{% endif %}"
TEXTS, SYMBOLS = 1500, 8  # of a vocabulary so small that every pair of tokens is counted


class Chatting(CharTokenizer):
    dialog_format = "llama2"


class Letters(CharTokenizer):
    """Ids below `SYMBOLS`."""

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [1] * bos + [3 + ord(c) % 5 for c in s]


class Bare:
    """A tokenizer that puts no bos before a text."""

    bos_token_id, eos_token_id, chat_template = None, None, None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 5 for c in text]}


def llama(seed: int = 0, tokenizer: object = None, **changes: object) -> ShortLlama:
    return ShortLlama(Llama(make_transformer(seed, **changes), tokenizer or CharTokenizer()))


def hf(vocab_size: int = SYMBOLS, **entries: object) -> ShortHFModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1}
    config = LlamaConfig(**sizes, vocab_size=vocab_size, initializer_range=0.5, **entries)
    return ShortHFModel(LlamaForCausalLM(config), tokenizer=Bare())


@pytest.fixture
def folder(llama_folders):
    return llama_folders


def joint(short, temperature: float) -> torch.Tensor:
    """How likely the model is to write each pair of tokens after bos, (V, V)."""
    pairs = torch.tensor([[1, i] for i in range(SYMBOLS)])
    logits = short.decoder.logits(pairs).double() / temperature  # (V, 2, V)
    first, second = logits[0, 0].softmax(-1), logits[:, 1].softmax(-1)
    return first[:, None] * second


@pytest.mark.parametrize("make", [partial(llama, 0, Letters(), vocab_size=SYMBOLS), hf])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_texts_are_written_as_the_model_predicts(make, temperature):
    """Counts of all pairs of first tokens against the closed form, by chi-square."""
    short = make()
    written = quiet(short, TEXTS, 3, temperature=temperature, batch_size=TEXTS)
    pairs = torch.tensor([window[-2:] if len(window) == 3 else window for window in written])
    if short.encode(""):  # bos is the window's first
        assert {window[0] for window in written} == {1}
    else:
        pairs = torch.tensor(written)[:, :2]
    counts = torch.bincount(pairs[:, 0] * SYMBOLS + pairs[:, 1], minlength=SYMBOLS**2).double()
    for other in (0.5, 1.0, 3.0):
        expected = TEXTS * joint(short, other).flatten()
        seen = expected > 5
        rest = torch.stack([expected[~seen].sum(), counts[~seen].sum()]).clamp(min=1e-9)
        chi = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
        chi += (rest[1] - rest[0]) ** 2 / rest[0].clamp(min=1)
        degrees = int(seen.sum())
        # six standard deviations above the mean of chi-square
        assert (chi < degrees + 6 * (2 * degrees) ** 0.5) == (other == temperature)


def test_a_draw_is_of_the_whole_vocabulary():
    """A token of probability 1/1000 is drawn as often as that: no top-k, no top-p."""
    logits = torch.tensor([[0.999, 0.001]]).log().expand(20_000, 2)
    drawn = draw(logits, 1.0, [(0, text, 5) for text in range(20_000)])
    assert 5 <= int(drawn.sum()) <= 40  # 20 expected, 4.5 the standard deviation
    refuses("NaN or infinite logits", draw, torch.full((1, 2), torch.nan), 1.0, [(0, 0, 0)])


@pytest.mark.parametrize("make", [llama, hf])
def test_neither_batch_nor_count_changes_a_text(make):
    short = make()
    whole = quiet(short, 7, 12)
    assert [len(window) for window in whole] == [12] * 7 and len({*map(tuple, whole)}) == 7
    assert quiet(short, 7, 12, batch_size=1) == quiet(short, 7, 12, batch_size=3) == whole
    assert quiet(short, 4, 12) == whole[:4]
    assert quiet(short, 7, 12, seed=1) != whole
    assert [window.text for window in whole] == [*range(7)]  # texts are what errors are over


def test_an_end_of_text_ends_nothing_and_the_models_own_settings_count_for_nothing():
    short = hf(eos_token_id=[*range(SYMBOLS)])  # whatever it writes ends a text
    plain = quiet(hf(), 4, 12)
    own = short.model.generation_config
    own.repetition_penalty, own.do_sample, own.top_k, own.temperature = 5.0, True, 1, 0.1
    assert quiet(short, 4, 12) == plain and short.model.generation_config is own
    meta = quiet(llama(0, Letters(), vocab_size=SYMBOLS), 8, 30)
    assert any(2 in window[:-1] for window in meta)  # its end of text, with more after it


def test_bos_is_in_a_window_only_where_the_tokenizer_puts_it():
    assert all(window[0] == 1 for window in quiet(llama(), 3, 12))
    after_bos = [ids[1:] for ids in quiet(llama(), 3, 13)]
    tokenizer = CharTokenizer()
    tokenizer.add_bos = False
    assert quiet(llama(0, tokenizer), 3, 12) == after_bos


def test_what_was_written_is_kept_and_more_is_added(tmp_path, monkeypatch):
    short, longer = llama(), quiet(llama(), 6, 12)
    first = quiet(short, 4, 12, beside=tmp_path / "out")
    assert first == longer[:4]
    (file,) = tmp_path.glob("self-*.json")
    rows = []
    monkeypatch.setattr(module, "draw", lambda *a: rows.append(len(a[2])) or draw(*a))
    assert quiet(short, 6, 12, beside=tmp_path / "out") == longer and set(rows) == {2}
    rows.clear()
    assert quiet(short, 6, 12, beside=tmp_path / "out") == longer and not rows
    assert quiet(short, 3, 12, beside=tmp_path / "out") == longer[:3] and not rows
    assert [*tmp_path.glob("self-*.json")] == [file]


@pytest.mark.parametrize(
    ("other", "changes"),
    [
        (partial(llama, 1), {}),  # weights
        (partial(llama, 0, norm_eps=1e-3), {}),
        (partial(llama, 0, Chatting()), {"chat": True}),
        (llama, {"seed": 1}),
        (llama, {"temperature": 0.5}),
        (llama, {"size": 13}),
    ],
)
def test_other_weights_or_settings_write_anew(other, changes, tmp_path):
    quiet(llama(), 2, beside=tmp_path / "out", size=40)
    quiet(other(), 2, beside=tmp_path / "out", **{"size": 40, **changes})
    assert len([*tmp_path.glob("self-*.json")]) == 2


@pytest.mark.parametrize("make", [llama, hf])
def test_a_model_that_reads_with_products_in_bfloat16_writes_so(make, tmp_path, monkeypatch):
    types, mixed = set(), make()
    exact = quiet(make(), 3, 12, beside=tmp_path / "out")
    mixed.decoder.mixed = True
    layer = next(
        m for m in mixed.decoder.layers.modules() if hasattr(m, "weight") and m.weight.ndim == 2
    )
    layer.register_forward_hook(lambda _, args, out: types.update((layer.weight.dtype, out.dtype)))
    quiet(mixed, 3, 12, beside=tmp_path / "out")
    assert types == {torch.bfloat16} and layer.weight.dtype == torch.float32
    assert len([*tmp_path.glob("self-*.json")]) == 2  # none of one in the other's
    assert quiet(make(), 3, 12, beside=tmp_path / "out") == exact
    monkeypatch.setattr(decoder, "free_memory", lambda: 0)  # no copies, the same products
    types.clear()
    quiet(mixed, 3, 13, beside=tmp_path / "out")
    assert types == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("make", [llama, hf])
def test_an_interrupted_run_goes_on_after_the_last_batch(make, tmp_path, monkeypatch):
    whole, rows = quiet(make(), 5, 20), []

    def drawing(logits, temperature, keys):
        rows.extend(row for _, row, position in keys if position == 10)
        if rows == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return draw(logits, temperature, keys)

    monkeypatch.setattr(module, "draw", drawing)
    with pytest.raises(KeyboardInterrupt):
        quiet(make(), 5, 20, beside=tmp_path / "out", batch_size=2)
    rows.clear()
    assert quiet(make(), 5, 20, beside=tmp_path / "out", batch_size=5) == whole
    assert rows == [2, 3, 4]  # what was kept is not written again


def test_chats_begin_with_the_template_up_to_the_users_open_turn(folder):
    short = llama(0, Chatting())
    opening = CharTokenizer().encode("[INST] ", bos=True, eos=False)
    assert short.opening(chat=True) == opening
    windows = quiet(short, 3, 20, chat=True)
    assert all(w[: len(opening)] == opening and len(w) == 20 for w in windows)
    assert {w.start for w in windows} == {len(opening)}
    assert len({*map(tuple, windows)}) == 3
    refuses("size = 5: expected more than 8 tokens", quiet, short, 3, 5, chat=True)
    refuses("neither Llama 2's nor Llama 3's dialog format", quiet, llama(), 3, 20, chat=True)
    named = open_model(str(folder / "hf"))
    refuses("has no chat template that begins all dialogs", quiet, named, 1, 20, chat=True)
    named.tokenizer.chat_template = TEMPLATE
    assert named.decode(named.opening(chat=True)) == "<s>user:"


@pytest.fixture
def chatting(folder, monkeypatch):
    """A model with a chat template, which is asked q00, q01 and so on in its first text."""
    asked = lambda _, text: (f"q{text}{i}" for i in count())  # noqa: E731
    monkeypatch.setattr(module, "prompts", asked)
    short = open_model(str(folder / "hf"))
    short.tokenizer.chat_template = TEMPLATE
    return short


def written_by(logits_of, ids, count, choose) -> None:
    """`continued` of a model whose logits a function fills in, by the text so far."""
    texts = [[*start] for start in ids]
    for _ in range(count):
        logits = torch.full((len(texts), BYTE_VOCAB), -1e9)
        for row, text in zip(logits, texts, strict=True):
            logits_of(text, row)
        for text, token in zip(texts, choose(logits).tolist(), strict=True):
            text.append(token)


def test_a_dialog_goes_on_with_a_prompt_after_the_end_of_each_answer(
    chatting, monkeypatch, tmp_path
):
    """Known answer: a model that writes two letters, x likelier than y, and the end."""
    x, y, end = *chatting.tokenizer("xy", add_special_tokens=False)["input_ids"], 1

    def logits(text: list[int], row: torch.Tensor) -> None:
        ended = {*text[-2:]} <= {x, y}
        row[[end] if ended else [x, y]] = torch.tensor([0.0, -0.1])[: 2 - ended]

    monkeypatch.setattr(chatting, "continued", partial(written_by, logits))
    kept = {"chat": True, "beside": tmp_path / "out"}
    windows, answers = quiet(chatting, 8, 64, **kept), {True: set(), False: set()}
    for text, window in enumerate(windows):
        said = re.findall("assistant:(..)</s>", chatting.decode(window))
        assert len(said) == 2
        for number, answer in enumerate(said):
            answers[(text + number) % module.GREEDY == 0].add(answer)
        turns = zip((f"q{text}{i}" for i in count()), [*said, "xx"], strict=False)
        whole = "".join(f"<s>user:{q}</s><s>assistant:{a}</s>" for q, a in turns)
        assert chatting.decode(window) == whole[: len(chatting.decode(window))]
        assert len(window) == 64 and window.start == len("s user:") - 1
        own = [token for token, counts in zip(window, window.counted, strict=True) if counts]
        wrote = "".join(f"{answer}</s>" for answer in said)
        assert re.fullmatch(re.escape(wrote) + "[xy]*", chatting.decode(own))
    assert answers[True] == {"xx"} and answers[False] == {"xx", "xy", "yx", "yy"}
    monkeypatch.setattr(chatting, "continued", None)  # nothing is written again
    assert [w.counted for w in quiet(chatting, 8, 64, **kept)] == [w.counted for w in windows]


def test_half_of_the_text_of_a_chat_model_is_dialogs(chatting):
    mixed = quiet(chatting, 16, 40)
    texts, dialogs = (quiet(chatting, 16, 40, chat=chat) for chat in (False, True))
    alone = [dialogs[i] if i in (1, 3, 5, 7, 8, 10, 12, 14) else texts[i] for i in range(16)]
    assert mixed == alone and [w.start for w in mixed] == [w.start for w in alone]
    assert [w.counted for w in mixed] == [w.counted for w in alone]
    assert {w.counted for w in texts} == {None}  # all tokens of a text are the model's
    assert [w.text for w in mixed] == [*range(16)]
    assert quiet(chatting, 5, 40, batch_size=2) == mixed[:5]
    chatting.tokenizer.chat_template = "{{ messages[0].content }}"  # begins no dialog alike
    assert quiet(chatting, 16, 40) == texts


def test_other_prompts_write_anew(chatting, tmp_path, monkeypatch):
    quiet(chatting, 1, 20, chat=True, beside=tmp_path / "out")
    (tmp_path / "others.txt").write_text("Hello\n")
    monkeypatch.setattr(module, "BUILT_IN", tmp_path / "others.txt")
    quiet(chatting, 1, 20, chat=True, beside=tmp_path / "out")
    assert len([*tmp_path.glob("self-*.json")]) == 2


def test_a_users_prompts_are_asked_instead_and_messages_begin_a_dialog_anew(
    chatting, monkeypatch, tmp_path
):
    """Known answer: a model that writes x and the end."""
    x, end = *chatting.tokenizer("x", add_special_tokens=False)["input_ids"], 1

    def logits(text: list[int], row: torch.Tensor) -> None:
        row[end if text[-1] == x else x] = 0.0

    monkeypatch.setattr(chatting, "continued", partial(written_by, logits))
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    context = [turn("system", "S"), turn("user", "U"), turn("assistant", "A"), turn("user", "V")]
    own = ["p", [turn("user", "q"), turn("assistant", "r")], context]
    asked = {"p": "<s>user:p</s>", "q": "<s>user:q</s>"}
    asked["V"] = "<s>system:S</s><s>user:U</s><s>assistant:A</s><s>user:V</s>"
    windows = quiet(chatting, 6, 64, chat=True, prompts=own, beside=tmp_path / "out")
    firsts = set()
    for row, window in enumerate(windows):
        order = [*islice(in_turn(["p", "q", "V"], 0, row), 9)]
        whole = "".join(f"{asked[name]}<s>assistant:x</s>" for name in order)
        assert whole.startswith(chatting.decode(window)) and len(window) == 64
        own_tokens = [t for t, counts in zip(window, window.counted, strict=True) if counts]
        assert re.fullmatch("(x</s>)+x?", chatting.decode(own_tokens))
        assert window.start == (1 if order[0] == "V" else len("s user:") - 1)
        firsts.add(order[0])
    assert firsts == {"p", "q", "V"}
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ({"prompt": "p"}, {"messages": own[1]}))
        + json.dumps({"messages": context})
        + '\n{"prompt": "judged", "right": "x"}'
    )
    assert windows == quiet(chatting, 6, 64, chat=True, prompts=tmp_path / "asked.jsonl")
    quiet(chatting, 6, 64, chat=True, prompts=own[:2], beside=tmp_path / "out")
    assert len([*tmp_path.glob("self-*.json")]) == 2  # other prompts write anew
    assert quiet(chatting, 4, 64, prompts=own)[1] == windows[1]  # half of the texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts = .*: expected texts, or messages with a user's"),
        ({"prompts": ["a", 3]}, "prompts = .*: expected texts, or messages with a user's"),
        ({"prompts": ["a"], "chat": False}, "chat = False: expected dialogs, for `prompts`"),
        ({"prompts": ["a" * 40]}, "prompt = 'aaa.*: expected at most 39 tokens with the chat"),
    ],
)
def test_prompts_that_nothing_can_answer_are_refused(chatting, settings, message):
    refuses(message, quiet, chatting, 2, 40, **settings)
    refuses("neither Llama 2's nor Llama 3's dialog format", quiet, llama(), 2, 40, prompts=["a"])


@pytest.mark.parametrize(
    ("template", "ends", "later"),
    [
        (TEMPLATE, {1}, "<s>user:Hi</s><s>assistant:"),
        (SYSTEM + TEMPLATE, {1}, "<s>user:Hi</s><s>assistant:"),
        (TEMPLATE.replace("</s>", "<end>\n"), {1, 258}, "\n<s>user:Hi<end>\n<s>assistant:"),
        (TEMPLATE.replace("</s>", "."), {0, 1}, "user:Hi.<s>assistant:"),  # <s> parts its turns
        ("{{ messages[-1].role }}:{{ messages[-1].content }}", {1}, "user:Hi"),
        ("{% if messages[1] %}{{ 1//0 }}{% endif %}{{ messages[0].content }}", {1}, "Hi"),
    ],
)
def test_an_answer_ends_and_a_turn_follows_as_the_template_has_it(folder, template, ends, later):
    short = open_model(str(folder / "hf"))
    short.tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    short.tokenizer.chat_template = template
    assert short.answer_ends == ends
    assert short.decode(short.turn("Hi", ends=short.answer_ends)) == later
    short.model.generation_config.eos_token_id = [7, 9]
    assert short.answer_ends == {7, 9, *ends}


def test_a_turn_in_metas_format():
    short, encode = llama(0, Chatting()), CharTokenizer().encode
    assert short.turn("Hi") == encode("[INST] Hi [/INST]", bos=True, eos=False)
    assert short.turn("Hi", ends=short.answer_ends) == short.turn("Hi") and short.answer_ends == {2}


def test_every_format_writes_the_same_text(folder):
    names = ("meta", "hf", "model.gguf")
    written = [quiet(open_model(str(folder / name)), 2, 16) for name in names]
    assert written[0] == written[1] == written[2]
    assert all(window[0] == 0 for window in written[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count = 0: expected a whole number of at least 1"),
        ({"size": 65}, "size = 65: expected more than 1 tokens and at most 64"),
        ({"size": 1}, "size = 1: expected a whole number of at least 2"),
        ({"temperature": 0.0}, "temperature = 0.0: expected a number above 0"),
        ({"seed": -1}, "seed = -1: expected a whole number of at least 0"),
        ({"batch_size": 0}, "batch_size = 0: expected a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    refuses(message, quiet, llama(), **{"count": 2, "size": 8, **settings})


def test_streamed_models_and_model_parallel_ranks_are_refused(folder, monkeypatch):
    streamed = open_model(str(folder / "meta"), stream=True, max_seq_len=32)
    refuses("--samples 96 --max_new_tokens 1152 --out own.jsonl", own_samples, streamed, 2, 8)
    share_model(monkeypatch, 2)
    refuses("got 2 model-parallel ranks: open the model with", own_samples, llama(), 2, 8)


# whatever a chat template fails by is one line of ours

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
DIALOG = Conversation(json.dumps(MESSAGES))
FAILING = {
    "{{ raise_exception('no\nway') }}": r"refuses \[{'role': 'user', .*: no\\nway; give plain text",
    "{{ 1//0 }}": "division or modulo by zero",
    "{% include 'other' %}": "no loader",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "maximum recursion depth exceeded",
    "{% for m in messages %}{{ m.content + 1 }}{% endfor %}": "can only concatenate str",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for": "unexpected 'end of template'",
    "{{ '\\ud800' }}": r"holds '\\ud800' as character 0, half a surrogate pair",
}


@pytest.fixture(scope="module")
def short(llama_folders):
    return open_model(str(llama_folders / "hf"), device="cpu")


@pytest.mark.parametrize("template", FAILING, ids=range(len(FAILING)))
def test_a_failing_template_is_one_line_where_a_dialog_is_asked_for(short, template):
    short.tokenizer.chat_template = template
    refuses(FAILING[template], short.encode, DIALOG)
    refuses(FAILING[template], own_samples, short, 1, 20, chat=True)
    assert short.encode("text") and own_samples(short, 1, 20, progress=False)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ '' }}", None])
def test_what_begins_no_dialog_alike_is_refused_for_own_dialogs_alone(short, template):
    short.tokenizer.chat_template = template
    refuses("no chat template that begins all dialogs", own_samples, short, 1, 20, chat=True)
    if template == "{{ messages[0].content }}":
        ids = short.encode(DIALOG)
        assert (short.decode(ids), ids.start) == ("Hello", 0)


def test_the_opening_is_not_needed_to_read_a_dialog(short):
    """A template that takes no user alone."""
    refuses = "{{ raise_exception('no') }}"
    short.tokenizer.chat_template = "{% if messages[1] %}A{% else %}" + refuses + "{% endif %}"
    ids = short.encode(DIALOG)
    assert (short.decode(ids), ids.start) == ("A", 0)
