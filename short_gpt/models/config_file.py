"""What a model says of its size, compared with its files before anything is made of that size."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from llama.args import MOST, check_positive, shown
from llama.formats.gguf_read import PART, GGUFParts
from llama.formats.names import GGUF, NAMES, check_layers
from llama.formats.safetensors import INDEX, WEIGHTS, SafetensorsFile, open_weights
from llama.io.json_files import read_json
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head")
OPTIONAL = ("intermediate_size", "num_key_value_heads", "head_dim", "n_inner")
# Sizes that a model has if its config has these numbers; a weight takes a bit at least.
MATRICES: list[tuple[str, ...]] = [("vocab_size", width) for width in WIDTHS[:3]]
MATRICES += [("hidden_size", "intermediate_size"), ("n_embd", "n_embd"), ("d_model", "d_model")]
MATRICES += [("hidden_size", heads, "head_dim") for heads in ("num_attention_heads", OPTIONAL[1])]
MATRICES += [("hidden_size", "hidden_size"), ("num_attention_heads",), ("num_key_value_heads",)]
BITS = 8
LAYER_BYTES = 1000  # the names and offsets of a layer's tensors alone take more
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # in settings of generation
ROPE_FACTORS = "rope_freqs.weight"
# One number for the kinds of their layers is a period, whose last layer has no sliding window.
LAST_OF_PERIOD = ("gemma2", "gemma3", "gpt-oss")


def read_config(source: str, options: Mapping[str, object] | None = None) -> Any:
    """The config of a model of transformers, its numbers checked if its files lie here.

    Args:
        source: a directory or a hub id.
        options: passed on; without ``trust_remote_code`` no code of the model's is run.

    Raises:
        MissingPackageError: transformers is missing.
        ShortGPTError: a number is none, or the files are too small for it.
        Exception: as those of ``AutoConfig.from_pretrained``.
    """
    try:
        from transformers import AutoConfig
    except ImportError:
        raise MissingPackageError('this model needs: pip install "short-gpt[hf]"') from None
    # False and not None, with which transformers asks on the terminal
    options = {"trust_remote_code": False, **(options or {})}
    directory = Path(source) / str(options.get("subfolder") or "")
    if "gguf_file" not in options and (directory / "config.json").is_file():
        check_config(directory)
    return AutoConfig.from_pretrained(source, **options)


def said_layers(directory: Path) -> int | None:
    """How many layers a config says that names code of its own, which is not run to be asked."""
    config = read_json(directory / "config.json")
    if "auto_map" not in config:
        return None
    check_config(directory)
    return next((config[key] for key in LAYERS if key in config), None)


def check_config(directory: Path) -> None:
    """Raises ShortGPTError for damaged safetensors, or numbers that cannot be those of weights."""
    config = read_json(directory / "config.json")
    for path in sorted(directory.glob("model*.safetensors")):  # what transformers reads
        SafetensorsFile(path)  # raises if the file is damaged
    if (directory / INDEX).is_file() and not (directory / WEIGHTS).is_file():
        open_weights(directory)  # raises if the index is damaged
    settings = directory / "generation_config.json"
    check_ids(directory / "config.json", config)
    check_ids(settings, read_json(settings) if settings.is_file() else {})
    size = sum(p.stat().st_size for p in directory.iterdir() if p.suffix != ".json" and p.is_file())
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        try:
            check_positive(**{k: part[k] for k in (*LAYERS, *WIDTHS) if k in part})
            check_positive(**{k: part[k] for k in OPTIONAL if part.get(k) is not None})
        except ShortGPTError as error:
            raise ShortGPTError(f"config.json in {directory} is damaged: {error}") from None
        needed = [part[k] * LAYER_BYTES for k in LAYERS if k in part]
        for names in MATRICES:
            sides = [part.get(k) for k in names]
            needed += [prod(n for n in sides if n) // BITS] if all(sides) else []
        if size and max(needed, default=0) > size:
            numbers = {k: part[k] for k in (*LAYERS, *WIDTHS, *OPTIONAL) if part.get(k)}
            raise ShortGPTError(
                f"config.json in {directory} does not fit its files, which have {size} bytes; it "
                f"has {numbers}: correct it, or fetch the model anew"
            )


def check_ids(path: Path, settings: Mapping[str, object]) -> None:
    """Raises ShortGPTError for numbers of special tokens that no token can have."""
    for key in IDS:
        ids = settings.get(key)
        each = ids if isinstance(ids, list) and ids else [ids]
        if ids is not None and not all(type(i) is int and -1 <= i <= MOST for i in each):
            raise ShortGPTError(
                f"{path} is damaged: {key} must be a token's number, or a list of them, got "
                f"{shown(ids)}; correct it, or fetch it anew"
            )


def check_gguf(path: Path) -> GGUFParts:
    """A GGUF file for transformers; ShortGPTError unless its layers and tensors fit.

    Of a plain Llama every tensor must be known: transformers drops others, such as biases.
    """
    match = PART.fullmatch(path.name)
    if match and int(match[3]) > 1:
        raise ShortGPTError(
            f"{path} is one of {int(match[3])} files of its model, which transformers does not "
            f"read; join them: short-gpt convert {path} {match[1]}.gguf"
        )
    parts = GGUFParts(path)
    kind = parts.fields.get("general.architecture")
    layers, width = (parts.fields.get(f"{kind}.{n}") for n in ("block_count", "embedding_length"))
    if not isinstance(kind, str) or not isinstance(layers, int) or not layers:
        raise ShortGPTError(
            f"{path} holds architecture {kind!r} of {layers!r} layers, expected a language model; "
            "is it a whole one?"
        )
    if not isinstance(width, int) or not width:  # transformers would take that of another model
        raise ShortGPTError(f"{path} has {kind}.embedding_length = {width!r}; is it a whole one?")
    check_layers(path, layers, parts.tensors)
    if kind == "llama" and not parts.fields.get("llama.expert_count"):
        _check_names(parts, layers)
    return parts


def gguf_layer_types(fields: Mapping[str, object], config: Any) -> list[str] | None:
    """The kinds of a GGUF file's layers as transformers calls them; None if it says none.

    transformers takes them from the layers' positions by periods of its own, by which a file need
    not go.

    Args:
        fields: the file's metadata.
        config: what transformers made of it.

    Raises:
        ShortGPTError: the model that transformers makes of ``config`` has no such kinds.
    """
    arch = fields.get("general.architecture")
    key = f"{arch}.attention.sliding_window_pattern"
    said, layers = fields.get(key), fields.get(f"{arch}.block_count")
    has_kinds = hasattr(config, "layer_types")
    if isinstance(said, int) and isinstance(layers, int) and arch in LAST_OF_PERIOD:
        said = [not said or (i + 1) % said for i in range(layers)]
    if said is None or not (isinstance(said, list) or has_kinds):
        return None
    windows = has_kinds and getattr(config, "sliding_window", None)
    if not isinstance(said, list) or (any(said) and not windows):
        raise ShortGPTError(
            f"{key} names layers with a sliding window, which transformers' {config.model_type} "
            "does not have here; open the model that it was made from"
        )
    kinds = ["sliding_attention" if slide else "full_attention" for slide in said]
    return kinds if has_kinds else None


def _check_names(parts: GGUFParts, layers: int) -> None:
    templates = [row[GGUF] for row in NAMES]
    known = {template.format(i) for template in templates for i in range(layers)} | {ROPE_FACTORS}
    if others := sorted(parts.tensors.keys() - known):
        raise ShortGPTError(
            f"{parts.path} cannot be loaded: it holds {', '.join(others[:3])}, which transformers' "
            "Llama lacks and would leave out; open the model that it was made from"
        )
