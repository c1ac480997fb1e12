"""Weights of transformers' Llama in ours, by a table of this file alone."""

from __future__ import annotations

from torch import Tensor
from transformers import LlamaForCausalLM

from llama.args import ModelArgs
from llama.model import Transformer


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk from halves (transformers) to neighbours (Meta)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def from_transformers(hf: LlamaForCausalLM, params: dict[str, object]) -> Transformer:
    """Our model with the weights of transformers' model."""
    args = ModelArgs.from_params(params, max_seq_len=64, max_batch_size=4)
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    theirs = hf.state_dict()
    state = {
        "tok_embeddings.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "output.weight": theirs["lm_head.weight"],
    }
    for i in range(args.n_layers):
        prefix = f"model.layers.{i}."
        for ours, name in names.items():
            state[f"layers.{i}.{ours}.weight"] = theirs[f"{prefix}{name}.weight"]
        for ours, name, heads in (
            ("wq", "q_proj", args.n_heads),
            ("wk", "k_proj", args.kv_heads),
        ):
            weight = theirs[f"{prefix}self_attn.{name}.weight"]
            state[f"layers.{i}.attention.{ours}.weight"] = permuted(weight, heads)
    model = Transformer(args)
    model.load_state_dict(state)
    return model.eval()
