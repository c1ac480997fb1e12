"""GGUF files for tests."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import BYTES

from llama.formats.names import GGUF, name_in


def write_gguf(path, model, *, arch="llama", tensors=(), drop=(), **fields):
    """A GGUF file of a Transformer in float32."""
    gguf = pytest.importorskip("gguf")
    writer, args = gguf.GGUFWriter(path, arch), model.params
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    for name, value in fields.items():
        writer.add_uint32(f"llama.{name}".replace("__", "."), value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", *BYTES[:-1], "ab"])
    writer.add_token_types([3, 3] + [1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for name, weight in model.state_dict().items():
        if name not in drop:
            writer.add_tensor(name_in(GGUF, name), weight.numpy())
    for name, weight in tensors:
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stack_file(path, arch="llama", layers=8, *, names=(), split=0, **fields):
    """A GGUF file of layers that hold one small tensor each, for what is said of layers.

    Args:
        path: the file.
        arch, layers: as it says.
        names: further tensors.
        split: tensors in each of several files; 0 is one file.
        fields: keys under the architecture, ``__`` for ``.``; a list, or a number.
    """
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(layers)
    writer.add_token_list([f"token{i}" for i in range(layers)])  # as many as there are layers
    for name, value in fields.items():
        key, add = f"{arch}.{name.replace('__', '.')}", writer.add_uint32
        if isinstance(value, list):
            add = writer.add_array
        elif isinstance(value, float):
            add = writer.add_float32
        add(key, value)
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    for i in range(layers):
        rows = np.random.default_rng(i).standard_normal((3, 32)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_0
        data = gguf.quants.quantize(rows, kind)
        writer.add_tensor(f"blk.{i}.ffn_down.weight", data, raw_dtype=kind)
        writer.add_tensor(f"blk.{i}.attn_norm.weight", rows[0, :7].copy())
    for name in names:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
