"""Other checkpoint formats to Meta's and back: Hugging Face directories, GGUF files.

Weights are copied one tensor at a time, and so the largest bounds the memory. Arguments without a
description are those of `reshard`. All raise InputError if the source is damaged or not a Llama.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.meta import (
    CONVERSION,
    Checkpoint,
    check_shards,
    check_vocabulary,
    copy_tokenizer,
    read_conversion,
    write_model,
)
from llama.checkpoint.pth import TensorInfo
from llama.checkpoint.sharding import EMBEDDING, OUTPUT, full_shapes
from llama.formats.gguf import GGUFFile
from llama.formats.hf import HFCheckpoint, config_of, for_older_readers
from llama.formats.names import HF, name_in, params_json, permute
from llama.formats.safetensors import Entry, grouped, tensor_bytes, write_weights
from llama.formats.tokenizers import write_tokenizer
from llama.io.files import check_new, new_directory
from llama.io.json_files import JsonObject, read_json, write_json
from llama.io.sources import public_name, resolve
from llama.parallel import choose_dtype
from llama.tokenizer import Tokenizer, find_tokenizer


def gguf_to_meta(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    shards: int = 1,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] = str,
) -> Path:
    """Writes a GGUF file of a Llama model as a Meta checkpoint directory; see `reshard`.

    Quantized weights become what they stand for; in float32, exactly. Tied embeddings are
    stored once. The tokenizer is written as ``tokenizer.json`` or, if it is SentencePiece's, as
    ``tokenizer.model``.
    """
    source = GGUFFile(Path(str(path)))
    args, kind = source.args(), choose_dtype(dtype, torch.device("cpu"))
    check_shards(args, shards)
    tokenizer, content, config = source.tokenizer()
    infos = {n: TensorInfo(s, kind, source.name_of(n)) for n, s in full_shapes(args).items()}

    def read(name: str) -> Tensor:
        progress(name)
        return source.read(source.name_of(name))

    out = Path(str(out_dir))
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=source.path)
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        (partial / tokenizer).write_bytes(content)
        own = Tokenizer(partial / tokenizer)
        other = "write Hugging Face's format"
        check_vocabulary(own, tokenizer, args.vocab_size, source.path, advice=other)
        write_model(partial, args, infos, read, shards=shards)
        write_json(partial / "params.json", params_json(args))
        write_json(partial / "tokenizer_config.json", config)
        record = {"source": source.path.name, "dtype": str(kind), **source.context()}
        write_json(partial / CONVERSION, record)
        verify(partial)
    return out


def hf_to_meta(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    shards: int = 1,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] = str,
) -> Path:
    """Writes a Hugging Face Llama as a Meta checkpoint directory; see `reshard`.

    ``source`` is a directory with ``config.json`` and safetensors, or a hub id; a ``dtype`` of None
    keeps each weight's. Tied embeddings are stored once.
    """
    directory, out = resolve(source), Path(str(out_dir))
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=directory)
    opened = HFCheckpoint(directory, dtype)
    check_shards(opened.args, shards)
    ids, tokenizer = opened.args.vocab_size, opened.tokenizer
    check_vocabulary(Tokenizer(tokenizer), tokenizer, ids, source, advice="write GGUF")

    def read(name: str) -> Tensor:
        progress(name)
        return opened.read(name)

    # what Meta's format cannot say, for the way back
    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    record: JsonObject = {
        "source": public_name(source),
        "dtype": None if dtype is None else str(dtype),
    }
    record |= {key: opened.config[key] for key in kept if key in opened.config}
    generation = directory / "generation_config.json"
    if generation.is_file():
        record["generation_config"] = read_json(generation)
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        copy_tokenizer(tokenizer, partial)
        write_model(partial, opened.args, opened.infos, read, shards=shards)
        write_json(partial / "params.json", params_json(opened.args))
        write_json(partial / CONVERSION, record)
        verify(partial)
    return out


def meta_to_hf(
    ckpt_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] = str,
) -> Path:
    """Writes a Meta checkpoint as a directory for ``AutoModelForCausalLM.from_pretrained``.

    Model-parallel shards are merged. An output head equal to the embedding is stored once, as tied.
    ``max_shard_bytes`` limits a safetensors file; more are written with their index.
    """
    source, out = Checkpoint(ckpt_dir), Path(str(out_dir))
    tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(source.directory)
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=source.directory)
    tied, infos = source.is_tied(), source.shards[0].infos
    shapes = {n: s for n, s in full_shapes(source.args).items() if not (tied and n == OUTPUT)}
    meta_names = {name_in(HF, name): name for name in shapes}
    entries = {hf: Entry.of(infos[name].dtype, shapes[name]) for hf, name in meta_names.items()}

    def read(hf_name: str) -> Iterator[memoryview]:
        name = meta_names[hf_name]
        progress(name)
        yield from tensor_bytes(permute(name, source.read(name), source.args, to=HF))

    dtype, record = infos[EMBEDDING].dtype, read_conversion(source.directory)
    config, generation = config_of(  # keeps no tokenizer: a vocabulary takes as much as a tensor
        source.args, dtype, tied=tied, tokenizer=Tokenizer(tokenizer), record=record
    )
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        write_tokenizer(tokenizer, partial)
        write_weights(partial, grouped(entries, max_shard_bytes), read)
        write_json(partial / "config.json", config)
        for_older_readers(partial)
        write_json(partial / "generation_config.json", generation)
        write_json(partial / CONVERSION, {"source": public_name(ckpt_dir)})
        verify(partial)
    return out
