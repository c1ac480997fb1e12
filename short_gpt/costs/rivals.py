"""What a user would take in place of a pruned model: the original with its layers in fewer bits.

It is written as a GGUF file, or rounded in memory, and measured beside the original.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gguf import GGMLQuantizationType

from llama.formats.gguf_read import GGUFParts, nbytes_of
from short_gpt.checkpoints.gguf import (
    TYPES,
    Stack,
    changes,
    file_type,
    is_quantized,
    rounded_values,
    type_of,
    write_gguf,
)
from short_gpt.checkpoints.target import StrPath
from short_gpt.data.windows import Answer, batches
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.models.decoder import keep_values
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_model import ShortModel

# Matrices in transformers that `checkpoints.gguf.PLAIN` names in GGUF files.
PLAIN_HF = re.compile(r"router|(^|\.)gate\.weight|conv1d|conv\.conv|altup|laurel")
ANSWERS_AT_ONCE = 4  # which are short
RIVAL = "rival"  # a folder of a run
KINDS = ("q8_0", "q4_k")  # for users of Hugging Face's format: 8 bits, and 4 or a little more
Texts = Mapping[str, Sequence[Sequence[int]]]  # windows by kind of text


class Rival(NamedTuple):
    """The original with its layers in fewer bits."""

    name: str  # types of the layers' matrices, most bytes first: "in Q4_0 and Q3_K"
    size: int  # bytes of the file, or of the weights if they were written so
    quality: Mapping[str, Perplexity]  # by kind of text, with the distance from the original


# Written, as a file


def requantized(
    source: StrPath, out: StrPath, kind: str, *, progress: Callable[[str], object] = str
) -> Path:
    """Writes a GGUF model with the weight matrices of its layers in fewer bits; returns ``out``.

    A matrix that has no more bits already, and all other tensors, are copied byte for byte. Memory
    holds one matrix in float32 at a time.

    Args:
        source: the GGUF file, or any of several.
        out: the new GGUF file; complete or not at all.
        kind: "q8_0", "q6_k", "q5_k", "q4_k", "q3_k" or "q2_k". Rows that do not fill blocks of 256
            weights get Q8_0, Q5_1, Q5_0, Q4_0 and Q4_0 in place of the last five.
        progress: called with the name of each tensor before it is written.

    Raises:
        MissingPackageError: libgguf is not installed.
        ShortGPTError: the type is none of these, or the model has no numbered layers.
        FileExistsError: ``out`` exists.
    """
    stack = Stack(source)
    changed = changes(stack, kind)
    keys = file_type(stack, kind) if changed else {}
    blocks = range(stack.blocks)
    return write_gguf(stack, out, blocks, changed=changed, keys=keys, progress=progress)


def largest_within(source: StrPath, most_bytes: int) -> str | None:
    """The largest type with which the file of `requantized` has at most so many bytes.

    None if no type is small enough. Only the header of ``source`` is read.
    """
    parts = GGUFParts(Path(str(source)))
    return next((kind for kind in TYPES if size_in(parts, kind) <= most_bytes), None)


def smaller_types(source: StrPath) -> list[str]:
    """The types whose files are smaller than the source and than that of the type before."""
    parts = GGUFParts(Path(str(source)))
    size, found = sum(path.stat().st_size for path in parts.paths), list[str]()
    for kind in TYPES:
        if size_in(parts, kind) < size:
            size = size_in(parts, kind)
            found.append(kind)
    return found


def size_in(parts: GGUFParts, kind: str) -> int:
    """The bytes of the file of `requantized`; of a source in several files a few more."""
    align, size = parts.headers[0].alignment, sum(path.stat().st_size for path in parts.paths)
    for name, new in changes(parts, kind).items():
        old = parts.tensors[name].nbytes  # of each, bytes up to a whole alignment follow
        size += new.nbytes + -new.nbytes % align - (old + -old % align)
    return size + -size % align


# Measured


def has_quantizer() -> bool:
    """Whether the package is installed that makes rivals."""
    return find_spec("libgguf") is not None


def rivals(
    short: ShortModel, texts: Texts, reference: Reference, *, stored: int, itemsize: int
) -> list[Rival]:
    """The original in 8 and in about 4 bits, rounded in memory as GGUF files are.

    Afterwards the weights are what they were, bit for bit. The machine's memory holds the layers
    once more.

    Args:
        short: The original, with all its layers.
        texts: Windows by kind of text, which ``reference`` has read with the original.
        stored: Bytes of the original's weights as they are written.
        itemsize: Bytes of a number there.

    Raises:
        MissingPackageError: libgguf is not installed.
    """
    found: list[Rival] = []
    for kind in KINDS:
        with rounded(short, kind) as (numbers, sizes):
            if sizes:  # none of a model whose weights are quantized already
                size = stored - itemsize * numbers + sizes.total()
                found.append(Rival(_name(sizes), size, quality_of(short, texts, reference)))
    return found


@contextmanager
def rounded(short: ShortModel, kind: str) -> Iterator[tuple[int, Counter[int]]]:
    """A model with its layers' matrices rounded inside a ``with`` block.

    Yields how many numbers these have, and their bytes by ggml's type.
    """
    numbers, sizes = 0, Counter[int]()
    with ExitStack() as undo:
        for layer in short.decoder.layers:
            for name, weight in layer.named_parameters():
                is_matrix = math.prod(weight.shape[:-1]) > 1 and not PLAIN_HF.search(name)
                if is_matrix and weight.is_floating_point():
                    new = type_of(weight.shape, kind)
                    if weight.device.type == "cpu":
                        undo.callback(setattr, weight, "data", weight.data)
                    else:  # which may have no room for both
                        undo.callback(keep_values([weight]))
                    weight.data = rounded_values(name, weight, new)
                    numbers += weight.numel()
                    sizes[new] += nbytes_of(name, tuple(weight.shape), new)
        yield numbers, sizes


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder inside ``folder`` for a file to measure; both go after the block."""
    shutil.rmtree(folder / RIVAL, ignore_errors=True)  # of a run that was killed
    try:
        (folder / RIVAL).mkdir(parents=True)
        yield folder / RIVAL
    finally:
        shutil.rmtree(folder / RIVAL, ignore_errors=True)


def of_file(path: Path, texts: Texts, reference: Reference, opening: OpenOptions) -> Rival:
    """A rival's file, read in PyTorch beside the original's ``reference``; texts as in `rivals`."""
    short, sizes = open_trainable(str(path), opening), Counter[int]()
    for name, entry in GGUFParts(path).tensors.items():
        sizes[entry.kind] += entry.nbytes if is_quantized(name, entry.shape) else 0
    quality = quality_of(short, texts, reference.through(short.decoder))
    return Rival(_name(+sizes), path.stat().st_size, quality)


def distances(short: ShortModel, texts: Texts, reference: Reference) -> dict[str, float]:
    """The mean KL divergence of the model as it is now, in nats a token, by kind of text."""
    found = quality_of(short, texts, reference)
    return {kind: one.kld.value for kind, one in found.items() if one.kld is not None}


def quality_of(short: ShortModel, texts: Texts, reference: Reference) -> dict[str, Perplexity]:
    """The model as it is now, on each kind of text."""
    found = {}
    for kind, windows in texts.items():
        together = ANSWERS_AT_ONCE if all(isinstance(w, Answer) for w in windows) else 1
        read = batches(windows, together)
        found[kind] = perplexity(short.decoder, read, reference=reference)
    return found


def _name(sizes: Counter[int]) -> str:
    return "in " + " and ".join(GGMLQuantizationType(kind).name for kind, _ in sizes.most_common())
