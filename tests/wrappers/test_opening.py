"""Checkpoints opened by where they lie: which wrapper, and which options do not go together."""

from __future__ import annotations

import pytest
import torch
from conftest import random_windows, refuses, write_byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama.sources import find_source
from short_gpt import ShortGPTError, ShortHFModel, ShortLlama, heal_refit, perplexity, rank, windows
from short_gpt.checkpoints.prune import layers_of
from short_gpt.jobs.conversion import prove
from short_gpt.wrappers import opening
from short_gpt.wrappers.opening import OpenOptions, open_model, open_trainable
from short_gpt.wrappers.streamed_llama import StreamedLlama

WINDOWS = random_windows(3, 20)


@pytest.fixture
def folder(llama_folders):
    return llama_folders


@pytest.mark.parametrize(
    ("name", "stream", "kind"),
    [
        ("meta", False, ShortLlama),
        ("hf", False, ShortHFModel),
        ("meta", True, StreamedLlama),
        ("hf", True, StreamedLlama),
    ],
)
def test_one_call_opens_every_format_with_the_same_options(name, stream, kind, folder):
    options = OpenOptions(max_seq_len=32, batch_size=2, n_prune_layers=3, device="cpu")
    whole = open_model(str(folder / "meta"), options)
    short = open_model(str(folder / name), options, stream=stream, dtype="float32")
    assert type(short) is kind and short.n_prune_layers == 3
    assert layers_of(str(folder / name)) == short.n_layers == 5
    expected = whole.perplexity(WINDOWS, progress=False).value
    assert short.perplexity(WINDOWS, progress=False).value == pytest.approx(expected, rel=1e-5)
    if kind is not ShortHFModel:  # whose config says how long its windows may be
        assert short.decoder.max_seq_len == 32


def test_a_dtype_and_a_tokenizer_elsewhere_reach_the_model(folder, tmp_path):
    write_byte_tokenizer(tmp_path)
    options = OpenOptions(tokenizer_path=str(tmp_path / "tokenizer.json"), dtype="bfloat16")
    for stream in (False, True):
        short = open_model(str(folder / "meta"), options, stream=stream, device="cpu")
        assert short.identity()["dtype"] == "torch.bfloat16"
        assert short.encode("a") == open_model(str(folder / "meta"), device="cpu").encode("a")


def test_a_tokenizer_that_is_not_read_is_refused(folder, tmp_path):
    hf, place = str(folder / "hf"), str(tmp_path / "tokenizer.json")
    write_byte_tokenizer(tmp_path)
    for options in ({"tokenizer_path": place}, {"options": OpenOptions(place, device="cpu")}):
        refuses(f"tokenizer_path = .*: the tokenizer of {hf} is", open_model, hf, **options)
    assert open_model(hf, stream=True, tokenizer_path=place, device="cpu").tokenizer_path


@pytest.mark.parametrize("name", ["meta", "hf"])
def test_a_checkpoint_of_any_format_is_opened_for_training(folder, name):
    source, options = str(folder / name), OpenOptions(device="cpu", dtype="bfloat16")
    short = open_trainable(source, options)
    assert short.source == source and short.trainable().dtype == torch.bfloat16
    expected = open_model(source, device="cpu").perplexity(WINDOWS, progress=False).value
    found = open_trainable(source, OpenOptions(device="cpu")).perplexity(WINDOWS, progress=False)
    assert found.value == pytest.approx(expected, rel=1e-5)


def test_options_that_do_not_go_together(folder):
    meta = str(folder / "meta")
    with pytest.raises(ValueError, match="_parallel_size = 2: .stream. holds one layer on"):
        open_model(meta, stream=True, model_parallel_size=2)
    with pytest.raises(ValueError, match="model_parallel_size = 2: only Meta's format is split"):
        open_model(str(folder / "hf"), model_parallel_size=2)
    refuses("1MB of memory are too little", open_model, meta, stream="1MB")
    assert open_model(meta, stream="900GB").max_memory == "900GB"
    refuses("max_sequence", open_model, meta, max_sequence=3, error=TypeError)


def test_a_cut_checkpoint_is_told_from_another(folder, tmp_path):
    short = open_model(str(folder / "meta"), device="cpu")
    short.remove_layers([1, 3])
    short.save(tmp_path / "cut")

    def proved(kind: str, drop: list[int]) -> str | None:
        source = find_source(folder / kind)
        return prove(tmp_path / "cut", source, "cut", OpenOptions(), True, drop=drop)

    assert proved("meta", [1, 3]).startswith("verified: the logits are those of")
    refuses(r"without \[1, 2\]: logits differ", proved, "meta", [1, 2], error=RuntimeError)
    assert "except for the last digits" in proved("hf", [1, 3])


def test_a_loaded_model_is_opened_with_its_tokenizer(folder):
    named = open_model(str(folder / "hf"), device="cpu", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    short = open_model(model, tokenizer=tokenizer, n_prune_layers=2)
    assert type(short) is ShortHFModel and short.model is model and short.n_prune_layers == 2
    assert short.encode("a b") == named.encode("a b")
    short.measure(WINDOWS, progress=False)
    assert short.perplexity(WINDOWS, progress=False).nats == pytest.approx(
        named.perplexity(WINDOWS, progress=False).nats
    )
    for option in ({"dtype": "float32"}, {"stream": True}, {"max_seq_len": 9}):
        with pytest.raises(ShortGPTError, match=f"`{next(iter(option))}` is for loading, and"):
            open_model(model, tokenizer=tokenizer, **option)


def test_a_tokenizer_object_takes_the_place_of_the_models_own(folder):
    tokenizer = open_model(str(folder / "hf"), device="cpu").tokenizer
    short = open_model(str(folder / "hf"), tokenizer=tokenizer, device="cpu")
    assert short.tokenizer is tokenizer
    with pytest.raises(
        ShortGPTError, match="meta is read with tokenizer_path=, a file: pass its path"
    ):
        open_model(str(folder / "meta"), tokenizer=tokenizer)


def test_so_many_layers_are_removed_as_are_named_in_the_call(folder):
    short = open_model(str(folder / "hf"), device="cpu")
    short.measure(WINDOWS, progress=False)
    lowest = short.importances.argsort().tolist()
    assert short.layers_to_remove(3) == short.layers_to_remove(n=3) == lowest[:3]
    refuses("say how many layers, n=..., set n_prune_layers", short.remove_layers)
    for also in ({"n": 2}, {"method": "bi"}, {"angular": True}):
        refuses("expected layers, or n and a method .* got both", short.remove_layers, [1], **also)
    short.n_prune_layers = 2
    refuses("number of layers to remove = 0", short.remove_layers, [])
    assert short.remove_layers(n=2, method="deepest") == [2, 3] and short.kept == [0, 1, 4]


def test_a_model_says_what_it_is_and_what_was_done_to_it(folder):
    short = open_model(str(folder / "hf"), device="cpu")
    short.measure(WINDOWS, progress=False)
    assert repr(short) == f"ShortHFModel(model {folder / 'hf'}, layers 5, windows scored 3)"
    short.remove_layers([3, 1])
    assert "layers 3, removed [3, 1], windows scored 3" in repr(short)
    assert "<td>[3, 1]</td>" in short._repr_html_()
    for stream, name in ((False, "ShortLlama"), (True, "StreamedLlama")):
        other = open_model(str(folder / "meta"), stream=stream, device="cpu")
        assert repr(other) == f"{name}(model {folder / 'meta'}, layers 5, windows scored 0)"


def test_a_callers_own_processes_share_windows_only_if_they_ask_for_it(folder, monkeypatch):
    grouped = []
    monkeypatch.setattr(opening.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(opening.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(opening, "initialize", lambda size, device: grouped.append(size))
    open_model(str(folder / "hf"), device="cpu")
    assert not grouped
    open_model(str(folder / "hf"), device="cpu", model_parallel_size=1)
    assert grouped == [1]


TEXT = "It was the best of times, it was the worst of times. " * 12
WITHOUT_BAR = {"progress": False}


def test_a_name_a_loaded_and_an_opened_model_have_the_same_perplexity_on_strings(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    short = open_model(str(folder / "meta"), device="cpu")
    cut = [*windows([TEXT], short.encode, size=64, stride=64, tail="keep")]
    expected = short.perplexity(cut, **WITHOUT_BAR).value
    values = [
        perplexity(str(folder / "hf"), TEXT, size=64).value,
        perplexity(folder / "meta", [TEXT], size=64).value,
        perplexity(model, [TEXT], tokenizer=tokenizer, size=64).value,
        perplexity(short.decoder, [[window] for window in cut]).value,
    ]
    assert values == pytest.approx([expected] * 4, rel=1e-5)


def test_a_loaded_model_is_ranked_and_refitted_as_the_opened_one(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    how = {"n": 1, "size": 32, "stride": 32, "max_windows": 6}
    texts = [TEXT, TEXT[::-1]]
    named = rank(str(folder / "hf"), texts, **how)
    loaded = rank(model, texts, tokenizer=tokenizer, **how)
    assert torch.equal(named.importance.block_influence, loaded.importance.block_influence)
    assert named.layers == loaded.layers and named.scored and not loaded.scored
    again = rank(open_model(str(folder / "hf")), texts, **how)
    assert torch.equal(again.importance.block_influence, named.importance.block_influence)

    refit = heal_refit(model, named.layers, texts, tokenizer=tokenizer, **WITHOUT_BAR)
    short = open_model(str(folder / "hf"))
    size = min(1024, short.decoder.max_seq_len)
    cut = windows(texts, short.encode, size=size, stride=size, tail="keep")
    heal_refit(short, named.layers, [*cut], **WITHOUT_BAR)
    tokens = torch.tensor(WINDOWS)
    assert refit.short.model is model and refit.short.kept == short.kept
    assert torch.allclose(model(tokens).logits, short.model(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["meta", "hf"])
def test_generate_knows_the_name_max_new_tokens(name, folder):
    short = open_model(str(folder / name), device="cpu")
    few = short.generate(["The"], max_new_tokens=3, temperature=0)
    assert few == short.generate(["The"], 3, 0) != short.generate(["The"], 9, 0)
