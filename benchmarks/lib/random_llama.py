"""Checkpoints of a Llama's shapes with random weights, written tensor by tensor; their texts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from string import ascii_lowercase

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.meta import full_shapes
from llama.checkpoint.pth import TensorInfo, write_shard
from llama.formats.hf import HF, config_of, name_in, params_json, permute
from llama.formats.safetensors import Entry, grouped, tensor_bytes, write_weights
from llama.tokenizer import ALPHABET, Tokenizer, tokenizer_json, with_bos

LLAMA = ModelArgs(vocab_size=32000)  # Llama-2-7B
SHARD_BYTES = 5_000_000_000  # of a safetensors file, at most
Tensors = tuple[dict[str, TensorInfo], Callable[[str], Tensor]]


def random_tensors(
    args: ModelArgs, dtype: torch.dtype, scale: Callable[[str], float] = lambda _: 1.0
) -> Tensors:
    """All tensors in Meta's names: their descriptions, and what gives one.

    Each is another part of the same random numbers; norms are ones.

    Args:
        args: the model's shape.
        dtype: of all of them.
        scale: by which a tensor's numbers are multiplied.
    """
    shapes = full_shapes(args)
    infos = {n: TensorInfo(shape, dtype, n) for n, shape in shapes.items()}
    most = max(info.numel for info in infos.values())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(most + 64 * len(infos), generator=generator).mul_(args.dim**-0.5).to(dtype)
    first = {name: 64 * i for i, name in enumerate(infos)}

    def read(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=dtype)
        return noise[first[name] :][: infos[name].numel].view(shapes[name]) * scale(name)

    return infos, read


def write_tokenizer(args: ModelArgs, directory: Path, *, bos: bool = False) -> None:
    """A token a byte, bos and eos, and others that no text has, as many as the model has rows.

    Args:
        args: the model's shape.
        directory: an existing folder.
        bos: whether the file says that bos comes in front, as transformers wants to be told.
    """
    tokens = ["<s>", "</s>", *ALPHABET.values()]
    tokens += [f"unused{i}" for i in range(args.vocab_size - len(tokens))]
    kinds = [3, 3, *[1] * (len(tokens) - 2)]
    text = tokenizer_json(tokens, kinds, [], "gpt-2")
    (directory / "tokenizer.json").write_text(with_bos(text, "<s>", 0) if bos else text)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_meta(args: ModelArgs, tensors: Tensors, directory: Path) -> None:
    """The checkpoint in Meta's format, one shard."""
    write_tokenizer(args, directory)
    write_shard(directory / "consolidated.00.pth", *tensors)
    (directory / "params.json").write_text(json.dumps(params_json(args)))


def write_hf(
    args: ModelArgs, tensors: Tensors, directory: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """The checkpoint in Hugging Face's format, with its index; config.json comes last."""
    write_tokenizer(args, directory, bos=True)
    infos, read = tensors
    meta = {name_in(HF, name): name for name in infos}

    def pieces(name: str) -> Iterator[memoryview]:
        yield from tensor_bytes(permute(meta[name], read(meta[name]), args, to=HF))

    entries = {name: Entry.of(infos[of].dtype, infos[of].shape) for name, of in meta.items()}
    write_weights(directory, grouped(entries, shard_bytes), pieces)
    dtype = next(iter(infos.values())).dtype
    tokenizer = Tokenizer(directory / "tokenizer.json")
    config, _ = config_of(args, dtype, tied=False, tokenizer=tokenizer, record={})
    (directory / "config.json").write_text(json.dumps(config))


def letters(count: int, source: random.Random) -> str:
    """A text of so many tokens: words of random letters, a token a letter."""
    return "".join(source.choice(ascii_lowercase + " ") for _ in range(count))
