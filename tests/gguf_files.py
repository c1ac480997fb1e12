"""GGUF files for tests."""

from __future__ import annotations

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
