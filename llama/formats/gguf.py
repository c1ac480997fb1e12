"""A GGUF file of a Llama model, in Meta's keys and names."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive
from llama.checkpoint.sharding import full_shapes
from llama.errors import InputError
from llama.formats.gguf_parts import GGUFParts
from llama.formats.names import GGUF, check_layers, check_tensors, ffn_keys, name_in
from llama.formats.tokenizers import gguf_tokenizer
from llama.io.json_files import JsonObject
from llama.rope import rope_frequencies

ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A GGUF file, opened and found to be one of a Llama model.

    Raises:
        FileNotFoundError: no such file.
        InputError: not a GGUF file, or of another architecture.
        MissingPackageError: the package gguf is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._parts = path, GGUFParts(path)
        self.fields, self.tensors = self._parts.fields, self._parts.tensors
        if self.get("general.architecture") != "llama":
            way = shlex.join(["short-gpt", "convert", str(path), "DIRECTORY", "--to", "hf"])
            raise InputError(
                f"{path} holds architecture {self.get('general.architecture')!r}; expected 'llama' "
                f"for Meta's format; another family goes to Hugging Face's: {way}"
            )

    def get(self, key: str, default: object = None) -> Any:
        """The value of a key of the metadata."""
        return self.fields.get(key, default)

    def need(self, key: str) -> Any:
        """The value of a key; InputError if the file lacks it."""
        if key not in self.fields:
            raise InputError(f"{self.path} lacks the key {key}")
        return self.get(key)

    def read(self, name: str) -> Tensor:
        """A tensor of this name in GGUF, dequantized, in memory of its own."""
        return self._parts.read(name)

    def name_of(self, meta_name: str) -> str:
        """GGUF's name of a tensor; the output head is the embedding where it has none."""
        name = name_in(GGUF, meta_name)
        return "token_embd.weight" if name not in self.tensors and name == "output.weight" else name

    def args(self) -> ModelArgs:
        """The model's shape; InputError where it is no Llama that Meta's code could run."""
        args = self._args()
        args.check()
        self._check(args)
        if ROPE_FACTORS in self.tensors:
            args.use_scaled_rope = True
            args.rope_scaling_factor = self._rope_factor(args)
        return args

    def _args(self) -> ModelArgs:
        need = self.need
        dim, heads = need("llama.embedding_length"), need("llama.attention.head_count")
        layers, width = need("llama.block_count"), need("llama.feed_forward_length")
        check_positive(embedding_length=dim, block_count=layers, feed_forward_length=width)
        check_layers(self.path, layers, self.tensors)
        if "token_embd.weight" not in self.tensors:
            raise InputError(f"{self.path} lacks token_embd.weight")
        return ModelArgs(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=self.get("llama.attention.head_count_kv", heads),
            vocab_size=self.tensors["token_embd.weight"].shape[0],
            norm_eps=_decimal(need("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_decimal(self.get("llama.rope.freq_base", 10000.0)),
            **ffn_keys(dim, width),
        )

    def _check(self, args: ModelArgs) -> None:
        expected = {
            "llama.rope.dimension_count": args.head_dim,
            "llama.attention.key_length": args.head_dim,
            "llama.attention.value_length": args.head_dim,
            "llama.expert_count": 0,
            "llama.rope.scaling.type": "none",
        }
        for key, value in expected.items():
            if self.get(key, value) != value:
                raise InputError(
                    f"{self.path} has {key} = {self.get(key)!r}; Meta's Llama has {value!r}"
                )
        self._check_names(args)

    def _check_names(self, args: ModelArgs) -> None:
        needed = {self.name_of(name) for name in full_shapes(args)}
        check_tensors(self.path, self.tensors.keys(), needed, ignored={ROPE_FACTORS})
        for name, shape in full_shapes(args).items():
            actual = self.tensors[self.name_of(name)].shape
            if actual != shape:
                raise InputError(
                    f"{self.name_of(name)} in {self.path} has shape {list(actual)}; its metadata "
                    f"gives {list(shape)}"
                )

    def _rope_factor(self, args: ModelArgs) -> float:
        """Llama 3.1's factor from the file's divisors of the rotary frequencies."""
        divisors = self.read(ROPE_FACTORS)
        factor = float(divisors.max())
        plain = rope_frequencies(args.head_dim, args.rope_theta)
        scaled = rope_frequencies(args.head_dim, args.rope_theta, factor)
        if not torch.allclose(plain / divisors, scaled, rtol=1e-4, atol=0):
            raise InputError(f"{self.path} scales its rotary frequencies unlike Llama 3.1")
        return factor

    def without_place(self) -> JsonObject:
        """What Meta's format has no place for, by the names of ``config.json``."""
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
    if not isinstance(value, float):
        raise InputError(f"expected a decimal number in the metadata, got {value!r}")
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))
