"""The architectures of GGUF files: a row for each, by llama.cpp's name.

A row says which layers can be removed, whether changed weights can be written back, and what
transformers gets wrong. Without a row all layers are alike: any can be removed, none be healed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp and transformers make of a file of this architecture."""

    # Layers i with i % every == at are of another kind: (every, at), from llama.cpp's code.
    period: tuple[int, int] | None = None
    # Only with a window: without the key all layers are of one kind.
    needs_window: bool = False
    # llama.cpp since September 2026 (https://github.com/ggml-org/llama.cpp/pull/29042) takes a list
    # of kinds from the file, seen to work here; before, it ignored the list.
    reads_list: bool = False
    # llama.cpp takes the kinds from a list alone; what it makes of one number changed.
    needs_list: bool = False
    # llama.cpp aborts where all layers have a sliding window, as it does where none has.
    needs_both_kinds: bool = False
    # llama.cpp computes otherwise for another number of layers.
    by_count: bool = False
    # Of so many layers it is another variant: of 27B, with another scale of attention; with a
    # window.
    variant: int | None = None
    # Later layers take values of the first.
    reads_first: bool = False

    # Changed weights can be written: they are in transformers as in the file, except that
    healed: bool = False
    # a file has rows of queries and keys in the order of Meta's format,
    permuted: bool = False
    # and norms plus one.
    norms_plus_one: bool = False

    # One number for the kinds is a period, whose last layer has no window; transformers has its own
    # period.
    period_in_file: bool = False
    # llama.cpp derives the scale of attention from sizes and `variant`; transformers has a default.
    scaled_by_size: bool = False
    # transformers knows its rotary positions, whatever the file says.
    own_rotary: bool = False


ALIKE = Architecture()
EVERY_4TH = Architecture((4, 3))
LISTED = Architecture(needs_list=True)
COUNTED = Architecture(by_count=True)
GEMMA = Architecture(
    reads_list=True, healed=True, norms_plus_one=True, period_in_file=True, scaled_by_size=True
)

ARCHITECTURES: dict[str, Architecture] = {
    "afmoe": Architecture((4, 3), needs_window=True),
    "arwkv7": Architecture(reads_first=True),
    "baichuan": COUNTED,
    "cohere2": Architecture((4, 3), reads_list=True),
    "cohere2moe": Architecture((4, 0)),
    "deepseek2": COUNTED,
    "deepseek32": COUNTED,
    "dots3note": LISTED,
    "exaone-moe": EVERY_4TH,
    "exaone4": Architecture((4, 3), needs_window=True, variant=64),
    "gemma-embedding": Architecture((6, 5), reads_list=True, needs_both_kinds=True),
    "gemma-embedding2": Architecture((6, 5)),
    "gemma2": replace(GEMMA, period=(2, 1), variant=46),
    "gemma3": replace(GEMMA, period=(6, 5), needs_window=True, variant=62),
    "gemma3n": Architecture((5, 4)),
    "gemma4": Architecture(needs_list=True, own_rotary=True),
    "gemma4-assistant": LISTED,
    "gpt-oss": Architecture((2, 1), reads_list=True, period_in_file=True, own_rotary=True),
    "granite_swa": LISTED,
    "laguna": Architecture((4, 0)),
    "llama": Architecture(healed=True, permuted=True),
    "llama4": EVERY_4TH,
    "maple": LISTED,
    "mellum": Architecture((4, 3), needs_window=True),
    "mimo2": LISTED,
    "minicpm": COUNTED,
    "minicpm3": COUNTED,
    "modern-bert": Architecture((3, 0), needs_window=True, reads_list=True, needs_both_kinds=True),
    "muse-glimmer": Architecture((4, 3), reads_list=True),
    "olmo2": Architecture((4, 3), needs_window=True, reads_list=True, healed=True),
    "onyx": EVERY_4TH,
    "phi3": Architecture(healed=True),
    "plamo3": Architecture((8, 7)),
    "qwen2": Architecture(healed=True),
    "qwen3": Architecture(healed=True),
    "qwen35": EVERY_4TH,
    "qwen35moe": EVERY_4TH,
    "qwen3next": EVERY_4TH,
    "rwkv7": Architecture(reads_first=True),
    "smallthinker": Architecture((4, 0), needs_window=True),
    "smollm3": EVERY_4TH,
    "spark2_5": LISTED,
    "starcoder2": Architecture(healed=True),
    "step35": LISTED,
}


def architecture(name: str) -> Architecture:
    """The row of an architecture; a variant of one that counts its layers has that one's."""
    counted = (
        row for known, row in ARCHITECTURES.items() if row.by_count and name.startswith(known)
    )
    return ARCHITECTURES.get(name) or next(counted, ALIKE)
