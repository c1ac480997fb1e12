"""Weights that are missing, unknown or of another shape: refused by name by every reader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import TEXT
from conftest import BYTE_VOCAB, make_transformer, refuses
from gguf_families import make, write_model
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file

from llama.formats.gguf import to_meta
from short_gpt import ShortHFModel
from short_gpt.models.decoder import is_finite
from short_gpt.wrappers.opening import open_model


@pytest.fixture(scope="module")
def made(llama_folders) -> Path:
    """A random Llama with a head of its own in every format."""
    (llama_folders / "book.txt").write_text(TEXT)
    return llama_folders


# what the message must hold, by kind of damage
SAID = {
    "layer": r"model\.layers\.4\.",
    "head": r"lm_head\.weight",
    "q_proj": r"model\.layers\.2\.self_attn\.q_proj\.weight",
    "embedding": r"model\.embed_tokens\.weight",
    "unexpected": r"model\.layers\.1\.self_attn\.q_proj\.bias",
    "shape": r"model\.layers\.3\.self_attn\.q_proj\.weight .*\[48, 32\]",
}


def damaged_hf(folder: Path, case: str, *, pickled: bool = False) -> None:
    """Rewrites the weights of ``hf`` with one kind of damage."""
    path = folder / "hf/model.safetensors"
    state = load_file(path)
    if case == "unexpected":
        state["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
    elif case == "shape":
        state["model.layers.3.self_attn.q_proj.weight"] = torch.zeros(48, 32)
    else:
        state = {name: weight for name, weight in state.items() if not re.match(SAID[case], name)}
    if pickled:
        path.unlink()
        torch.save(state, folder / "hf/pytorch_model.bin")
    else:
        save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", SAID)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_hugging_face_directory(here, case, pickled):
    damaged_hf(here, case, pickled=pickled)
    refuses(rf"hf cannot be loaded: its files .*{SAID[case]}", ShortHFModel, "hf")


def test_tied_and_known_keys_are_no_damage(here):
    """A head that is tied may be left out, and old files hold rotary frequencies."""
    path = here / "hf/model.safetensors"
    state = load_file(path)
    config = json.loads((here / "hf/config.json").read_text())
    (here / "hf/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    del state["lm_head.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, path, metadata={"format": "pt"})
    short = ShortHFModel("hf")
    assert torch.equal(short.model.lm_head.weight, state["model.embed_tokens.weight"])


GGUF = {
    "layer": (4, "blk.4.attn_k.weight|model.layers.4."),
    "q_proj": ("layers.2.attention.wq.weight", "blk.2.attn_q.weight|layers.2.self_attn.q_proj"),
    "embedding": ("tok_embeddings.weight", "token_embd.weight|model.embed_tokens.weight"),
    "none": (None, "no tensors|token_embd|layers"),
    "unexpected": ((), "blk.1.attn_q.bias"),
    "shape": ("layers.3.attention.wq.weight", "blk.3.attn_q.weight|layers.3.self_attn.q_proj"),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_file(made, tmp_path, case):
    model = make_transformer(vocab_size=BYTE_VOCAB)
    what, said = GGUF[case]
    names = set(model.state_dict())
    drop = {"layer": {n for n in names if n.startswith("layers.4.")}, "none": names}.get(case)
    extra = {
        "unexpected": [("blk.1.attn_q.bias", torch.zeros(32))],
        "shape": [("blk.3.attn_q.weight", torch.zeros(48, 32))],
    }.get(case, [])
    drop = {what} if drop is None else drop
    path = write_gguf(tmp_path / "m.gguf", model, drop=drop, tensors=extra)
    assert "m.gguf" in refuses(said, ShortHFModel, path)
    assert "m.gguf" in refuses(said, to_meta, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def qwen(path: Path, *extra: tuple[str, torch.Tensor]) -> Path:
    """A GGUF file of another architecture than llama, whose attention has biases."""
    model = make_transformer(vocab_size=BYTE_VOCAB)
    widths = {"q": 32, "k": 16, "v": 16}
    biases = [
        (f"blk.{i}.attn_{part}.bias", torch.ones(width))
        for i in range(5)
        for part, width in widths.items()
    ]
    return write_gguf(path, model, arch="qwen2", tensors=[*biases, *extra])


def test_a_gguf_file_of_another_architecture(tmp_path):
    assert ShortHFModel(qwen(tmp_path / "whole.gguf")).model.config.model_type == "qwen2"
    scales = [("blk.1.attn_output.scale", torch.ones(32)), ("blk.0.attn_sub.bias", torch.ones(32))]
    path = qwen(tmp_path / "m.gguf", *scales)
    said = r"m.gguf cannot be loaded: it holds blk.0.attn_sub.bias, blk.1.attn_output.scale, which"
    refuses(said, ShortHFModel, path)


@pytest.mark.parametrize("family", ["phi3", "qwen2"])
def test_kinds_of_layers_that_a_model_of_transformers_lacks(tmp_path, family):
    """Phi-3 has no kinds there; a Qwen 2 has, but none slides without a window in the file."""
    model, key = make(family), "attention.sliding_window_pattern"
    path = write_model(tmp_path / "m.gguf", family, model, **{key: [True, False] * 4})
    said = f"m.gguf cannot be loaded: {family}.{key} names layers with a sliding window, which"
    refuses(said, ShortHFModel, path)
    path = write_model(tmp_path / "n.gguf", family, model, **{key: [False] * 8})
    assert len(ShortHFModel(path).greedy([3, 4], 4)) == 4


@pytest.mark.parametrize(
    ("family", "period", "full"),
    [("gemma3", 3, [2, 5]), ("gemma3", 1, range(8)), ("gemma3", 0, []), ("gemma2", 4, [3, 7])],
)
def test_a_period_that_a_gguf_file_names_is_not_that_of_transformers(
    tmp_path, family, period, full
):
    model, key, found = make(family), "attention.sliding_window_pattern", []
    slides = [i not in full for i in range(8)]
    for name, said in (("m", {key: period}), ("n", {key: slides}), ("o", {})):
        short = ShortHFModel(write_model(tmp_path / f"{name}.gguf", family, model, **said))
        found.append(short.decoder.logits(torch.arange(3, 43)[None]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9000]), "its weights are cut off or"),
        (lambda path: path.write_bytes(b""), "its weights are cut off or damaged; fetch it again"),
        ({"hidden_act": "nope"}, "its config names 'nope', which is not known here"),
        ({"rope_parameters": {"rope_type": "zzz"}}, "its config names 'zzz', which is not known"),
    ],
)
def test_what_torch_and_transformers_say_is_told_in_other_words(here, spoil, said):
    if isinstance(spoil, dict):
        config = json.loads((here / "hf/config.json").read_text())
        (here / "hf/config.json").write_text(json.dumps(config | spoil))
    else:
        damaged_hf(here, "head", pickled=True)
        spoil(here / "hf/pytorch_model.bin")
    refuses(f"hf cannot be loaded: {said}", ShortHFModel, "hf")


@pytest.mark.parametrize("window", [["a"], [[1], [2]], [2**70, 1], [1.5, 2.0]])
def test_windows_of_anything_but_token_ids(here, window):
    for model in ("meta", "hf"):
        short = open_model(model, max_seq_len=16, device="cpu")
        refuses("expected a list of token ids", short.measure, [window], progress=False)


def test_weights_of_every_dtype_are_checked():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        weight = torch.ones(3).to(dtype)
        assert is_finite(weight)
        weight[1] = torch.nan
        assert not is_finite(weight)
        assert is_finite(torch.full((9,), torch.finfo(dtype).max).to(dtype))  # whose sum is not
    assert not is_finite(torch.tensor([torch.inf, -torch.inf]))
    assert is_finite(torch.ones(3, dtype=torch.uint8))  # of a quantization
