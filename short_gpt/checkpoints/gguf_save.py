"""A model in memory that came from a GGUF file, as GGUF: the file, with what changed in it.

What did not change is copied byte for byte. Changed tensors go back in their own type, or where
the package gguf writes none of that (K-quants) in Q8_0.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from llama.formats.gguf_parts import GGUFParts
from llama.formats.gguf_types import stored, type_name, writable
from llama.formats.gguf_write import Stored
from llama.formats.names import permute_rows
from llama.io.sources import is_gguf
from short_gpt.checkpoints.gguf import write_gguf
from short_gpt.checkpoints.gguf_layers import Stack, renamed
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.models.weight_changes import Parameter
from short_gpt.runtime.errors import ShortGPTError

# Architectures whose weights lie in transformers as in the file, up to the heads of queries and
# keys of the second row, and norms of the third, which a file stores plus one.
MAPPED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "starcoder2", "olmo2")
PERMUTED = ("llama",)
PLUS_ONE = ("gemma2", "gemma3")


def save_gguf(
    short: ModelRecord,
    out: str | os.PathLike[str],
    source: str | os.PathLike[str],
    layers_path: str,
    *,
    record: Provenance,
    overwrite: bool = False,
) -> Path:
    """Writes a model of transformers that was opened from a GGUF file as one.

    Args:
        short: the model.
        out: the new file, which appears whole or not at all.
        source: the file that it was opened from.
        layers_path: where the model has its layers: ``"model.layers"``.
        record: of what was done.
        overwrite: whether an earlier pruned file is replaced; nothing else ever is.

    Raises:
        ShortGPTError: ``source`` is no GGUF file or has another number of layers, or a changed
            weight has no place in it.
        FileExistsError: ``out`` exists.
    """
    if not is_gguf(source):
        raise ShortGPTError(
            f"{out} is written from a GGUF file, got {source}; name a directory and convert that: "
            f"short-gpt convert DIRECTORY {out}"
        )
    parts = GGUFParts(Path(str(source)))
    stack = Stack.of(parts)
    if stack.layers != short.n_layers:
        raise ShortGPTError(
            f"{source} has {stack.layers} layers, this model began with {short.n_layers}: it is "
            "not where the model came from"
        )
    short.check_whole()  # in a trial, numbers of layers are not those of `kept`
    keep = [*short.kept, *range(stack.layers, stack.blocks)]
    changed: dict[str, Stored] = {}
    for parameter in sorted(short.changed):
        name = _name(stack, parameter, layers_path)
        changed[name] = _stored(stack, name, _weight(short, parameter))
    return write_gguf(parts, out, keep, changed=changed, done=record, overwrite=overwrite)


def _weight(short: ModelRecord, parameter: Parameter) -> Tensor:
    number, name = parameter
    return short.decoder.layers[short.kept.index(number)].get_parameter(name)


def check_saved(source: str | os.PathLike[str], layers: Sequence[int]) -> None:
    """Refuses, before any work, a GGUF file that `save_gguf` could not write back changed.

    Args:
        source: the file.
        layers: numbers of the layers that are removed.

    Raises:
        ShortGPTError: the architecture is not one of `MAPPED`, or the layers cannot go.
    """
    stack = Stack.of(GGUFParts(Path(str(source))))
    if stack.arch not in MAPPED:
        raise ShortGPTError(
            f"changed weights are written to GGUF files of {', '.join(MAPPED)}, {source} is of "
            f"{stack.arch}: name a directory instead"
        )
    stack.kept(layers)


def _name(stack: Stack, parameter: Parameter, layers_path: str) -> str:
    """GGUF's name of a parameter of transformers; ShortGPTError if it has none that is sure."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number, own = parameter
    full = f"{layers_path}.{number}.{own}"
    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    found = None
    if stack.arch in MAPPED:
        names = get_tensor_name_map(known[stack.arch], stack.blocks)
        found = names.get_name(full, try_suffixes=(".weight", ".bias"))
    if found not in stack.parts.tensors:
        raise ShortGPTError(
            f"{full} was changed, and where it belongs in a GGUF file of {stack.arch} is not "
            f"known; known are weights of {', '.join(MAPPED)}: name a directory instead"
        )
    return str(found)


def _stored(stack: Stack, name: str, weight: Tensor) -> Stored:
    """A changed tensor as it goes back, in its own type or one that can be written."""
    place = stack.parts.tensors[name]
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
    key = heads.get(name.split(".")[-2])
    if key is not None and stack.arch in PERMUTED:
        count = stack.get(key) or stack.get(heads["attn_q"])
        if not isinstance(count, int):
            raise ShortGPTError(f"{name} was changed, whose heads differ from layer to layer")
        weight = permute_rows(weight, count, to_neighbours=True)
    if stack.arch in PLUS_ONE and name.endswith("norm.weight"):
        weight = weight.float() + 1
    if tuple(weight.shape) != place.shape:
        raise ShortGPTError(f"{name} has shape {list(weight.shape)}, expected {list(place.shape)}")
    kind = writable(place.kind, place.shape)
    return stored(name, weight, kind, part=stack.parts.part_of(name))


def about_types(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> str | None:
    """Which tensors of a written file are of another type than in its source, in words.

    Args:
        source: the file that ``out`` was made from.
        out: a file of `save_gguf`.
    """
    before, after = (GGUFParts(Path(str(path))) for path in (source, out))
    record = Provenance.beside(out)
    gone = set(record.removed_layers) if record else set()
    stack = Stack.of(before)
    keep = [i for i in range(stack.blocks) if i not in gone]
    moves = Counter(
        (before.tensors[old].kind, after.tensors[new].kind)
        for new, old in renamed(before.tensors, keep).items()
        if before.tensors[old].kind != after.tensors[new].kind
    )
    if not moves:
        return None
    parts = [f"{n} of {type_name(a)} as {type_name(b)}" for (a, b), n in sorted(moves.items())]
    return f"changed tensors in another type than before: {', '.join(parts)}"
