"""Other checkpoint formats to Meta's and back: Hugging Face directories, GGUF files.

One table of weight names serves every direction; weights go over one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.meta import CONVERSION, Checkpoint, copy_tokenizer, read_conversion
from llama.checkpoint.pth import TensorInfo
from llama.checkpoint.reshard import check_shards, write_model
from llama.checkpoint.sharding import EMBEDDING, OUTPUT, full_shapes
from llama.formats.gguf import GGUFFile
from llama.formats.hf import args_of, config_of, meta_infos
from llama.formats.names import HF, META, name_in, params_json, permute
from llama.formats.safetensors import Entry, grouped, open_weights, tensor_bytes, write_weights
from llama.formats.tokenizers import find_hf_tokenizer, write_tokenizer
from llama.io.files import check_new, new_directory
from llama.io.json_files import JsonObject, read_json, write_json
from llama.io.sources import resolve
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
    """Writes a GGUF file of a Llama model as a Meta checkpoint directory.

    Quantized weights become what they stand for; in float32, exactly. Tied embeddings are
    stored once. The tokenizer is written as ``tokenizer.json``, or as ``tokenizer.model`` if it is
    SentencePiece's.

    Args:
        path: the GGUF file.
        out_dir: the new directory; appears whole or not at all.
        dtype: of the weights.
        shards: number of files: the model-parallel ranks that the checkpoint is made for.
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.
        verify: called with the finished directory before it takes its place; may raise.

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: no such file.
        InputError: not a GGUF file, or not a Llama: the message names what differs.
        MissingPackageError: the package gguf is missing.
    """
    source = GGUFFile(Path(str(path)))
    args, kind = source.args(), choose_dtype(dtype, torch.device("cpu"))
    check_shards(args, shards)
    tokenizer, words, config = source.tokenizer()
    infos = {
        name: TensorInfo(shape, kind, source.name_of(name))
        for name, shape in full_shapes(args).items()
    }

    def read(name: str) -> Tensor:
        progress(name)
        return source.read(source.name_of(name)).to(kind)

    out = Path(str(out_dir))
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=source.path)
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        write_model(partial, args, infos, read, shards=shards)
        write_json(partial / "params.json", params_json(args))
        (partial / tokenizer).write_bytes(words)
        write_json(partial / "tokenizer_config.json", config)
        record = {"source": source.path.name, "dtype": str(kind), **source.without_place()}
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
    """Writes a Hugging Face Llama as a Meta checkpoint directory, tensor by tensor.

    Memory is bounded by the largest tensor. Tied embeddings are stored once.

    Args:
        source: a directory with ``config.json`` and safetensors, or a hub id.
        out_dir: the new directory; appears whole or not at all.
        dtype: of the weights; None keeps each one's.
        shards: number of files: the model-parallel ranks that the checkpoint is made for.
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.
        verify: called with the finished directory before it takes its place; may raise.

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: config, weights or tokenizer are missing.
        InputError: a file is damaged, or not a Llama: the message names what differs.
        ConnectionError: a hub id cannot be fetched.
    """
    directory, out = resolve(source), Path(str(out_dir))
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=directory)
    weights = open_weights(directory)
    args, infos = check_llama(directory, dtype)
    check_shards(args, shards)

    def read(name: str) -> Tensor:
        progress(name)
        hf_name = name_in(HF, name)
        return permute(name, weights[hf_name].read(hf_name), args, to=META).to(infos[name].dtype)

    conversion = {"source": str(source), "dtype": None if dtype is None else str(dtype)}
    record = conversion | _without_place(directory)
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        copy_tokenizer(find_hf_tokenizer(directory), partial)
        write_model(partial, args, infos, read, shards=shards)
        write_json(partial / "params.json", params_json(args))
        write_json(partial / CONVERSION, record)
        verify(partial)
    return out


def _without_place(directory: Path) -> JsonObject:
    """What Meta's format has no place for, kept in ``conversion.json`` for the way back."""
    config, generation = read_json(directory / "config.json"), directory / "generation_config.json"
    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    record = {key: config[key] for key in kept if key in config}
    return record | ({"generation_config": read_json(generation)} if generation.is_file() else {})


def check_llama(
    directory: str | os.PathLike[str], dtype: str | torch.dtype | None = None
) -> tuple[ModelArgs, dict[str, TensorInfo]]:
    """The shape of a Hugging Face Llama and its tensors in Meta's format, from the headers alone.

    Raises:
        FileNotFoundError, InputError, ConnectionError: as for `hf_to_meta`.
    """
    directory = resolve(directory)
    config = read_json(directory / "config.json")
    args, weights = args_of(config, directory), open_weights(directory)
    tied = bool(config.get("tie_word_embeddings", False))
    find_hf_tokenizer(directory)
    return args, meta_infos(args, weights, dtype, tied=tied, directory=directory)


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

    Model-parallel shards are merged; memory is bounded by the largest tensor. An output head
    equal to the embedding is stored once, as tied.

    Args:
        ckpt_dir: the Meta checkpoint directory.
        out_dir: the new directory; appears whole or not at all.
        tokenizer_path: tokenizer file; None looks beside the checkpoint.
        max_shard_bytes: limit of a safetensors file; more are written with their index.
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.
        verify: called with the finished directory before it takes its place; may raise.

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: checkpoint or tokenizer are missing.
        InputError: the checkpoint cannot be read.
    """
    source, out = Checkpoint(ckpt_dir), Path(str(out_dir))
    tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(source.directory)
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=source.directory)
    tied, infos = is_tied(source), source.shards[0].infos
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
        write_json(partial / "generation_config.json", generation)
        write_json(partial / CONVERSION, {"source": str(ckpt_dir)})
        verify(partial)
    return out


def is_tied(source: Checkpoint) -> bool:
    """Whether output head and embedding are the same, bit for bit; compared shard by shard."""
    first = source.shards[0].infos
    if first[OUTPUT].dtype != first[EMBEDDING].dtype:
        return False
    for rank, shard in enumerate(source.shards):
        head, rows = shard.read(OUTPUT), shard.infos[OUTPUT].shape[0]
        # the head is always cut by vocabulary; an embedding cut by width is joined for these rows
        if len(source.shards) == 1 or source.vocab_parallel:
            embedding = shard.read(EMBEDDING)
        else:
            part = slice(rank * rows, (rank + 1) * rows)
            embedding = torch.cat([s.read(EMBEDDING)[part] for s in source.shards], 1)
        if not torch.equal(head, embedding):
            return False
    return True
