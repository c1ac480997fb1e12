"""The three kinds of tokenizer files, on vocabularies made here."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import refuses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import sentencepiece_model
from tokenizers import Tokenizer as Model
from tokenizers.processors import TemplateProcessing

from llama.tokenizer import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    Tokenizer,
    find_tokenizer,
    llama3_names,
    tokenizer_json,
)

PAIRS = ["t h", "th e", "i n", "a n", "an d", "Ġ the", "Ġ and", "Ġ Ġ", "ĠĠ ĠĠ", "1 2", "12 3"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ODD = [
    "",
    "in the beginning and the end",
    "1234567 12 123",
    "a\r\nb\n\n c\t\td    e\n\n1",
    "don't I'LL we've",
    "cafe\u0301 \u0301\u0300",
    "😀👩\u200d👧 中文\uff0c字符",
    "\u2003\u00a0\u3000x\u2028",
    "nul\0nul",
    "Ġ Ċ ġ",
    "<|im_start|>user <|end_of_text|> <s> <0x0A> </s>",
]
TEXT = st.text() | st.text(alphabet=" \n\tthe and123'sé中😀<|>")
same_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's letter for every byte: printable ones are themselves, the others follow U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def vocabulary(*, control: list[str]) -> tuple[list[str], list[int]]:
    """Control tokens, the byte alphabet and what the merges make, with their types."""
    letters, made = list(byte_alphabet().values()), [pair.replace(" ", "") for pair in PAIRS]
    return [*control, *letters, *made], [3] * len(control) + [1] * (256 + len(made))


def rank_lines(tokens: list[str]) -> bytes:
    """A tiktoken file with these tokens, written in the byte alphabet, as ranks 0, 1, ..."""
    byte_of = {letter: byte for byte, letter in byte_alphabet().items()}
    words = [base64.b64encode(bytes(byte_of[letter] for letter in token)) for token in tokens]
    return b"".join(b"%s %d\n" % (word, rank) for rank, word in enumerate(words))


@pytest.fixture
def llama2(tmp_path: Path) -> Tokenizer:
    return Tokenizer(sentencepiece_model(tmp_path / "tokenizer.model", 300))


@pytest.fixture
def llama3(tmp_path: Path) -> Tokenizer:
    tokens, _ = vocabulary(control=[])
    return Tokenizer(write(tmp_path / "tokenizer.model", rank_lines(tokens)))


@pytest.fixture
def smollm(tmp_path: Path) -> Tokenizer:
    tokens, types = vocabulary(control=CONTROL)
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    return Tokenizer(write_json(tmp_path, tokenizer_json(tokens, types, PAIRS, "smollm"), config))


@pytest.fixture(params=["llama2", "llama3", "smollm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def write_json(directory: Path, text: str, config: Mapping[str, object] | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    if config is not None:
        write(directory / "tokenizer_config.json", json.dumps(config).encode())
    return write(directory / "tokenizer.json", text.encode())


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False)


# What a file says


def test_llama2_facts(llama2: Tokenizer) -> None:
    assert (llama2.n_words, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (300, 1, 2, -1)
    assert llama2.stop_tokens == {2} and llama2.special_tokens == {}
    assert llama2.add_bos and llama2.dialog_format == "llama2"


def test_llama3_facts(llama3: Tokenizer) -> None:
    n = 256 + len(PAIRS)
    assert (llama3.n_words, llama3.bos_id, llama3.eos_id) == (n + 256, n, n + 1)
    assert llama3.pad_id == -1 and llama3.stop_tokens == {n + 1, n + 8, n + 9}
    assert llama3.add_bos and llama3.dialog_format == "llama3"
    assert llama3.special_tokens == {name: n + i for i, name in enumerate(llama3_names())}


def test_json_facts(smollm: Tokenizer) -> None:
    assert (smollm.n_words, smollm.bos_id, smollm.eos_id) == (3 + 256 + len(PAIRS), 1, 2)
    assert smollm.pad_id == -1 and smollm.stop_tokens == {2}
    assert not smollm.add_bos and smollm.dialog_format is None
    assert smollm.special_tokens == {name: i for i, name in enumerate(CONTROL)}


def test_published_special_ids() -> None:
    names = llama3_names()
    assert len(names) == len({*names}) == 256
    published = {"begin_of_text": 0, "end_of_text": 1, "reserved_special_token_0": 2}
    published |= {"finetune_right_pad_id": 4, "start_header_id": 6, "end_header_id": 7}
    published |= {"eom_id": 8, "eot_id": 9, "python_tag": 10, "reserved_special_token_250": 255}
    assert {name: names.index(f"<|{name}|>") for name in published} == published


# Encoding and decoding


@pytest.mark.parametrize("text", ODD)
def test_round_trip_with_bos_and_eos(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *plain(tokenizer, text), tokenizer.eos_id]
    assert tokenizer.encode(text, True, False) == ids[:-1]
    assert tokenizer.decode(ids) == text


def test_text_never_turns_into_special_tokens(tokenizer: Tokenizer) -> None:
    special = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_tokens.values()}
    names = ["<s>", "</s>", *CONTROL, *llama3_names()]
    for name in names:
        ids = plain(tokenizer, f"so {name} said")
        assert not special & set(ids), name
        assert tokenizer.decode(ids) == f"so {name} said"


@same_files
@given(TEXT)
def test_any_text_comes_back(llama3: Tokenizer, smollm: Tokenizer, text: str) -> None:
    for tokenizer in (llama3, smollm):
        assert tokenizer.decode(plain(tokenizer, text)) == text


def test_half_characters_decode_to_the_replacement(tokenizer: Tokenizer) -> None:
    assert "\ufffd" in tokenizer.decode(plain(tokenizer, "😀")[:-1])
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_unknown_id(tokenizer: Tokenizer, wrong: int) -> None:
    refuses(rf"\[{wrong}\]: expected 0\.\.\d+", tokenizer.decode, [1, wrong])


def test_half_a_surrogate_pair(tokenizer: Tokenizer) -> None:
    refuses(r"holds '\\ud83d' as character 1, half a surrogate", plain, tokenizer, "a\ud83d")


# Long texts


@pytest.mark.parametrize(
    "text", ["a" * 500_000, " " * 500_000, "\n" * 500_000, "1" * 500_000, "an " * 50_000]
)
def test_long_texts(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(plain(tokenizer, text)) == text


# tokenizer.json from a GGUF vocabulary


def test_ranks_give_the_ids_of_tiktoken(llama3: Tokenizer) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokens, _ = vocabulary(control=[])
    words = (line.split()[0] for line in rank_lines(tokens).splitlines())
    ranks = {base64.b64decode(word): i for i, word in enumerate(words)}
    model = tiktoken.Encoding("", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in [*ODD, "anthe thethe   12312 the123", "an " * 9000]:
        assert plain(llama3, text) == model.encode_ordinary(text)


def test_no_file_beside_ranks_is_read(tmp_path: Path) -> None:
    """The reference reads none: it names eos itself, and always puts bos first."""
    tokens, _ = vocabulary(control=[])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(rank_lines(tokens))
    before = Tokenizer(path)
    config = {"eos_token": "<|eot_id|>", "add_bos_token": False, "pad_token": "<p>"}
    write(tmp_path / "tokenizer_config.json", json.dumps(config).encode())
    after = Tokenizer(path)
    assert (after.eos_id, after.add_bos) == (before.eos_id, before.add_bos)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
def test_pre_tokenizers(tmp_path: Path, pre: str) -> None:
    """Merges stop at the cuts: white space leaves its last blank to the word behind it.

    With SmolLM2's, every digit is cut off first, and what stands in front of one is whole.
    """
    tokens, types = vocabulary(control=[])
    tokenizer = Tokenizer(write_json(tmp_path, tokenizer_json(tokens, types, PAIRS, pre)))
    pieces = [tokens[i] for i in plain(tokenizer, "the    the 1234")]
    digits = [*"1234"] if pre == "smollm" else ["123", "4"]
    assert pieces == ["the", "ĠĠ", "Ġ", "Ġthe", "Ġ", *digits]
    pieces = [tokens[i] for i in plain(tokenizer, "the    1")]
    assert pieces == ["the", *(["ĠĠĠĠ"] if pre == "smollm" else ["ĠĠ", "Ġ", "Ġ"]), "1"]
    model = json.loads(tokenizer_json(tokens, types, PAIRS, pre))
    assert model["model"]["ignore_merges"] == (pre == "llama-bpe")
    rules = model["pre_tokenizer"]["pretokenizers"]
    assert [rule["type"] for rule in rules[:-2]] == (["Digits"] if pre == "smollm" else [])
    split = rules[-2]["pattern"]["Regex"]
    assert split == (LLAMA3_PATTERN if pre == "llama-bpe" else GPT2_PATTERN)


def test_whole_words_precede_merges_in_llama_bpe(tmp_path: Path) -> None:
    tokens, types = vocabulary(control=[])
    for pre, length in [("llama-bpe", 1), ("gpt-2", 5)]:
        text = tokenizer_json([*tokens, "whole"], [*types, 1], PAIRS, pre)
        assert len(plain(Tokenizer(write_json(tmp_path, text)), "whole")) == length


def test_token_types(tmp_path: Path) -> None:
    """Type 3 is special and absent from texts; type 4 is whole in texts and has a text."""
    tokens, types = vocabulary(control=CONTROL)
    text = tokenizer_json([*tokens, "<think>"], [*types, 4], PAIRS, "smollm")
    tokenizer = Tokenizer(write_json(tmp_path, text))
    assert plain(tokenizer, "<think>the") == [len(tokens), tokens.index("the")]
    assert tokenizer.decode([0, len(tokens), 1]) == "<think>"
    assert "<think>" not in tokenizer.special_tokens


def test_tokens_outside_the_byte_alphabet(tmp_path: Path) -> None:
    """Spelled in bytes and never whole in texts, as transformers has it."""
    tokens, types = vocabulary(control=[])
    text = tokenizer_json([*tokens, "<\uff5cend\uff5c>"], [*types, 3], PAIRS, "smollm")
    tokenizer = Tokenizer(write_json(tmp_path, text))
    assert tokenizer.n_words == len(tokens) + 1 and tokenizer.special_tokens == {}
    assert tokenizer.decode([len(tokens)]) == "<\uff5cend\uff5c>"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pre": "new"}, "ggml.pre = 'new': expected one of gpt-2, smollm, llama-bpe"),
        ({"token_types": [1]}, r"types: \[267, 267, 1\]"),
        ({"tokens": ["a"] * 267, "merges": []}, r"types: \[267, 1, 267\]"),
        ({"merges": ["q z"]}, r"lacks tokens of the merges \[\('q', 'z'\)\]"),
        ({"merges": ["the"]}, r"lacks tokens of the merges \[\('the', ''\)\]"),
    ],
)
def test_vocabularies_that_do_not_fit(change: dict[str, Any], match: str) -> None:
    tokens, types = vocabulary(control=[])
    parts: dict[str, Any] = dict(tokens=tokens, token_types=types, merges=PAIRS, pre="smollm")
    refuses(match, tokenizer_json, **parts | change)


# Names of bos and eos beside a tokenizer.json


def json_file(
    directory: Path, names: list[str], config: Mapping[str, object] | None = None
) -> Tokenizer:
    tokens, types = vocabulary(control=names)
    return Tokenizer(write_json(directory, tokenizer_json(tokens, types, PAIRS, "gpt-2"), config))


@pytest.mark.parametrize(
    ("names", "bos", "eos"),
    [
        (["<|end_of_text|>", "<|begin_of_text|>"], 1, 0),
        (["<|endoftext|>"], 0, 0),
        (["<s>", "</s>", "<|endoftext|>"], -1, -1),
        (["<pad>"], -1, -1),
    ],
)
def test_usual_names_without_a_config(tmp_path: Path, names: list[str], bos: int, eos: int) -> None:
    tokenizer = json_file(tmp_path, names)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos, eos, -1)
    assert tokenizer.stop_tokens == {eos} - {-1} and not tokenizer.add_bos


def test_a_config_precedes_usual_names(tmp_path: Path) -> None:
    config = {"bos_token": None, "eos_token": "</s>", "pad_token": "<s>"}
    tokenizer = json_file(tmp_path, ["<s>", "</s>"], config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (-1, 1, 0)


def test_a_config_makes_a_token_special(tmp_path: Path) -> None:
    tokens, types = vocabulary(control=[])
    text = tokenizer_json([*tokens, "<end>"], [*types, 4], PAIRS, "gpt-2")
    tokenizer = Tokenizer(write_json(tmp_path, text, {"eos_token": "<end>"}))
    assert tokenizer.special_tokens == {"<end>": len(tokens)}
    assert tokenizer.eos_id not in plain(tokenizer, "the <end>")
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": True}, True),
        ({}, False),
        ({"add_bos_token": True, "bos_token": None}, False),  # there is none to add
    ],
)
def test_add_bos_from_the_config(tmp_path: Path, config: dict[str, object], expected: bool) -> None:
    assert json_file(tmp_path, ["<s>", "</s>"], config).add_bos is expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"add_bos_token": False}, False), ({}, True), ({"add_bos_token": None}, True)],
)
def test_add_bos_from_the_post_processor(
    tmp_path: Path, config: dict[str, object], expected: bool
) -> None:
    tokens, types = vocabulary(control=["<s>", "</s>"])
    model = Model.from_str(tokenizer_json(tokens, types, PAIRS, "gpt-2"))
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.enable_truncation(3)
    model.enable_padding(length=5)
    tokenizer = Tokenizer(write_json(tmp_path, model.to_str(), config))
    assert tokenizer.add_bos is expected
    assert len(plain(tokenizer, "xyzxyz")) == 6, "neither bos, nor truncation, nor padding"
    assert plain(tokenizer, "x") == [tokens.index("x")]


def test_llama3_as_json(tmp_path: Path) -> None:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = json_file(tmp_path, names + headers)
    assert tokenizer.dialog_format == "llama3" and tokenizer.stop_tokens == {1, 2, 3}
    assert json_file(tmp_path, names).dialog_format is None
    # Instruct's eos token is the end of a turn, and the file names no other
    config = {"bos_token": names[0], "eos_token": "<|eot_id|>"}
    assert json_file(tmp_path, names, config).stop_tokens == {1, 2, 3}


@pytest.mark.parametrize("key", ["bos", "eos"])
def test_absent_bos_or_eos(tmp_path: Path, key: str) -> None:
    flags = {"bos": False, "eos": False, key: True}
    need = rf"{key} = True: expected a {key}_token, but .*tokenizer_config.json"
    refuses(f"{need} is missing", json_file(tmp_path, ["<pad>"]).encode, "the", **flags)
    with pytest.raises(ValueError, match=f"{need} names none"):
        json_file(tmp_path, ["<pad>"], {"bos_token": None}).encode("the", **flags)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (b'{"bos_token": "<', r"tokenizer_config.json is damaged .it is not JSON: Unterminated"),
        (b'{"bos_token": "<x>"}', r"names a token '<x>', which .*tokenizer.json lacks"),
    ],
)
def test_damaged_config(tmp_path: Path, config: bytes, match: str) -> None:
    write(tmp_path / "tokenizer_config.json", config)
    refuses(match, json_file, tmp_path, ["<s>"])


# Files that are not what they should be


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "damaged .expected SentencePiece, tiktoken ranks or .* begins with b''"),
        (b"version https://git-lfs", r"begins with b'version https://git-'"),
        (b"<html>", "begins with b'<html>'"),
        (b"\x00" * 99, r"begins with b'\\x00"),
        (b'{"version": "1.0", "trunc', "is damaged .*EOF"),
        (b'{"dim": 4096}', "is damaged"),
        (b"IQ== 0\nIg=", "is damaged .*not enough values"),
        (b"IQ== 0\nI?== 1\n", "is damaged .Only base64"),
        (b"IQ== 0\nIg== 7\n", "expected new tokens of the ranks 0, 1"),
        (b"IQ== 0\nIQ== 1\n", "expected new tokens of the ranks 0, 1"),
        (b"IQ== 0\nIg== 1\n", "and each single byte"),
        (b"\n\x0e\n\x05<unk>\x15\0\0", "is damaged .expected a SentencePiece model"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, match: str) -> None:
    refuses(match, Tokenizer, write(tmp_path / "tokenizer.model", data))


# Where a tokenizer is


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["m/tokenizer.model", "m/tokenizer.json", "tokenizer.model"], "m/tokenizer.model"),
        (["m/tokenizer.json", "tokenizer.model"], "m/tokenizer.json"),
        (["tokenizer.model", "tokenizer.json"], "tokenizer.model"),
    ],
)
def test_find_tokenizer(tmp_path: Path, files: list[str], found: str) -> None:
    (tmp_path / "m").mkdir()
    for name in files:
        write(tmp_path / name, b"x")
    assert find_tokenizer(tmp_path / "m") == tmp_path / found
    with pytest.raises(FileNotFoundError, match=r"looked for .*tokenizer\.model, .*json"):
        find_tokenizer(tmp_path / "elsewhere" / "m")
    for path, problem in ((tmp_path / "none", "does not exist"), (tmp_path, "is a directory")):
        refuses(problem, Tokenizer, path, error=FileNotFoundError)
