"""The names of a layer's parts: one row a family, by ``model_type`` of its config or "meta".

A family without a row is read through all rows: whatever known name a layer has is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from torch import nn

Names = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The names of a family's parts, all relative to one of its layers except the first.

    An entry has several names where layers are of several kinds, and none where there is no such
    part. The defaults are those of Llama in transformers, which most families share.
    """

    layers: Names = ("model.layers",)  # paths of the list inside the causal language model
    attention: Names = ("self_attn",)  # the sublayer
    attention_output: Names = ("self_attn.o_proj",)  # its output projection
    mlp: Names = ("mlp",)  # the sublayer
    mlp_output: Names = ("mlp.down_proj",)  # its output projection
    lora: Names = ("gate_proj", "up_proj", "down_proj")  # ends of the MLP's matrices' names
    attention_norm_after: Names = ()  # through which the attention's output joins the stream
    mlp_norm_after: Names = ()  # the same of the MLP
    # whether it reads windows without bos badly, because its texts in training had it
    needs_bos: bool = field(default=False, kw_only=True)


LLAMA = Family()
# Experts are one tensor, or one module each: no linear map ends them.
EXPERTS = Family(mlp=("mlp", "block_sparse_moe"), mlp_output=(), lora=("w1", "w2", "w3"))
# Norms stand after both sublayers: no matrix writes a residual branch by itself.
POST_NORM = Family(
    attention_norm_after=("post_attention_layernorm",),
    mlp_norm_after=("post_feedforward_layernorm",),
)
GEMMA = replace(POST_NORM, needs_bos=True)
BLOOM = Family(
    layers=("transformer.h",),
    attention=("self_attention",),
    attention_output=("self_attention.dense",),
    mlp_output=("mlp.dense_4h_to_h",),
    lora=("dense_h_to_4h", "dense_4h_to_h"),
)
GPT2 = Family(
    layers=("transformer.h",),
    attention=("attn",),
    attention_output=("attn.c_proj",),
    mlp_output=("mlp.c_proj",),
    lora=("mlp.c_fc", "mlp.c_proj"),
)
GPTJ = replace(
    GPT2, attention_output=("attn.out_proj",), mlp_output=("mlp.fc_out",), lora=("fc_in", "fc_out")
)
# Attention or a linear attention, which end in maps of two names.
LINEAR = replace(LLAMA, attention_output=("self_attn.o_proj", "linear_attn.out_proj"))
# Attention or Mamba, then an MLP or experts.
JAMBA = Family(
    attention_output=("self_attn.o_proj", "mamba.out_proj"),
    mlp=("feed_forward",),
    mlp_output=("feed_forward.down_proj",),
)
# The mixer is a layer's only sublayer, and solved as an MLP is.
MAMBA = Family(
    layers=("backbone.layers",),
    attention=(),
    attention_output=(),
    mlp=(),
    mlp_output=("mixer.out_proj",),
    lora=(),
)
# Attention or a convolution, then an MLP or experts.
LFM2 = Family(
    attention_output=("self_attn.out_proj", "conv.out_proj"),
    mlp=("feed_forward",),
    mlp_output=("feed_forward.w2",),
    lora=("w1", "w2", "w3"),
)

# By model_type. Of several names that a layer of an unknown family has, the first in this order
# is taken.
FAMILIES: dict[str, Family] = {
    "meta": Family(
        layers=("layers",),
        attention=("attention",),
        attention_output=("attention.wo",),
        mlp=("feed_forward",),
        mlp_output=("feed_forward.w2",),
        lora=(),  # trained as a model of transformers only
    ),
    # of gemma3n several states a layer, which are not scored
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma"), GEMMA),
    "gemma": Family(needs_bos=True),
    "recurrent_gemma": Family(
        attention=("temporal_block",),
        attention_output=("temporal_block.o_proj", "temporal_block.linear_out"),
        mlp=("mlp_block",),
        mlp_output=("mlp_block.down_proj",),
        needs_bos=True,
    ),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3"), LLAMA),
    **dict.fromkeys(("cohere", "cohere2", "deepseek_v3", "granite", "stablelm"), LLAMA),
    "mixtral": EXPERTS,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    "jamba": JAMBA,
    "bamba": JAMBA,
    "falcon_h1": replace(JAMBA, attention_output=()),  # both at once
    "granitemoehybrid": replace(
        JAMBA,
        mlp=("shared_mlp",),  # beside experts, or alone
        mlp_output=("shared_mlp.output_linear",),
        lora=("input_linear", "output_linear"),
    ),
    "nemotron_h": replace(
        MAMBA,
        layers=("model.layers",),
        mlp_output=("mixer.down_proj", "mixer.o_proj", "mixer.out_proj"),
    ),
    "gpt_oss": Family(mlp_output=(), lora=()),  # experts in one tensor
    "glm4": replace(
        LLAMA,
        attention_norm_after=("post_self_attn_layernorm",),
        mlp_norm_after=("post_mlp_layernorm",),
        lora=("gate_up_proj", "down_proj"),
    ),
    "olmo2": POST_NORM,  # norms after both sublayers only
    "phi3": Family(lora=("gate_up_proj", "down_proj")),
    "starcoder2": Family(mlp_output=("mlp.c_proj",), lora=("mlp.c_fc", "mlp.c_proj")),
    "phi": Family(
        attention_output=("self_attn.dense",), mlp_output=("mlp.fc2",), lora=("fc1", "fc2")
    ),
    "opt": Family(
        layers=("model.decoder.layers",),
        attention_output=("self_attn.out_proj",),
        mlp=(),  # two maps of the layer itself
        mlp_output=("fc2",),
        lora=("fc1", "fc2"),
    ),
    "llama4_text": Family(mlp=("feed_forward",), mlp_output=("feed_forward.down_proj",)),
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "lfm3": replace(
        LFM2,
        attention_output=("self_attn.o_proj", "conv.out_proj"),
        attention_norm_after=("post_operator_norm",),
        mlp_norm_after=("post_ffn_norm",),
    ),
    "gpt2": GPT2,
    "gpt_neo": replace(GPT2, attention_output=("attn.attention.out_proj",)),
    "gptj": GPTJ,
    "codegen": GPTJ,
    # Qwen of 2023, whose code comes with the weights
    "qwen": replace(GPT2, lora=("w1", "w2", "mlp.c_proj")),
    "gpt_neox": replace(
        BLOOM,
        layers=("gpt_neox.layers",),
        attention=("attention",),
        attention_output=("attention.dense",),
    ),
    "falcon": BLOOM,
    "bloom": BLOOM,
    "mpt": replace(
        BLOOM,
        layers=("transformer.blocks",),
        attention=("attn",),
        attention_output=("attn.out_proj",),
        mlp=("ffn",),
        mlp_output=("ffn.down_proj",),
        lora=("up_proj", "down_proj"),
    ),
    "rwkv": Family(
        layers=("rwkv.blocks",),
        attention=("attention",),
        attention_output=("attention.output",),
        mlp=("feed_forward",),  # a gate ends it, and no map
        mlp_output=(),
        lora=(),
    ),
    "xlstm": Family(
        layers=("backbone.blocks",),
        attention=("mlstm_layer",),
        attention_output=("mlstm_layer.out_proj",),
        mlp=("ffn",),
        mlp_output=("ffn.proj_down",),
        lora=("proj_up_gate", "proj_up", "proj_down"),
    ),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), MAMBA),
}

META = FAMILIES["meta"]
# All rows in one: every name once, in the table's order.
ANY = Family(
    *(
        tuple(dict.fromkeys(n for row in FAMILIES.values() for n in getattr(row, entry.name)))
        for entry in fields(Family)
        if entry.name != "needs_bos"
    )
)


def family_of(model_type: str | None) -> Family:
    """The row of a family; `ANY`, which recognises parts by all known names, where there is none.

    Example:
        >>> family_of("gpt2").attention_output
        ('attn.c_proj',)
    """
    return FAMILIES.get(model_type or "", ANY)


def part(layer: nn.Module, names: Names) -> nn.Module | None:
    """The first part of a layer that has one of these names; None if there is none."""
    return next(iter(_parts(layer, names)), None)


def only_part(layer: nn.Module, names: Names) -> nn.Module | None:
    """The same, and None also where several parts have such a name."""
    parts = _parts(layer, names)
    return parts[0] if len(parts) == 1 else None


def _parts(layer: nn.Module, names: Names) -> list[nn.Module]:
    modules = dict(layer.named_modules())
    return [modules[name] for name in names if name in modules]
