"""Other checkpoint formats to Meta's and back: Hugging Face directories, GGUF files.

One table of weight names serves every direction; weights go over one tensor at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.archive import TensorInfo
from llama.args import ModelArgs
from llama.checkpoint import CONVERSION, Checkpoint, copy_tokenizer
from llama.files import check_new, new_directory, write_json
from llama.parallel import choose_dtype
from llama.reshard import check_shards, write_model
from llama.safetensors_file import Entry, grouped, open_weights, tensor_bytes, write_weights
from llama.sharding import EMBEDDING, OUTPUT, full_shapes
from llama.tokenizer import Tokenizer, find_tokenizer

# The names of a weight in Meta's, Hugging Face's and GGUF's format; {} is the layer.
META, HF, GGUF = range(3)
NAMES = (
    ("tok_embeddings.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "model.norm.weight", "output_norm.weight"),
    ("output.weight", "lm_head.weight", "output.weight"),
    *(
        (f"layers.{{}}.{meta}.weight", f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight")
        for meta, hf, gguf in (
            ("attention.wq", "self_attn.q_proj", "attn_q"),
            ("attention.wk", "self_attn.k_proj", "attn_k"),
            ("attention.wv", "self_attn.v_proj", "attn_v"),
            ("attention.wo", "self_attn.o_proj", "attn_output"),
            ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
            ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
            ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
            ("attention_norm", "input_layernorm", "attn_norm"),
            ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
        )
    ),
)


def name_in(column: int, meta_name: str) -> str:
    """The name of Meta's weight in another column of `NAMES`."""
    number = re.match(r"layers\.(\d+)\.", meta_name)
    template = re.sub(r"^layers\.\d+\.", "layers.{}.", meta_name)
    row = next(row for row in NAMES if row[META] == template)
    return row[column].format(number[1] if number else "")


def permute(meta_name: str, weight: Tensor, args: ModelArgs, *, to: int) -> Tensor:
    """Rows of wq and wk in the other order; every other weight as it is.

    Meta rotates the neighbours (2i, 2i + 1) of a head, Hugging Face i and i + hd / 2.

    Args:
        meta_name: of the weight.
        weight: (H hd, D), H heads of width hd.
        args: tells the numbers of heads.
        to: `HF` from Meta's order, or `META` from Hugging Face's.
    """
    heads = {"wq": args.n_heads, "wk": args.kv_heads}.get(meta_name.split(".")[-2])
    if heads is None:
        return weight
    half = args.head_dim // 2
    parts = (half, 2) if to == HF else (2, half)
    return weight.unflatten(0, (heads, *parts)).transpose(1, 2).flatten(0, 2)


def gguf_to_meta(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    shards: int = 1,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a GGUF file of a Llama model as a Meta checkpoint directory.

    Quantized weights become what they stand for; in float32, exactly. Tied embeddings are
    stored once. The tokenizer is written as ``tokenizer.json``.

    Args:
        path: the GGUF file.
        out_dir: the new directory; appears whole or not at all.
        dtype: of the weights.
        shards: number of files: the model-parallel ranks that the checkpoint is made for.
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, or not a Llama: the message names what differs.
        ImportError: the package gguf is missing.
    """
    from llama.gguf_file import GGUFFile

    source = GGUFFile(Path(str(path)))
    args, kind = source.args(), choose_dtype(dtype, torch.device("cpu"))
    check_shards(args, shards)
    tokenizer = source.tokenizer()
    infos = {
        name: TensorInfo(shape, kind, source.name_of(name))
        for name, shape in full_shapes(args).items()
    }

    def read(name: str) -> Tensor:
        progress(name)
        return source.read(source.name_of(name)).to(kind)

    replaces = CONVERSION if overwrite else None
    check_new(Path(str(out_dir)), replaces=replaces, source=source.path)
    with new_directory(Path(str(out_dir)), replaces=replaces) as partial:
        write_model(partial, args, infos, read, shards=shards)
        write_json(partial / "params.json", params_json(args))
        (partial / "tokenizer.json").write_text(tokenizer[0], encoding="utf-8")
        write_json(partial / "tokenizer_config.json", tokenizer[1])
        write_json(partial / CONVERSION, {"source": source.path.name, "dtype": str(kind)})
    return Path(str(out_dir))


def hf_to_meta(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    shards: int = 1,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
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

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: config, weights or tokenizer are missing.
        ValueError: a file is damaged, or not a Llama: the message names what differs.
        ConnectionError: a hub id cannot be fetched.
    """
    from llama.hf_llama import find_hf_tokenizer, read_json
    from llama.hub import resolve

    directory, out = resolve(source), Path(str(out_dir))
    replaces = CONVERSION if overwrite else None
    check_new(out, replaces=replaces, source=directory)
    config, weights = read_json(directory / "config.json"), open_weights(directory)
    args, infos = check_llama(directory, dtype)
    check_shards(args, shards)

    def read(name: str) -> Tensor:
        progress(name)
        hf_name = name_in(HF, name)
        return permute(name, weights[hf_name].read(hf_name), args, to=META).to(infos[name].dtype)

    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    record: dict[str, Any] = {"source": str(source), "dtype": None if dtype is None else str(dtype)}
    record |= {key: config[key] for key in kept if key in config}
    if (directory / "generation_config.json").is_file():
        record["generation_config"] = read_json(directory / "generation_config.json")
    with new_directory(out, replaces=replaces) as partial:
        copy_tokenizer(find_hf_tokenizer(directory), partial)
        write_model(partial, args, infos, read, shards=shards)
        write_json(partial / "params.json", params_json(args))
        write_json(partial / CONVERSION, record)
    return out


def check_llama(
    directory: str | os.PathLike[str], dtype: str | torch.dtype | None = None
) -> tuple[ModelArgs, dict[str, TensorInfo]]:
    """The shape of a Hugging Face Llama and its tensors in Meta's format, from the headers alone.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as for `hf_to_meta`.
    """
    from llama.hf_llama import args_of, find_hf_tokenizer, meta_infos, read_json
    from llama.hub import resolve

    directory = resolve(directory)
    config = read_json(directory / "config.json")
    args, weights = args_of(config, directory), open_weights(directory)
    tied = bool(config.get("tie_word_embeddings", False))
    find_hf_tokenizer(directory)
    return args, meta_infos(args, weights, dtype, tied, directory)


def meta_to_hf(
    ckpt_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    tokenizer_path: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
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

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: checkpoint or tokenizer are missing.
        ValueError: the checkpoint cannot be read.
    """
    from llama.hf_llama import config_of, read_json, write_tokenizer

    source, out = Checkpoint(ckpt_dir), Path(str(out_dir))
    tokenizer = Path(str(tokenizer_path)) if tokenizer_path else find_tokenizer(source.directory)
    replaces = CONVERSION if overwrite else None
    check_new(out, replaces=replaces, source=source.directory)
    tied, infos = _tied(source), source.shards[0].infos
    shapes = {n: s for n, s in full_shapes(source.args).items() if not (tied and n == OUTPUT)}
    meta_names = {name_in(HF, name): name for name in shapes}
    entries = {hf: Entry.of(infos[name].dtype, shapes[name]) for hf, name in meta_names.items()}

    def read(hf_name: str) -> Iterator[memoryview]:
        name = meta_names[hf_name]
        progress(name)
        yield from tensor_bytes(permute(name, source.read(name), source.args, to=HF))

    earlier = source.directory / CONVERSION
    record = read_json(earlier) if earlier.is_file() else {}
    dtype = infos[EMBEDDING].dtype
    config, generation = config_of(source.args, dtype, tied, Tokenizer(tokenizer), record)
    with new_directory(out, replaces=replaces) as partial:
        write_tokenizer(tokenizer, partial)
        write_weights(partial, grouped(entries, max_shard_bytes), read)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", generation)
        write_json(partial / CONVERSION, {"source": str(ckpt_dir)})
    return out


def _tied(source: Checkpoint) -> bool:
    """Whether output head and embedding are the same, bit for bit; compared shard by shard."""
    first = source.shards[0].infos
    if first[OUTPUT].dtype != first[EMBEDDING].dtype:
        return False
    for rank, shard in enumerate(source.shards):
        head, rows = shard.read(OUTPUT), shard.infos[OUTPUT].shape[0]
        if len(source.shards) == 1 or source.vocab_parallel:
            embedding = shard.read(EMBEDDING)
        else:
            part = slice(rank * rows, (rank + 1) * rows)
            embedding = torch.cat([s.read(EMBEDDING)[part] for s in source.shards], 1)
        if not torch.equal(head, embedding):
            return False
    return True


def params_json(args: ModelArgs) -> dict[str, Any]:
    """The content of a ``params.json`` for these arguments; keys of no effect are left out."""
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"]
    names += ["ffn_dim_multiplier", "norm_eps", "rope_theta"]
    if args.use_scaled_rope:
        names += ["use_scaled_rope", "rope_scaling_factor"]
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def ffn_keys(dim: int, width: int) -> dict[str, Any]:
    """``multiple_of`` (and ``ffn_dim_multiplier``) with which a feed-forward layer is so wide."""
    for multiple_of in (256, 1024, 4096):
        if ModelArgs(dim=dim, multiple_of=multiple_of).ffn_dim == width:
            return {"multiple_of": multiple_of}
    multiplier = (width + 0.5) / int(2 * (4 * dim) / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}
