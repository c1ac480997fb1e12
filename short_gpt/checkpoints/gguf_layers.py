"""A GGUF file's metadata on its layers, and what must change in it with fewer of them.

A layer's kind follows from a key or, in llama.cpp's code, from its position. A kept layer must keep
its kind. If no key can say so, the removal is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from llama.errors import check_file
from llama.formats.gguf_read import ARRAY, GGUFParts, Record
from llama.formats.gguf_write import BOOL, record
from short_gpt.models.gguf_architectures import architecture
from short_gpt.models.gguf_loading import PATTERN
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Tensors that hold something of every layer, or layers of another stack, without its number.
OTHER_LAYERS = re.compile(r"per_layer_.+|(.+\.)?(blk|layers?|block)\.\d+\..+")
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


class Stack(GGUFParts):
    """A GGUF model as layers; ShortGPTError where they are not, all of them, numbered."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        super().__init__(Path(str(source)))
        arch = self.get("general.architecture")
        blocks = self.get(f"{arch}.block_count")
        extra = self.get(f"{arch}.nextn_predict_layers") or 0
        if not isinstance(arch, str) or type(blocks) is not int or type(extra) is not int:
            raise ShortGPTError(
                f"{self.path} holds architecture {arch!r} of {blocks!r} layers, expected a "
                "language model"
            )
        numbers = {int(match[1]) for name in self.tensors if (match := LAYER.fullmatch(name))}
        complete = numbers == set(range(blocks))
        check_file(complete, self.path, f"it has {len(numbers)} of {blocks} layers")
        others = [n for n in self.tensors if not LAYER.fullmatch(n) and OTHER_LAYERS.fullmatch(n)]
        if others or not 0 <= extra < blocks:
            raise ShortGPTError(
                f"layers of {self.path} ({arch}) cannot be removed: "
                f"{others[0] if others else 'nextn_predict_layers'} belongs to all of them, or to "
                "other layers"
            )
        self.arch, self.row = arch, architecture(arch)
        self.blocks = blocks  # number of all ``blk.N``
        self.extra = extra  # of the last of these, which predict further tokens and always stay

    @property
    def layers(self) -> int:
        """Number of the layers that may be removed."""
        return self.blocks - self.extra

    def kept(self, layers: Sequence[int]) -> list[int]:
        """The blocks that stay when existing ``layers`` are removed; see `records`."""
        keep = [*check_layers(layers, range(self.layers)), *range(self.layers, self.blocks)]
        self.records(keep)
        return keep

    def value(self, name: str) -> object:
        """The value of a key of the architecture."""
        return self.get(f"{self.arch}.{name}")

    def records(self, keep: Sequence[int]) -> dict[str, Record | None]:
        """The keys that change when only the blocks ``keep`` stay, numbers ascending.

        ShortGPTError if no key can describe what stays.
        """
        keep = list(keep)
        if keep == list(range(self.blocks)):
            return {}
        values = {f"{self.arch}.block_count": len(keep), **self._lists(keep)}
        removed = [i for i in range(self.layers) if i not in set(keep)]
        if why := self._refusal(removed):
            raise ShortGPTError(f"layers {removed} of {self.path} cannot be removed: {why}")
        leading = self.value("leading_dense_block_count")
        if isinstance(leading, int):
            values[f"{self.arch}.leading_dense_block_count"] = sum(i < leading for i in keep)
        changed: dict[str, Record | None] = {}
        for key, value in values.items():
            before = self.headers[0].records[key]
            changed[key] = record(key, value, before.kind, before.element)
        if not isinstance(self.value(PATTERN), list) and self.changed_kinds(keep):
            slides = [not self._kind(i) for i in keep]  # whether a window slides over it
            key = f"{self.arch}.{PATTERN}"
            changed[key] = record(key, slides, ARRAY, BOOL)
        return changed

    def _lists(self, keep: Sequence[int]) -> dict[str, object]:
        """The lists with an entry a block or a layer, shortened; texts and tokens are none."""
        lists: dict[str, object] = {}
        for key, value in self.fields.items():
            name = key.removeprefix(f"{self.arch}.")
            own = key != name or key.startswith("xielu.")
            if not own or not isinstance(value, list) or name in NOT_OF_LAYERS:
                continue
            if len(value) in (self.blocks, self.layers):
                lists[key] = [value[i] for i in keep if i < len(value)]
            elif name == PATTERN or name.startswith(("attention.head_count", "feed_forward")):
                raise ShortGPTError(
                    f"layers of {self.path} cannot be removed: {key} has {len(value)} "
                    f"entries for {self.layers} layers"
                )
        return lists

    def period(self) -> tuple[int, int] | None:
        """After how many layers kinds repeat by position, and which of them differs."""
        rule, period = self.row.period, self.value(PATTERN)
        if self.row.needs_window and not self.value("attention.sliding_window"):
            return None
        if rule and isinstance(period, int):  # 0: windows slide over all layers
            return (period, 0 if rule[1] == 0 else period - 1) if period else None
        return rule

    def _kind(self, layer: int) -> bool:
        """Whether a layer is the one that differs in its period, by key or by position."""
        pattern = self.value(PATTERN)
        return not pattern[layer] if isinstance(pattern, list) else self._kind_at(layer)

    def _kind_at(self, position: int) -> bool:
        period = self.period()
        return period is not None and position % period[0] == period[1]

    def changed_kinds(self, keep: Sequence[int]) -> list[int]:
        """The kept layers that would be of another kind by their new positions."""
        own = [i for i in keep if i < self.layers]
        at = self._kind_at if self.period() else self._kind  # without a period, as in the source
        return [i for new, i in enumerate(own) if at(new) != self._kind(i)]

    def _periods(self) -> dict[str, int]:
        """Periods that keys name, whose phase differs from architecture to architecture."""
        names = PERIODS if self.row.period else (*PERIODS, PATTERN)
        values = {name: self.value(name) for name in names}
        return {n: v for n, v in values.items() if isinstance(v, int) and v > 1}

    @property
    def whole_period(self) -> int:
        """How many layers in a row may go so that the position of any other still says its kind."""
        return math.lcm(*self._periods().values(), *(self.period() or ())[:1])

    def check(self) -> None:
        """Raises ShortGPTError if no layers can be removed, whichever they are."""
        if why := self._refusal([]):
            raise ShortGPTError(f"no layers of {self.path} can be removed: {why}")

    def _refusal(self, removed: Sequence[int]) -> str | None:
        """Why llama.cpp would misread the model with these layers removed; None if it does not."""
        arch, row, own = self.arch, self.row, [i for i in range(self.layers) if i not in removed]
        present, kept = ({self._kind(i) for i in some} for some in (range(self.layers), own))
        needed = present if row.needs_both_kinds else present - {True}
        numbering = [name for name in NUMBERED if self.value(name)]
        pattern, first, count = self.value(PATTERN), self.value("n_deepstack_layers"), len(removed)
        images = isinstance(first, int) and any(i < first for i in removed)
        moved = [new - i for new, i in enumerate(own)]
        every = [n for n in self._periods().values() if any(shift % n for shift in moved)]
        if not every and not row.reads_list and self.changed_kinds(own):
            every = [*(self.period() or ())[:1]]
        reasons: dict[str, object] = {
            f"llama.cpp cannot load a {arch} whose layers all have one kind of attention": (
                needed - kept
            ),
            f"{arch}'s {', '.join(numbering)} numbers layers": numbering,
            f"llama.cpp takes the kinds of {arch}'s layers from a list, and {PATTERN} is "
            f"{pattern!r}": row.needs_list and not isinstance(pattern, list),
            f"the first {first} take images (n_deepstack_layers); name others": images,
            f"llama.cpp tells variants of {arch} by the number of their layers": (
                row.by_count or row.variant in (self.blocks, self.blocks - count)
            ),
            f"layers of {arch} take values of layer 0; leave that one": (
                row.reads_first and 0 in removed
            ),
            f"one in {', '.join(map(str, every))} layers of {arch} is of another kind, and no key "
            f"is known to say which; remove {self.whole_period} layers in a row, or write a "
            "directory, whose config can list the kinds": every,
        }
        return next((why for why, wrong in reasons.items() if wrong), None)
