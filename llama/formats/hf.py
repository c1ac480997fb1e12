"""A Hugging Face Llama directory in Meta's terms: its config, its weights, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama.args import ModelArgs
from llama.checkpoint.meta import copy_tokenizer
from llama.checkpoint.pth import TensorInfo
from llama.checkpoint.sharding import EMBEDDING, OUTPUT, full_shapes
from llama.errors import InputError
from llama.formats.names import HF, ffn_keys, name_in
from llama.formats.safetensors import DTYPES, SafetensorsFile
from llama.io.files import write_json
from llama.model import ROPE_HIGH_FACTOR, ROPE_LOW_FACTOR, ROPE_ORIGINAL_CONTEXT
from llama.parallel import choose_dtype
from llama.tokenizer import (
    N_SPECIAL,
    Tokenizer,
    _read_ranks,
    llama3_special_tokens,
    tokenizer_json,
)

LLAMA3_SCALING = {
    "low_freq_factor": ROPE_LOW_FACTOR,
    "high_freq_factor": ROPE_HIGH_FACTOR,
    "original_max_position_embeddings": ROPE_ORIGINAL_CONTEXT,
}


def args_of(config: Mapping[str, Any], directory: Path) -> ModelArgs:
    """The model's shape from a ``config.json``.

    Raises:
        InputError: it is no Llama that Meta's code could run; the message names what differs.
    """
    lacking = ["hidden_size", "intermediate_size", "num_attention_heads"]
    lacking = [k for k in [*lacking, "num_hidden_layers", "vocab_size"] if k not in config]
    kind = config.get("model_type")
    if kind == "llama" and lacking:
        raise InputError(f"config.json in {directory} lacks {lacking}")
    expected: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if kind == "llama":
        expected |= {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
        expected |= {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
        expected |= {"quantization_config": None}
    for key, value in expected.items():
        found = config.get(key, "none" if key == "model_type" else value)
        if found != value and not (found is None and key in ("head_dim", "architectures")):
            found = found.get("quant_method", found) if isinstance(found, dict) else found
            raise InputError(
                f"{directory} is not a plain Llama: its {key} is {found!r}, expected {value!r}"
            )
    args = ModelArgs(
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        **ffn_keys(config["hidden_size"], config["intermediate_size"]),
        **_rope(config, directory),
    )
    args.check()
    return args


def _rope(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Rotary keys of params.json; transformers 5 calls ``rope_parameters`` what 4 split in two."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = scaling.get("rope_theta", config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if partial != 1.0:
        raise InputError(f"{directory} rotates a part of each head ({partial}); Llama rotates all")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3" or any(scaling.get(k) != v for k, v in LLAMA3_SCALING.items()):
        shown = {k: v for k, v in scaling.items() if k != "rope_theta"}
        raise InputError(
            f"{directory} scales its rotary frequencies by {shown}; only Llama 3.1's scaling can "
            f"be converted: rope_type 'llama3' with {LLAMA3_SCALING}"
        )
    factor = scaling["factor"]
    return {"rope_theta": theta, "use_scaled_rope": True, "rope_scaling_factor": factor}


def config_of(
    args: ModelArgs,
    dtype: torch.dtype,
    tied: bool,
    tokenizer: Tokenizer,
    record: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of ``config.json`` and ``generation_config.json``.

    Args:
        args: the model's shape.
        dtype: of the weights.
        tied: whether the output head is the embedding.
        tokenizer: tells bos and eos where the record does not.
        record: content of ``conversion.json``; holds what Meta's format has no place for.
    """
    ends = sorted(tokenizer.stop_tokens)
    ids = {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    ids |= {k: record[k] for k in (*ids, "pad_token_id") if k in record}
    rope: dict[str, Any] = {"rope_type": "default"}
    context = 4096 if args.rope_theta < 500000 else 8192
    if args.rope_factor is not None:
        rope, context = {"rope_type": "llama3", "factor": args.rope_factor, **LLAMA3_SCALING}, 2**17
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": record.get("max_position_embeddings", context),
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        # transformers 4 reads the first two, transformers 5 the third
        "rope_theta": args.rope_theta,
        "rope_scaling": rope if args.rope_factor is not None else None,
        "rope_parameters": {**rope, "rope_theta": args.rope_theta},
        "torch_dtype": str(dtype).removeprefix("torch."),
        **ids,
    }
    return config, record.get("generation_config", ids)


def meta_infos(
    args: ModelArgs,
    weights: Mapping[str, SafetensorsFile],
    dtype: str | torch.dtype | None,
    tied: bool,
    directory: Path,
) -> dict[str, TensorInfo]:
    """What is to be written in Meta's format; InputError where the weights are not a Llama's."""
    shapes = full_shapes(args)
    names = {name: name_in(HF, name) for name in shapes}
    embedding, head = names[EMBEDDING], names[OUTPUT]
    if tied and head in weights and embedding in weights:
        pairs = zip(weights[head].chunks(head), weights[embedding].chunks(embedding), strict=False)
        same = weights[head].entries[head] == weights[embedding].entries[embedding]
        if not same or any(a != b for a, b in pairs):
            raise InputError(f"{directory} ties its embeddings, but stores another {head}")
    names[OUTPUT] = embedding if tied else head
    ignored = {name for name in weights if name.endswith("rotary_emb.inv_freq")} | {head}
    missing = sorted(set(names.values()) - weights.keys())
    unknown = sorted(weights.keys() - set(names.values()) - ignored)
    if missing or unknown:
        raise InputError(
            f"{directory} is not a plain Llama: it lacks tensors {missing[:3]} and has others "
            f"{unknown[:3]}"
        )
    infos, known = {}, ", ".join(DTYPES)
    chosen = None if dtype is None else choose_dtype(dtype, torch.device("cpu"))
    for name, shape in shapes.items():
        entry = weights[names[name]].entries[names[name]]
        if entry.shape != shape:
            raise InputError(
                f"{names[name]} in {directory} has shape {list(entry.shape)}; config.json gives "
                f"{list(shape)}"
            )
        kind = chosen or DTYPES.get(entry.dtype)
        if kind is None:
            raise InputError(f"{names[name]} in {directory} is {entry.dtype}; expected {known}")
        infos[name] = TensorInfo(shape, kind, names[name])
    return infos


def find_hf_tokenizer(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory} has neither tokenizer.json nor tokenizer.model")


def write_tokenizer(source: Path, target: Path) -> None:
    """Writes a Meta checkpoint's tokenizer for transformers.

    ``tokenizer.json`` and SentencePiece files are copied, with a configuration for the latter;
    Llama 3's ranks become a ``tokenizer.json`` with the same ids.
    """
    dialog = Tokenizer(source).dialog_format
    is_json = source.read_bytes()[:64].lstrip().startswith(b"{")
    if is_json or dialog == "llama2":
        copy_tokenizer(source, target)
        config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config |= {"add_bos_token": True, "add_eos_token": False, "legacy": True}
        config |= {"tokenizer_class": "LlamaTokenizer"}
    else:
        (target / "tokenizer.json").write_text(_llama3_json(source), encoding="utf-8")
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        config |= {"add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    if not is_json and not (target / "tokenizer_config.json").is_file():
        write_json(target / "tokenizer_config.json", config)


def _llama3_json(path: Path) -> str:
    """The ``tokenizer.json`` of a file of ranks: every pair that makes a token is a merge."""
    ranks = _read_ranks(path, path.read_bytes())
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [f"{_spell(a)} {_spell(b)}" for _, _, a, b in sorted(pairs)]
    special = {i: name for name, i in llama3_special_tokens(len(ranks)).items()}  # 3.1's names
    names = [special[len(ranks) + i] for i in range(N_SPECIAL)]
    types = [1] * len(ranks) + [3] * N_SPECIAL
    text = tokenizer_json([*map(_spell, ranks), *names], types, merges, "llama-bpe")
    return with_bos(text, names[0], len(ranks))


def with_bos(text: str, bos: str, number: int) -> str:
    """A ``tokenizer.json`` by which transformers puts bos in front."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors

    fast = Fast.from_str(text)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
    return fast.to_str()


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins of the 256 bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


ALPHABET = _byte_alphabet()


def _spell(token: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in token)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; FileNotFoundError or InputError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no JSON object: {error}") from None
