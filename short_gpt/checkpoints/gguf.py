"""A GGUF model without some layers, its tensors as they are in their quantization.

Whatever is written carries its record with it, as the key ``short_gpt.pruning``: the text of what
stands in ``pruning.json`` elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from llama.formats.gguf_header import STRING, Record, read_header
from llama.formats.gguf_parts import PART, GGUFParts, named_parts
from llama.formats.gguf_write import Stored, copied, record, write_again
from llama.io.json_files import json_text
from llama.io.outputs import check_outputs, new_files
from short_gpt.checkpoints.gguf_kinds import PATTERN
from short_gpt.checkpoints.gguf_layers import Stack, renamed
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.records import RECORD
from short_gpt.runtime.errors import ShortGPTError


def prune_gguf(
    source: str | PathLike[str],
    out: str | PathLike[str],
    layers: Sequence[int],
    *,
    provenance: Provenance | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a GGUF model of any architecture without some layers; no weight is ever loaded.

    The tensors' bytes are copied in pieces, so memory does not grow with the model and any
    quantization goes over. What was written is read again and compared before it is there.

    Args:
        source: the file; of a model in several, ``NAME-00001-of-0000N.gguf``.
        out: the new file; with such a name, so many files.
        layers: numbers of the layers to leave out.
        provenance: what is known beside what is removed; goes into the file with that.
        overwrite: whether an earlier pruned file is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.
        verify: called with the new file before it takes its place; of several files not called.

    Returns:
        ``out``.

    Raises:
        ShortGPTError: a layer does not exist, or what is left could not be told to llama.cpp.
        FileNotFoundError: there is no such file.
        FileExistsError: ``out`` exists, or is the source.
    """
    parts = GGUFParts(Path(str(source)))
    stack = Stack.of(parts)
    keep = stack.kept(layers, provenance.block_influence if provenance else ())
    own = [i for i in keep if i < stack.layers]
    done = (provenance or Provenance()).cut(source, removed=layers, kept=own)
    return write_gguf(
        parts, out, keep, done=done, overwrite=overwrite, progress=progress, verify=verify
    )


def write_gguf(
    source: GGUFParts,
    out: str | PathLike[str],
    keep: Sequence[int],
    *,
    changed: Mapping[str, Stored] | None = None,
    done: Provenance | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Writes some blocks of a GGUF model, with what changed in them.

    Args:
        source: the model.
        out, overwrite, progress, verify: as for `prune_gguf`.
        keep: numbers of the blocks that stay, ascending.
        changed: tensors that are other than in the source, by their names there.
        done: the record; without it, and with all blocks, the bytes are those of the source.
    """
    paths = out_paths(out)
    check_new_gguf(out, source=source, overwrite=overwrite)
    names = renamed(source.tensors, keep)
    found = changed or {}
    tensors = {new: found.get(old) or copied(source, old) for new, old in names.items()}
    records = Stack.of(source).records(keep)
    if done is not None:
        records[RECORD] = record(RECORD, json_text(done.to_dict()), STRING)
    with new_files(paths, overwrite=overwrite, ours=is_pruned_gguf) as partial:
        write_again(partial, source, tensors, records=records, progress=progress)
        check_written(partial[0], source, names, records, changed=found)
        if verify is not None and len(partial) == 1:
            verified(partial[0], verify)
    return Path(str(out))


def verified(partial: Path, verify: Callable[[Path], object]) -> None:
    """Calls ``verify`` with a file of a name that says that it is GGUF."""
    named = partial.rename(partial.with_name(f"{partial.name}.gguf"))
    try:
        verify(named)
    finally:
        named.rename(partial)


def about_kinds(
    source: str | PathLike[str],
    layers: Sequence[int],
    influence: Sequence[float | None] = (),
) -> str | None:
    """What other programs get wrong of a GGUF model without some layers; None if nothing.

    Args:
        source: the original model.
        layers: numbers of the removed layers.
        influence: Block Influence of each layer, by which another set is offered.
    """
    stack = Stack.of(GGUFParts(Path(str(source))))
    keep = [i for i in range(stack.blocks) if i not in set(layers)]
    if not stack.changed_kinds(keep):
        return None
    remark = (
        f"{stack.arch}.{PATTERN} lists the kinds of the layers left. transformers passes over it "
        "and takes kinds from positions, which is wrong here: for transformers, name a directory "
        f"in place of the file, as in short-gpt prune {source} DIRECTORY"
    )
    if not stack.has_period:
        return remark
    return (
        f"{remark}. llama.cpp from before its pull request 29042 (September 2026), and what is "
        f"built on it, pass over it too; {stack.advice(layers, influence)}"
    )


def out_paths(out: str | PathLike[str]) -> list[Path]:
    """The files to write for a name: one, or all those that a name of one of several tells.

    Example:
        >>> [str(p) for p in out_paths("m-00001-of-00002.gguf")]
        ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    path = Path(str(out))
    match = PART.fullmatch(path.name)
    return named_parts(path.with_name(f"{match[1]}.gguf"), int(match[3])) if match else [path]


def check_new_gguf(
    out: str | PathLike[str], *, source: GGUFParts | None = None, overwrite: bool
) -> None:
    """Raises FileExistsError or PermissionError where `write_gguf` could not write."""
    paths = out_paths(out)
    if not paths:
        raise ShortGPTError(f"{out} names a file of none; name it NAME-00001-of-0000N.gguf")
    check_outputs(paths, overwrite=overwrite, ours=is_pruned_gguf)
    sources = [path.resolve() for path in source.paths] if source else []
    if taken := [path for path in paths if path.resolve() in sources]:
        raise FileExistsError(f"{taken[0]} is the source; choose another name")


def is_pruned_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file that `write_gguf` made."""
    try:
        return RECORD in read_header(path).fields
    except ValueError:
        return False


def check_written(
    path: Path,
    source: GGUFParts,
    names: Mapping[str, str],
    records: Mapping[str, Record | None],
    *,
    changed: Mapping[str, Stored],
) -> None:
    """Proves that a file holds what it is to hold, by reading it again.

    Args:
        path: the new file, or the first of several.
        source: what it was made from.
        names: of every tensor, and its name in the source.
        records: keys that are other than in the source.
        changed: tensors that are other, by their names in the source.

    Raises:
        RuntimeError: it does not; the message names what differs.
    """
    again = GGUFParts(path)
    _check_keys(again, source, records)
    if list(again.tensors) != list(names):
        raise RuntimeError(f"{path} holds other tensors than it should")
    for new, old in names.items():
        pieces = changed[old].chunks() if old in changed else source.chunks(old)
        if not _same(pieces, again.chunks(new)):
            raise RuntimeError(f"{path} holds another {new} than was to be written")


def _check_keys(again: GGUFParts, source: GGUFParts, records: Mapping[str, Record | None]) -> None:
    """Raises RuntimeError unless a file has the source's keys, but for those that changed."""
    expected = {k: r.raw for k, r in source.headers[0].records.items() if k not in records}
    expected |= {key: found.raw for key, found in records.items() if found is not None}
    kept = {key: found.raw for key, found in again.headers[0].records.items()}
    wrong = [k for k in expected | kept if expected.get(k) != kept.get(k)]
    if wrong := [key for key in wrong if not key.startswith("split.")]:
        raise RuntimeError(f"{again.path} does not say what it should of {', '.join(wrong[:3])}")


def _same(one: Iterable[bytes], other: Iterable[bytes]) -> bool:
    digests = [hashlib.blake2b(), hashlib.blake2b()]
    for digest, pieces in zip(digests, (one, other), strict=True):
        for piece in pieces:
            digest.update(piece)
    return digests[0].digest() == digests[1].digest()
