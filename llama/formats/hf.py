"""A Hugging Face Llama directory in Meta's terms: its config and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama.args import ModelArgs, check_positive
from llama.checkpoint.meta import (
    CONVERSION,
    Checkpoint,
    read_conversion,
)
from llama.checkpoint.pth import TensorInfo
from llama.checkpoint.sharding import EMBEDDING, OUTPUT, full_shapes
from llama.errors import check, check_file, refused
from llama.files import JsonObject, StrPath, check_new, new_directory, read_json, write_json
from llama.formats.names import HF, META, check_tensors, ffn_keys, name_in, permute
from llama.formats.safetensors import (
    DTYPES,
    Entry,
    SafetensorsFile,
    grouped,
    open_weights,
    tensor_bytes,
    write_weights,
)
from llama.formats.tokenizers import find_hf_tokenizer, write_tokenizer
from llama.model import ROPE_HIGH_FACTOR, ROPE_LOW_FACTOR, ROPE_ORIGINAL_CONTEXT
from llama.parallel import config_dtype
from llama.sources import check_links, public_name
from llama.tokenizer import Tokenizer, find_tokenizer

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

    ``tied`` is True where the config makes the output head the embedding; ``infos`` are as in
    `meta_infos`. InputError if it is not a plain Llama.
    """

    def __init__(self, directory: Path) -> None:
        check_links(directory)
        config = self.config = read_json(directory / "config.json")
        self.directory = directory
        self.args, self._files = args_of(config, directory), open_weights(directory)
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.infos = meta_infos(self.args, self._files, tied=self.tied, directory=directory)

    def read(self, name: str) -> Tensor:
        """The tensor of Meta's name, with Meta's order of rows, in the dtype of the file."""
        hf_name = str(self.infos[name].storage)
        weight = self._files[hf_name].read(hf_name)
        return permute(name, weight, self.args, to=META)

    @property
    def tokenizer(self) -> Path:
        """The path of the tokenizer file; FileNotFoundError if there is none."""
        return find_hf_tokenizer(self.directory)


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


def meta_infos(
    args: ModelArgs, weights: Mapping[str, SafetensorsFile], *, tied: bool, directory: Path
) -> dict[str, TensorInfo]:
    """What a directory's files hold, by Meta's names; the storage is the name in Hugging Face's.

    ``weights`` is the file of every tensor; ``tied`` says whether the config makes the output head
    the embedding; ``directory`` is for messages.
    """
    shapes = full_shapes(args)
    names = {name: name_in(HF, name) for name in shapes}
    head = names[OUTPUT]
    if tied:
        _check_tied(weights, head, names[EMBEDDING], directory)
        names[OUTPUT] = names[EMBEDDING]
    ignored = {name for name in weights if name.endswith("rotary_emb.inv_freq")} | {head}
    check_tensors(directory, weights.keys(), set(names.values()), ignored=ignored)
    infos: dict[str, TensorInfo] = {}
    for name, shape in shapes.items():
        entry = weights[names[name]].entries[names[name]]
        problem = f"{names[name]} has shape {list(entry.shape)}; config.json gives {list(shape)}"
        check_file(entry.shape == shape, directory, problem)
        problem = f"{names[name]} is {entry.dtype}, expected {', '.join(DTYPES)}"
        check_file(entry.dtype in DTYPES, directory, problem)
        infos[name] = TensorInfo(shape, DTYPES[entry.dtype], names[name])
    return infos


def _check_tied(
    weights: Mapping[str, SafetensorsFile], head: str, embedding: str, directory: Path
) -> None:
    """Raises InputError where a tied head is stored too, with other values.

    transformers ties nothing then, and uses the stored one.
    """
    if head in weights and embedding in weights:
        same = weights[head].entries[head] == weights[embedding].entries[embedding]
        pairs = zip(weights[head].chunks(head), weights[embedding].chunks(embedding), strict=False)
        equal = same and all(a == b for a, b in pairs)
        check_file(equal, directory, f"it ties its embeddings, but stores another {head}")


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
