"""Hugging Face checkpoints pruned from their files."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from families import FAMILIES, make
from safetensors.torch import load_file, save_file

from short_gpt import ShortHFModel
from short_gpt.hf_checkpoint import mergekit_recipe, prune_hf
from short_gpt.hf_decoder import HFDecoder

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
TOKENS = torch.arange(3, 23).reshape(2, 10)
DROP, KEPT = [1, 4], [0, 2, 3, 5]


def logits(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return HFDecoder(model).logits(TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_hold_the_model_pruned_in_memory(family, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    prune_hf(tmp_path / "whole", tmp_path / "cut", DROP)
    short = ShortHFModel(model)
    short.remove_layers(DROP)
    loaded, problems = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", output_loading_info=True
    )
    assert not any(problems.values()), problems
    ours = HFDecoder(loaded.eval())
    assert (ours.logits(TOKENS) - short.decoder.logits(TOKENS)).abs().max() < 1e-5
    expected = json.loads(json.dumps(model.config.to_dict()))
    found = json.loads(json.dumps(loaded.config.to_dict()))
    assert {k for k in expected if found.get(k) != expected[k]} <= {"_name_or_path"}


@pytest.fixture
def whole(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_single_file_stays_single_and_other_files_go_along(whole, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt"):
        (whole / name).write_text("{}")
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors"):
        (whole / name).write_text("")
    seen = []
    out = prune_hf(whole, tmp_path / "cut", DROP, provenance={"by": "me"}, progress=seen.append)
    names = {"tokenizer.json", "chat_template.jinja", "LICENSE", "merges.txt", "config.json"}
    names |= {"generation_config.json", "model.safetensors", "pruning.json"}
    assert {p.name for p in out.iterdir()} == names
    record = json.loads((out / "pruning.json").read_text())
    assert record == {"removed_layers": DROP, "kept_layers": KEPT, "by": "me"}
    assert len(seen) == len(load_file(out / "model.safetensors"))


def test_the_config_changes_in_nothing_but_the_layers(whole, tmp_path):
    """A config of transformers 4 keeps its keys, which 5 would write otherwise."""
    config = json.loads((whole / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    config |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32"}
    (whole / "config.json").write_text(json.dumps(config))
    out = prune_hf(whole, tmp_path / "cut", DROP)
    found = json.loads((out / "config.json").read_text())
    assert found == {**config, "num_hidden_layers": 4}


def test_names_may_lack_the_models_name(tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert "h.0.ln_1.weight" in tensors
    prune_hf(tmp_path / "whole", tmp_path / "cut", DROP)
    HFDecoder(model).keep_layers(KEPT)
    assert (logits(tmp_path / "cut") - HFDecoder(model).logits(TOKENS)).abs().max() < 1e-5


def test_every_dtype_goes_over_as_bytes(whole, tmp_path):
    path = whole / "model.safetensors"
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    out = load_file(prune_hf(whole, tmp_path / "cut", [0]) / "model.safetensors")
    name = "layers.{}.self_attn.q_proj.weight"
    assert torch.equal(
        out["model." + name.format(0)].view(torch.uint8),
        tensors["model." + name.format(1)].view(torch.uint8),
    )


def test_pruned_again_it_remembers_the_first_time(whole, tmp_path):
    prune_hf(whole, tmp_path / "one", [1])
    out = prune_hf(tmp_path / "one", tmp_path / "two", [3])
    record = json.loads((out / "pruning.json").read_text())
    assert record["source_pruning"]["removed_layers"] == [1]
    prune_hf(whole, tmp_path / "both", DROP)
    assert torch.equal(logits(out), logits(tmp_path / "both"))


def test_refusals(whole, tmp_path):
    out = tmp_path / "cut"
    with pytest.raises(ValueError, match=r"layers \[9\] do not exist; the model has 0..5"):
        prune_hf(whole, out, [9])
    with pytest.raises(FileExistsError, match="exists"):
        prune_hf(whole, whole, [1])
    with pytest.raises(FileNotFoundError, match="neither a directory nor a hub id"):
        prune_hf(tmp_path / "none", out, [1])
    path = whole / "model.safetensors"
    tensors = {n.replace("layers.5.", "layers.6."): t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"expected tensors of model.layers.0 to model.layers.5"):
        prune_hf(whole, out, [1])
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "model_type": "nothing"}))
    with pytest.raises(ValueError, match="is no causal model that can be pruned"):
        prune_hf(whole, out, [1])
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        prune_hf(whole, out, [1])
    assert not out.exists()


def test_mergekit_recipe():
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load(mergekit_recipe("a: b", [0, 1, 2, 5, 7, 8], dtype="float16"))
    ranges = [s["sources"][0]["layer_range"] for s in recipe["slices"]]
    assert ranges == [[0, 3], [5, 6], [7, 9]]
    assert {s["sources"][0]["model"] for s in recipe["slices"]} == {"a: b"}
    assert (recipe["merge_method"], recipe["dtype"]) == ("passthrough", "float16")
    with pytest.raises(ValueError, match=r"expected ascending .* got \[2, 1\]"):
        mergekit_recipe("a", [2, 1])
