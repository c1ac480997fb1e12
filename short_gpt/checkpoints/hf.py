"""A model in Hugging Face's format: pruned in its files tensor by tensor, or saved from memory."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from llama.checkpoint.meta import CONVERSION, copy_tokenizer
from llama.checkpoint.pth import rounded
from llama.files import read_json, read_marker, write_json
from llama.formats.gguf import to_meta
from llama.formats.hf import for_older_readers
from llama.formats.safetensors import (
    DTYPES,
    Entry,
    SafetensorsFile,
    open_weights,
    tensor_bytes,
    write_weights,
)
from llama.sources import TEMPLATES, check_links, public_name
from short_gpt.checkpoints.provenance import PROVENANCE, Provenance
from short_gpt.checkpoints.target import Replaced, StrPath, Target, stored_names
from short_gpt.models.hf import HFDecoder
from short_gpt.models.loading import TRUST, auto_class, check_stored, explained, read_config
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import read_record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What goes along as it is: tokenizers, generation settings, templates, licenses.
COPIED = re.compile(
    r".+\.(json|jinja|model|tiktoken|bpe|txt)|(LICENSE|NOTICE|USE_POLICY).*|tokenizer.*"
)
NOT_COPIED = re.compile(r"(config|params|pruning|conversion)\.json|.+\.index\.json|.+\.py")


def write_hf(
    directory: Path,
    target: Target,
    keep: Sequence[int],
    record: Provenance,
    replaced: Replaced,
    *,
    decoder: HFDecoder | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes the layers ``keep`` of a Hugging Face directory of any family; see `prune_checkpoint`.

    The bytes are copied in pieces, so memory does not grow with the model and any dtype goes over.
    ``config.json`` changes only where the removal changes it, and gains what older programs read.
    ``replaced`` are tensors, by name in the source's files, that are written in their place;
    ``decoder`` is the source's model on the meta device, if it is there already.
    """
    target.check(source=directory)
    check_links(directory)
    decoder = decoder or skeleton(directory)
    weights = _own_weights(open_weights(directory), decoder)
    prefix = _prefix(weights, decoder.layers_path, len(decoder.layers))
    stored = stored_names(weights, prefix, keep)
    config = _edited_config(directory, decoder, keep)
    with target.new_directory(record, card=True) as partial:
        write_json(partial / "config.json", config)
        _copy_others(directory, partial)
        for_older_readers(partial)
        _write_kept(partial, weights, stored, replaced, progress)
    return target.path


def save_hf(
    model: PreTrainedModel,
    target: Target,
    *,
    tokenizer: object,
    record: Provenance | None,
    source: StrPath | None = None,
) -> Path:
    """Writes a model of transformers for plain ``from_pretrained``, with its card and record.

    ``tokenizer`` may be None, and ``record`` too where ``source`` is named: the model of another
    format that this is a conversion of, which ``conversion.json`` notes.
    """
    marker = PROVENANCE if source is None else CONVERSION
    with target.new_directory(record, card=True, marker=marker) as partial:
        _save(model, tokenizer, partial)
        if source is not None:
            write_json(
                partial / CONVERSION, {"source": public_name(source), "dtype": str(model.dtype)}
            )
    return target.path


def save_as_meta(
    model: PreTrainedModel, target: Target, *, record: Provenance, tokenizer_path: StrPath
) -> Path:
    """Writes a Llama of transformers that came from a Meta directory in Meta's format again.

    ``target`` verifies the Hugging Face directory that is then converted; the Meta directory's own
    tokenizer is copied because it may gain tokens through transformers.
    """
    tokenizer = Path(str(tokenizer_path))
    with replace(target, verify=None).new_directory(record, card=False) as partial:
        folder = partial.with_name("hugging_face")
        folder.mkdir()
        _save(model, None, folder)
        target.prove(folder)
        copy_tokenizer(tokenizer, folder)  # which the conversion asks for
        partial.rmdir()
        to_meta(folder, partial)
        shutil.rmtree(folder)
        for path in [*partial.glob("tokenizer*")]:
            path.unlink()
        copy_tokenizer(tokenizer, partial)
        marker = read_marker(partial / CONVERSION)  # names the removed Hugging Face directory
        write_json(partial / CONVERSION, {**marker, "source": record.source})
    return target.path


def _save(model: PreTrainedModel, tokenizer: object, out: Path) -> None:
    model.save_pretrained(out)
    if tokenizer is not None:
        cast("PreTrainedTokenizerBase", tokenizer).save_pretrained(out)
    for_older_readers(out)


def _write_kept(
    out: Path,
    weights: Mapping[str, SafetensorsFile],
    stored: Mapping[str, str],
    replaced: Replaced,
    progress: Callable[[str], object],
) -> None:
    """Writes the tensors that stay into files as in the source, without empty ones."""
    groups: dict[str, dict[str, Entry]] = {}
    for new, old in stored.items():
        groups.setdefault(weights[old].path.name, {})[new] = weights[old].entries[old]

    def read(name: str) -> Iterator[bytes | memoryview]:
        progress(name)
        old, file = stored[name], weights[stored[name]]
        if old not in replaced:
            yield from file.chunks(old)
            return
        dtype = DTYPES[file.entries[old].dtype]
        yield from tensor_bytes(rounded(old, replaced[old](), dtype))

    write_weights(out, [groups[name] for name in sorted(groups)], read)


def _copy_others(directory: Path, out: Path) -> None:
    config = directory / "tokenizer_config.json"
    own_code = config.is_file() and "auto_map" in read_json(config)
    for path in sorted(directory.iterdir()):
        copied = COPIED.fullmatch(path.name) and not NOT_COPIED.fullmatch(path.name)
        if (copied or (own_code and path.suffix == ".py")) and path.is_file():
            shutil.copyfile(path, out / path.name)
    if (named := directory / TEMPLATES).is_dir():
        shutil.copytree(named, out / TEMPLATES)


def skeleton(directory: Path) -> HFDecoder:
    """The model of a Hugging Face directory without weights; ShortGPTError if it is none."""
    try:
        config = read_config(str(directory))
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
            return HFDecoder(model)
    except Exception as error:
        why = explained(error)
        if TRUST in str(error):
            why = "it is defined by Python code of its own; expected a family of transformers"
        raise ShortGPTError(f"{directory} is not a causal model to be pruned: {why}") from error


def _own_weights(
    weights: Mapping[str, SafetensorsFile], decoder: HFDecoder
) -> dict[str, SafetensorsFile]:
    """Without layers after the last, as DeepSeek's, which predict further tokens: none is run."""
    ignored = decoder.model._keys_to_ignore_on_load_unexpected or ()

    def is_further(name: str) -> bool:
        number = re.search(r"\.(\d+)\.", name)
        after = number is not None and int(number[1]) >= len(decoder.layers)
        return after and any(re.search(pattern, name) for pattern in ignored)

    return {name: file for name, file in weights.items() if not is_further(name)}


def _prefix(weights: Mapping[str, object], layers_path: str, count: int) -> str:
    """The stored layers' name before their number, with or without the enclosing model's."""
    last = layers_path.rpartition(".")[2]
    numbers_of: dict[str, set[int]] = {}
    for name in weights:
        match = re.match(rf"((?:[^\d.][^.]*\.)*?{re.escape(last)})\.(\d+)\.", name)
        if match:
            numbers_of.setdefault(match[1], set()).add(int(match[2]))
    fitting = [p for p, numbers in numbers_of.items() if numbers == set(range(count))]
    ours = f".{layers_path}"
    related = [p for p in fitting if ours.endswith(f".{p}") or f".{p}".endswith(ours)]
    choice = related or [p for p in fitting if "vision" not in p and "audio" not in p]
    if len(choice) != 1:
        shown = {p: len(numbers) for p, numbers in numbers_of.items()}
        raise ShortGPTError(
            f"expected tensors of {layers_path}.0 to {layers_path}.{count - 1}, one list of them; "
            f"the files hold {shown or 'none'}"
        )
    return choice[0]


def _edited_config(directory: Path, decoder: HFDecoder, keep: Sequence[int]) -> dict[str, object]:
    """The source's config.json, changed only where removing the layers changes the config."""
    config = read_record(directory / "config.json")
    if not config.get("quantization_config"):  # which takes packages of its own to load
        check_stored(directory, decoder.model.config)
    before = decoder.model.config.to_dict()
    decoder.keep_layers(keep)
    after = decoder.model.config.to_dict()
    config.pop("auto_map", None)  # names code that does not go along: the library's own is enough
    aliases = {own: name for name, own in decoder.config.attribute_map.items()}
    _patch(config, before, after, aliases)
    return config


def _patch(
    target: dict[str, object],
    before: Mapping[str, object],
    after: Mapping[str, object],
    aliases: Mapping[str, str],
) -> None:
    for key, value in after.items():
        old = before.get(key)
        # settings of single layers are other layers' after the removal: all are written
        if key != "per_layer_config" and isinstance(value, dict) and isinstance(old, dict):
            if value != old:
                inner = target.get(key)
                target[key] = inner = inner if isinstance(inner, dict) else {}
                _patch(inner, old, value, aliases)
        elif value != old:
            alias = aliases.get(key, key)
            target[alias if key not in target and alias in target else key] = value
