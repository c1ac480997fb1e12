"""What the formats call the same things: one table of weight names, and params.json's keys."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

from torch import Tensor

from llama.args import ModelArgs
from llama.errors import InputError
from llama.files import JsonObject

# The names of a weight in Meta's, Hugging Face's and GGUF's format; {} is the layer.
META, HF, GGUF = range(3)
NAMES = (
    ("tok_embeddings.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "model.norm.weight", "output_norm.weight"),
    ("output.weight", "lm_head.weight", "output.weight"),
    *(
        (f"layers.{{}}.{meta}.weight", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight")
        for meta, hf, gguf in (
            ("attention.wq", "self_attn.q_proj", "attn_q"),
            ("attention.wk", "self_attn.k_proj", "attn_k"),
            ("attention.wv", "self_attn.v_proj", "attn_v"),
            ("attention.wo", "self_attn.o_proj", "attn_output"),
            ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
            ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
            ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
            ("attention_norm", "input_layernorm", "attn_norm"),
            ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
        )
    ),
)


def name_in(column: int, meta_name: str) -> str:
    """The name of Meta's weight in another column of `NAMES`."""
    number = re.match(r"layers\.(\d+)\.", meta_name)
    template = re.sub(r"^layers\.\d+\.", "layers.{}.", meta_name)
    row = next(row for row in NAMES if row[META] == template)
    return row[column].format(number[1] if number else "")


def permute(meta_name: str, weight: Tensor, args: ModelArgs, *, to: int) -> Tensor:
    """Rows of wq and wk, (H hd, D), in the order of `HF` or `META`; other weights as they are.

    Meta rotates the neighbours (2i, 2i + 1) of a head, Hugging Face i and i + hd / 2.
    """
    heads = {"wq": args.n_heads, "wk": args.kv_heads}.get(meta_name.split(".")[-2])
    return weight if heads is None else permute_rows(weight, heads, to_neighbours=to == META)


def permute_rows(weight: Tensor, heads: int, *, to_neighbours: bool) -> Tensor:
    """Rows of heads, (H hd, ...), from one order of rotated pairs to the other.

    Pairs (i, i + hd / 2) become the neighbours (2i, 2i + 1), Meta's and GGUF's order of a Llama,
    or with ``to_neighbours`` False the reverse.
    """
    # (H hd, ...) -> (H, 2, hd / 2, ...) or (H, hd / 2, 2, ...); the inner axes are transposed
    pairs = (2, -1) if to_neighbours else (-1, 2)
    return weight.unflatten(0, (heads, *pairs)).transpose(1, 2).flatten(0, 2)


def check_tensors(source: Path, have: Set[str], needed: Set[str], *, ignored: Set[str]) -> None:
    """Raises InputError unless a source has all needed tensors and no others, such as biases."""
    missing, unknown = sorted(needed - have), sorted(have - needed - ignored)
    problem = f"no plain Llama: it lacks tensors {missing[:3]} and has others {unknown[:3]}"
    if missing or unknown:
        raise InputError(f"{source} is {problem}")


def params_json(args: ModelArgs) -> JsonObject:
    """The content of a ``params.json`` for these arguments; keys of no effect are left out."""
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"]
    names += ["ffn_dim_multiplier", "norm_eps", "rope_theta"]
    if args.use_scaled_rope:
        names += ["use_scaled_rope", "rope_scaling_factor"]
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def ffn_keys(dim: int, width: int) -> JsonObject:
    """``multiple_of`` (and ``ffn_dim_multiplier``) with which a feed-forward layer is so wide."""
    for multiple_of in (256, 1024, 4096):
        if ModelArgs(dim=dim, multiple_of=multiple_of).ffn_dim == width:
            return {"multiple_of": multiple_of}
    multiplier = (width + 0.5) / int(2 * (4 * dim) / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
