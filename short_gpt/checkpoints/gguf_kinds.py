"""How llama.cpp decides the kinds of layers, by key or by position, and what no key can say.

The names are GGUF's: of architectures, and of the keys under them.
"""

from __future__ import annotations

from short_gpt.models.gguf_loading import ATTENTION_SCALED

PATTERN = "attention.sliding_window_pattern"
# Lists whose length may be that of the layers by chance, and that say nothing of layers.
NOT_OF_LAYERS = ("rope.dimension_sections", "classifier.output_labels", "rope.scaling.factors")
# Numbers of layers, or what is built in the order of layers: known to no rule here.
NUMBERED = (
    *("attention.shared_kv_layers", "rescale_every_n_layers", "decoder_block_count"),
    *("hash_layer_count", "num_loops", "attn_res.block_size", "hrm.layers_per_stack"),
    *("ple.layers", "target_layers", "deepstack_mapping", "decision.block_count"),
)
# Every so many layers there is another kind; which of them, llama.cpp's code says.
PERIODS = ("full_attention_interval", "moe_every_n_layers", "interleave_moe_layer_step")

# By architecture, where a layer's kind follows from its position and llama.cpp's code has the
# period: layers i with i % period == phase differ from the others.
PERIODIC: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("gpt-oss", "gemma2"), (2, 1)),
    **dict.fromkeys(("gemma3", "gemma-embedding", "gemma-embedding2"), (6, 5)),
    **dict.fromkeys(("cohere2moe", "laguna", "smallthinker"), (4, 0)),
    **dict.fromkeys(("cohere2", "exaone-moe", "exaone4", "muse-glimmer", "onyx", "olmo2"), (4, 3)),
    **dict.fromkeys(("afmoe", "llama4", "mellum", "qwen3next", "qwen35", "qwen35moe"), (4, 3)),
    "smollm3": (4, 3),
    "gemma3n": (5, 4),
    "modern-bert": (3, 0),
    "plamo3": (8, 7),
}
# Of these only with a window: without the key all their layers are of one kind.
WITH_WINDOW = ("gemma3", "olmo2", "afmoe", "exaone4", "mellum", "modern-bert", "smallthinker")
# llama.cpp takes the kinds of these from a list alone; what it makes of one number changed.
BY_LIST = (
    *("dots3note", "gemma4", "gemma4-assistant", "granite_swa", "maple", "mimo2"),
    *("spark2_5", "step35"),
)
# llama.cpp since September 2026 (https://github.com/ggml-org/llama.cpp/pull/29042) takes a list of
# kinds from the file, seen to work for these; before, it ignored the list and went by the position.
READS_PATTERN = (
    *("cohere2", "gemma2", "gemma3", "gemma-embedding", "gpt-oss", "modern-bert"),
    *("muse-glimmer", "olmo2"),
)
# llama.cpp aborts where no layer has a sliding window, and of these also where all have one.
BOTH_KINDS = ("gemma-embedding", "modern-bert")
# llama.cpp computes otherwise for another number of layers.
BY_COUNT = ("baichuan", "deepseek2", "deepseek32", "minicpm", "minicpm3")
# Of so many layers they are others: of 27B, with another scale of attention; with a window.
COUNTS = {**ATTENTION_SCALED, "exaone4": 64}
FROM_FIRST = ("rwkv7", "arwkv7")  # later layers take values of the first
