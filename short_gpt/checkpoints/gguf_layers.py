"""A GGUF file's metadata on its layers, and what must change in it with fewer of them.

Some architectures tell a layer's kind by a key, some by its position alone, by rules that
llama.cpp has in its code. A layer that stays must keep its kind: where a key can say so it does,
elsewhere the cut is refused, and where scores are at hand with the best set that would do.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama.formats.gguf_read import ARRAY, GGUFParts, Record
from llama.formats.gguf_write import BOOL, record
from short_gpt.checkpoints.gguf_kinds import (
    ALIKE,
    BOTH_KINDS,
    BY_COUNT,
    BY_LIST,
    COUNTS,
    FIRST_STAY,
    FROM_FIRST,
    NEEDED,
    NOT_OF_LAYERS,
    NUMBERED,
    PATTERN,
    PERIODIC,
    PERIODS,
    READS_PATTERN,
    WITH_WINDOW,
    cheapest_set,
    ordinal,
)
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Tensors that hold something of every layer, or layers of another stack, without its number.
OTHER_LAYERS = re.compile(r"per_layer_.+|(.+\.)?(blk|layers?|block)\.\d+\..+")


@dataclass(frozen=True)
class Stack:
    """The layers of a GGUF model.

    Attributes:
        parts: the model.
        arch: its architecture.
        blocks: all ``blk.N``.
        extra: of these the last, which predict further tokens and always stay.
    """

    parts: GGUFParts
    arch: str
    blocks: int
    extra: int

    @classmethod
    def of(cls, parts: GGUFParts) -> Stack:
        """The layers of a model.

        Raises:
            ShortGPTError: it has no numbered layers, or tensors of layers that are not numbered.
        """
        arch = parts.fields.get("general.architecture")
        blocks = parts.fields.get(f"{arch}.block_count")
        if not isinstance(arch, str) or not isinstance(blocks, int) or isinstance(blocks, bool):
            raise ShortGPTError(
                f"{parts.path} holds architecture {arch!r} of {blocks!r} layers, expected a "
                "language model"
            )
        _check_names(parts, arch, blocks)
        extra = parts.fields.get(f"{arch}.nextn_predict_layers") or 0
        if not isinstance(extra, int) or not 0 <= extra < blocks:
            raise ShortGPTError(f"{parts.path} has nextn_predict_layers = {extra!r} of {blocks}")
        return cls(parts, arch, blocks, extra)

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Stack:
        """The layers of a GGUF file; errors as those of `of` and `GGUFParts`."""
        return cls.of(GGUFParts(Path(str(source))))

    @property
    def layers(self) -> int:
        """How many layers there are to choose from."""
        return self.blocks - self.extra

    def kept(self, layers: Sequence[int], influence: Sequence[float | None] = ()) -> list[int]:
        """The blocks that stay without some layers.

        Args:
            layers: to be removed.
            influence: Block Influence of each layer, by which another set is offered.

        Raises:
            ShortGPTError: a layer does not exist, or those left would be of another kind.
        """
        check_layers(layers, range(self.layers))
        keep = [i for i in range(self.blocks) if i not in set(layers)]
        self.records(keep, influence)
        return keep

    def get(self, name: str) -> object:
        """The value of a key of the architecture."""
        return self.parts.fields.get(f"{self.arch}.{name}")

    def records(
        self, keep: Sequence[int], influence: Sequence[float | None] = ()
    ) -> dict[str, Record | None]:
        """The keys that are other than before when only some blocks stay.

        Args:
            keep: numbers of the blocks that stay, ascending; with all of them nothing changes.
            influence: Block Influence of each layer, by which another set is offered.

        Raises:
            ShortGPTError: what stays cannot be said; the message names the key and what to do.
        """
        keep = list(keep)
        if keep == list(range(self.blocks)):
            return {}
        values = {f"{self.arch}.block_count": len(keep), **self._lists(keep)}
        self._check(keep, influence)
        leading = self.get("leading_dense_block_count")
        if isinstance(leading, int):
            values[f"{self.arch}.leading_dense_block_count"] = sum(i < leading for i in keep)
        changed: dict[str, Record | None] = {}
        for key, value in values.items():
            before = self.parts.headers[0].records[key]
            changed[key] = record(key, value, before.kind, before.element)
        return changed | self._pattern(keep)

    def _lists(self, keep: Sequence[int]) -> dict[str, object]:
        """The lists with an entry a block or a layer, cut; texts and tokens are none."""
        cut: dict[str, object] = {}
        for key, value in self.parts.fields.items():
            name = key.removeprefix(f"{self.arch}.")
            own = key != name or key.startswith("xielu.")
            if not own or not isinstance(value, list) or name in NOT_OF_LAYERS:
                continue
            if len(value) in (self.blocks, self.layers):
                cut[key] = [value[i] for i in keep if i < len(value)]
            elif name == PATTERN or name.startswith(("attention.head_count", "feed_forward")):
                raise ShortGPTError(
                    f"layers of {self.parts.path} cannot be removed: {key} has {len(value)} "
                    f"entries for {self.layers} layers"
                )
        return cut

    def _pattern(self, keep: Sequence[int]) -> dict[str, Record | None]:
        """The list of layers' kinds for an architecture that reads one; none where it need not."""
        if isinstance(self.get(PATTERN), list) or not self.changed_kinds(keep):
            return {}
        slides = [not self._kind(i) for i in keep]  # whether a window slides over it
        key = f"{self.arch}.{PATTERN}"
        return {key: record(key, slides, ARRAY, BOOL)}

    def _period(self) -> tuple[int, int] | None:
        """After how many layers kinds repeat by position, and which of them differs."""
        rule, period = PERIODIC.get(self.arch), self.get(PATTERN)
        if self.arch in WITH_WINDOW and not self.get("attention.sliding_window"):
            return None
        if rule and isinstance(period, int):  # 0: windows slide over all layers
            return (period, 0 if rule[1] == 0 else period - 1) if period else None
        return rule

    @property
    def has_period(self) -> bool:
        """Whether llama.cpp has a period in its code by which kinds follow from positions."""
        return self._period() is not None

    def _kind(self, layer: int) -> bool:
        """Whether a layer is the one that differs in its period, by the file or by its position."""
        pattern = self.get(PATTERN)
        return not pattern[layer] if isinstance(pattern, list) else self._kind_at(layer)

    def _kind_at(self, position: int) -> bool:
        period = self._period()
        return period is not None and position % period[0] == period[1]

    def changed_kinds(self, keep: Sequence[int]) -> list[int]:
        """The layers that would be of another kind if their new position told it.

        Args:
            keep: numbers of the blocks that stay, ascending.
        """
        own = [i for i in keep if i < self.layers]
        at = self._kind_at if self.has_period else self._kind  # of no period, as in the source
        return [i for new, i in enumerate(own) if at(new) != self._kind(i)]

    def _periods(self) -> dict[str, int]:
        """Periods that keys name, whose phase differs from architecture to architecture."""
        names = PERIODS if self.arch in PERIODIC else (*PERIODS, PATTERN)
        values = {name: self.get(name) for name in names}
        return {n: v for n, v in values.items() if isinstance(v, int) and v > 1}

    def _fits(self, keep: Sequence[int]) -> str | None:
        """Why kinds would change that no key can express; None if they would not."""
        if why := self._moved(keep):
            return why
        period = self._period()
        if period is None or self.arch in READS_PATTERN or not self.changed_kinds(keep):
            return None
        return (
            f"in llama.cpp every {ordinal(period[0])} layer of {self.arch} is of another "
            "kind, by its position, and no key is known to say otherwise"
        )

    def _moved(self, keep: Sequence[int]) -> str | None:
        """Why a key of `_periods` would mean other layers; None if it would not."""
        own = [i for i in keep if i < self.layers]
        for name, every in self._periods().items():
            if any((new - i) % every for new, i in enumerate(own)):
                return f"{self.arch}.{name} makes every {ordinal(every)} layer another kind"
        return None

    def _check(self, keep: Sequence[int], influence: Sequence[float | None]) -> None:
        """Raises ShortGPTError unless the kept blocks keep their kinds."""
        removed = [i for i in range(self.layers) if i not in set(keep)]
        if why := self._refusal(removed):
            raise ShortGPTError(f"layers {removed} of {self.parts.path} cannot be removed: {why}")
        if why := self._fits(keep):
            raise ShortGPTError(
                f"without layers {removed} of {self.parts.path} others would be of the wrong kind: "
                f"{why}; {self.advice(removed, influence)}"
            )

    def _refusal(self, removed: Sequence[int]) -> str | None:
        """Why llama.cpp would misread the model with these layers removed; None if it does not."""
        layers = range(self.layers)
        kinds, left = ({self._kind(i) for i in layers if i not in out} for out in ((), removed))
        if (kinds if self.arch in BOTH_KINDS else kinds - {True}) - left:
            return f"llama.cpp opens no {self.arch} of which all layers are of one kind"
        for name in NUMBERED:
            if self.get(name):
                return f"{self.arch}.{name} = {self.get(name)!r} numbers layers"
        if self.arch in BY_LIST and not isinstance(pattern := self.get(PATTERN), list):
            return (
                f"llama.cpp takes the kinds of {self.arch}'s layers from a list, and "
                f"{self.arch}.{PATTERN} is {pattern!r}"
            )
        for name in FIRST_STAY:
            first = self.get(name)
            if isinstance(first, int) and any(i < first for i in removed):
                return f"the first {first} take images (n_deepstack_layers); name others"
        if self.arch.startswith(BY_COUNT):
            return f"llama.cpp tells variants of {self.arch} by the number of their layers"
        if self.arch in FROM_FIRST and 0 in removed:
            return f"layers of {self.arch} take values of layer 0; leave that one"
        if COUNTS.get(self.arch) in (self.blocks, self.blocks - len(removed)):
            return (
                f"llama.cpp takes {self.arch} of {COUNTS[self.arch]} layers for another variant, "
                "by that number"
            )
        return None

    def advice(self, gone: Sequence[int], influence: Sequence[float | None] = ()) -> str:
        """The set of lowest Block Influence that leaves all others their kind, in words.

        Args:
            gone: the layers that were to be removed; the set has as many.
            influence: Block Influence of each layer; without it no set is offered.
        """
        scores = [math.nan if score is None else score for score in influence]
        if len(scores) != self.layers or not all(map(math.isfinite, scores)):
            return (
                "for the best set that leaves all others their kinds by position, rank by Block "
                "Influence (short-gpt rank) and choose by its `scores`"
            )

        def stays(layer: int, new: int) -> bool:
            moved = any((layer - new) % every for every in self._periods().values())
            return not moved and (self._period() is None or self._kind_at(new) == self._kind(layer))

        others = cheapest_set(scores, len(gone), stays)
        if others is None or self._refusal(others):
            return "no other set of layers is offered"
        ours, theirs = (sum(scores[i] for i in layers) for layers in (gone, others))
        return (
            f"of as many layers, `layers` {','.join(map(str, others))} leave all others their "
            f"kinds by position: their Block Influence sums to {theirs:.4g}, that of "
            f"{','.join(map(str, gone))} to {ours:.4g}"
        )


def _check_names(parts: GGUFParts, arch: str, blocks: int) -> None:
    """Raises ShortGPTError unless the tensors are those of numbered layers, all and no other."""
    numbers = {int(m[1]) for name in parts.tensors if (m := LAYER.fullmatch(name))}
    if numbers != set(range(blocks)):
        raise ShortGPTError(
            f"{parts.path} says that it has {blocks} layers; its tensors blk.N are of "
            f"{len(numbers)}: is it whole?"
        )
    if arch in ALIKE and (missing := _missing(parts.tensors, blocks)):
        raise ShortGPTError(f"{parts.path} lacks {missing[0]}: is it whole?")
    others = [n for n in parts.tensors if not LAYER.fullmatch(n) and OTHER_LAYERS.fullmatch(n)]
    if others:
        raise ShortGPTError(
            f"layers of {parts.path} ({arch}) cannot be removed: {others[0]} belongs to all of "
            "them, or to other layers"
        )


def _missing(names: Mapping[str, object], blocks: int) -> list[str]:
    """The tensors that a model of layers that are alike lacks, as far as its others tell."""
    parts = {m[2] for name in names if (m := LAYER.fullmatch(name))}
    expected = [*NEEDED, *(f"blk.{i}.{part}" for i in range(blocks) for part in sorted(parts))]
    return [name for name in expected if name not in names]


def renamed(names: Mapping[str, object], keep: Sequence[int]) -> dict[str, str]:
    """The old name of every tensor that stays, by its new one, in the file's order.

    Args:
        names: of the tensors.
        keep: numbers of the blocks that stay, ascending.

    Example:
        >>> renamed({"blk.0.a": 0, "blk.1.a": 0, "output.weight": 0}, [1])
        {'blk.0.a': 'blk.1.a', 'output.weight': 'output.weight'}
    """
    new_number = {old: new for new, old in enumerate(keep)}
    old_name: dict[str, str] = {}
    for name in names:
        match = LAYER.fullmatch(name)
        if match is None:
            old_name[name] = name
        elif int(match[1]) in new_number:
            old_name[f"blk.{new_number[int(match[1])]}.{match[2]}"] = name
    return old_name
