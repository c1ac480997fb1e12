"""Llamas as GGUF files, from Meta's and Hugging Face's format, with their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
import torch
from conftest import make_transformer, refuses, save_checkpoint
from tokenizer_files import KINDS, ODD, meta, write_tokenizer
from tokenizers import Tokenizer as Fast
from tokenizers import models, normalizers

from llama.checkpoint.meta import Checkpoint
from llama.errors import InputError
from llama.formats.gguf import GGUFFile, llama_to_gguf, to_meta
from llama.formats.gguf_read import GGUFParts, read_header
from llama.formats.hf import meta_to_hf
from llama.formats.tokenizers import Pieces, gguf_tokenizer, vocabulary
from llama.tokenizer import Tokenizer, find_tokenizer

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PRE = {"sentencepiece": "default", "ranks": "llama-bpe"}


def same(one: Path, other: Path) -> bool:
    ours, theirs = Checkpoint(one), Checkpoint(other)
    shapes = [(a.ffn_dim, a.norm_eps, a.rope_theta, a.kv_heads) for a in (ours.args, theirs.args)]
    return shapes[0] == shapes[1] and all(
        torch.equal(ours.read(name), theirs.read(name)) for name in ours.infos
    )


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_are_the_same_weights_and_the_same_tokens(tmp_path, kind):
    source = meta(tmp_path / "meta", kind)
    llama_to_gguf(source, tmp_path / "m.gguf")
    to_meta(tmp_path / "m.gguf", tmp_path / "again")
    assert same(source, tmp_path / "again")
    fields = read_header(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"] == PRE.get(kind, kind)
    ours, theirs = (Tokenizer(find_tokenizer(d)) for d in (source, tmp_path / "again"))
    assert (ours.n_words, ours.bos_id, ours.eos_id) == (
        theirs.n_words,
        theirs.bos_id,
        theirs.eos_id,
    )
    assert ours.add_bos == theirs.add_bos
    for text in ODD:
        assert ours.encode(text, False, False) == theirs.encode(text, False, False), text
        assert ours.decode(ours.encode(text, False, False)) == text or kind == "sentencepiece"
    llama_to_gguf(tmp_path / "again", tmp_path / "n.gguf")
    name = "tokenizer.ggml.pre"  # the way round that begins with a GGUF file
    assert read_header(tmp_path / "n.gguf").fields[name] == fields[name]


@pytest.mark.parametrize("kind", ["sentencepiece", "ranks", "qwen2"])
def test_hugging_faces_format_gives_the_same_file(tmp_path, kind):
    source = meta(tmp_path / "meta", kind)
    meta_to_hf(source, tmp_path / "hf")
    llama_to_gguf(source, tmp_path / "a.gguf")
    llama_to_gguf(tmp_path / "hf", tmp_path / "b.gguf")
    ours, theirs = (read_header(tmp_path / f"{n}.gguf") for n in "ab")
    own = ("general.name", "conversion.source", "tokenizer.chat_template")
    assert {k: v for k, v in ours.fields.items() if k not in own} == {
        k: v for k, v in theirs.fields.items() if k not in own
    }
    one, other = (GGUFParts(tmp_path / f"{n}.gguf") for n in "ab")
    assert list(one.tensors) == list(other.tensors)
    assert all(torch.equal(one.read(n), other.read(n)) for n in one.tensors)


def test_what_the_file_says(tmp_path):
    source = meta(tmp_path / "meta", rope_theta=500000.0)
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**params, "use_scaled_rope": True}))
    llama_to_gguf(source, tmp_path / "m.gguf", also={"a.b": "c"})
    fields, tensors = read_header(tmp_path / "m.gguf")[:2]
    expected = {"general.architecture": "llama", "general.name": "meta", "general.file_type": 0}
    expected |= {"llama.block_count": 2, "llama.context_length": 131072}
    expected |= {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    expected |= {"llama.rope.dimension_count": 8, "llama.rope.freq_base": 500000.0}
    expected |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    expected |= {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages }}"}
    expected |= {"conversion.source": "meta", "a.b": "c"}
    assert {key: fields.get(key) for key in expected} == expected
    assert tensors["rope_freqs.weight"].shape == (4,)
    to_meta(tmp_path / "m.gguf", tmp_path / "again")
    assert Checkpoint(tmp_path / "again").args.rope_factor == 8.0


def test_a_tied_head_is_left_out(tmp_path):
    model = make_transformer(vocab_size=268, n_layers=2)
    model.output.weight = model.tok_embeddings.weight
    source = tmp_path / "meta"
    write_tokenizer(source, "gpt-2")
    save_checkpoint(source, model)
    llama_to_gguf(source, tmp_path / "m.gguf")
    assert "output.weight" not in read_header(tmp_path / "m.gguf").tensors


@pytest.mark.parametrize(
    ("kind", "number", "bound"), [("f16", 1, 1e-3), ("bf16", 30, 8e-3), ("q8_0", 8, 8e-3)]
)
def test_matrices_go_to_the_type_asked_for_and_vectors_stay(tmp_path, kind, number, bound):
    source = meta(tmp_path / "meta")
    llama_to_gguf(source, tmp_path / "m.gguf", kind=kind)
    parts, model = GGUFParts(tmp_path / "m.gguf"), Checkpoint(source)
    assert parts.tensors["blk.1.ffn_norm.weight"].kind == 0
    assert parts.tensors["blk.1.ffn_up.weight"].kind == number
    found, weight = parts.read("blk.1.ffn_up.weight"), model.read("layers.1.feed_forward.w3.weight")
    assert 0 < (found - weight).abs().max() <= bound * weight.abs().max()
    down = parts.tensors["blk.1.ffn_down.weight"]  # rows of 96: whole blocks of 32
    assert down.kind == number


def test_rows_that_are_no_whole_blocks_go_to_f16(tmp_path):
    source = meta(tmp_path / "meta", multiple_of=40)
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**params, "multiple_of": 40}))
    width = Checkpoint(source).args.ffn_dim
    llama_to_gguf(source, tmp_path / "m.gguf", kind="q8_0")
    down = read_header(tmp_path / "m.gguf").tensors["blk.0.ffn_down.weight"]
    assert width % 32 and down.kind == 1


def test_values_beyond_float16_are_refused_and_nothing_is_left(tmp_path):
    model = make_transformer(vocab_size=268, n_layers=2)
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[0, 0] = 1e6
    write_tokenizer(tmp_path / "meta", "gpt-2")
    source = save_checkpoint(tmp_path / "meta", model)
    with pytest.raises(InputError, match=r"w2.weight has values beyond F16's: write bf16"):
        llama_to_gguf(source, tmp_path / "m.gguf", kind="f16")
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]
    llama_to_gguf(source, tmp_path / "m.gguf")
    refuses("exists", llama_to_gguf, source, tmp_path / "m.gguf", error=FileExistsError)
    llama_to_gguf(source, tmp_path / "m.gguf", kind="bf16", overwrite=True)
    with pytest.raises(InputError, match="type = 'q4_k': expected one of f32, f16, bf16, q8_0"):
        llama_to_gguf(source, tmp_path / "n.gguf", kind="q4_k")


def test_ids_without_a_token_are_filled_up(tmp_path):
    keys = vocabulary(write_tokenizer(tmp_path / "t", "gpt-2"), 270)
    assert b"[PAD269]" in keys["tokenizer.ggml.tokens"].raw
    refuses("268 tokens, .* has 260 ids", vocabulary, tmp_path / "t/tokenizer.json", 260)


def test_a_tokenizer_json_made_from_sentencepiece_gives_its_tokens(tmp_path):
    """As transformers writes Llama 2's: pairs in the order of scores."""
    path = write_tokenizer(tmp_path / "t", "sentencepiece")
    pieces = Pieces.read(path.read_bytes(), "t")
    vocab = {text: i for i, text in enumerate(pieces.texts)}
    pairs = [
        (-score, text[:i], text[i:])
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True)
        for i in range(1, len(text))
        if kind == 1 and text[:i] in vocab and text[i:] in vocab
    ]
    merges = [(a, b) for _, a, b in sorted(pairs, key=lambda pair: pair[0])]
    fast = Fast(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    fast.add_special_tokens(["<s>", "</s>"])
    (tmp_path / "j").mkdir()
    fast.save(str(tmp_path / "j/tokenizer.json"))
    ours = vocabulary(tmp_path / "j/tokenizer.json", len(vocab))
    theirs = vocabulary(path, len(vocab))
    for key in ("tokens", "token_type", "model", "add_space_prefix"):
        name = f"tokenizer.ggml.{key}"
        assert ours[name].raw == theirs[name].raw, key
    merged = {a + b for a, b in merges}
    found = [
        np.frombuffer(keys["tokenizer.ggml.scores"].raw[-4 * len(vocab) :], "<f4")
        for keys in (ours, theirs)
    ]
    number = [vocab[text] for text in merged]
    first, second = (np.argsort(-scores[number], kind="stable") for scores in found)
    assert len(number) > 20 and (first == second).all()


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}


@pytest.mark.parametrize(
    ("normalizers", "pre", "space"),
    [
        ([PREPEND, REPLACE], None, True),
        ([REPLACE], None, False),
        ([], {**METASPACE, "prepend_scheme": "first"}, True),
        ([], {**METASPACE, "prepend_scheme": "never"}, False),
        ([], {**METASPACE, "split": True}, None),
        ([], {k: v for k, v in METASPACE.items() if k != "split"}, None),  # it splits, too
        ([], {**METASPACE, "replacement": "_"}, None),
        ([PREPEND, {**REPLACE, "pattern": {"String": "-"}}], None, None),
        ([PREPEND, {**REPLACE, "pattern": {"Regex": " "}}], None, True),
        ([PREPEND, {**REPLACE, "content": "_"}], None, None),
        ([{**PREPEND, "prepend": "_"}, REPLACE], None, None),
        ([PREPEND], None, None),  # spaces stay spaces
        ([], None, None),
        ([REPLACE, {"type": "NFC"}], None, None),
    ],
)
def test_rules_of_spaces_that_sentencepiece_lacks_are_refused(tmp_path, normalizers, pre, space):
    vocab = {"<unk>": 0, "a": 1, "\u2581": 2, "\u2581a": 3}
    merges = [("\u2581", "a")]
    fast = Fast(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    content = {**json.loads(fast.to_str()), "normalizer": normalizer, "pre_tokenizer": pre}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    if space is None:
        refuses("rules of splitting texts .* expected Llama 2's", vocabulary, path, 4)
    else:
        assert vocabulary(path, 4)["tokenizer.ggml.add_space_prefix"].raw[-1] == space


def test_tokenizers_that_llama_cpp_has_no_name_for_are_refused(tmp_path):
    (tmp_path / "u").mkdir()
    unigram = tokenizer_files.sentencepiece_model(
        tmp_path / "u/tokenizer.model", 320, model_type="unigram", hard_vocab_limit=False
    )
    refuses("model_type = 1: expected that of byte-pair", vocabulary, unigram, 400)
    path = write_tokenizer(tmp_path / "t", "gpt-2")
    content = json.loads(path.read_text())
    for part, value, message in (
        ("pre_tokenizer", {**LEVEL, "use_regex": False}, "rules of splitting texts"),
        ("pre_tokenizer", {**LEVEL, "add_prefix_space": True}, "rules of splitting texts"),
        ("normalizer", {"type": "Lowercase"}, "rules of splitting texts"),
        ("model", {**content["model"], "ignore_merges": True}, "rules of splitting texts"),
        ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "'WordLevel': exp"),
    ):
        path.write_text(json.dumps({**content, part: value}))
        refuses(message, vocabulary, path, 300)


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    data = write_tokenizer(tmp_path / "t", "sentencepiece").read_bytes()
    assert Pieces.read(data, "t").to_bytes()[:4000] == data[:4000]  # the pieces, byte for byte
    for cut in range(1, len(data), 997):
        refuses("^t is damaged|^t: model_type", Pieces.read, data[:cut], "t")


def test_a_gguf_file_of_sentencepiece_that_is_damaged_is_refused(tmp_path, monkeypatch):
    source = meta(tmp_path / "meta", "sentencepiece")
    llama_to_gguf(source, tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    file.fields["tokenizer.ggml.scores"] = [0.0]
    refuses(r"\[320, 320, 1, 320\]", gguf_tokenizer, file)
    file.fields["tokenizer.ggml.scores"] = [0.0] * 320
    file.fields["tokenizer.ggml.add_bos_token"] = False
    refuses("add_bos_token = False: expected true", gguf_tokenizer, file)


@pytest.mark.parametrize("kind", [1, 4])  # NORMAL and USER_DEFINED
@pytest.mark.parametrize(("name", "text"), [("bos", "<|im_start|>"), ("eos", "<|im_end|>")])
def test_bos_and_eos_are_control_pieces_whatever_a_gguf_file_says(tmp_path, kind, name, text):
    """As older conversions wrote added tokens."""
    llama_to_gguf(meta(tmp_path / "meta", "sentencepiece"), tmp_path / "m.gguf")
    file, number = GGUFFile(tmp_path / "m.gguf"), 319
    fields = file.fields
    fields["tokenizer.ggml.tokens"][number] = text
    fields["tokenizer.ggml.token_type"][number] = kind
    fields[f"tokenizer.ggml.{name}_token_id"] = number
    file_name, data, _ = gguf_tokenizer(file)
    (tmp_path / file_name).write_bytes(data)
    tokenizer = Tokenizer(tmp_path / file_name)
    assert getattr(tokenizer, f"{name}_id") == number
    assert tokenizer.stop_tokens == {tokenizer.eos_id} and tokenizer.eos_id >= 0
    assert number not in tokenizer.encode(f"the {text}{text}", False, False)
    assert tokenizer.encode("the", True, True)[0 if name == "bos" else -1] == number


def test_a_key_of_a_tokenizer_with_another_value_is_refused(tmp_path):
    llama_to_gguf(meta(tmp_path / "meta", "llama-bpe"), tmp_path / "m.gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    file.fields["tokenizer.ggml.merges"] = [1, 2]
    refuses(r"m.gguf is damaged \(.*merges is no list of .* str", gguf_tokenizer, file)
