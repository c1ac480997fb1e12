"""What the formats call the same things; a Hugging Face Llama directory in Meta's terms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive
from llama.checkpoint.meta import (
    CONVERSION,
    EMBEDDING,
    OUTPUT,
    Checkpoint,
    full_shapes,
    read_conversion,
)
from llama.checkpoint.pth import TensorInfo
from llama.errors import InputError, check, check_file, refused
from llama.files import JsonObject, StrPath, check_new, new_directory, read_json, write_json
from llama.formats.safetensors import (
    DTYPES,
    Entry,
    grouped,
    open_weights,
    tensor_bytes,
    write_weights,
)
from llama.formats.tokenizers import write_tokenizer
from llama.model import ROPE_HIGH_FACTOR, ROPE_LOW_FACTOR, ROPE_ORIGINAL_CONTEXT
from llama.parallel import config_dtype
from llama.sources import check_links, public_name
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
    """Rows of wq and wk, (H hd, D), in the order of `HF` or `META`; other weights as they are.

    Meta rotates the neighbours (2i, 2i + 1) of a head, Hugging Face i and i + hd / 2.
    """
    heads = {"wq": args.n_heads, "wk": args.kv_heads}.get(meta_name.split(".")[-2])
    return weight if heads is None else permute_rows(weight, heads, to_neighbours=to == META)


def permute_rows(weight: Tensor, heads: int, *, to_neighbours: bool) -> Tensor:
    """Rows of heads, (H hd, ...), from one order of rotated pairs to the other.

    Pairs (i, i + hd / 2) become the neighbours (2i, 2i + 1), Meta's and GGUF's order of a Llama,
    or with ``to_neighbours`` False the reverse.
    """
    # (H hd, ...) -> (H, 2, hd / 2, ...) or (H, hd / 2, 2, ...); the inner axes are transposed
    pairs = (2, -1) if to_neighbours else (-1, 2)
    return weight.unflatten(0, (heads, *pairs)).transpose(1, 2).flatten(0, 2)


def check_tensors(source: Path, have: Set[str], needed: Set[str], *, ignored: Set[str]) -> None:
    """Raises InputError unless a source has all needed tensors and no others, such as biases."""
    missing, unknown = sorted(needed - have), sorted(have - needed - ignored)
    problem = f"no plain Llama: it lacks tensors {missing[:3]} and has others {unknown[:3]}"
    if missing or unknown:
        raise InputError(f"{source} is {problem}")


def params_json(args: ModelArgs) -> JsonObject:
    """The content of a ``params.json`` for these arguments; keys of no effect are left out."""
    names = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"]
    names += ["ffn_dim_multiplier", "norm_eps", "rope_theta"]
    if args.use_scaled_rope:
        names += ["use_scaled_rope", "rope_scaling_factor"]
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def ffn_keys(dim: int, width: int) -> JsonObject:
    """``multiple_of`` (and ``ffn_dim_multiplier``) with which a feed-forward layer is so wide."""
    for multiple_of in (256, 1024, 4096):
        if ModelArgs(dim=dim, multiple_of=multiple_of).ffn_dim == width:
            return {"multiple_of": multiple_of}
    multiplier = (width + 0.5) / int(2 * (4 * dim) / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}


LLAMA3_SCALING = {
    "low_freq_factor": ROPE_LOW_FACTOR,
    "high_freq_factor": ROPE_HIGH_FACTOR,
    "original_max_position_embeddings": ROPE_ORIGINAL_CONTEXT,
}
PARTIAL = "partial_rotary_factor"
# Of families with names of their own in transformers 4: theirs, by the usual or our name. No other
# family that it knows has rotary positions for each kind of layer.
_OLDER_NAMES: dict[str, dict[str, str]] = {
    "gemma3_text": {"local_theta": "rope_local_base_freq"},
    "gemma3n_text": {"local_theta": "rope_local_base_freq"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", PARTIAL: "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", PARTIAL: "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "local_theta": "local_rope_theta"},
    "olmo3": {"local_theta": "rope_theta"},  # the same for both
    "qwen3_moe": {"num_local_experts": "num_experts"},
}


class HFCheckpoint:
    """A Hugging Face Llama's config and weights in Meta's terms, checked by their headers.

    ``tied`` is True where the config makes the output head the embedding; ``infos`` are what the
    files hold, by Meta's names, with the name in Hugging Face's as the storage. InputError if it is
    not a plain Llama.
    """

    def __init__(self, directory: Path) -> None:
        check_links(directory)
        config = self.config = read_json(directory / "config.json")
        self.directory = directory
        self.args, self._files = args_of(config, directory), open_weights(directory)
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.infos = self._infos()

    def _infos(self) -> dict[str, TensorInfo]:
        shapes, weights = full_shapes(self.args), self._files
        names = {name: name_in(HF, name) for name in shapes}
        head, embedding = names[OUTPUT], names[EMBEDDING]
        if self.tied:
            names[OUTPUT] = embedding
            if {head, embedding} <= weights.keys():  # else transformers would use the stored head
                files = weights[head], weights[embedding]
                same = files[0].entries[head] == files[1].entries[embedding]
                pairs = zip(files[0].chunks(head), files[1].chunks(embedding), strict=False)
                equal = same and all(a == b for a, b in pairs)
                problem = f"it ties its embeddings, but stores another {head}"
                check_file(equal, self.directory, problem)
        ignored = {name for name in weights if name.endswith("rotary_emb.inv_freq")} | {head}
        check_tensors(self.directory, weights.keys(), {*names.values()}, ignored=ignored)
        infos: dict[str, TensorInfo] = {}
        for name, shape in shapes.items():
            own = names[name]
            entry = weights[own].entries[own]
            problem = f"{own} has shape {list(entry.shape)}; config.json gives {list(shape)}"
            check_file(entry.shape == shape, self.directory, problem)
            problem = f"{own} is {entry.dtype}, expected {', '.join(DTYPES)}"
            check_file(entry.dtype in DTYPES, self.directory, problem)
            infos[name] = TensorInfo(shape, DTYPES[entry.dtype], own)
        return infos

    def read(self, name: str) -> Tensor:
        """The tensor of Meta's name, with Meta's order of rows, in the dtype of the file."""
        hf_name = str(self.infos[name].storage)
        weight = self._files[hf_name].read(hf_name)
        return permute(name, weight, self.args, to=META)

    @property
    def tokenizer(self) -> Path:
        """The path of the tokenizer file; FileNotFoundError if there is none."""
        for name in ("tokenizer.json", "tokenizer.model"):
            if (self.directory / name).is_file():
                return self.directory / name
        raise FileNotFoundError(f"{self.directory} has neither tokenizer.json nor tokenizer.model")


def args_of(config: JsonObject, directory: Path) -> ModelArgs:
    """The model's shape from the content of a ``config.json``; InputError if no plain Llama."""
    _check_plain(config, directory)
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


def _check_plain(config: JsonObject, directory: Path) -> None:
    """Raises InputError unless the config is one of a Llama without variations."""
    needed = ["hidden_size", "intermediate_size", "num_attention_heads"]
    lacking = [k for k in [*needed, "num_hidden_layers", "vocab_size"] if k not in config]
    expected: JsonObject = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if config.get("model_type") == "llama":
        check_file(not lacking, directory / "config.json", f"it lacks {lacking}")
        check_positive(**{key: config[key] for key in needed})
        expected |= {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
        expected |= {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
        expected |= {"quantization_config": None}
    for key, value in expected.items():
        actual = config.get(key, "none" if key == "model_type" else value)
        if actual != value and not (actual is None and key in ("head_dim", "architectures")):
            actual = actual.get("quant_method", actual) if isinstance(actual, dict) else actual
            expected_value = f"{value!r}, as a plain Llama has it"
            raise refused(f"{directory / 'config.json'}: {key}", actual, expected_value)
    config_dtype(config, directory)  # raises for one of whole numbers or 8 bits


def _rope(config: JsonObject, directory: Path) -> JsonObject:
    """Rotary keys of params.json; transformers 5 calls ``rope_parameters`` what 4 split in two."""
    parts = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    scaling = {**parts[0], **parts[1]}
    theta = scaling.get("rope_theta", config.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    check(partial == 1.0, f"{directory}: {PARTIAL}", partial, "1.0, as a plain Llama has it")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3" or any(scaling.get(k) != v for k, v in LLAMA3_SCALING.items()):
        shown = {k: v for k, v in scaling.items() if k != "rope_theta"}
        raise refused(f"{directory}: rope_scaling", shown, "Llama 3.1's, or none")
    factor = scaling.get("factor")
    return {"rope_theta": theta, "use_scaled_rope": True, "rope_scaling_factor": factor}


def for_older_readers(directory: Path) -> None:
    """Adds to a Hugging Face directory what transformers 4 and programs such as mlx-lm read.

    Transformers 5 writes ``rope_parameters`` alone. What reads ``rope_theta`` then runs another
    model, of 10,000, without notice. Nothing that transformers 5 reads changes.
    """
    path = directory / "config.json"
    write_json(path, _with_older_entries(read_json(path)))
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    changed = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # of version 4 a mapping
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if changed != config:
        write_json(path, changed)


def _with_older_entries(config: JsonObject) -> JsonObject:
    # a multimodal model has a config inside for each tower
    parts = {k: v for k, v in config.items() if isinstance(v, dict) and "model_type" in v}
    config = {**config, **{key: _with_older_entries(part) for key, part in parts.items()}}
    names = _OLDER_NAMES.get(str(config.get("model_type")))
    older = {"torch_dtype": config.get("dtype")}
    older |= {key: config.get(key) for key in names or ()}
    rotary = config.get("rope_parameters") or {}
    if names is not None and isinstance(rotary.get("full_attention"), dict):
        older["local_theta"] = (rotary.get("sliding_attention") or {}).get("rope_theta")
        rotary = rotary["full_attention"]
    if "rope_theta" in rotary:
        older |= {key: rotary.get(key) for key in ("rope_theta", PARTIAL)}
        older["rope_scaling"] = _older_scaling(config, rotary)
    return {**config, **{(names or {}).get(k, k): v for k, v in older.items() if v is not None}}


def _older_scaling(config: JsonObject, rotary: JsonObject) -> JsonObject | None:
    kind = rotary.get("rope_type", "default")
    if kind == "default" and "mrope_section" not in rotary:  # of images and videos, too
        return None
    if (config.get("model_type"), kind) == ("phi3", "longrope"):  # which takes no other entries
        return {"type": kind, **{k: rotary[k] for k in ("short_factor", "long_factor")}}
    return {k: v for k, v in rotary.items() if k not in ("rope_theta", PARTIAL)}


def longest_window(args: ModelArgs) -> int:
    """The tokens of Llama 2's, Llama 3's, Code Llama's or Llama 3.1's window; Meta has no key."""
    if args.rope_factor is not None:
        return 2**17
    return 4096 if args.rope_theta < 500000 else 8192 if args.rope_theta < 1e6 else 16384


def config_of(
    args: ModelArgs, dtype: torch.dtype, *, tied: bool, tokenizer: Tokenizer, record: JsonObject
) -> tuple[JsonObject, JsonObject]:
    """The contents of ``config.json``, of transformers 5, and ``generation_config.json``.

    ``tokenizer`` names bos and eos where ``record`` does not: the content of ``conversion.json``,
    which holds what Meta's format cannot say.
    """
    ends = sorted(tokenizer.stop_tokens)
    ids: JsonObject = {
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    ids |= {k: record[k] for k in (*ids, "pad_token_id") if k in record}
    rope: JsonObject = {"rope_type": "default"}
    if args.rope_factor is not None:
        rope = {"rope_type": "llama3", "factor": args.rope_factor, **LLAMA3_SCALING}
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
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "max_position_embeddings": record.get("max_position_embeddings", longest_window(args)),
        "rope_parameters": {**rope, "rope_theta": args.rope_theta},
        "dtype": str(dtype).removeprefix("torch."),
        **ids,
    }
    return config, record.get("generation_config", ids)


def meta_to_hf(
    ckpt_dir: StrPath,
    out_dir: StrPath,
    *,
    tokenizer_path: StrPath | None = None,
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
