"""GGUF files of Llamas in Meta's keys and names; from every format to GGUF, and to Meta's."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive, check_split
from llama.checkpoint.meta import (
    CONVERSION,
    EMBEDDING,
    OUTPUT,
    Checkpoint,
    check_vocabulary,
    copy_records,
    copy_tokenizer,
    full_shapes,
    read_conversion,
    write_model,
)
from llama.checkpoint.pth import TensorInfo
from llama.errors import InputError, check, check_file
from llama.files import (
    JsonObject,
    StrPath,
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
    write_file,
)
from llama.formats.hf import (
    GGUF,
    HFCheckpoint,
    check_tensors,
    ffn_keys,
    longest_window,
    name_in,
    params_json,
)
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
            factor = llama3_factor(self.read(ROPE_FACTORS), args.head_dim, args.rope_theta)
            if factor is None:
                raise InputError(f"{self.path} scales its rotary frequencies unlike Llama 3.1")
            args.use_scaled_rope, args.rope_scaling_factor = True, factor
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

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the file of its tokenizer, and ``tokenizer_config.json``."""
        name, content, config = gguf_tokenizer(self)
        (folder / name).write_bytes(content)
        write_json(folder / "tokenizer_config.json", config)


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
    source: StrPath,
    out: StrPath,
    *,
    kind: str | None = None,
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
        out: The new file; it and what is not named here are as in `to_meta`.
        kind: Type of the matrices: "f32", "f16", "bf16" or "q8_0". Default: the source's.
        also: Further keys, whose values are texts.
        exact: Refuse a ``kind`` that rounds the weights, because ``verify`` compares logits.
        verify: Called with the complete file, under a temporary name, before it is renamed.
    """
    path = Path(str(out))
    replaces = partial(has_key, key=SOURCE_KEY)
    check_output(path, overwrite=overwrite, replaces=replaces)
    source = find_source(source)
    opened = open_meta(source) if source.kind == "meta" else open_hf(source)
    own_kind = SOURCE_TYPES.get(opened.infos[EMBEDDING].dtype, "f32")
    tensors = _tensors(opened, kind or own_kind)
    rounds = exact and kind not in (None, "f32", own_kind)
    check(not rounds, "type", kind, "one that keeps the weights, as `verify` is set")
    records = _shape_records(opened) | vocabulary(opened.tokenizer, opened.args.vocab_size)
    matrices = [tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1]
    file_type = FILE_TYPES[max(FILE_TYPES, key=matrices.count)]  # of most matrices
    records["general.file_type"] = record("general.file_type", file_type, UINT32)
    for key, value in {SOURCE_KEY: public_name(source), **(also or {})}.items():
        records[key] = record(key, value, STRING)
    with new_file(path, overwrite=overwrite, replaces=replaces) as file:
        write_file(file, records, tensors, progress=progress)
        if verify is not None:
            verify(file)
    return path


class Llama(NamedTuple):
    """A Llama of any format, opened; its weights are read later.

    ``read`` gives a full tensor by Meta's name, with Meta's order of rows. ``tokenizer`` is its
    file, or for messages its name; ``write_tokenizer`` writes it into a directory in Meta's format.
    ``record`` is what Meta's format cannot say, by the names of ``config.json``.
    """

    name: str
    args: ModelArgs
    params: JsonObject  # the content of params.json
    infos: Mapping[str, TensorInfo]
    read: Callable[[str], Tensor]
    is_tied: Callable[[], bool]
    tokenizer: Path
    write_tokenizer: Callable[[Path], object]
    record: JsonObject
    vocab_parallel: bool | None = None


def _shape_records(opened: Llama) -> dict[str, Record]:
    args = opened.args
    context = opened.record.get("max_position_embeddings", longest_window(args))
    check_positive(max_position_embeddings=context)
    values: dict[str, tuple[object, int]] = {
        "general.architecture": ("llama", STRING),
        "general.type": ("model", STRING),
        "general.name": (opened.name, STRING),
        "llama.block_count": (args.n_layers, UINT32),
        "llama.context_length": (context, UINT32),
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


def open_meta(source: StrPath) -> Llama:
    """A directory in Meta's format, whose tokenizer is in it or its parent."""
    checkpoint = Checkpoint(source)
    folder = checkpoint.directory
    tokenizer = find_tokenizer(folder)
    Tokenizer(tokenizer)
    return Llama(
        folder.resolve().name,
        checkpoint.args,
        checkpoint.params.get("model", checkpoint.params),
        checkpoint.infos,
        checkpoint.read,
        checkpoint.is_tied,
        tokenizer,
        partial(copy_tokenizer, tokenizer),
        read_conversion(folder),
        checkpoint.vocab_parallel,
    )


def open_hf(source: StrPath) -> Llama:
    """A directory in Hugging Face's format, or a model of the hub."""
    hf = HFCheckpoint(resolve(source))
    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    record: JsonObject = {"max_position_embeddings": 2048}  # transformers' own, where it has none
    record |= {key: hf.config[key] for key in kept if key in hf.config}
    generation = hf.directory / "generation_config.json"
    if generation.is_file():
        record["generation_config"] = read_json(generation)
    return Llama(
        Path(str(source)).name,
        hf.args,
        params_json(hf.args),
        hf.infos,
        hf.read,
        lambda: hf.tied,
        hf.tokenizer,
        partial(copy_tokenizer, hf.tokenizer),
        record,
    )


def open_gguf(source: StrPath) -> Llama:
    """A GGUF file, dequantized to float32."""
    file = GGUFFile(Path(str(source)))
    args, context = file.args(), file.get("llama.context_length")
    names = {name: file.name_of(name) for name in full_shapes(args)}
    return Llama(
        file.path.name,
        args,
        params_json(args),
        {n: TensorInfo(s, torch.float32, names[n]) for n, s in full_shapes(args).items()},
        lambda name: file.read(names[name]),
        lambda: names[OUTPUT] == names[EMBEDDING],
        file.path,
        file.write_tokenizer,
        {} if context is None else {"max_position_embeddings": context},
    )


def _tensors(opened: Llama, kind: str) -> dict[str, Stored]:
    check(kind in TYPES, "type", kind, f"one of {', '.join(TYPES)}")

    def pack(name: str, ggml_type: int) -> list[bytes]:
        return [packed(name, opened.read(name), ggml_type)]

    args, tied = opened.args, opened.is_tied()
    tensors: dict[str, Stored] = {}
    for name, shape in full_shapes(args).items():
        if tied and name == OUTPUT:
            continue
        ggml_type = writable(TYPES[kind], shape) if len(shape) > 1 else F32
        size = nbytes_of(name, shape, ggml_type)
        chunks = partial(pack, name, ggml_type)
        tensors[name_in(GGUF, name)] = Stored(shape, ggml_type, size, chunks)
    if args.rope_factor is not None:
        plain = rope_frequencies(args.head_dim, args.rope_theta)
        divisors = plain / rope_frequencies(args.head_dim, args.rope_theta, args.rope_factor)
        tensors[ROPE_FACTORS] = stored(ROPE_FACTORS, divisors, F32)
    return tensors


def to_meta(
    source: StrPath,
    out_dir: StrPath,
    *,
    dtype: str | torch.dtype | None = None,
    shards: int = 1,
    also: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[str], object] = str,
    verify: Callable[[Path], object] = str,
) -> Path:
    """Writes a Llama of any format as a Meta checkpoint directory, tensor by tensor.

    From Meta's format the number of files changes: there and back gives the same bits. The
    embedding stays cut the way it is, see `by_vocabulary` of `llama.checkpoint.meta`. Tied
    embeddings are stored once. Quantized weights become what they stand for; in float32, exactly.

    Args:
        source: Directory in Meta's or Hugging Face's format, GGUF file, or hub id.
        out_dir: The new directory; appears complete or not at all.
        dtype: Dtype of the weights. Default: the source's; of GGUF float32.
        shards: Number of files: the model-parallel ranks that will read the checkpoint.
        also: Names of a Meta directory's JSON files to copy, where they exist.
        overwrite: Replace an earlier conversion; nothing else ever is. Default: False.
        progress: Called with every tensor's name before it is written.
        verify: Called with the finished directory before it is renamed; may raise.
    """
    source, out = find_source(source), Path(str(out_dir))
    check_new(out, marker=CONVERSION, overwrite=overwrite, source=source.path)
    opened = {"meta": open_meta, "gguf": open_gguf}.get(source.kind, open_hf)(source)
    check(1 <= shards <= 100, "shards", shards, "1 to 100")
    check_split(opened.args, shards)
    kind = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    infos = {n: TensorInfo(i.shape, kind or i.dtype, i.storage) for n, i in opened.infos.items()}

    def read(name: str) -> Tensor:
        progress(name)
        return opened.read(name)

    record = {**opened.record, "source": public_name(source), "shards": shards}
    record |= {} if kind is None else {"dtype": str(kind)}
    with new_directory(out, marker=CONVERSION, overwrite=overwrite) as partial:
        opened.write_tokenizer(partial)
        if source.kind != "meta":
            words, ids = Tokenizer(find_tokenizer(partial)), opened.args.vocab_size
            other = "Hugging Face's format" if source.kind == "gguf" else "GGUF"
            check_vocabulary(words, opened.tokenizer, ids, source, advice=f"write {other}")
        by = opened.vocab_parallel
        write_model(partial, opened.args, infos, read, shards=shards, vocab_parallel=by)
        write_json(partial / "params.json", opened.params)
        copy_records(source.path, partial, also)
        write_json(partial / CONVERSION, record)
        verify(partial)
    return out
