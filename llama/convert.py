"""Other checkpoint formats to Meta's: GGUF files of Llama models.

One table of weight names serves every direction; weights go over one tensor at a time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.archive import TensorInfo, write_shard
from llama.args import ModelArgs
from llama.checkpoint import full_shapes
from llama.files import check_new, new_directory, write_json
from llama.model import rope_frequencies
from llama.parallel import choose_dtype
from llama.tokenizer import tokenizer_json

# Meta's name, GGUF's name; {} is the layer. GGUF keeps the rows of wq and wk in Meta's order.
GGUF_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "layers.{}.attention.wq.weight": "blk.{}.attn_q.weight",
    "layers.{}.attention.wk.weight": "blk.{}.attn_k.weight",
    "layers.{}.attention.wv.weight": "blk.{}.attn_v.weight",
    "layers.{}.attention.wo.weight": "blk.{}.attn_output.weight",
    "layers.{}.feed_forward.w1.weight": "blk.{}.ffn_gate.weight",
    "layers.{}.feed_forward.w2.weight": "blk.{}.ffn_down.weight",
    "layers.{}.feed_forward.w3.weight": "blk.{}.ffn_up.weight",
    "layers.{}.attention_norm.weight": "blk.{}.attn_norm.weight",
    "layers.{}.ffn_norm.weight": "blk.{}.ffn_norm.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
CONVERSION = "conversion.json"  # what was converted; marks a directory that may be replaced


def gguf_to_meta(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
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
        overwrite: whether an earlier conversion is replaced; nothing else ever is.
        progress: called with every tensor's name before it is written.

    Returns:
        ``out_dir``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, or not a Llama: the message names what differs.
        ImportError: the package gguf is missing.
    """
    source = _GGUF(Path(str(path)))
    args, kind = source.args(), choose_dtype(dtype, torch.device("cpu"))
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
        write_shard(partial / "consolidated.00.pth", infos, read)
        write_json(partial / "params.json", params_json(args))
        (partial / "tokenizer.json").write_text(tokenizer[0], encoding="utf-8")
        write_json(partial / "tokenizer_config.json", tokenizer[1])
        write_json(partial / CONVERSION, {"source": source.path.name, "dtype": str(kind)})
    return Path(str(out_dir))


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


class _GGUF:
    """A GGUF file as Meta's keys and names."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"GGUF file {path} does not exist")
        try:
            import gguf
        except ImportError:
            raise ImportError('reading GGUF needs: pip install "short-gpt[demo]"') from None
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise ValueError(f"{path} is not a complete GGUF file: {error}") from None
        self.fields = {name: field.contents for name, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.quants.dequantize
        if self.get("general.architecture") != "llama":
            raise ValueError(
                f"{path} holds architecture {self.get('general.architecture')!r}; expected 'llama'"
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields[key]() if key in self.fields else default

    def need(self, key: str) -> Any:
        if key not in self.fields:
            raise ValueError(f"{self.path} lacks the key {key}")
        return self.get(key)

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())

    def name_of(self, meta_name: str) -> str:
        """GGUF's name of a tensor; the output head is the embedding where it has none."""
        number = re.search(r"\d+(?=\.)", meta_name.removesuffix("weight"))
        layer = number[0] if number else ""
        name = GGUF_NAMES[meta_name.replace(f"layers.{layer}.", "layers.{}.")].format(layer)
        return "token_embd.weight" if name not in self.tensors and name == "output.weight" else name

    def args(self) -> ModelArgs:
        """The model's shape; ValueError where it is no Llama that Meta's code could run."""
        need = self.need
        dim, heads = need("llama.embedding_length"), need("llama.attention.head_count")
        if "token_embd.weight" not in self.tensors:
            raise ValueError(f"{self.path} lacks token_embd.weight")
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
                raise ValueError(
                    f"{self.path} has {key} = {self.get(key)!r}; Meta's Llama has {value!r}"
                )
        wanted = {self.name_of(name) for name in full_shapes(args)}
        unknown = sorted(self.tensors.keys() - wanted - {ROPE_FACTORS})
        missing = sorted(wanted - self.tensors.keys())
        if unknown or missing:
            raise ValueError(
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
            raise ValueError(f"{self.path} scales its rotary frequencies unlike Llama 3.1")
        return factor

    def tokenizer(self) -> tuple[str, Mapping[str, Any]]:
        """The texts of ``tokenizer.json`` and the content of ``tokenizer_config.json``."""
        kind = self.need("tokenizer.ggml.model")
        if kind != "gpt2":
            raise ValueError(
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
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return text, json.loads(json.dumps(config))


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-05, not 9.99999974e-06."""
    return float(str(torch.tensor(value, dtype=torch.float32).numpy()))
