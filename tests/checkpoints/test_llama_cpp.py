"""GGUF files written here, opened by llama.cpp: the real small model, and tiny ones of families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_families import FAMILIES, make, write_model
from gguf_files import layers_file
from llama_cpp import LlamaCpp
from tokenizer_files import KINDS, ODD, meta

from llama import Llama
from llama.formats.gguf import llama_to_gguf
from llama.formats.gguf_read import GGUFParts
from llama.formats.gguf_write import UINT32, copied, record, write_again
from llama.model import rope_frequencies
from llama.tokenizer import Tokenizer, find_tokenizer
from short_gpt import ShortHFModel, ShortLlama
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.checkpoints.gguf import Stack
from short_gpt.checkpoints.target import stored_names
from short_gpt.data import demo
from short_gpt.models.decoder import WeightChange
from short_gpt.models.gguf_loading import architecture
from short_gpt.models.hf import HFDecoder

pytestmark = pytest.mark.real

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a little fox who",
    "In the year 1492, Columbus sailed across the ocean with three ships, and on them were",
]
REMOVED = [3, 12, 13, 14]
# products of gelu are looked up in a table of float16 there, everything else is float32
ROUNDING = {"gemma2": 5e-3, "gemma3": 5e-3, "starcoder2": 2e-2}


def build(directory: Path | None = None) -> ShortLlama:
    directory = directory or demo.checkpoint()
    llama = Llama.build(directory, directory / "tokenizer.json", 512, 4, device="cpu")
    return ShortLlama(llama)


def difference(found: dict[int, float], logits: torch.Tensor) -> float:
    """The largest between llama.cpp's log probabilities and those of logits (V,)."""
    expected = torch.log_softmax(logits.double(), -1)
    return max(abs(expected[token].item() - value) for token, value in found.items())


def differences(client: LlamaCpp, short: ShortLlama) -> float:
    """The largest over the prompts, of the five likeliest tokens."""
    encoded = [short.encode(prompt) for prompt in PROMPTS]
    return max(
        difference(client.logprobs(ids, 5), short.decoder.logits(torch.tensor([ids]))[0, -1])
        for ids in encoded
    )


@pytest.fixture(scope="module")
def short() -> ShortLlama:
    return build()


@pytest.fixture(scope="module")
def cut() -> ShortLlama:
    short = build()
    short.remove_layers(REMOVED)
    return short


def test_the_source_and_the_pruned_file_are_ours_but_for_llama_cpps_own_rounding(
    tmp_path, short, cut
):
    """Q4_1: its products take activations in 8 bits, which no cut changes."""
    prune_checkpoint(demo.gguf_file(), tmp_path / "cut.gguf", REMOVED)
    own = differences(LlamaCpp(demo.gguf_file()), short)
    found = differences(LlamaCpp(tmp_path / "cut.gguf"), cut)
    print(f"largest difference of log probabilities: source {own:.3f}, pruned {found:.3f}")
    assert 0 < own < 0.5 and found < 2 * own


def test_in_float32_llama_cpp_writes_the_same_text_token_for_token(tmp_path):
    """The first layers, from Meta's format, and pruned there."""
    first = prune_checkpoint(demo.checkpoint(), tmp_path / "first", list(range(12, 30)))
    llama_to_gguf(first, tmp_path / "whole.gguf")
    llama_to_gguf(prune_checkpoint(first, tmp_path / "pruned", [3, 8]), tmp_path / "cut.gguf")
    short, cut = build(first), build(first)
    cut.remove_layers([3, 8])
    for name, model in (("whole", short), ("cut", cut)):
        client = LlamaCpp(tmp_path / f"{name}.gguf")
        for prompt in PROMPTS:
            assert client.greedy(prompt, 16) == model.greedy(model.encode(prompt), 16), prompt
        assert differences(client, model) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_makes_our_tokens_of_a_text(tmp_path, kind):
    """What follows a text follows the ids that we make of it."""
    source = meta(tmp_path / "meta", kind)
    llama_to_gguf(source, tmp_path / "m.gguf")
    tokenizer, client = Tokenizer(find_tokenizer(source)), LlamaCpp(tmp_path / "m.gguf")
    letter = tokenizer.encode("x", False, False)[-1]
    for text in ODD[:-1]:  # the last has special tokens, which it takes for what they are
        ids = tokenizer.encode(text, tokenizer.add_bos, False)
        assert client.count(text) == len(ids), (text, ids)
        found = [client.logprobs(prompt, 5, chosen=letter) for prompt in (text, ids)]
        assert found[0] == pytest.approx(found[1], abs=1e-5), text


def test_the_real_models_tokens_are_llama_cpps(short):
    client = LlamaCpp(demo.gguf_file(), context=4096)
    for text in ("a\n\n1 b\n\n\n22", "1234567 12.5 1,000", "the    the 1  2", *PROMPTS):
        ids = short.encode(text)
        assert client.count(text) == len(ids), text
        found = [client.logprobs(prompt, 5, chosen=ids[0]) for prompt in (text, ids)]
        assert found[0] == pytest.approx(found[1], abs=1e-5), text


def cut_counts_alone(path: Path, out: Path, keep: list[int]) -> None:
    """What other tools do: tensors renumbered, ``block_count`` set, and nothing else."""
    parts = GGUFParts(path)
    key = f"{Stack(path).arch}.block_count"
    names = stored_names(parts.tensors, "blk", keep)
    tensors = {new: copied(parts, old) for new, old in names.items()}
    write_again(out, parts, tensors, records={key: record(key, len(keep), UINT32)})


def test_lists_of_layers_are_what_makes_a_cut_file_load(tmp_path):
    model = make("llama")
    path = write_model(tmp_path / "m.gguf", "llama", model, **{"attention.head_count_kv": [2] * 8})
    prune_checkpoint(path, tmp_path / "ours.gguf", [1, 4])
    cut_counts_alone(path, tmp_path / "theirs.gguf", [0, 2, 3, 5, 6, 7])
    ids = list(range(2, 30))
    HFDecoder(model).keep_layers([0, 2, 3, 5, 6, 7])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    assert difference(LlamaCpp(tmp_path / "ours.gguf").logprobs(ids), logits) < 1e-4
    with pytest.raises(RuntimeError, match="Failed to init"):
        LlamaCpp(tmp_path / "theirs.gguf")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_cut_file_of_a_family_is_the_model_cut_in_memory(tmp_path, family):
    """Longer than the windows; of families whose layers differ by position both kinds move."""
    model = make(family)
    path = write_model(tmp_path / "m.gguf", family, model)
    prune_checkpoint(path, tmp_path / "cut.gguf", [1, 4])
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    keep = [0, 2, 3, 5, 6, 7]
    HFDecoder(model).keep_layers(keep)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    rounding = ROUNDING.get(family, 2e-4)
    assert difference(LlamaCpp(tmp_path / "cut.gguf").logprobs(ids), logits) < rounding
    if Stack(path).changed_kinds(keep):  # where the list is what makes it right
        cut_counts_alone(path, tmp_path / "plain.gguf", keep)
        assert difference(LlamaCpp(tmp_path / "plain.gguf").logprobs(ids), logits) > 0.05


@pytest.mark.parametrize("arch", ["gemma-embedding", "modern-bert", "muse-glimmer"])
@pytest.mark.parametrize("fields", [{}, {"attention__sliding_window_pattern": 4}], ids=str)
@pytest.mark.parametrize("removed", [[2], [0, 3]], ids=str)
def test_without_layers_that_change_nothing_a_model_is_the_same(tmp_path, arch, fields, removed):
    """To the last bit, with the list of kinds that is written; without it, it is another."""
    path = layers_file(tmp_path / "m.gguf", arch, identity=removed, **fields)
    prune_checkpoint(path, tmp_path / "ours.gguf", removed)
    cut_counts_alone(path, tmp_path / "theirs.gguf", [i for i in range(8) if i not in removed])
    ids = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    results = []
    for name in ("m", "ours", "theirs"):
        client = LlamaCpp(tmp_path / f"{name}.gguf", embedding=arch != "muse-glimmer")
        if arch == "muse-glimmer":
            results.append([value for _, value in sorted(client.logprobs(ids, 258).items())])
        else:
            results.append(client.embed(ids))
    assert results[0] == results[1]
    assert max(abs(a - b) for a, b in zip(results[0], results[2], strict=True)) > 0.03


@pytest.mark.parametrize(
    "family", [f for f in sorted(FAMILIES) if architecture(FAMILIES[f][0]).healed]
)
def test_changed_weights_are_written_where_llama_cpp_reads_them(tmp_path, family):
    """All weights of the layers left, norms too, which some files store plus one."""
    model = make(family)
    short = ShortHFModel(model)
    short.source = str(write_model(tmp_path / "m.gguf", family, model))
    short.remove_layers([1, 4])
    keep, changed = [0, 2, 3, 5, 6, 7], set()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for number, layer in zip(keep, short.decoder.layers, strict=True):
            for name, weight in layer.named_parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
                changed.add((number, name))
    short.note_change(WeightChange({"method": "by hand"}, frozenset(changed)))
    short.save(tmp_path / "out.gguf")
    ids = torch.randint(2, 258, (40,), generator=generator).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    rounding = ROUNDING.get(family, 2e-4)
    assert difference(LlamaCpp(tmp_path / "out.gguf").logprobs(ids), logits) < rounding
    prune_checkpoint(tmp_path / "m.gguf", tmp_path / "cut.gguf", [1, 4])
    assert difference(LlamaCpp(tmp_path / "cut.gguf").logprobs(ids), logits) > 0.05


DIVISORS = rope_frequencies(16, 10000.0) / rope_frequencies(16, 10000.0, 8.0)
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
YARN["rope.scaling.original_context_length"] = 32


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("llama", {}, {"rope_freqs": DIVISORS.numpy()}),
        ("llama", {}, LINEAR),
        ("qwen2", {}, {"rope.scale_linear": 4.0}),
        ("llama", {}, YARN),
        ("qwen2", {}, {**YARN, "rope.scaling.original_context_length": 24}),
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {}),
        ("gemma2", {"num_hidden_layers": 46, "hidden_size": 96}, {}),  # of 27B
        ("gemma3", {}, LINEAR),  # of which only the layers without a window are scaled
        ("gemma3", {"num_hidden_layers": 62, "hidden_size": 96}, {}),
    ],
)
def test_llama_cpp_reads_positions_and_scales_as_we_do(tmp_path, family, changes, keys):
    """Also those that plain transformers leaves out of its config."""
    path = write_model(tmp_path / "m.gguf", family, make(family, **changes), **keys)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 258, (100,), generator=generator).tolist()
    logits = ShortHFModel(path, dtype=torch.float32).decoder.logits(torch.tensor([ids]))[0, -1]
    rounding = 2 * ROUNDING.get(family, 2e-4)
    assert difference(LlamaCpp(path).logprobs(ids), logits) < rounding
