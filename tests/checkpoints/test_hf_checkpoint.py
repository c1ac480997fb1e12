"""Hugging Face checkpoints pruned from their files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import children
import pytest
import torch
import transformers
from conftest import refuses, write_byte_tokenizer
from families import DROP, KEPT, TOKENS, make
from processes import alone
from safetensors.torch import load_file, save_file

from llama.formats.safetensors import Entry
from llama.sources import FETCHED, find_source
from short_gpt import ShortHFModel, convert, open_model
from short_gpt.checkpoints import Provenance, Target, prune_checkpoint
from short_gpt.models.hf import HFDecoder
from short_gpt.runtime.state import versions


def logits(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return HFDecoder(model).logits(TOKENS)


BY_ME = Provenance.of_scores(facts={"by": "me"})


@pytest.fixture
def whole(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


WORKS = {
    "prunes": lambda name: prune_checkpoint(name, "out", [1]),
    "streams": lambda name: open_model(name, stream=True, device="cpu"),
    "converts": lambda name: convert(name, "out"),
    "opens": ShortHFModel,
}
LINKS = ["LICENSE", "tokenizer_secret", "chat_template.jinja", "additional_chat_templates/a.jinja"]


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_not_followed(llama_folders, tmp_path, monkeypatch, work, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama_folders / "hf", "hf")
    Path("secret").mkdir()
    Path("secret/key.jinja").write_text('{"password": "secret"}')
    link = Path("hf", name)
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("secret/key.jinja").resolve())
    refuses(f"{name} is a link to .*, outside of", WORKS[work], "hf")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "conversion.json"]
)
def test_a_link_out_of_metas_format_is_not_followed_except_of_a_tokenizer(
    llama_folders, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama_folders / "meta", "meta")
    Path("meta/tokenizer.json").rename("tokenizer.json")
    Path("meta/tokenizer.json").symlink_to("../tokenizer.json")
    prune_checkpoint("meta", "out", [1])
    Path("key").write_text('{"password": "secret"}')
    Path("meta", name).unlink(missing_ok=True)
    Path("meta", name).symlink_to("../key")
    refuses(f"{name} is a link to ", prune_checkpoint, "meta", "other", [1])
    assert not Path("other").exists()


@pytest.mark.parametrize("store", ["blobs", "../blobs/ab"])
def test_links_of_the_hubs_cache_are_followed(llama_folders, tmp_path, monkeypatch, store):
    repo = tmp_path / "hub" / "models--a--b"
    snapshot, blobs = repo / "snapshots" / ("0" * 40), repo / store
    shutil.copytree(llama_folders / "hf", snapshot)
    blobs.mkdir(parents=True)
    for path in [p for p in snapshot.iterdir() if p.is_file()]:
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, snapshot))
    monkeypatch.chdir(tmp_path)
    for work in ("prunes", "streams", "opens"):
        WORKS[work](str(snapshot))
    assert Path("out/tokenizer.json").is_file()


def test_a_single_file_stays_single_and_other_files_go_along(whole, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt"):
        (whole / name).write_text("{}")
    (whole / "NOTICE").symlink_to("NOTICE")  # to itself: nothing to copy
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors"):
        (whole / name).write_text("")
    (whole / "params.json").write_text('{"dim": 64}')  # as Mistral has it beside these files
    assert find_source(whole).kind == "hf"
    (whole / "additional_chat_templates").mkdir()
    (whole / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    seen = []
    out = prune_checkpoint(whole, tmp_path / "cut", DROP, provenance=BY_ME, progress=seen.append)
    assert (out / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    names = {"tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt", "config.json"}
    names |= {"generation_config.json", "model.safetensors", "pruning.json", "README.md"}
    names |= {"additional_chat_templates"}
    assert {p.name for p in out.iterdir()} == names
    assert "# whole without 2 of its 6 layers" in (out / "README.md").read_text()
    assert "    [1, 4]\n\nThey were chosen by hand." in (out / "README.md").read_text()
    record = json.loads((out / "pruning.json").read_text())
    files = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    assert record.pop("files") == sorted(files)
    prune_checkpoint(whole, Target(tmp_path / "cut", overwrite=True), DROP, provenance=BY_ME)
    assert record == {
        "removed_layers": DROP,
        "kept_layers": KEPT,
        "original_layers": KEPT,
        "source": "whole",
        "by": "me",
        "versions": versions(),
    }
    assert len(seen) == len(load_file(out / "model.safetensors"))


def test_the_config_changes_in_nothing_but_the_layers(whole, tmp_path):
    """A config of transformers 4 keeps its keys, which 5 would write otherwise."""
    config = json.loads((whole / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    config |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32"}
    (whole / "config.json").write_text(json.dumps(config))
    out = prune_checkpoint(whole, tmp_path / "cut", DROP)
    found = json.loads((out / "config.json").read_text())
    assert found == {**config, "num_hidden_layers": 4}


def test_code_that_does_not_go_along_is_not_named(whole, tmp_path):
    config = json.loads((whole / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    (whole / "config.json").write_text(json.dumps(config))
    (whole / "strange.py").write_text("")
    out = prune_checkpoint(whole, tmp_path / "cut", DROP)
    again = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert len(again.model.layers) == len(KEPT)


def test_names_may_lack_the_models_name(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert "h.0.ln_1.weight" in tensors
    prune_checkpoint(tmp_path / "whole", tmp_path / "cut", DROP)
    HFDecoder(model).keep_layers(KEPT)
    assert (logits(tmp_path / "cut") - HFDecoder(model).logits(TOKENS)).abs().max() < 1e-5


def test_every_dtype_goes_over_as_bytes(whole, tmp_path):
    path = whole / "model.safetensors"
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    out = load_file(prune_checkpoint(whole, tmp_path / "cut", [0]) / "model.safetensors")
    name = "layers.{}.self_attn.q_proj.weight"
    assert torch.equal(
        out["model." + name.format(0)].view(torch.uint8),
        tensors["model." + name.format(1)].view(torch.uint8),
    )


def test_pruned_again_it_remembers_the_first_time(whole, tmp_path):
    prune_checkpoint(whole, tmp_path / "one", [1])
    out = prune_checkpoint(tmp_path / "one", tmp_path / "two", [3])
    record = json.loads((out / "pruning.json").read_text())
    assert record["source_pruning"]["removed_layers"] == [1]
    prune_checkpoint(whole, tmp_path / "both", DROP)
    assert torch.equal(logits(out), logits(tmp_path / "both"))


def test_refusals(whole, tmp_path):
    out = tmp_path / "cut"
    refuses(r"layers \[9\] do not exist; the model has 0..5", prune_checkpoint, whole, out, [9])
    refuses("exists", prune_checkpoint, whole, whole, [1], error=FileExistsError)
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        prune_checkpoint(tmp_path / "none", out, [1])
    path = whole / "model.safetensors"
    tensors = {n.replace("layers.5.", "layers.6."): t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    refuses(r"expected tensors of model.layers.0 to", prune_checkpoint, whole, out, [1])
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    refuses("is not a causal model to be pruned", prune_checkpoint, whole, out, [1])
    (whole / "config.json").write_text(json.dumps(config))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        prune_checkpoint(whole, out, [1])
    assert not out.exists()


def hollow_llama(directory, **changes):
    """A Llama in bfloat16, all zeros, its file a hole: (largest tensor, all) bytes."""
    shape = {**LARGE, **changes, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config = transformers.LlamaConfig(**shape)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    write_byte_tokenizer(directory)
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).state_dict()
    entries = {name: Entry.of(torch.bfloat16, tuple(w.shape)) for name, w in weights.items()}
    path = directory / "model.safetensors"
    header, end = {}, 0
    for name, entry in entries.items():
        offsets = [end, end + entry.nbytes]
        header[name] = {"dtype": "BF16", "shape": entry.shape, "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return max(entry.nbytes for entry in entries.values()), end


LARGE = {"vocab_size": 16000, "hidden_size": 256, "intermediate_size": 3072}
LARGE |= {"num_hidden_layers": 13, "num_attention_heads": 8, "tie_word_embeddings": True}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """The model has eight times as much; pruning copies pieces, converting turns whole tensors."""
    small, large, drop = tmp_path / "small", tmp_path / "large", [3, 4, 11]
    hollow_llama(small / "hf", vocab_size=258, intermediate_size=64)
    largest, total = hollow_llama(large / "hf")
    assert total > 8 * largest
    done = alone(tmp_path / "printed", children.conversions, small, large, drop).end()
    assert done.codes == [0], done.err
    pruning, to_meta, pruning_meta, to_hf = json.loads(done.out)
    print(pruning, to_meta, pruning_meta, to_hf)
    assert pruning < 32 * 2**20 + largest / 4  # two pieces of 16 MiB, and the header's names
    assert to_meta < pruning_meta + 1 < to_hf + 2 < 3 * largest


def test_tokenizers_in_any_file_and_notices_go_along_from_a_directory_and_the_hub(whole, tmp_path):
    names = ["qwen.tiktoken", "vocab.bpe", "vocab.txt", "spiece.model", "NOTICE", "USE_POLICY.md"]
    for name in (*names, "weights.bin"):
        (whole / name).write_text("a")
    prune_checkpoint(whole, tmp_path / "cut", [1])
    assert {path.name for path in (tmp_path / "cut").iterdir()} >= {*names}
    assert not (tmp_path / "cut/weights.bin").exists()
    for name in names:
        assert any(fnmatch(name, pattern) for pattern in FETCHED)
