"""A GGUF model with some layers removed or changed; its tensors keep their quantization.

A file's key ``short_gpt.pruning`` holds the text of ``pruning.json``. A layer's kind follows from a
key or, in llama.cpp's code, from its position. A kept layer must keep its kind: if no key can say
so, the removal is refused.

Matrices can also be requantized in fewer bits. Types are those of ``llama-quantize --pure`` without
an importance matrix, except that embedding and output head stay as they are:
``tensor_allows_quantization`` and ``tensor_type_fallback`` of llama.cpp's ``src/llama-quant.cpp``
name the tensors and types. The package libgguf quantizes, with llama.cpp's bytes: our own quantizer
has less squared error and yet more distance from the original.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quants,
)
from torch import Tensor, nn

from llama.errors import check_file
from llama.files import json_text
from llama.formats.gguf_read import ARRAY, STRING, GGUFParts, Record, nbytes_of
from llama.formats.gguf_write import (
    BOOL,
    F16,
    UINT32,
    Stored,
    copied,
    packed,
    record,
    stored,
    writable,
    write_again,
)
from llama.formats.hf import permute_rows
from llama.sources import is_gguf
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.provenance import NAME, RECORD, Provenance
from short_gpt.checkpoints.target import StrPath, Target, check_new_gguf, stored_names
from short_gpt.models.decoder import keep_values
from short_gpt.models.gguf_loading import ARCHITECTURES, PATTERN, architecture, is_scaled
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError, check, required

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
            f"is known to say which; remove {self.whole_period} layers in a row, or prune "
            "a Hugging Face directory, whose config can list the kinds": every,
        }
        return next((why for why, wrong in reasons.items() if wrong), None)


def write_gguf(
    source: Stack,
    target: Target | StrPath,
    keep: Sequence[int],
    *,
    changed: Mapping[str, Stored] | None = None,
    done: Provenance | None = None,
    keys: Mapping[str, Record] | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes the blocks ``keep`` of a GGUF model, numbers ascending; see `prune_checkpoint`.

    ``changed`` tensors, by their names there, and ``keys`` differ from the source's; ``done`` is
    the record, without which, and with all blocks, the bytes do not change.
    """
    target = Target.of(target)
    check_new_gguf(target.out, source=source.paths[0], overwrite=target.overwrite)
    names = stored_names(source.tensors, "blk", keep)
    changed = changed or {}
    tensors = {new: changed.get(old) or copied(source, old) for new, old in names.items()}
    records = source.records(keep) | dict(keys or {})
    if done is not None:
        records[RECORD] = record(RECORD, json_text(done.to_dict()), STRING)
        if isinstance(name := source.fields.get(NAME), str):
            records[NAME] = record(NAME, done.named(name), STRING)
    with target.new_file() as partial:
        write_again(partial, source, tensors, records=records, progress=progress)
    return target.path


def about_kinds(source: StrPath, layers: Sequence[int]) -> str | None:
    """What other programs get wrong in a GGUF model without these layers; None if nothing."""
    stack = Stack(source)
    keep = [i for i in range(stack.blocks) if i not in set(layers)]
    directory = "for transformers, where it reads this architecture, convert it with `to` hf"
    if not stack.changed_kinds(keep):
        if not stack.row.healed or not is_scaled(stack):
            return None
        return f"transformers ignores how this file scales positions; {directory}"
    return (
        f"{stack.arch}.{PATTERN} lists the kinds of the kept layers. transformers, and llama.cpp "
        "from before September 2026 where it has a rule of its own, ignore the list and take kinds "
        f"from positions, which is wrong here; {directory}"
    )


def save_gguf(
    short: ModelRecord, target: Target, source: StrPath, layers_path: str, *, record: Provenance
) -> Path:
    """Writes a model of transformers that was opened from the GGUF file ``source`` as one.

    ``verify`` of the target is not called: what did not change is the source's, byte for byte.
    ``layers_path`` is that of the layers in the model: ``"model.layers"``. ShortGPTError if the
    source is another model's, or has no known tensor for a changed weight.
    """
    if not is_gguf(source):
        raise ShortGPTError(
            f"{target.out} is written from a GGUF file, got {source}; name a directory and convert "
            f"that: short-gpt convert DIRECTORY {target.out}"
        )
    stack = Stack(source)
    short.check_source(source, stack.layers)
    keep = [*short.kept, *range(stack.layers, stack.blocks)]
    kind = next((str(each.how["type"]) for each in short.changes if "type" in each.how), None)
    keys = file_type(stack, kind) if kind else {}
    changed = changes(stack, kind) if kind else {}
    if short.changed:
        check_architecture(source)
    for number, own in sorted(short.changed):
        weight = short.decoder.layers[short.kept.index(number)].get_parameter(own)
        name = _name(stack, f"{layers_path}.{number}.{own}")
        changed[name] = _stored(stack, name, weight, changed.get(name))
    target = replace(target, verify=None)
    return write_gguf(stack, target, keep, changed=changed, done=record, keys=keys)


def types_in(
    short: ModelRecord, source: StrPath, layers_path: str, kind: str
) -> dict[int, dict[str, int]]:
    """What `ModelRecord.types_in` returns; ShortGPTError if no matrix of the file gets smaller."""
    stack = check_architecture(source)
    new, found = changes(stack, kind), dict[int, dict[str, int]]()
    check(new, "type", kind, f"one that takes fewer bytes than those of {source}")
    for number, layer in zip(short.present, short.decoder.layers, strict=True):
        each = [(own, weight) for own, weight in layer.named_parameters() if weight.dim() > 1]
        names = {own: _name(stack, f"{layers_path}.{number}.{own}") for own, _ in each}
        found[number] = {own: new[name].kind for own, name in names.items() if name in new}
    return found


def in_few_bits(source: StrPath) -> bool:
    """Whether the layers of a GGUF file have less than 8 bits a weight.

    What changes of them is rounded again, and so a training should change few matrices.
    """
    tensors = GGUFParts(Path(str(source))).tensors.items()
    layers = [entry for name, entry in tensors if LAYER.fullmatch(name)]
    return sum(t.nbytes for t in layers) < sum(math.prod(t.shape) for t in layers)


def check_architecture(source: StrPath) -> Stack:
    """Raises ShortGPTError for a GGUF file of which `save_gguf` can write no changed weight."""
    stack = Stack(source)
    if not stack.row.healed:
        healed = ", ".join(name for name, row in ARCHITECTURES.items() if row.healed)
        raise ShortGPTError(
            f"changed weights are written to GGUF files of {healed}, {source} is of "
            f"{stack.arch}: name a directory instead"
        )
    return stack


def _name(stack: Stack, full: str) -> str:
    """GGUF's name of a parameter of transformers; ShortGPTError where it is not known."""
    arch_of = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(arch_of[stack.arch], stack.blocks)
    name = names.get_name(full, try_suffixes=(".weight", ".bias"))
    if name not in stack.tensors:
        raise ShortGPTError(
            f"{full} was changed, and where it belongs in a GGUF file of {stack.arch} is not "
            "known: name a directory instead"
        )
    return str(name)


def _stored(stack: Stack, name: str, weight: Tensor, new: Stored | None) -> Stored:
    """A changed tensor in the type of ``new``, else in its own or in one that can be written."""
    before = stack.tensors[name]
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    key = heads.get(name.split(".")[-2])
    if key is not None and stack.row.permuted:
        count = stack.value(key) or stack.value(heads["attn_q"])
        if not isinstance(count, int):
            raise ShortGPTError(f"{name} was changed, whose heads differ from layer to layer")
        weight = permute_rows(weight, count, to_neighbours=True)
    if stack.row.norms_plus_one and name.endswith("norm.weight"):
        weight = weight.float() + 1
    if new is not None:
        return new._replace(chunks=lambda: [quantized(name, weight, new.kind)])
    kind = writable(before.kind, before.shape)
    return stored(name, weight, kind)


# Largest first: the type where rows do not fill its blocks, and llama.cpp's number of such files.
TYPES = {
    "q8_0": ("F16", 7),
    "q6_k": ("Q8_0", 18),
    "q5_k": ("Q5_1", 16),
    "q4_k": ("Q5_0", 14),
    "q3_k": ("Q4_0", 11),
    "q2_k": ("Q4_0", 10),
}
FILE_TYPE = "general.file_type"
# Routers, convolutions and other small matrices, which are not quantized.
PLAIN = re.compile(
    r"_norm\.|ffn_gate_(inp|tid2eid)|altup|laurel|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj"
    r"|time_mix_(first|[avgw]\d|decay_w\d|lerp_fused)|attn_rel_b"
)


def file_type(parts: GGUFParts, kind: str) -> dict[str, Record]:
    """The key that names a requantized file's type, where the source has one."""
    number = record(FILE_TYPE, TYPES[kind][1], UINT32)
    return {FILE_TYPE: number} if FILE_TYPE in parts.fields else {}


def changes(parts: GGUFParts, kind: str) -> dict[str, Stored]:
    """The tensors that get another type, read and quantized when they are written."""

    def pieces(name: str, number: int) -> Iterator[bytes]:
        yield quantized(name, parts.read(name), number)

    changed: dict[str, Stored] = {}
    for name, (shape, _, _, nbytes) in parts.tensors.items():
        number = type_of(shape, kind)
        size = nbytes_of(name, shape, number) if is_quantized(name, shape) else nbytes
        if size < nbytes:
            changed[name] = Stored(shape, number, size, partial(pieces, name, number))
    return changed


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp quantizes this tensor, and it is a layer's."""
    is_matrix = name.endswith(".weight") and math.prod(shape[:-1]) > 1
    return bool(is_matrix and LAYER.fullmatch(name) and not PLAIN.search(name))


def check_type(kind: str) -> None:
    """Raises ShortGPTError unless this is a type of `TYPES`."""
    check(kind in TYPES, "type", kind, f"one of {', '.join(TYPES)}")


def type_of(shape: Sequence[int], kind: str) -> int:
    """Ggml's number of the type that a matrix gets in ``kind`` of `TYPES`."""
    check_type(kind)
    numbers = [GGMLQuantizationType[name] for name in (kind.upper(), TYPES[kind][0], "F16")]
    return next(int(n) for n in numbers if shape[-1] % GGML_QUANT_SIZES[n][0] == 0)


def quantized(name: str, weight: Tensor, number: int) -> bytes:
    """The bytes of a matrix (..., K) in a type of `type_of`, by libgguf, which may be missing."""
    if number == F16:
        return packed(name, weight, number)
    with required("libgguf", by="a model in fewer bits"):
        import libgguf
    rows = weight.detach().cpu().float().flatten(0, -2)
    parts = rows.split(-(-len(rows) // torch.get_num_threads()))
    with ThreadPoolExecutor() as pool:  # each part without Python's lock
        done = pool.map(lambda part: libgguf.quantize_rows(part.numpy(), number), parts)
        return b"".join(part.tobytes() for part in done)


def rounded_values(name: str, weight: Tensor, number: int) -> Tensor:
    """A matrix as it is read of a GGUF file, in its own dtype and on its device."""
    rows = math.prod(weight.shape[:-1])
    packed = np.frombuffer(quantized(name, weight, number), np.uint8).reshape(rows, -1)
    values = quants.dequantize(packed, GGMLQuantizationType(number))  # (rows, K) in float32
    return torch.from_numpy(values).view(weight.shape).to(weight)


@torch.no_grad()
def round_layer(layer: nn.Module, types: Mapping[str, int]) -> Callable[[], None]:
    """Rounds matrices of a layer to ggml's types, by their names; returns what undoes it."""
    weights = {name: layer.get_parameter(name) for name in types}
    undo = keep_values(weights.values())
    for name, weight in weights.items():
        weight.copy_(rounded_values(name, weight, types[name]))
    return undo
