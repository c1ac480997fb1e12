"""`--data self`: text that the model writes itself, alone and in a mix, in every command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from commands import TEXT, fails, run
from conftest import interrupted, random_windows, refuses, save_chat_llama

from llama.formats.hf import meta_to_hf
from short_gpt import open_model, own_samples, rank, shrink, texts
from short_gpt.data.texts import TextsInMemory
from short_gpt.data.windows import mix
from short_gpt.healing import healing_windows
from short_gpt.jobs import generate, generation, heal
from short_gpt.jobs.inputs import WindowSettings
from short_gpt.jobs.shrink_result import ANSWERS
from short_gpt.wrappers import own_text as module
from short_gpt.wrappers.own_text import split_own_text, with_own_text
from short_gpt.wrappers.short_llama import ShortLlama

SMALL = ("--size", 32)
JUDGED = "evaluated on self: text that the model itself wrote, and perplexity on own samples is not"


@pytest.fixture
def here(ckpt) -> Path:
    """A random model, a text of 38 windows at most, and a folder of six texts."""
    Path("books").mkdir()
    for i, ids in enumerate(random_windows(6, 160, vocab=26)):
        Path(f"books/{i}.txt").write_text("".join(chr(97 + token) for token in ids))
    return ckpt.parent


def own(count: int, **settings: object) -> list[list[int]]:
    short = open_model("ckpt", max_seq_len=32)
    return own_samples(short, count, 32, progress=False, **settings)


def test_the_layers_are_ranked_on_what_the_model_wrote(here):
    result = rank("ckpt", "self", n=1, size=32, max_windows=5, stride=16)
    short = open_model("ckpt", max_seq_len=32)
    short.measure(own(5), progress=False)
    assert result.importance.n_windows == result.importance.n_texts == 5
    difference = result.importance.block_influence - short.importance.block_influence
    assert difference.abs().max() < 1e-6
    assert not [*here.glob("self-*")]  # no state, nowhere to keep it


def test_a_repeated_and_a_resumed_command_write_nothing_again(here, monkeypatch, capsys):
    command = ("rank", "ckpt", "--data", "self", *SMALL, "--max_windows", 5, "--json", "r.json")
    with interrupted(ShortLlama, "score_batch", 0):
        rank("ckpt", "self", size=32, max_windows=5, stride=256, state="r.json.state")
    (kept,) = here.glob("self-*.json")
    monkeypatch.setattr(ShortLlama, "continued", None)  # nothing more is written
    run(*command)
    run(*command, "--overwrite")
    assert [*here.glob("self-*.json")] == [kept]
    assert json.loads(Path("r.json").read_text())["arguments"]["data"] == "self"
    short = open_model("ckpt", max_seq_len=32)
    assert len(own_samples(short, 5, 32, beside=here / "x", progress=False)) == 5


def test_a_mix_is_read_in_equal_parts(here):
    kinds = [["abcdefgh" * 4], [[7] * 16, [8] * 16, [9] * 16]]
    cut = {"size": 8, "stride": 8, "seed": 0}
    few = mix(kinds, lambda text: [ord(c) for c in text], limit=4, **cut)
    assert sorted(w[0] < 10 for w in few) == [False, False, True, True]
    assert {w.text for w in few if w[0] >= 10} == {0}
    every = mix(kinds, lambda text: [ord(c) for c in text], equal=True, **cut)
    assert sorted(w[0] < 10 for w in every) == [False] * 4 + [True] * 4  # the smallest has four
    result = rank("ckpt", "book.txt,self", size=32, max_windows=6, stride=16)
    assert result.importance.n_windows == 6
    assert result.importance.n_texts == 4  # one book, and three of the model's own


def test_the_share_of_a_mix_is_asked_for(here):
    asked = []

    def write(chat: bool | None, count: int) -> list[list[int]]:
        asked.append((chat, count))
        return [[1, 2]] * count

    def kinds() -> list:
        return ["self", ["a text"], "self:chat", "self:text"]

    assert [len(list(k)) for k in with_own_text(kinds(), write, 10)] == [3, 1, 3, 3]
    with_own_text(kinds(), write, None)
    split_own_text(["self"], [], write, 9)  # four more, to be held out
    split_own_text(["self"], [["held"]], write, 9)
    split_own_text(["self"], [], write, 64)  # a tenth of 72 is held out: 64 are left
    each = [(chat, count) for count in (3, 96) for chat in (None, True, False)]
    assert asked == [*each, (None, 13), (None, 9), (None, 72)]
    refuses("expected what writes it", healing_windows, "self", lambda text: [1, 2], 2)


def test_own_text_is_held_out_only_where_there_is_no_other(here):
    own_texts = [[i] * 8 for i in range(20)]

    def held(kinds: list) -> list:
        return split_own_text(kinds, [], lambda chat, count: own_texts, 20)[1]

    (part,) = held(["self"])
    assert 3 <= len(part) <= 5 and all(text in own_texts for text in part)
    (real,) = held([["a", "b", "c"], "self"])
    assert len(real) == 1 and real[0] in ("a", "b", "c")
    for few in (8, 5):  # four more than so many to learn from
        del own_texts[few:]
        assert [*map(len, held(["self:text", "self:chat"]))] == [4, 4]


def test_a_healing_learns_from_own_text_and_is_judged_by_another(here, monkeypatch):
    windows = {"eval_data": "book.txt", "size": 32, "max_windows": 6, "eval_windows": 3}
    done = heal("ckpt", "out", layers=[2, 3], data="self", **windows)
    assert len([*here.glob("self-*.json")]) == 1
    judged = done.evidence.perplexity["healed"]
    assert judged.windows == 3
    monkeypatch.setattr(ShortLlama, "continued", None)
    again = heal("ckpt", "again", layers=[2, 3], data="self", **windows)
    assert again.evidence.perplexity["healed"].value == judged.value


@pytest.mark.parametrize(
    ("data", "more", "said"),
    [("self", (), True), ("self", ("--eval_data", "book.txt"), False), ("books,self", (), False)],
)
def test_where_own_text_alone_judges_it_is_said(here, capsys, data, more, said):
    read = ("--data", data, *SMALL, "--max_windows", 6, "--eval_windows", 2, *more)
    run("heal", "ckpt", "out", "--layers", "2,3", *read)
    assert (JUDGED in capsys.readouterr().out) == said
    cases = ("--method", "bi", "--n", 1, "--heal_by", "raw")
    run("compare", "ckpt", *read, *cases)
    assert (JUDGED in capsys.readouterr().out) == said


@pytest.mark.parametrize("judge", [None, "book.txt"])
def test_a_card_says_where_own_text_alone_judged(here, judge):
    meta_to_hf("ckpt", "hf")
    windows = {"eval_data": judge, "size": 32, "max_windows": 6, "eval_windows": 3}
    heal("hf", "out", layers=[2, 3], data="self", **windows)
    card = Path("out/README.md").read_text()
    remark = "The model itself wrote the text that judged it: this perplexity is not quality."
    assert card.count(remark) == (judge is None)
    short = open_model("out", max_seq_len=32)
    short.perplexity(random_windows(3, 32, vocab=26), progress=False)  # of other text
    short.save("again")
    card = Path("again/README.md").read_text()
    assert "| perplexity |" in card and remark not in card


SYSTEM = "".join(random.Random(0).choices("ABCDEFGHIJ", k=90))
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<system>" + SYSTEM + "{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
OPENING = len(f"<system>{SYSTEM}<user>")


def dialogs(count: int, length: int = 120, seed: int = 0) -> list[dict[str, object]]:
    """Rows of a user's question and an answer, in random letters, that share no long run."""
    rows = []
    for ids in random_windows(count, 2 * length, vocab=26, seed=seed):
        text = "".join(chr(97 + token) for token in ids)
        turns = {"user": text[:length], "assistant": text[length:]}
        messages = [{"role": role, "content": said} for role, said in turns.items()]
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, one_rank) -> str:
    """A model whose chat template begins with a system prompt of more than 64 tokens."""
    path = tmp_path_factory.mktemp("prompted")
    save_chat_llama(path, 6, TEMPLATE)
    return str(path / "hf")


@pytest.mark.usefixtures("few_timed_tokens")
@pytest.mark.parametrize(("chat", "size"), [(False, 192), (True, 112), (True, 192)])
def test_the_system_prompt_of_a_template_is_no_copied_text(prompted, tmp_path, size, chat):
    data = {"data": dialogs(40)} if chat else {"data": "self:chat"}
    windows = {"size": size, "max_windows": 12, "eval_windows": 4}
    healed = heal(prompted, str(tmp_path / "healed"), layers=[2], **data, **windows)
    assert healed.left_out is None and healed.evidence.perplexity["healed"].windows == 4
    ranked = rank(prompted, **data, n=1, method="auto", size=size, max_windows=12)
    assert (ranked.choice.fitted, ranked.choice.judged) == (6, 6)
    how = {"n": 1, **windows, **data}
    shrunk = shrink(prompted, str(tmp_path / "shrunk"), **how)
    texts = [states for kind, states in shrunk.quality.items() if kind != ANSWERS]
    assert texts and all(states["healed"].windows == 4 for states in texts)


@pytest.mark.usefixtures("few_timed_tokens")
def test_a_dialog_that_comes_again_is_found_after_its_system_prompt(prompted, tmp_path):
    data = {"data": [*dialogs(6), *dialogs(6)]}  # a window each
    windows = {"size": 256, "max_windows": 12, "eval_windows": 4}
    healed = heal(prompted, str(tmp_path / "out"), layers=[2], **data, **windows)
    assert healed.left_out == "left out 1 of 11 windows that share text with held-out ones"
    (note,) = rank(prompted, **data, n=1, method="auto", size=256, max_windows=12).choice.notes[:1]
    assert note == "4 windows left out: they share text with others"
    shrunk = shrink(prompted, str(tmp_path / "small"), n=1, **data, **windows)
    assert healed.left_out in shrunk.to_dict()["remarks"]
    windows |= {"eval_data": TextsInMemory(dialogs(3))}
    healed = heal(prompted, str(tmp_path / "other"), layers=[2], **data, **windows)
    assert healed.left_out == "left out 6 of 12 windows that share text with held-out ones"


@pytest.mark.usefixtures("few_timed_tokens")
def test_prompts_of_a_file_are_answered_in_dialogs_and_those_with_right_answers_asked(
    prompted, tmp_path, monkeypatch, capsys
):
    seen: list[list[str]] = []
    plain = module.in_turn
    monkeypatch.setattr(module, "in_turn", lambda own, *a: seen.append([*own]) or plain(own, *a))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "learned"}, {"prompt": "judged", "right": "yes"}, {"prompt": "too"}]
    Path("both.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("judged.jsonl").write_text(json.dumps(rows[1]))
    Path("lines.txt").write_text("learned\ntoo\n")
    windows = {"size": 192, "max_windows": 12, "eval_windows": 4}
    shrunk = shrink(prompted, "shrunk", n=1, **windows, prompts="both.jsonl")
    assert shrunk.questions == ["judged"] and shrunk.answers["original"].right != [None]
    assert seen and all(own == ["learned", "too"] for own in seen)
    assert "--prompts both.jsonl" in shrunk.command
    seen.clear()
    train = ("--heal_by", "distill", "--recipe", "small,steps=1")
    read = ("--layers", 2, "--size", 192, "--max_windows", 12, "--eval_windows", 4)
    run("heal", prompted, "out", "--data", "self:chat", *read, "--prompts", "lines.txt", *train)
    assert seen and all(own == ["learned", "too"] for own in seen)
    (step,) = json.loads(Path("out/pruning.json").read_text())["healing"]
    assert step["tokens"] == 2 * 192 and 0 < step["counted_tokens"] < 2 * (192 - OPENING)
    capsys.readouterr()
    for data, file, message in (
        ("self:text", "both.jsonl", "expected self or self:chat in --data"),
        ("book.txt", "lines.txt", "expected self or self:chat in --data"),
        ("self", "judged.jsonl", "expected some without right answers"),
    ):
        refused = ("heal", prompted, "no", *read, "--data", data, "--prompts", file)
        assert message in fails(capsys, *refused)


def test_no_model_is_judged_by_a_text_named_self(here, capsys):
    refuses(r"perplexity on own samples is not quality\): expected", texts, "self")
    for command in (
        ("evaluate", "ckpt", "--data", "self"),
        ("evaluate", "ckpt", "--data", "self:chat"),
        ("heal", "ckpt", "out", "--layers", 2, "--data", "books", "--eval_data", "self", *SMALL),
    ):
        assert "which no model is judged by" in fails(capsys, *command)
    Path("self.txt").write_text(TEXT)
    assert [*texts("self.txt")] == [TEXT]


def test_generate_writes_samples_to_a_file_that_data_reads(here, capsys, monkeypatch):
    run("generate", "ckpt", "--samples", 4, "--max_new_tokens", 32, "--out", "own.jsonl")
    assert capsys.readouterr().out == "written: own.jsonl\n"
    short = open_model("ckpt")
    assert [*texts("own.jsonl")] == [short.decode(ids) for ids in own(4, seed=1)]
    run("rank", "ckpt", "--data", "own.jsonl", "--size", 16, "--stream", "--n", 1)
    run("generate", "ckpt", "ab", "--max_new_tokens", 3)
    monkeypatch.setattr(generation, "open_model", None)  # what follows is told before
    refuses("prompt.* one text", generate, "ckpt", 5)
    for options, message in (
        ((), "expected either a --prompt to continue, or --samples and --out"),
        (("ab", "--samples", 2, "--out", "a.jsonl"), "expected either a --prompt to continue"),
        (("--samples", 2), "or --samples and --out"),
        (("ab", "--out", "a.jsonl"), "or --samples and --out"),
        (("--samples", 2, "--out", "a.txt"), "expected the name of a .jsonl file"),
        (("--samples", 2, "--out", "own.jsonl"), "own.jsonl exists"),
        (("--samples", 2, "--out", "a.jsonl", "--seed", -1), "--seed = -1: expected a whole"),
    ):
        capsys.readouterr()
        line = fails(capsys, "generate", "ckpt", *options)
        assert message in line and "`" not in line


def test_texts_that_will_not_be_read_are_told_before_the_model_writes(here, monkeypatch):
    monkeypatch.setattr(module, "own_samples", None)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: 'no\.txt'"):
        rank("ckpt", "self,no.txt", size=32)
    assert WindowSettings("self:text,self:chat").kinds() == ["self:text", "self:chat"]
    refuses("names self:chat twice: name it once", WindowSettings("self,self:chat").kinds)
