"""Models of transformers from hub, directory or GGUF file: their configs, and all their weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from llama.args import ModelArgs, some
from llama.checkpoint.meta import Checkpoint
from llama.formats.gguf import ROPE_FACTORS
from llama.formats.gguf_read import GGUFParts, part_paths
from llama.parallel import FLOATS
from llama.sources import check_links, find_source, hub_failure, is_gguf, reach, resolve
from short_gpt.models.gguf_loading import complete_config, mend_tokenizer, reading_gguf
from short_gpt.runtime.digest import Stamps, json_digest, stamps
from short_gpt.runtime.errors import ShortGPTError, check, damaged, without_password

TRUST = "trust_remote_code"  # an option, and in errors: a model comes with Python code
# The entries by which a Llama is known.
SHAPE = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
# Entries of a config.json without effect on a forward pass. dtype: whoever opens a model chooses
# it, and states keep it by itself. Text is encoded by the tokenizer, which has its own bos and eos;
# pad_token_id counts, as RoBERTa numbers its positions from it.
HARMLESS = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "architectures"})
HARMLESS |= {"torch_dtype", "dtype", "use_cache", "return_dict", "initializer_range"}
HARMLESS |= {"output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id"}
HARMLESS |= {"id2label", "label2id", "num_labels", "problem_type", "finetuning_task"}
# Of a Llama in Meta's format: limits of a run, and a size that the weights decide (-1 in files).
LIMITS = frozenset({"max_batch_size", "max_seq_len", "vocab_size"})


def read_config(source: str, options: Mapping[str, object] | None = None) -> Any:
    """The config of a model of transformers."""
    from transformers import AutoConfig

    # False and not None, with which transformers asks on the terminal
    options = {TRUST: False, **(options or {})}
    if not Path(source).exists():
        reach(source, options)
    return AutoConfig.from_pretrained(source, **options)


def shape_of(source: str, *, trust_remote_code: bool = False) -> ModelArgs:
    """The shape of a Meta or Hugging Face directory, or of a model on the hub by its config.

    Of a config, the width of the feed-forward layers is not read.
    """
    kind = find_source(source).kind
    check(kind != "gguf", "format of the model", kind, "Meta's or Hugging Face's")
    if kind == "meta":
        # a Meta checkpoint's vocabulary is in its weights, not in params.json
        return Checkpoint(source).args
    try:
        config = read_config(source, {TRUST: trust_remote_code})
        text = config.get_text_config(decoder=True)
    except Exception as error:
        if kind == "hub" and (failure := hub_failure(source, error)) is not None:
            raise failure from None
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    # a family may have other names for them, and then is not a Llama
    sizes = [getattr(text, name, None) for name in SHAPE]
    check(None not in sizes, "model_type", text.model_type, f"a Llama, with {SHAPE}")
    dim, layers, heads, words = (int(size) for size in sizes if size is not None)
    # without an entry every query has keys of its own
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelArgs(dim, layers, heads, kv_heads, words)


def config_digest(config: Mapping[str, object]) -> str:
    """A digest of all entries of a configuration except `HARMLESS` ones, so none is overlooked."""
    return json_digest(_counting(config))


def config_entries(config: Any) -> dict[str, object]:
    """The entries of a config of transformers in memory."""
    return dict(json.loads(config.to_json_string()))


def params_entries(params: object) -> dict[str, object]:
    """The entries of a Llama's arguments, ours or those of Meta's reference package."""
    return {name: value for name, value in vars(params).items() if name not in LIMITS}


def _counting(value: object) -> object:
    # in a fixed order, ready for JSON
    if isinstance(value, Mapping):
        return {k: _counting(value[k]) for k in sorted(value) if k not in HARMLESS}
    if isinstance(value, list | tuple):
        return [_counting(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def explained(error: BaseException) -> str:
    """Transformers' errors in one line: the first paragraph, of at most 300 characters."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "it does not fit the free memory; free some, or take a smaller dtype or stream"
    if TRUST in str(error):
        return (
            "it comes with Python code of its own, which is not run; look at that code, and pass "
            "`trust_remote_code` to run it"
        )
    if isinstance(error, EOFError | UnpicklingError) or "PytorchStreamReader" in str(error):
        return "its weights are cut off or damaged; fetch it again"
    if isinstance(error, KeyError):
        return f"its config names {error}, which is not known here; try a newer transformers"
    # anything else: its own words, or its class where it has none
    first = without_password(str(error)).strip().split("\n\n")[0]
    text = " ".join(first.split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


# options of loading that say where files come from: the tokenizer's as well as the model's
FROM_WHERE = ["cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder"]
FROM_WHERE += ["token", TRUST]
# asks what came of every tensor, for `check_weights`; a wrong shape is reported like the others
ALL = {"output_loading_info": True, "ignore_mismatched_sizes": True}
TOKENIZER = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens).*|.+\.(model|tiktoken)"
)
# How transformers' own reports of the weights begin, in versions 5 and 4; and of a tokenizer.model,
# where it tries two kinds of file and `load_tokenizer` says what was wrong if neither fits.
# The last is advice on the dtype of a GGUF file, which is the user's choice.
REPORTS = [" LOAD REPORT", "Some weights of ", "Could not extract SentencePiece model"]
REPORTS += ["Loading a GGUF checkpoint with its weights packed"]
LOGGERS = ("modeling_utils", "tokenization_utils_tokenizers", "quantizers.quantizer_gguf")


def auto_class(config: Any) -> Any:
    """The class of transformers that makes the model of a config, towers for images included."""
    import transformers as t

    if getattr(config, "auto_map", None):  # code that comes with the model decides itself
        return t.AutoModelForCausalLM
    # a config around the language model's is a multimodal model's
    inside = config.get_text_config(decoder=True) is not config
    if inside and type(config) in t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return t.AutoModelForImageTextToText
    if type(config) in t.MODEL_FOR_CAUSAL_LM_MAPPING:
        return t.AutoModelForCausalLM
    raise ShortGPTError(f"a model of type {config.model_type!r} is not a causal language model")


def load(name: str, options: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """A model with all of its weights, and its tokenizer unless one is passed."""
    path, gguf, parts = Path(name), {}, None
    if is_gguf(name):
        if not path.is_file():
            raise FileNotFoundError(f"GGUF file {name} does not exist")
        parts = GGUFParts(path)
        path, gguf = path.parent, {"gguf_file": path.name}
    # transformers takes a GGUF file as a directory and a name in it
    where = str(path) if gguf else name
    # never None, with which transformers asks on the terminal; kernels of the hub round otherwise
    options = {"dtype": "auto", "use_kernels": False} | options
    options[TRUST] = bool(options.get(TRUST, False))
    both = {key: options[key] for key in FROM_WHERE if key in options} | gguf
    reading: AbstractContextManager[list[str]] = reading_gguf(parts) if parts else nullcontext([])
    try:
        with reading as skipped:
            config = read_config(where, both)
            if parts and complete_config(parts, config):
                options["config"] = config
            loader = auto_class(config)
            names = [p.name for p in path.iterdir()] if path.is_dir() and not gguf else None
            if names is not None:
                check_links(path)
            # a directory may hold weights alone
            if tokenizer is None and (names is None or any(map(TOKENIZER.match, names))):
                tokenizer = load_tokenizer(where, both)
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
    # divisors of the rotary frequencies are in the config
    if others := set(skipped) - {ROPE_FACTORS}:
        raise ShortGPTError(
            f"{name} cannot be loaded: it holds {some(others)}, which transformers' model of its "
            "kind lacks and would leave out; open the model that it was made from"
        )
    if gguf:  # the weights are no longer quantized, so they can be saved and trained
        vars(model.config).pop("quantization_config", None)  # version 4 has none here
        vars(model).update(hf_quantizer=None, is_quantized=False)
    return model, tokenizer


def check_loaded(model: nn.Module) -> None:
    """Raises ShortGPTError for a model that cannot be changed, or is of several dtypes.

    A saved one is opened in one dtype. Modules that its class keeps in float32 do not count.
    """
    kind, dtypes = type(model).__name__, dict[torch.dtype, str]()
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = [part for name in names for part in getattr(model, name, None) or ()]
    for name, weight in model.named_parameters():
        if weight.is_inference():
            raise ShortGPTError(f"{kind} was made in torch.inference_mode(): make it outside")
        if weight.dtype in FLOATS.values() and not any(part in name for part in kept):
            dtypes.setdefault(weight.dtype, name)
    if len(dtypes) > 1 and not getattr(model, "is_quantized", False):
        both = " and ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        raise ShortGPTError(f"{kind} has weights in {both}: make it one dtype, as in model.float()")


def weight_files(source: str | PathLike[str]) -> list[Path]:
    """A checkpoint's files of weights, of any format."""
    source = find_source(source)
    if source.kind == "gguf":
        return part_paths(source.path)
    folder = resolve(source)
    patterns = ["consolidated.*.pth"] if source.kind == "meta" else ["*.safetensors", "*.bin"]
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])


def weight_stamps(source: str | PathLike[str]) -> Stamps:
    """`stamps` of a model's files of weights here, by which a change of them shows."""
    with suppress(FileNotFoundError):  # such as weights in a subfolder
        return stamps(weight_files(source)) if Path(source).exists() else ()
    return ()


def load_tokenizer(where: str, options: Mapping[str, Any]) -> Any:
    """A tokenizer of transformers; of a directory, a ShortGPTError names the file at fault."""
    from transformers import AutoTokenizer

    directory = Path(where) / str(options.get("subfolder") or "")
    local = directory.is_dir() and "gguf_file" not in options
    try:
        with without_report():
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            tokenizer("a", verbose=False)  # the package tokenizers sees some damages only here
    except BaseException as error:
        # a panic of the Rust code in the package tokenizers is no Exception
        if not local or isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if TRUST in str(error):
            raise ShortGPTError(explained(error)) from error
        raise damaged(f"the tokenizer in {directory}", explained(error), mend="fetch it") from error
    if local and len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise damaged(f"the tokenizer in {directory}", "no vocabulary", mend="fetch its files")
    return tokenizer


def check_stored(directory: Path, config: Any) -> None:
    """Raises ShortGPTError for a Hugging Face directory without all weights of its config."""
    import transformers

    # Loading onto the meta device reads no weight; version 4 reads them: there nothing is checked.
    if transformers.__version__.startswith("4."):
        return
    try:
        with without_report():
            loader = auto_class(config)
            _, info = loader.from_pretrained(directory, device_map="meta", use_kernels=False, **ALL)
    except Exception as error:
        raise ShortGPTError(f"{directory} cannot be loaded: {explained(error)}") from error
    check_weights(str(directory), info)


@contextmanager
def without_report() -> Iterator[None]:
    """Keeps transformers from printing its reports, which become errors here."""

    def quiet(record: logging.LogRecord) -> bool:
        return not any(report in record.getMessage() for report in REPORTS)

    with ExitStack() as stack:
        for name in LOGGERS:
            logger = logging.getLogger(f"transformers.{name}")
            logger.addFilter(quiet)
            stack.callback(logger.removeFilter, quiet)
        yield


def check_weights(name: str, info: Mapping[str, Collection[Any]]) -> None:
    """Refuses a model whose files do not hold exactly its weights.

    Transformers by itself fills what is missing with random numbers and goes on. ``info`` is what
    it gives with ``output_loading_info``; it has no tied weights, nor keys ignored on purpose.
    """
    unexpected = "hold, not of the model its config describes,"
    texts = {"missing_keys": "lack", "unexpected_keys": unexpected}
    wrong = [f"{text} {some(info[key])}" for key, text in texts.items() if info.get(key)]
    # of wrong shapes one is named
    for key, stored, expected in sorted(map(tuple, info.get("mismatched_keys", ())))[:1]:
        wrong.append(f"hold {key} as {[*stored]}, of which its config makes {[*expected]}")
    # torch's messages have many lines; the first says enough
    wrong += [" ".join(str(text).split())[:200] for text in info.get("error_msgs", ())][:1]
    if wrong:
        raise ShortGPTError(
            f"{name} cannot be loaded: its files {'; they '.join(wrong)}; fetch or convert it again"
        )


def restore_frequencies(model: Any) -> None:
    """Makes the rotary frequencies float32 again, as loading has them: `.to(dtype)` rounds them.

    Rounded to bfloat16, an angle at position 1000 is wrong by up to 2 radians.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or buffer.dtype.itemsize >= 4:
                continue
            with suppress(AttributeError, TypeError):  # not made of a config, as in some towers
                whole = getattr(type(module)(module.config), name)
                setattr(module, name, whole.to(buffer.device))
