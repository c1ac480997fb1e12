"""GGUF files through transformers: what it would read itself, in less time and memory."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from conftest import BYTE_VOCAB, make_transformer, refuses
from gguf_families import COMMON, add_keys, finished, make, write_model, write_tokenizer
from gguf_files import write_gguf
from processes import alone
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import modeling_gguf_pytorch_utils as reading

from llama.formats.gguf_read import ARRAY, STRING, GGUFParts, read_header
from llama.formats.gguf_write import Stored, copied, packed, record, write_again
from llama.model import rope_frequencies
from short_gpt import ShortHFModel
from short_gpt.models.gguf_loading import reading_gguf
from short_gpt.runtime.errors import ShortGPTError

KINDS = gguf.GGMLQuantizationType
WIDTHS = {"qwen3": {"head_dim": 128}}  # transformers reads no other here


def quantized(path: Path, out: Path) -> Path:
    """A copy whose matrices are of every type in turn that the package gguf writes."""
    parts = GGUFParts(path)
    kinds = [KINDS.Q8_0, KINDS.F16, KINDS.Q4_0, KINDS.BF16, KINDS.Q5_1, KINDS.F32]
    tensors = {}
    for number, (name, place) in enumerate(parts.tensors.items()):
        kind = kinds[number % len(kinds)] if len(place.shape) > 1 else KINDS.F32
        content = packed(name, parts.read(name), kind)
        tensors[name] = Stored(place.shape, kind, len(content), lambda c=content: [c])
    write_again(out, parts, tensors)
    return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "starcoder2"])
def test_the_model_and_its_tokenizer_are_those_of_plain_transformers(tmp_path, monkeypatch, family):
    """Config, weights bit for bit and vocabulary, in either type; tensors are read in pieces."""
    monkeypatch.setattr("llama.formats.gguf_read.CHUNK_VALUES", 300)
    model = make(family, num_hidden_layers=2, **WIDTHS.get(family, {}))
    quantized(write_model(tmp_path / "plain.gguf", family, model), tmp_path / "m.gguf")
    where = {"gguf_file": "m.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **where)
    for kind in (torch.float32, torch.bfloat16):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, **where, dtype=kind)
        short = ShortHFModel(tmp_path / "m.gguf", dtype=kind)
        ours, theirs = short.model.state_dict(), plain.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        vars(plain.config).pop("quantization_config", None)
        if hasattr(plain.config, "query_pre_attn_scalar"):  # which transformers reads from no file
            plain.config.query_pre_attn_scalar = model.config.query_pre_attn_scalar
        assert short.model.config.to_dict() == plain.config.to_dict()
        assert short.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert short.tokenizer.special_tokens_map == tokenizer.special_tokens_map
        assert short.encode("abba ba") == tokenizer("abba ba")["input_ids"]


@pytest.mark.parametrize(("arch", "kind"), [("qwen2moe", "qwen2_moe"), ("gpt2", "gpt2")])
def test_what_transformers_merges_and_transposes_is_as_it_makes_it(tmp_path, arch, kind):
    """Experts' gates and ups become one weight; GPT-2's matrices are transposed."""
    path = random_file(tmp_path / "m.gguf", arch, kind)
    for dtype in (torch.float32, torch.bfloat16):
        options = {"gguf_file": path.name, "dtype": dtype}
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, **options).state_dict()
        with reading_gguf(GGUFParts(path)) as left_out:
            model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
            assert left_out == ["unknown.weight"]
            found = reading.load_gguf_checkpoint(str(path), True, model.to("meta"), dtype)
            assert {weight.dtype for weight in found["tensors"].values()} == {dtype}
            ours = AutoModelForCausalLM.from_pretrained(tmp_path, **options).state_dict()
        assert ours.keys() == plain.keys()
        for name, weight in plain.items():
            assert torch.equal(ours[name], weight) and ours[name].dtype == dtype, name


def random_file(path: Path, arch: str, kind: str) -> Path:
    """Random tensors of the names and shapes that transformers knows, and one that it does not."""
    sizes = {"embedding_length": 64, "block_count": 2, "context_length": 1024}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16}
    sizes |= {"feed_forward_length": 256, "vocab_size": BYTE_VOCAB}
    sizes |= {"expert_count": 4, "expert_used_count": 2}
    own = {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model(kind, **COMMON | own | {"max_position_embeddings": 1024})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = reading.get_gguf_hf_weights_map(
        model, reading.TENSOR_PROCESSORS[arch](config.to_dict())
    )
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, arch)
    add_keys(writer, arch, sizes)
    for name, of_model in names.items():
        shape = model.state_dict()[of_model].shape
        if "_exps" in name:
            count, rows, columns = shape
            rows //= 1 if "down" in name else 2
            writer.add_tensor(f"{name}.weight", torch.randn(count, rows, columns).numpy())
        else:
            transposed = arch == "gpt2" and name.startswith("blk")
            shape = shape[1:] if "inp_shexp" in name else shape  # one row
            writer.add_tensor(name, torch.randn(shape[::-1] if transposed else shape).numpy())
    writer.add_tensor("unknown.weight", torch.randn(4).numpy())
    write_tokenizer(writer)
    return finished(writer, path)


def test_the_header_is_read_once_and_by_no_other_reader(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB))
    read = []

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("transformers reads the header itself")

    monkeypatch.setattr(gguf, "GGUFReader", refused)
    if hasattr(__import__("transformers.integrations").integrations, "gguf"):
        monkeypatch.setattr("transformers.integrations.gguf.reader._read_metadata", refused)
    name = "llama.formats.gguf_read.read_header"
    monkeypatch.setattr(name, lambda p: read.append(p) or read_header(p))
    ShortHFModel(path)
    assert read == [path]
    assert gguf.GGUFReader is refused  # nothing of transformers or gguf stays another


def test_the_metadata_are_those_that_transformers_reads(tmp_path):
    """Of texts that are not asked for it takes their number for the size of the vocabulary."""
    reader = pytest.importorskip("transformers.integrations.gguf.reader")
    keys = {"attention.head_count_kv": [2] * 8}
    path = write_model(tmp_path / "m.gguf", "llama", make("llama"), **keys)
    plain = reader.read_gguf_metadata
    for asked in ((), ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")):
        expected, names = plain(path, asked)
        with reading_gguf(GGUFParts(path)):
            found, ours = reader.read_gguf_metadata(path, asked)
        assert found == expected and sorted(ours) == sorted(names)
    assert reader.read_gguf_metadata is plain


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_takes_little_beside_the_model(tmp_path, monkeypatch):
    """In either dtype, with a large vocabulary whose embedding is the last tensor.

    A copy of the embedding would add 0.87 of the model; one in float32 twice that of bfloat16.
    """
    count = 40_000
    write_gguf(tmp_path / "tiny.gguf", make_transformer(vocab_size=BYTE_VOCAB))
    model = make_transformer(vocab_size=count, dim=768, n_layers=1)
    whole = write_gguf(tmp_path / "plain.gguf", model, drop=["output.weight"])
    parts, key, largest = GGUFParts(whole), "tokenizer.ggml.tokens", "token_embd.weight"
    texts = [*parts.fields[key], *(f"x{i}" for i in range(count - BYTE_VOCAB))]
    records = {key: record(key, texts, ARRAY, STRING)}
    names = [*(name for name in parts.tensors if name != largest), largest]
    tensors = {name: copied(parts, name) for name in names}
    write_again(tmp_path / "m.gguf", parts, tensors, records=records)
    code = """
import gc, sys
from pathlib import Path
import torch
import transformers
from llama.model import rope_frequencies
from short_gpt import ShortHFModel

def status(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024

ShortHFModel("tiny.gguf", dtype=torch.float32)  # imports all
for dtype in (torch.float32, torch.bfloat16):
    gc.collect()
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here
    short = ShortHFModel("m.gguf", dtype=dtype)
    print((status("VmHWM:") - before) / sum(p.nbytes for p in short.model.parameters()))
    del short
"""
    monkeypatch.chdir(tmp_path)
    done = alone(tmp_path / "printed", exec, code, {}).end()
    assert done.codes == [0], done.err
    found = [float(line) for line in done.out.split()]
    assert len(found) == 2 and min(found) > 0.8 and max(found) < 1.5, found


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}
IDS = torch.randint(2, 258, (1, 300), generator=torch.Generator().manual_seed(3))
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
YARN["rope.scaling.original_context_length"] = 32
YARN_CONFIG = {"rope_type": "yarn", "original_max_position_embeddings": 32}


@pytest.fixture
def no_tokenizer(monkeypatch):
    """Version 4 of transformers makes none of a few letters."""
    monkeypatch.setattr("short_gpt.models.loading.load_tokenizer", lambda *_: None)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("family", "changes", "keys"),
    [
        ("llama", {"rope_parameters": SCALED}, LINEAR),
        ("llama", {"rope_parameters": SCALED}, {"rope.scale_linear": 4.0}),
        ("qwen2", {"rope_parameters": {**SCALED, **YARN_CONFIG}}, YARN),
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {}),
        ("gemma3", {"query_pre_attn_scalar": 16}, {}),
        ("gemma2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 24, "hidden_size": 96}, {}),
    ],
)
def test_what_transformers_leaves_out_of_the_metadata_is_in_the_config(
    tmp_path, no_tokenizer, family, changes, keys
):
    if "rope_parameters" in changes and transformers.__version__.startswith("4."):
        changes = {"rope_scaling": changes["rope_parameters"]}
    model = make(family, **{"max_position_embeddings": 512, **changes})
    path = write_model(tmp_path / "m.gguf", family, model, **keys)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(ShortHFModel(path).model), expected, atol=1e-3, rtol=1e-3)
    if "num_hidden_layers" in changes:  # of 46 layers, which transformers reads slowly
        return
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert (logits_of(plain) - expected).abs().max() > 0.05  # as long as transformers does not


def test_a_llama_3_1_has_its_scaled_rotary_frequencies(tmp_path, no_tokenizer):
    rope = {"rope_parameters": LLAMA3}
    if transformers.__version__.startswith("4."):
        rope = {"rope_scaling": LLAMA3, "rope_theta": LLAMA3["rope_theta"]}
    model = make("llama", **rope, max_position_embeddings=131072)
    plain = rope_frequencies(16, 500000.0)
    divisors = (plain / rope_frequencies(16, 500000.0, 8.0)).numpy()
    path = write_model(tmp_path / "m.gguf", "llama", model, rope_freqs=divisors)
    short = ShortHFModel(path)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(short.model), expected, atol=1e-3, rtol=1e-3)
    short.remove_layers([1])
    again = ShortHFModel(short.save_pretrained(tmp_path / "out"))
    torch.testing.assert_close(logits_of(again.model), logits_of(short.model))
    with short.without_layers([2]):
        assert (logits_of(short.model) - logits_of(again.model)).abs().max() > 1e-3
    for keys in ({"rope_freqs": divisors**2}, {"rope_freqs": divisors, **LINEAR}):
        with pytest.raises(ShortGPTError, match="it scales rotary positions"):
            ShortHFModel(write_model(tmp_path / "w.gguf", "llama", model, **keys))
    other = {"rope.scaling.yarn_beta_fast": 16.0}
    with pytest.raises(ShortGPTError, match=r"it scales rotary positions \(yarn\)"):
        ShortHFModel(write_model(tmp_path / "w.gguf", "llama", model, **YARN, **other))


def test_whole_numbers_are_no_weights(tmp_path):
    parts = GGUFParts(write_gguf(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB)))
    entry = parts.tensors["output_norm.weight"]
    parts.tensors["output_norm.weight"] = entry._replace(kind=26)  # I32, as wide as F32
    refuses(r"output_norm.weight holds whole numbers \(I32\)", parts.read, "output_norm.weight")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_in_several_files_is_the_one_in_one(tmp_path, family):
    model = make(family)
    whole = write_model(tmp_path / "m.gguf", family, model)
    write_model(tmp_path / "n.gguf", family, model, split=20)
    parts = sorted(tmp_path.glob("n-*.gguf"))
    assert len(parts) > 3
    tokens = torch.randint(2, 258, (1, 20), generator=torch.Generator().manual_seed(0))
    one, several = (ShortHFModel(p, dtype=torch.float32) for p in (whole, parts[1]))
    assert torch.equal(one.decoder.logits(tokens), several.decoder.logits(tokens))
    assert one.encode("ab") == several.encode("ab")
    several.remove_layers([1])
    several.save(tmp_path / "cut.gguf")
    assert GGUFParts(tmp_path / "cut.gguf").fields[f"{family}.block_count"] == 7
