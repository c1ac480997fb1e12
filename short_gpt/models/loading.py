"""Models of transformers from where they lie: hub, directory or GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from llama.io.hub import hub_failure
from llama.io.sources import is_gguf
from llama.parallel import choose_device
from short_gpt.models.config_file import check_gguf, gguf_layer_types, read_config
from short_gpt.models.gguf_loading import check_left_out, mend_tokenizer, reading_gguf
from short_gpt.models.weights_report import check_weights, without_report
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError

# options of loading that say where files come from: the tokenizer's as well as the model's
FROM_WHERE = ["cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder"]
FROM_WHERE += ["token", "trust_remote_code"]
# asks what came of every tensor, for `check_weights`; a wrong shape is told like the others
ALL = {"output_loading_info": True, "ignore_mismatched_sizes": True}
TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens).*|.+\.(model|tiktoken)"
)


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the whole model of a config, towers for images included.

    Raises:
        ShortGPTError: the config is of no language model; the message names its kind.
    """
    import transformers as t

    if getattr(config, "auto_map", None):  # code that comes with the model decides itself
        return t.AutoModelForCausalLM
    if config.get_text_config(decoder=True) is not config:
        if type(config) in t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return t.AutoModelForImageTextToText
    elif type(config) in t.MODEL_FOR_CAUSAL_LM_MAPPING:
        return t.AutoModelForCausalLM
    raise ShortGPTError(f"a model of type {config.model_type!r} is no causal language model")


def place_of(
    device: str | torch.device | None, options: Mapping[str, object]
) -> torch.device | None:
    """Where a loaded model goes; None leaves it where ``options`` put it.

    Raises:
        ShortGPTError: ``device`` and a ``device_map`` in ``options`` are both given.
    """
    if device is not None and "device_map" in options:
        raise ShortGPTError("give device for one place or device_map for several, not both")
    return None if device is None else choose_device(device)


def load(name: str, options: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingPackageError('ShortHFModel needs: pip install "short-gpt[hf]"') from None
    path, gguf, parts = Path(name), {}, None
    if is_gguf(name):
        if not path.is_file():
            raise FileNotFoundError(f"GGUF file {name} does not exist")
        parts = check_gguf(path)
        path, gguf = path.parent, {"gguf_file": path.name}
    where = str(path) if gguf else name
    # never None, with which transformers asks on the terminal
    trust = bool(options.get("trust_remote_code", False))
    options = {"dtype": "auto", **options, "trust_remote_code": trust}
    both = {key: options[key] for key in FROM_WHERE if key in options} | gguf
    reading: AbstractContextManager[list[str]] = reading_gguf(parts) if parts else nullcontext([])
    try:
        with reading as left_out:
            config = read_config(where, both)
            if parts and (kinds := gguf_layer_types(parts)):
                config.layer_types = kinds
                options["config"] = config
            loader = auto_class(config)
            if tokenizer is None and (gguf or _has_tokenizer(path)):
                tokenizer = AutoTokenizer.from_pretrained(where, **both)
                if parts:
                    mend_tokenizer(tokenizer, parts.headers[0])
            with without_report():
                model, info = loader.from_pretrained(where, **gguf, **(options | ALL))
    except Exception as error:  # a wrong name, no network, an unknown kind, a wrong option ...
        if not path.exists() and (failure := hub_failure(name, error)):
            raise failure from error
        kind = OSError if isinstance(error, OSError) else ShortGPTError
        raise kind(f"{name} cannot be loaded: {explained(error)}") from error
    check_weights(name, info)
    check_left_out(name, left_out)
    if gguf:  # the weights are no longer quantized, so they can be saved and trained
        vars(model.config).pop("quantization_config", None)  # version 4 has none here
        vars(model).update(hf_quantizer=None, is_quantized=False)
    return model, tokenizer


def check_stored(directory: Path, config: Any) -> None:
    """Refuses a Hugging Face directory that does not hold all weights of its config, as `load`.

    Transformers goes through the whole loading, on the meta device, for which no weight is read.
    Its version 4 reads them all the same: there nothing is checked.

    Raises:
        ShortGPTError: as `check_weights`.
    """
    import transformers

    if transformers.__version__.startswith("4."):
        return
    try:
        with without_report():
            loader = auto_class(config)
            _, info = loader.from_pretrained(directory, device_map="meta", **ALL)
    except Exception as error:
        raise ShortGPTError(f"{directory} cannot be loaded: {explained(error)}") from error
    check_weights(str(directory), info)


def _has_tokenizer(path: Path) -> bool:
    """Whether there is a tokenizer to load: not in a directory of weights alone."""
    return not path.is_dir() or any(TOKENIZER.match(p.name) for p in path.iterdir())


def explained(error: BaseException) -> str:
    """Transformers' errors in one line: the first paragraph, of at most 300 characters."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "it does not fit the free memory; free some, or take a smaller dtype or stream"
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python code of its own, which is not run; look at that code, and pass "
            "`trust_remote_code` to run it"
        )
    if isinstance(error, EOFError | UnpicklingError) or "PytorchStreamReader" in str(error):
        return "its weights are cut off or damaged; fetch it anew"
    if isinstance(error, KeyError):
        return f"its config names {error}, which is not known here; try a newer transformers"
    if (named := re.match(r"module 'torch' has no attribute ('\w+')", str(error))) is not None:
        return f"its config names {named[1]} as a dtype, expected one such as 'bfloat16'"
    text = " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
