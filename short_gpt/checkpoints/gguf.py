"""A GGUF model with some layers removed or changed; its tensors keep their quantization.

A file's key ``short_gpt.pruning`` holds the text of ``pruning.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llama.files import json_text
from llama.formats.gguf_read import STRING, GGUFParts, Record
from llama.formats.gguf_write import (
    Stored,
    copied,
    record,
    stored,
    writable,
    write_again,
)
from llama.formats.names import permute_rows
from llama.sources import is_gguf
from short_gpt.checkpoints.gguf_layers import LAYER, Stack
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.provenance import NAME, RECORD, Provenance
from short_gpt.checkpoints.requantizing import changes, file_type, quantized
from short_gpt.checkpoints.target import StrPath, Target, check_new_gguf, stored_names
from short_gpt.models.gguf_architectures import ARCHITECTURES
from short_gpt.models.gguf_loading import PATTERN, is_scaled
from short_gpt.runtime.errors import ShortGPTError, check


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
    directory = "for transformers, name a directory in place of the file"
    if not stack.changed_kinds(keep):
        if not stack.row.healed or not is_scaled(stack):
            return None
        return f"transformers ignores how this file scales positions: {directory}"
    return (
        f"{stack.arch}.{PATTERN} lists the kinds of the kept layers. transformers, and llama.cpp "
        "from before September 2026 where it has a rule of its own, ignore the list and take kinds "
        f"from positions, which is wrong here: {directory}"
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
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

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
