"""Meta to Hugging Face and back, and GGUF to Meta."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64encode

import huggingface_hub
import pytest
import torch
import transformers
from conftest import make_transformer, refuses, save_byte_llama, save_meta, write_byte_tokenizer
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from llama import Tokenizer
from llama.checkpoint.meta import Checkpoint
from llama.errors import InputError
from llama.formats.gguf import to_meta
from llama.formats.hf import HF, META, HFCheckpoint, meta_to_hf, permute
from llama.formats.safetensors import (
    DTYPES,
    Entry,
    SafetensorsFile,
    open_weights,
    tensor_bytes,
    write_file,
)
from llama.formats.tokenizers import write_tokenizer
from llama.generation import load_model
from llama.model import rope_frequencies
from llama.sources import hub_failure, resolve

VOCAB = 258
TOKENS = torch.arange(3, 27).reshape(2, 12)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SCALED = {"use_scaled_rope": True, "rope_scaling_factor": 4.0, "rope_theta": 500000.0}


def ours(path, tensors):
    """The bytes that our writer makes of tensors."""
    entries = {name: Entry.of(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    write_file(path, entries, lambda name: tensor_bytes(tensors[name]))
    return path.read_bytes()


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_safetensors_have_the_librarys_bytes_except_the_order(tmp_path, dtype):
    """Which the library takes from names, and a copy of a file's tensors from the file."""

    def theirs(tensors):
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        return (tmp_path / "theirs").read_bytes()

    shapes = {"a": (3, 5), "b": (7,), "layers.10.w": (1, 1), "layers.9.w": (2, 3)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    assert ours(tmp_path / "ours", tensors) == theirs(tensors)
    mixed = {"w": torch.randn(2, 2, dtype=torch.float64), **tensors}
    assert ours(tmp_path / "mixed", mixed) == theirs(mixed) or dtype == torch.float64
    renumbered = dict(sorted(tensors.items(), reverse=True))
    assert ours(tmp_path / "ours", renumbered) != theirs(renumbered)
    assert list(SafetensorsFile(tmp_path / "ours").entries) == list(renumbered)


def state(directory):
    assert len(list(directory.glob("consolidated.*"))) == 1
    return torch.load(directory / "consolidated.00.pth", mmap=True)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def weights(directory):
    return {k: v for p in directory.glob("*.safetensors") for k, v in load_file(p).items()}


def hf_logits(directory, **options):
    model, problems = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(problems.values()), problems
    with torch.no_grad():
        return model.eval()(TOKENS).logits


CASES = {
    "grouped queries": {},
    "as many key heads": {"n_kv_heads": 4},
    "one key head": {"n_kv_heads": 1, "rope_theta": 500000.0},
    "llama 3.1": SCALED,
    "tied": {"tied": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "odd width": {"ffn_dim_multiplier": 1.3, "multiple_of": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_meta_to_hf_gives_the_same_logits_and_comes_back_bit_exact(case, tmp_path):
    model = save_meta(tmp_path / "meta", **CASES[case])
    hf = meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    if case != "bfloat16":
        expected = model(TOKENS)
        assert (hf_logits(hf) - expected).abs().max() < 1e-5 * expected.abs().max()
    back = to_meta(hf, tmp_path / "back")
    assert same(state(tmp_path / "meta"), state(back))
    ours, theirs = Checkpoint(tmp_path / "meta").args, Checkpoint(back).args
    assert ours.ffn_dim == theirs.ffn_dim and ours.rope_factor == theirs.rope_factor
    assert (ours.norm_eps, ours.rope_theta) == (theirs.norm_eps, theirs.rope_theta)
    config = "tokenizer_config.json"
    assert (back / config).read_bytes() == (tmp_path / "meta" / config).read_bytes()
    words = [json.loads((d / "tokenizer.json").read_text()) for d in (back, tmp_path / "meta")]
    assert words[0].pop("post_processor")["type"] == "TemplateProcessing"  # which puts bos
    assert words[1].pop("post_processor") is None and words[0] == words[1]
    limited = Checkpoint(back, max_seq_len=64)
    loaded = load_model(limited, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(loaded(TOKENS), model.float()(TOKENS))


def test_a_vocabulary_of_more_ids_than_words_is_refused_for_metas_format(tmp_path):
    """Which holds as many of both; a directory would be written that nothing opens."""
    config = transformers.LlamaConfig(**SMALL, vocab_size=VOCAB + 6)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    write_byte_tokenizer(tmp_path / "hf")
    with pytest.raises(
        InputError, match=f"has {VOCAB} tokens, .* has {VOCAB + 6} ids: .* write GGUF"
    ):
        to_meta(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", CASES)
def test_hf_comes_back_bit_exact(case, tmp_path):
    save_meta(tmp_path / "meta", **CASES[case])
    first = meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    # as transformers writes it
    model = transformers.AutoModelForCausalLM.from_pretrained(first, dtype="auto")
    model.config.max_position_embeddings = 777
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(tmp_path / "own", max_shard_size="20KB")
    write_byte_tokenizer(tmp_path / "own")
    # as transformers 5 writes the template
    (tmp_path / "own/chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "own/additional_chat_templates").mkdir()
    (tmp_path / "own/additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    to_meta(tmp_path / "own", tmp_path / "middle")
    back = meta_to_hf(tmp_path / "middle", tmp_path / "back")
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (back / "additional_chat_templates/tools.jinja").read_text() == "{{ tools }}"
    assert same(weights(tmp_path / "own"), weights(back))
    assert same(weights(first), weights(back))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, dtype="auto")
    ours, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {k for k in ours if theirs[k] != ours[k]} <= {"_name_or_path"}
    assert loaded.generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("vocab_parallel", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_model_parallel_files_are_merged(vocab_parallel, tied, tmp_path):
    model = save_meta(tmp_path / "two", shards=2, vocab_parallel=vocab_parallel, tied=tied)
    save_meta(tmp_path / "one", tied=tied)
    out = meta_to_hf(tmp_path / "two", tmp_path / "hf", max_shard_bytes=20_000)
    assert same(weights(out), weights(meta_to_hf(tmp_path / "one", tmp_path / "hf1")))
    assert ("lm_head.weight" in weights(out)) is not tied
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = sum(t.nbytes for t in weights(out).values())
    assert index["metadata"]["total_size"] == total
    expected = model(TOKENS)
    assert (hf_logits(out) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_permutation_of_one_head():
    args = Checkpoint.__new__(Checkpoint)  # only the numbers of heads matter
    args.n_heads, args.kv_heads, args.head_dim = 1, 1, 8
    rows = torch.arange(8.0)[:, None]
    turned = permute("layers.0.attention.wk.weight", rows, args, to=HF)
    assert turned.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(permute("layers.0.attention.wk.weight", turned, args, to=META), rows)


def test_a_config_of_transformers_4_is_read(tmp_path):
    model = save_meta(tmp_path / "meta", **SCALED)
    hf = meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == 500000.0
    assert config["max_position_embeddings"] == 131072
    (hf / "config.json").write_text(json.dumps(config))
    args = Checkpoint(to_meta(hf, tmp_path / "back")).args
    assert (args.rope_theta, args.rope_factor) == (500000.0, model.params.rope_factor)


@pytest.mark.parametrize(("theta", "context"), [(1e4, 4096), (5e5, 8192), (1e6, 16384)])
def test_the_longest_window_is_that_of_the_llama_with_such_a_theta(theta, context, tmp_path):
    save_meta(tmp_path / "meta", rope_theta=theta)
    hf = meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    assert json.loads((hf / "config.json").read_text())["max_position_embeddings"] == context


REFUSED = {
    "model_type = 'qwen2': expected 'llama'": {"model_type": "qwen2"},
    "architectures = ['LlamaForSequence": {"architectures": ["LlamaForSequenceClassification"]},
    "attention_bias = True: expected False": {"attention_bias": True},
    "mlp_bias = True: expected False": {"mlp_bias": True},
    "head_dim = 16: expected 8": {"head_dim": 16},
    "hidden_act = 'gelu'": {"hidden_act": "gelu"},
    "quantization_config = 'gptq'": {"quantization_config": {"quant_method": "gptq"}},
    "rope_scaling = {'rope_type': 'yarn'": {
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0}
    },
    "lacks ['vocab_size']": {"vocab_size": ...},
    "has shape [258, 32]; config.json gives [99, 32]": {"vocab_size": 99},
    "it lacks tensors ['model.layers.5": {"num_hidden_layers": 6},
    "and has others ['model.layers.4": {"num_hidden_layers": 4},
}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory, one_rank):
    path = tmp_path_factory.mktemp("refused")
    save_meta(path / "meta")
    return meta_to_hf(path / "meta", path / "hf")


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_llama_is_refused(message, hf_dir, tmp_path):
    shutil.copytree(hf_dir, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | REFUSED[message]
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    refuses(re.escape(message), to_meta, tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_are_refused_and_old_buffers_are_not(hf_dir, tmp_path):
    shutil.copytree(hf_dir, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(hf_dir / path.name) | buffer, path)
    to_meta(tmp_path / "hf", tmp_path / "out", dtype="bfloat16")
    assert state(tmp_path / "out")["norm.weight"].dtype == torch.bfloat16
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(load_file(hf_dir / path.name) | bias, path)
    refuses("has others .*q_proj.bias", to_meta, tmp_path / "hf", tmp_path / "out2")


def test_missing_and_damaged_files(hf_dir, tmp_path):
    for name, error, message in (
        ("config.json", FileNotFoundError, r"has no params\.json .* and no config\.json"),
        ("model.safetensors", FileNotFoundError, "neither model.safetensors nor"),
        ("tokenizer.json", FileNotFoundError, "neither tokenizer.json nor tokenizer.model"),
    ):
        shutil.copytree(hf_dir, tmp_path / name)
        (tmp_path / name / name).unlink()
        refuses(message, to_meta, tmp_path / name, tmp_path / "out", error=error)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    refuses("names a file ../b", open_weights, tmp_path, error=FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("GatedRepoError", ValueError, "a/b is gated: accept its terms"),
        ("RepositoryNotFoundError", ValueError, "neither a directory here nor a model"),
        ("LocalEntryNotFoundError", ConnectionError, "the hub cannot be reached"),
        ("OfflineModeIsEnabled", ConnectionError, "the hub cannot be reached"),
    ],
)
def test_the_hub_refuses_in_one_line(monkeypatch, name, kind, message):
    cls = getattr(huggingface_hub.errors, name)

    def refuse(*_, **__):
        raise cls.__new__(cls)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    said = refuses(message, resolve, "a/b", error=kind)
    wrapped = OSError("transformers'\nown words")  # as its loaders raise it
    wrapped.__cause__ = cls.__new__(cls)
    assert str(hub_failure("a/b", wrapped)) == said
    assert hub_failure("a/b", OSError("disk full")) is None
    refuses("neither a directory nor a hub id", resolve, "/no/such/place", error=FileNotFoundError)


def test_llama_3_ranks_become_a_tokenizer_json_with_the_same_ids(tmp_path):
    words = [bytes([i]) for i in range(256)]
    words += [b"th", b" t", b"the", b" the", b"in", b"ing", b"12", b"\n\n", "é".encode()]
    path = tmp_path / "tokenizer.model"
    lines = [b"%s %d\n" % (b64encode(word), i) for i, word in enumerate(words)]
    path.write_bytes(b"".join(lines))
    (tmp_path / "out").mkdir()
    write_tokenizer(path, tmp_path / "out")
    ours, theirs = Tokenizer(path), Tokenizer(tmp_path / "out" / "tokenizer.json")
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the thing, then\n\n12 3 é", " the  singing\t日本"):
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs.encode(text, bos=True, eos=False) == ids
        assert auto(text)["input_ids"] == ids
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)
    assert theirs.stop_tokens == ours.stop_tokens and theirs.dialog_format == "llama3"


@pytest.fixture
def gguf_model():
    return make_transformer(vocab_size=VOCAB)


def test_a_gguf_without_output_is_tied(tmp_path, gguf_model):
    path = write_gguf(tmp_path / "a.gguf", gguf_model, drop=["output.weight"])
    out = to_meta(path, tmp_path / "out")
    assert state(out)["output.weight"].equal(gguf_model.tok_embeddings.weight)
    hf = meta_to_hf(out, tmp_path / "hf")
    assert "lm_head.weight" not in weights(hf)
    ids = Tokenizer(out / "tokenizer.json").encode("a text", bos=True, eos=False)
    assert transformers.AutoTokenizer.from_pretrained(hf)("a text")["input_ids"] == ids


def test_gguf_rope_factors(tmp_path):
    model = make_transformer(vocab_size=VOCAB, rope_theta=500000.0, dim=64)
    hd = model.params.head_dim
    divisors = rope_frequencies(hd, 500000.0) / rope_frequencies(hd, 500000.0, 32.0)
    path = write_gguf(tmp_path / "a.gguf", model, tensors=[("rope_freqs.weight", divisors)])
    assert Checkpoint(to_meta(path, tmp_path / "out")).args.rope_factor == 32.0
    wrong = [("rope_freqs.weight", divisors.sqrt())]
    path = write_gguf(tmp_path / "b.gguf", model, tensors=wrong)
    refuses(r"scales its rotary frequencies unlike Llama 3\.1", to_meta, path, tmp_path / "out2")


def test_gguf_refusals(tmp_path, gguf_model):
    for options, message in (
        ({"arch": "qwen2"}, "holds architecture 'qwen2', expected 'llama'"),
        ({"tensors": [("blk.0.attn_q.bias", torch.ones(32))]}, r"others \['blk.0.attn_q.bias'\]"),
        ({"drop": ["norm.weight"]}, r"lacks tensors \['output_norm.weight'\]"),
        ({"drop": ["tok_embeddings.weight"]}, "lacks token_embd.weight"),
        ({"expert_count": 8}, "llama.expert_count = 8: expected 0"),
        ({"attention__key_length": 16}, "key_length = 16: expected 8"),
        ({"rope__scaling__factor": 4.0}, "llama.rope.scaling.factor = 4.0: expected 1.0"),
        ({"rope__scale_linear": 2.0}, "llama.rope.scale_linear = 2.0: expected 1.0"),
    ):
        path = write_gguf(tmp_path / "a.gguf", gguf_model, **options)
        refuses(message, to_meta, path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        to_meta(tmp_path / "none.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_longest_window_of_a_gguf_file_comes_through_metas_format(tmp_path):
    model = make_transformer(vocab_size=VOCAB)
    path = write_gguf(tmp_path / "m.gguf", model, context_length=77)
    to_meta(path, tmp_path / "meta", shards=2)
    to_meta(tmp_path / "meta", tmp_path / "one", shards=1)
    meta_to_hf(tmp_path / "one", tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.max_position_embeddings == 77


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"'])
def test_a_damaged_tokenizer_is_not_carried_over(tmp_path, content):
    save_meta(tmp_path / "meta")
    meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    for folder in ("hf", "meta"):
        (tmp_path / folder / "tokenizer.json").write_bytes(content)
    for convert, source, how in (
        (to_meta, "hf", {}),
        (meta_to_hf, "meta", {}),
        (to_meta, "meta", {"shards": 2}),
    ):
        refuses(r"tokenizer\.json", convert, tmp_path / source, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()


def test_bos_that_only_the_configuration_names_reaches_transformers(tmp_path):
    save_meta(tmp_path / "meta")
    ours = Tokenizer(tmp_path / "meta/tokenizer.json")
    assert ours.add_bos
    meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    expected = ours.encode("a text", True, False)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("a text")["input_ids"] == expected
    assert Tokenizer(tmp_path / "hf/tokenizer.json").encode("a text", True, False) == expected
    path = tmp_path / "meta/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    meta_to_hf(tmp_path / "meta", tmp_path / "without")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "without")
    assert theirs("a text")["input_ids"] == expected[1:]


@pytest.mark.parametrize("source", ["meta", "hf", "gguf"])
def test_what_float16_cannot_hold_is_not_written_as_infinite(tmp_path, source):
    model = make_transformer(vocab_size=VOCAB)
    model.layers[1].attention.wq.weight.data[0, 0] = 1e6
    save_byte_llama(tmp_path / "meta", model)
    path = write_gguf(tmp_path / "m.gguf", model) if source == "gguf" else tmp_path / source
    if source == "hf":
        meta_to_hf(tmp_path / "meta", path)
    with pytest.raises(InputError, match=r"layers\.1\.attention\.wq\.weight has values beyond fl"):
        to_meta(path, tmp_path / "half", shards=1, dtype="float16")
    assert not (tmp_path / "half").exists()
    to_meta(path, tmp_path / "wide", shards=1, dtype="bfloat16")


def test_a_tied_config_that_stores_another_head_is_refused(tmp_path):
    """Transformers uses the stored head then, and a converter must not write the embedding."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    refuses("it ties its embeddings, but stores another lm_head", HFCheckpoint, tmp_path)
