"""The size of a model, told by its files before anything is loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from conftest import make_transformer, save_checkpoint

from llama.args import ModelArgs
from llama.checkpoint.sharding import full_shapes
from short_gpt import ShortGPTError
from short_gpt.models.config_file import shape_of

CONFIG = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
CONFIG |= {"num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
SEVEN = (4096, 32, 32000, 32, 32, 11008)


def hf(folder: Path, **changes: object) -> str:
    folder.mkdir()
    content = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def sizes(args: ModelArgs) -> tuple[int, ...]:
    heads = args.n_heads, args.kv_heads
    return args.dim, args.n_layers, args.vocab_size, *heads, args.ffn_dim


def parameters(args: ModelArgs) -> int:
    return sum(map(math.prod, full_shapes(args).values()))


def test_the_parameters_are_the_published_numbers(tmp_path):
    large = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
    grouped = {"vocab_size": 128256, "num_key_value_heads": 8, "intermediate_size": 14336}
    assert parameters(shape_of(hf(tmp_path / "7"))) == 6_738_415_616
    large["intermediate_size"] = 13824
    assert parameters(shape_of(hf(tmp_path / "13", **large))) == 13_015_864_320
    assert parameters(shape_of(hf(tmp_path / "8", **grouped))) == 8_030_261_248


@pytest.mark.parametrize("wide", [11008, 1536, 9999])
def test_a_config_says_the_shape(tmp_path, wide):
    assert sizes(shape_of(hf(tmp_path / "a", intermediate_size=wide))) == (*SEVEN[:-1], wide)
    assert shape_of(hf(tmp_path / "b", num_key_value_heads=8)).kv_heads == 8


def test_a_meta_directory_says_the_shape(tmp_path):
    folder = save_checkpoint(tmp_path / "meta", make_transformer())
    found, model = shape_of(str(folder)), make_transformer()
    assert sizes(found) == (32, 5, 96, 4, 2, 96)
    assert parameters(found) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nothing"}, "other cannot be loaded: "),
        (
            {"model_type": "gpt2", "intermediate_size": None, "vocab_size": 60_000},
            "model_type = .gpt2.: expected a Llama, with .*intermediate_size",
        ),
    ],
)
def test_what_says_none_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ShortGPTError, match=message):
        shape_of(hf(tmp_path / "other", **changes))


def test_gguf_files_and_what_is_not_there_are_refused_by_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ShortGPTError, match="format of the model = .gguf.: expected Meta"):
        shape_of(str(tmp_path / "model.gguf"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        shape_of(str(tmp_path / "nowhere"))
    with pytest.raises(ConnectionError, match="owner/name is not a directory here, and the hub"):
        shape_of("owner/name")
