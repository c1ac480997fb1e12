"""Which windows begin with bos: the first of a text, or every one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from commands import TEXT, run
from transformers import AutoConfig, AutoModelForCausalLM, GemmaTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from short_gpt import ShortHFModel
from short_gpt.data.disjoint import overlapping
from short_gpt.data.windows import starts_texts, windows
from short_gpt.models.families import family_of

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,"
VOCAB = {t: i for i, t in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS])}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
BOS = VOCAB["<bos>"]

pytestmark = pytest.mark.usefixtures("few_timed_tokens")


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_rank) -> Path:
    """A random Gemma 2 and, under another name, a Llama, both with Gemma's tokenizer."""
    folder = tmp_path_factory.mktemp("gemma")
    for family in ("gemma2", "llama"):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(VOCAB), **SIZES)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, 1, 0
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / family)
        tokenizer = GemmaTokenizer(vocab=VOCAB, merges=[], add_bos_token=True)
        tokenizer.save_pretrained(folder / family)
    (folder / "book.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT[:200].upper())
    return folder


@pytest.fixture
def gemma(made) -> ShortHFModel:
    return ShortHFModel(str(made / "gemma2"))


def test_the_model_says_which(gemma, made):
    ids = gemma.tokenizer(TEXT).input_ids
    assert ids[0] == gemma.tokenizer.bos_token_id == BOS and ids.count(BOS) == 1
    assert starts_texts(gemma.encode) == [BOS] and gemma.bos == "every"
    assert ShortHFModel(str(made / "llama")).bos == "first"
    silent = GemmaTokenizer(vocab=VOCAB, merges=[], add_bos_token=False)
    assert ShortHFModel(gemma.model, tokenizer=silent).bos == "first"


def test_all_kinds_of_gemma_do():
    kinds = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if "gemma" in kind]
    texts = [kind for kind in kinds if f"{kind}_text" not in kinds]  # others hold a model of text
    known = [kind for kind in texts if "unified" not in kind and "assistant" not in kind]
    assert len(known) > 4 and all(family_of(kind).needs_bos for kind in known)


@pytest.mark.parametrize("seed", [None, 3])
def test_every_window_is_what_the_tokenizer_makes_of_its_text(gemma, seed):
    cut = windows([TEXT, "x" * 70], gemma.encode, size=32, stride=32, seed=seed, bos="every")
    found = list(cut)
    texts = [gemma.tokenizer.decode(w, skip_special_tokens=True) for w in found]
    assert found == [gemma.tokenizer(text).input_ids for text in texts]
    assert {len(w) for w in found} == {32}
    first = [t for t, w in zip(texts, found, strict=True) if w.text == 0]
    count = len(TEXT) // 31  # they meet: 31 letters each
    assert set(first) == {TEXT[31 * i : 31 * i + 31] for i in range(count)}
    assert len(first) == count and len(found) == count + 2


def test_the_first_is_the_authors_way(gemma):
    plain = list(windows([TEXT], gemma.encode, size=32, stride=16))
    ids = gemma.encode(TEXT)
    assert plain == list(windows([TEXT], gemma.encode, size=32, stride=16, bos="first"))
    assert plain == [ids[i : i + 32] for i in range(0, len(ids) - 31, 16)]
    every = list(windows([TEXT], gemma.encode, size=32, stride=16, bos="every"))
    assert every == [[BOS, *ids[1 + i : 32 + i]] for i in range(0, len(ids) - 31, 16)]


def test_a_tail_is_kept_with_its_bos(gemma):
    found = list(windows(["abcdefg"], gemma.encode, size=5, stride=5, tail="keep", bos="every"))
    assert [gemma.tokenizer.decode(w) for w in found] == ["<bos>abcd", "<bos>efg"]


def test_bos_is_never_predicted_and_all_text_is(gemma):
    found = windows([TEXT], gemma.encode, size=32, stride=32, bos="every")
    cut = list(found)
    assert gemma.perplexity(cut, progress=False).tokens == 31 * len(cut)
    gemma.measure(cut, progress=False)
    assert gemma.importance.n_tokens == 32 * len(cut)  # its state counts as any first token's


@pytest.mark.parametrize(("size", "stride"), [(32, 32), (64, 17)])
def test_copies_are_found_behind_their_bos(gemma, size, stride):
    letters = random.Random(0).choices(LETTERS, k=400)
    text = "".join(letters)
    one = list(windows([text], gemma.encode, size=size, stride=stride, bos="every"))
    assert set(overlapping(one, [one[1][1:]])) >= {1}
    other = "".join(random.Random(1).choices(LETTERS, k=400))
    apart = list(windows([other], gemma.encode, size=size, stride=stride, bos="every"))
    assert overlapping(one, apart) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bos": "all"}, "bos = 'all': expected 'first' or 'every'"),
        ({"bos": "every"}, "expected 'first', because this tokenizer puts no bos"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        windows(["abc"], lambda text: [ord(c) for c in text], size=2, stride=1, **options)


@pytest.mark.parametrize(("model", "bos"), [("gemma2", "every"), ("llama", "first")])
def test_commands_say_which_and_keep_it(here, capsys, model, bos):
    data = ("--data", "book.txt", "--size", 32)
    run("rank", model, *data, "--stride", 32, "--json", "r.json")
    assert ("bos at the start of every window" in capsys.readouterr().out) == (bos == "every")
    run("evaluate", model, *data, "--max_windows", 3)
    assert ("perplexity, bos in every window" in capsys.readouterr().out) == (bos == "every")
    record = json.loads(Path("r.json").read_text())
    assert record["bos"] == bos
    assert sum(record["importance"]["windows"]) == len(TEXT) // (31 if bos == "every" else 32)
