"""A GGUF file of a Llama model, in Meta's keys and names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.sharding import full_shapes
from llama.errors import InputError, MissingPackageError
from llama.formats.hf import with_bos
from llama.formats.names import GGUF, ffn_keys, name_in
from llama.model import rope_frequencies
from llama.tokenizer import tokenizer_json

ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A GGUF file, opened and found to be one of a Llama model.

    Raises:
        FileNotFoundError: no such file.
        InputError: not a GGUF file, or of another architecture.
        MissingPackageError: the package gguf is missing.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"GGUF file {path} does not exist")
        try:
            import gguf
        except ImportError:
            raise MissingPackageError('reading GGUF needs: pip install "short-gpt[demo]"') from None
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise InputError(f"{path} is not a complete GGUF file: {error}") from None
        self.fields = {name: field.contents for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.quants.dequantize
        if self.get("general.architecture") != "llama":
            raise InputError(
                f"{path} holds architecture {self.get('general.architecture')!r}; expected 'llama'"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields[key]() if key in self.fields else default

    def need(self, key: str) -> Any:
        if key not in self.fields:
            raise InputError(f"{self.path} lacks the key {key}")
        return self.get(key)

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())

    def name_of(self, meta_name: str) -> str:
        """GGUF's name of a tensor; the output head is the embedding where it has none."""
        name = name_in(GGUF, meta_name)
        return "token_embd.weight" if name not in self.tensors and name == "output.weight" else name

    def args(self) -> ModelArgs:
        """The model's shape; InputError where it is no Llama that Meta's code could run."""
        need = self.need
        dim, heads = need("llama.embedding_length"), need("llama.attention.head_count")
        if "token_embd.weight" not in self.tensors:
            raise InputError(f"{self.path} lacks token_embd.weight")
        args = ModelArgs(
            dim=dim,
            n_layers=need("llama.block_count"),
            n_heads=heads,
            n_kv_heads=self.get("llama.attention.head_count_kv", heads),
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]),
            norm_eps=_decimal(need("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_decimal(self.get("llama.rope.freq_base", 10000.0)),
            **ffn_keys(dim, need("llama.feed_forward_length")),
        )
        args.check()
        self._check(args)
        if ROPE_FACTORS in self.tensors:
            args.use_scaled_rope = True
            args.rope_scaling_factor = self._rope_factor(args)
        return args

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
        wanted = {self.name_of(name) for name in full_shapes(args)}
        unknown = sorted(self.tensors.keys() - wanted - {ROPE_FACTORS})
        missing = sorted(wanted - self.tensors.keys())
        if unknown or missing:
            raise InputError(
                f"{self.path} is not a plain Llama: it lacks tensors {missing[:3]} and has "
                f"others {unknown[:3]}"
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

    def tokenizer(self) -> tuple[str, Mapping[str, Any]]:
        """The texts of ``tokenizer.json`` and the content of ``tokenizer_config.json``."""
        kind = self.need("tokenizer.ggml.model")
        if kind != "gpt2":
            raise InputError(
                f"{self.path} has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') "
                "can be converted"
            )
        tokens, pre = self.need("tokenizer.ggml.tokens"), self.get("tokenizer.ggml.pre", "default")
        text = tokenizer_json(
            tokens,
            self.need("tokenizer.ggml.token_type"),
            self.need("tokenizer.ggml.merges"),
            pre,
        )
        # llama.cpp's defaults where the file is silent: Llama 3 begins with bos, others do not
        add_bos = self.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
        config: dict[str, Any] = {"add_bos_token": add_bos}
        for name in ("bos", "eos", "unknown", "padding"):
            number = self.get(f"tokenizer.ggml.{name}_token_id")
            if number is not None:
                key = {"unknown": "unk", "padding": "pad"}.get(name, name)
                config[f"{key}_token"] = tokens[number]
        template = self.get("tokenizer.chat_template")
        if template is not None:
            config["chat_template"] = template
        bos = self.get("tokenizer.ggml.bos_token_id")
        if add_bos and bos is not None:
            text = with_bos(text, tokens[bos], bos)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return text, json.loads(json.dumps(config))


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05, not 9.99999974e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))
