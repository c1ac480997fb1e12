"""GGUF files for tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from conftest import BYTES
from gguf_families import add_keys, finished, write_tokenizer

from llama.formats.gguf_read import GGUFParts
from llama.formats.gguf_write import Stored, copied, packed, writable, write_again
from llama.formats.hf import GGUF, name_in


def write_gguf(path, model, *, arch="llama", tensors=(), drop=(), **fields):
    """A GGUF file of a Transformer in float32."""
    writer, args = gguf.GGUFWriter(path, arch), model.params
    keys = {"embedding_length": args.dim, "block_count": args.n_layers}
    keys |= {"attention.head_count": args.n_heads, "attention.head_count_kv": args.kv_heads}
    keys |= {"feed_forward_length": args.ffn_dim, "rope.freq_base": float(args.rope_theta)}
    keys |= {"attention.layer_norm_rms_epsilon": args.norm_eps}
    add_keys(writer, arch, keys)
    add_keys(writer, "llama", fields)
    write_tokenizer(writer, [*BYTES[:-1], "ab"])
    for name, weight in model.state_dict().items():
        if name not in drop:
            writer.add_tensor(name_in(GGUF, name), weight.numpy())
    for name, weight in tensors:
        writer.add_tensor(name, weight.numpy())
    return finished(writer, path)


def data(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, by name."""
    parts = GGUFParts(path)
    return {name: b"".join(parts.chunks(name)) for name in parts.tensors}


def in_types(path: Path, out: Path, kinds: dict[str, int]) -> Path:
    """A copy whose tensors with such names are of other types; of Q3_K only zeros are made."""
    parts = GGUFParts(path)

    def other(name: str) -> Stored:
        kind = next((k for part, k in kinds.items() if part in name), None)
        if kind is None:
            return copied(parts, name)
        shape = parts.tensors[name].shape
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        content = bytes(int(np.prod(shape)) // block * size)
        if writable(kind, shape) == kind:
            content = packed(name, parts.read(name), kind)
        return Stored(shape, kind, len(content), lambda: [content])

    write_again(out, parts, {name: other(name) for name in parts.tensors})
    return out


def layers_file(path, arch, *, identity=(), layers=8, **fields):
    """A GGUF file of random layers with windows of 8 tokens, for llama.cpp.

    Args:
        path: the file.
        arch: "gemma-embedding", "modern-bert" or "muse-glimmer".
        identity: layers whose output projections are zero: without them the model is the same.
        layers: how many.
        fields: numbers under the architecture, ``__`` for ``.``.
    """
    writer, random = gguf.GGUFWriter(path, arch), np.random.default_rng(0)
    bert, embeds = arch == "modern-bert", arch != "muse-glimmer"
    width, ffn, heads, head = 64, 96, 4, 16
    fields = {"context_length": 128, "embedding_length": width, "block_count": layers, **fields}
    fields |= {"feed_forward_length": ffn, "attention.head_count": heads}
    fields |= {"attention.head_count_kv": heads if bert else 2, "attention.sliding_window": 8}
    fields |= {"attention.key_length": head, "attention.value_length": head, "vocab_size": 258}
    fields |= {"attention.layer_norm_rms_epsilon": 1e-6, "attention.layer_norm_epsilon": 1e-5}
    fields |= {"rope.freq_base": 1e4, "rope.freq_base_swa": 1e3, "logit_scale": 0.5}
    add_keys(writer, arch, fields | ({"pooling_type": 1} if embeds else {}))
    if bert:
        writer.add_causal_attention(False)

    def add_matrix(name, *shape, scale=0.3):
        data = random.standard_normal(shape) * scale
        writer.add_tensor(f"{name}.weight", data.astype(np.float32))

    def add_norms(*names, size=width):
        for name in names:
            data = 1 + random.standard_normal(size) * 0.1
            writer.add_tensor(f"{name}.weight", data.astype(np.float32))

    add_matrix("token_embd", 258, width)
    add_norms("output_norm", *["token_embd_norm"] * bert)
    if not embeds:
        add_matrix("output", 258, width)
    for i in range(layers):
        block, scale = f"blk.{i}", 0.0 if i in identity else 0.3
        add_matrix(f"{block}.attn_output", width, width, scale=scale)
        add_matrix(f"{block}.ffn_down", width, ffn, scale=scale)
        add_matrix(f"{block}.ffn_up", 2 * ffn if bert else ffn, width)
        add_norms(*[f"{block}.attn_norm"] * (not bert or i > 0), f"{block}.ffn_norm")
        if bert:
            add_matrix(f"{block}.attn_qkv", 3 * width, width)
            continue
        for name, rows in (("q", heads * head), ("k", 2 * head), ("v", 2 * head)):
            add_matrix(f"{block}.attn_{name}", rows, width)
        add_matrix(f"{block}.ffn_gate", ffn, width)
        add_norms(f"{block}.post_attention_norm", f"{block}.post_ffw_norm")
        add_norms(f"{block}.attn_q_norm", f"{block}.attn_k_norm", size=head)
        if not embeds:
            add_matrix(f"{block}.attn_gate", width, width)
    write_tokenizer(writer)
    return finished(writer, path)


def stack_file(path, arch="llama", layers=8, *, names=(), drop=(), split=0, **fields):
    """A GGUF file of layers that hold one small tensor each, for what is said of layers.

    Args:
        path: the file.
        arch, layers: as it says.
        names: further tensors.
        drop: tensors that are left out.
        split: tensors in each of several files; 0 is one file.
        fields: keys under the architecture, ``__`` for ``.``; a list, a text or a number.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(layers)
    writer.add_token_list([f"token{i}" for i in range(layers)])  # as many as there are layers
    add_keys(writer, arch, fields)

    def add_tensor(name, data, **kind):
        if name not in drop:
            writer.add_tensor(name, data, **kind)

    add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    add_tensor("output_norm.weight", np.ones(8, np.float32))
    for i in range(layers):
        rows = np.random.default_rng(i).standard_normal((3, 32)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_0
        data = gguf.quants.quantize(rows, kind)
        add_tensor(f"blk.{i}.ffn_down.weight", data, raw_dtype=kind)
        add_tensor(f"blk.{i}.attn_norm.weight", rows[0, :7].copy())
    for name in names:
        add_tensor(name, np.ones(4, np.float32))
    return finished(writer, path)
