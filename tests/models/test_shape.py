"""The size of a model, told by its files before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_transformer, refuses, save_checkpoint

from short_gpt.models.loading import shape_of

CONFIG = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
CONFIG |= {"num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}


def hf(folder: Path, **changes: object) -> str:
    folder.mkdir()
    content = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("grouped", [None, 8])
def test_a_config_says_the_shape(tmp_path, grouped):
    found = shape_of(hf(tmp_path / "a", num_key_value_heads=grouped))
    assert (found.dim, found.n_layers, found.vocab_size) == (4096, 32, 32000)
    assert (found.n_heads, found.kv_heads) == (32, grouped or 32)


def test_a_meta_directory_says_the_shape(tmp_path):
    found = shape_of(str(save_checkpoint(tmp_path / "meta", make_transformer())))
    assert (found.dim, found.n_layers, found.vocab_size) == (32, 5, 96)
    assert (found.n_heads, found.kv_heads) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing"}, "other cannot be loaded: "),
        (
            {"model_type": "mamba", "num_attention_heads": None},
            "model_type = .mamba.: expected a Llama, with .*num_attention_heads",
        ),
    ],
)
def test_what_says_none_is_refused_by_name(tmp_path, changes, message):
    refuses(message, shape_of, hf(tmp_path / "other", **changes))


def test_gguf_files_and_what_is_not_there_are_refused_by_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuses("format of the model = .gguf.: expected Meta", shape_of, str(tmp_path / "model.gguf"))
    refuses("nowhere does not exist", shape_of, str(tmp_path / "nowhere"), error=FileNotFoundError)
    refuses("owner/name is not a directory here", shape_of, "owner/name", error=ConnectionError)
