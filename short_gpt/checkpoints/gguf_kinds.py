"""How llama.cpp tells the kinds of layers, by key or by position, and what it cannot be told.

The names are GGUF's: of architectures, and of the keys under them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
FIRST_STAY = ("n_deepstack_layers",)  # the first so many layers take something from outside

# By architecture, where a layer's kind follows from its position and llama.cpp's code has the
# period: layers i with i % period == phase differ from the others.
PERIODIC: dict[str, tuple[int, int]] = {
    "gpt-oss": (2, 1),
    "gemma2": (2, 1),
    "gemma3": (6, 5),
    "gemma3n": (5, 4),
    "cohere2": (4, 3),
    "cohere2moe": (4, 0),
    "exaone-moe": (4, 3),
    "olmo2": (4, 3),
    "afmoe": (4, 3),
    "laguna": (4, 0),
    "llama4": (4, 3),
    "mellum": (4, 3),
    "plamo3": (8, 7),
    "qwen3next": (4, 3),
    "qwen35": (4, 3),
    "qwen35moe": (4, 3),
    "smallthinker": (4, 0),
    "smollm3": (4, 3),
}
# Of these only with a window: without the key all their layers are of one kind.
WITH_WINDOW = ("gemma3", "olmo2", "afmoe", "mellum", "smallthinker")
# llama.cpp since its pull request 29042 (September 2026) takes a list of kinds from the file, seen
# to work for these; before, it dropped the list without a word and went by the position.
READS_PATTERN = ("cohere2", "gemma2", "gemma3", "gpt-oss", "olmo2")
# llama.cpp computes otherwise for another number of layers.
BY_COUNT = ("baichuan", "deepseek2", "deepseek32", "minicpm", "minicpm3")
# Of so many layers they are others: of 27B, with another scale of attention; with a window.
COUNTS = {"gemma2": 46, "gemma3": 62, "exaone4": 64}
FROM_FIRST = ("rwkv7", "arwkv7")  # later layers take values of the first


def near_sets(
    wanted: Sequence[int], count: int, period: int, fits: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """Sets of layers near those wanted, whose removal leaves every other its place in the period.

    Args:
        wanted: layers that were to go.
        count: of all layers.
        period: after how many of them kinds repeat.
        fits: whether the layers that stay would be what they are.

    Returns:
        At most two sets: of no more layers than wanted, and of more; fewer where none fits.

    Example:
        >>> near_sets([3], 8, 2, lambda keep: all((n - i) % 2 == 0 for n, i in enumerate(keep)))
        [[2, 3]]
    """
    sets: list[list[int]] = []
    for runs in sorted({len(wanted) // period, -(-len(wanted) // period)} - {0}):
        left, gone = list(range(count)), []
        for _ in range(runs):
            starts = range(len(left) - period + 1)
            if not starts:
                break
            # as many as there are of those wanted; of equal ones the first
            best = max(starts, key=lambda s: len({*left[s : s + period]} & {*wanted}))
            gone += left[best : best + period]
            del left[best : best + period]
        if left and len(gone) == runs * period and fits(left):
            sets.append(sorted(gone))
    return sets


def ordinal(number: int) -> str:
    """A number in a sentence: ``"second"``, ``"6th"``."""
    return {2: "second", 3: "third"}.get(number, f"{number}th")
