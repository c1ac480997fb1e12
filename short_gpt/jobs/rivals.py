"""What a user would do in place of removing layers, measured: the original in fewer bits."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama.formats.gguf_read import GGUFParts, nbytes_of
from llama.formats.gguf_write import type_name
from short_gpt.checkpoints.rival import (
    is_quantized,
    largest_within,
    quantized,
    requantized,
    type_of,
)
from short_gpt.checkpoints.target import StrPath
from short_gpt.data.windows import Answer, batches
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.models.decoder import keep_values
from short_gpt.wrappers.opening import open_trainable
from short_gpt.wrappers.options import OpenOptions
from short_gpt.wrappers.short_model import ShortModel

ANSWERS_AT_ONCE = 4  # which are short
RIVAL = "rival"  # a folder of a run
KINDS = ("q8_0", "q4_k")  # for users of Hugging Face's format: 8 bits, and 4 or a little more
# Matrices in transformers that `checkpoints.rival.PLAIN` names in GGUF files.
PLAIN = re.compile(r"router|(^|\.)gate\.weight|conv1d|conv\.conv|altup|laurel")
Texts = Mapping[str, Sequence[Sequence[int]]]  # windows by kind of text


class Rival(NamedTuple):
    """The original with its layers in fewer bits."""

    name: str  # types of the layers' matrices, most bytes first: "in Q4_0 and Q3_K"
    size: int  # bytes of the file, or of the weights if they were written so
    quality: Mapping[str, Perplexity]  # by kind of text, with the distance from the original


def has_quantizer() -> bool:
    """Whether the package is installed that makes rivals."""
    return find_spec("libgguf") is not None


def rivals(
    short: ShortModel,
    texts: Texts,
    reference: Reference,
    *,
    stored: int,
    itemsize: int,
    kinds: Sequence[str] = KINDS,
) -> list[Rival]:
    """The original in 8 and in about 4 bits, rounded in memory as GGUF files are.

    Afterwards the weights are what they were, bit for bit. The machine's memory holds the layers
    once more.

    Args:
        short: The original, with all its layers.
        texts: Windows by kind of text, which ``reference`` has read with the original.
        stored: Bytes of the original's weights as they are written.
        itemsize: Bytes of a number there.
        kinds: Names of `checkpoints.rival.TYPES`.

    Raises:
        MissingPackageError: libgguf is not installed.
    """
    found: list[Rival] = []
    for kind in kinds:
        with rounded(short, kind) as (numbers, sizes):
            if sizes:  # none of a model whose weights are quantized already
                size = stored - itemsize * numbers + sizes.total()
                found.append(Rival(_name(sizes), size, _quality(short, texts, reference)))
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
                is_matrix = math.prod(weight.shape[:-1]) > 1 and not PLAIN.search(name)
                if is_matrix and weight.is_floating_point():
                    new = type_of(weight.shape, kind)
                    if weight.device.type == "cpu":
                        undo.callback(setattr, weight, "data", weight.data)
                    else:  # which may have no room for both
                        undo.callback(keep_values([weight]))
                    weight.data = _rounded(name, weight, new)
                    numbers += weight.numel()
                    sizes[new] += nbytes_of(name, tuple(weight.shape), new)
        yield numbers, sizes


def _rounded(name: str, weight: Tensor, number: int) -> Tensor:
    """A matrix as it is read of a GGUF file, in its own dtype and on its device."""
    from gguf import GGMLQuantizationType, quants

    rows = math.prod(weight.shape[:-1])
    packed = np.frombuffer(quantized(name, weight, number), np.uint8).reshape(rows, -1)
    values = quants.dequantize(packed, GGMLQuantizationType(number))  # (rows, K) in float32
    return torch.from_numpy(values).view(weight.shape).to(weight)


@contextmanager
def rival_file(source: StrPath, out: Path, folder: Path) -> Iterator[Path | None]:
    """The original GGUF model in the largest type whose file is not larger than ``out``.

    None where all are larger. It is written to ``folder``, and removed after the block. Errors are
    those of `requantized`.
    """
    kind = largest_within(source, out.stat().st_size)
    shutil.rmtree(folder / RIVAL, ignore_errors=True)  # of a run that was killed
    try:
        if kind is None:
            yield None
        else:
            (folder / RIVAL).mkdir(parents=True)
            yield requantized(source, folder / RIVAL / f"{kind}.gguf", kind)
    finally:
        shutil.rmtree(folder / RIVAL, ignore_errors=True)


def of_file(path: Path, texts: Texts, reference: Reference, opening: OpenOptions) -> Rival:
    """A rival's file, read in PyTorch beside the original's ``reference``; texts as in `rivals`."""
    short, sizes = open_trainable(str(path), opening), Counter[int]()
    for name, entry in GGUFParts(path).tensors.items():
        sizes[entry.kind] += entry.nbytes if is_quantized(name, entry.shape) else 0
    quality = _quality(short, texts, reference.through(short.decoder))
    return Rival(_name(+sizes), path.stat().st_size, quality)


def _quality(short: ShortModel, texts: Texts, reference: Reference) -> dict[str, Perplexity]:
    found = {}
    for kind, windows in texts.items():
        together = ANSWERS_AT_ONCE if all(isinstance(w, Answer) for w in windows) else 1
        read = batches(windows, together)
        found[kind] = perplexity(short.decoder, read, reference=reference)
    return found


def _name(sizes: Counter[int]) -> str:
    return "in " + " and ".join(type_name(kind) for kind, _ in sizes.most_common())
