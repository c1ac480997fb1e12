"""A Hugging Face checkpoint without some layers, written tensor by tensor from its files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llama.formats.safetensors import (
    DTYPES,
    Entry,
    SafetensorsFile,
    open_weights,
    tensor_bytes,
    write_weights,
)
from llama.io.json_files import read_json, write_json
from llama.io.sources import resolve
from short_gpt.checkpoints.card import write_provenance
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import Replaced, StrPath, Target, takes_target
from short_gpt.models.config_file import TRUST, explained, read_config
from short_gpt.models.hf import HFDecoder
from short_gpt.models.loading import auto_class, check_stored
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import MissingPackageError, ShortGPTError
from short_gpt.runtime.results import read_record

# What goes along as it is: tokenizers, generation settings, templates, licenses.
COPIED = re.compile(r".+\.(json|jinja|model|txt)|(LICENSE|NOTICE|USE_POLICY).*|tokenizer.*")
NOT_COPIED = re.compile(r"config\.json|.+\.index\.json|(pruning|conversion)\.json|.+\.py")


@takes_target
def prune_hf(
    source: StrPath,
    target: Target,
    layers: Sequence[int],
    *,
    provenance: Provenance | None = None,
    replaced: Replaced | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a safetensors directory with some layers removed; no weight is ever loaded.

    The tensors' bytes are copied in pieces, so memory does not grow with the model and any dtype
    goes over. ``config.json`` changes in what the removal changes, and in nothing else, so it
    stays one for the version of ``transformers`` that wrote it. A model card says what went.

    Args:
        source: a directory with ``config.json`` and safetensors of any family, or a hub id.
        target: the new directory; a path is enough.
        layers: numbers of the layers to remove.
        provenance: by which scores they were chosen, and facts to keep; completed here and
            written as ``pruning.json`` and on the card.
        replaced: by name in the source's files, tensors that are written in their place.
        progress: called with every tensor's new name before it is written.

    Returns:
        The target's path.

    Raises:
        ShortGPTError: a layer does not exist, the files lack weights or hold others, or the family
            cannot be pruned right: it says why.
        FileNotFoundError: config or weights are missing.
        FileExistsError: the target exists, or with ``overwrite`` holds the source or other files.
        MissingPackageError: transformers is missing.
    """
    directory = resolve(source)
    target.check(source=directory)
    weights = open_weights(directory)
    decoder = _skeleton(directory)
    count = len(decoder.layers)
    check_layers(layers, range(count))
    keep = [i for i in range(count) if i not in set(layers)]
    record = (provenance or Provenance()).cut(
        source, removed=layers, kept=keep, directory=directory
    )
    old_name = _old_names(weights, _prefix(weights, decoder.layers_path, count), keep)
    config = _edited_config(directory, decoder, keep)
    with target.new_directory() as partial:
        write_json(partial / "config.json", config)
        _check_config(partial, decoder)
        _write_kept(partial, weights, old_name, replaced or {}, progress)
        _copy_others(directory, partial)
        write_provenance(partial, record, card=True)
        target.prove(partial)
    return target.path


def _write_kept(
    out: Path,
    weights: Mapping[str, SafetensorsFile],
    old_name: Mapping[str, str],
    replaced: Replaced,
    progress: Callable[[str], object],
) -> None:

    def read(name: str) -> Iterator[bytes | memoryview]:
        progress(name)
        old, file = old_name[name], weights[old_name[name]]
        if old not in replaced:
            yield from file.chunks(old)
            return
        dtype = DTYPES[file.entries[old].dtype]
        yield from tensor_bytes(replaced[old]().to("cpu", dtype))

    write_weights(out, _groups(weights, old_name), read)


def _copy_others(directory: Path, out: Path) -> None:
    """Copies files that do not change; Python files too, if the tokenizer is defined in one."""
    config = directory / "tokenizer_config.json"
    own_code = config.is_file() and "auto_map" in read_json(config)
    for path in sorted(directory.iterdir()):
        wanted = COPIED.fullmatch(path.name) and not NOT_COPIED.fullmatch(path.name)
        if (wanted or (own_code and path.suffix == ".py")) and path.is_file():
            shutil.copyfile(path, out / path.name)


def _skeleton(directory: Path) -> HFDecoder:
    """The model of a directory's config, without weights."""
    if re.search(r"(layers|blocks|h)\.\d", json.dumps(_quantization(directory))):
        raise ShortGPTError(
            f"{directory} is quantized with settings for single layers, which cannot be renumbered"
        )
    try:
        config = read_config(str(directory))
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
            return HFDecoder(model)
    except MissingPackageError:
        raise
    except Exception as error:
        reason = explained(error)
        if TRUST in str(error):
            reason = "it is defined by Python code of its own; expected a family of transformers"
        raise ShortGPTError(
            f"{directory} is no causal model that can be pruned: {reason}"
        ) from error


def _quantization(directory: Path) -> object:
    return read_record(directory / "config.json").get("quantization_config")


def _prefix(weights: Mapping[str, object], layers_path: str, count: int) -> str:
    """The stored layers' name before their number, with or without that of the model around."""
    last = layers_path.rpartition(".")[2]
    numbers_of: dict[str, set[int]] = {}
    for name in weights:
        match = re.match(rf"((?:[^\d.][^.]*\.)*?{re.escape(last)})\.(\d+)\.", name)
        if match:
            numbers_of.setdefault(match[1], set()).add(int(match[2]))
    fitting = [p for p, numbers in numbers_of.items() if numbers == set(range(count))]
    related = [p for p in fitting if _ends(layers_path, p) or _ends(p, layers_path)]
    choice = related or [p for p in fitting if "vision" not in p and "audio" not in p]
    if len(choice) != 1:
        shown = {p: len(numbers) for p, numbers in numbers_of.items()}
        raise ShortGPTError(
            f"expected tensors of {layers_path}.0 to {layers_path}.{count - 1}, one list of them; "
            f"the files hold {shown or 'none'}"
        )
    return choice[0]


def _ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _old_names(weights: Mapping[str, object], prefix: str, keep: Sequence[int]) -> dict[str, str]:
    """The stored name of every tensor that stays, by its new name."""
    new_number = {old: new for new, old in enumerate(keep)}
    names: dict[str, str] = {}
    for name in weights:
        match = re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", name)
        if match is None:
            names[name] = name
        elif int(match[1]) in new_number:
            names[f"{prefix}.{new_number[int(match[1])]}.{match[2]}"] = name
    return names


def _groups(
    weights: Mapping[str, SafetensorsFile], old_name: Mapping[str, str]
) -> list[dict[str, Entry]]:
    """The tensors of each new file: as in the source, without files of which none is left."""
    groups: dict[str, dict[str, Entry]] = {}
    for new, old in old_name.items():
        file = weights[old]
        groups.setdefault(file.path.name, {})[new] = file.entries[old]
    return [groups[name] for name in sorted(groups)]


def _edited_config(directory: Path, decoder: HFDecoder, keep: Sequence[int]) -> dict[str, object]:
    """The source's config.json, changed where removing the layers changes the config."""
    if not _quantization(directory):  # which takes packages of its own to load
        check_stored(directory, decoder.model.config)
    before = decoder.model.config.to_dict()
    decoder.keep_layers(keep)
    after = decoder.model.config.to_dict()
    config = read_record(directory / "config.json")
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
        if isinstance(value, dict) and isinstance(old, dict):
            if value != old:
                inner = target.get(key)
                target[key] = inner = inner if isinstance(inner, dict) else {}
                _patch(inner, old, value, aliases)
        elif value != old:
            alias = aliases.get(key, key)
            target[alias if key not in target and alias in target else key] = value


def _check_config(partial: Path, decoder: HFDecoder) -> None:
    """Raises ShortGPTError unless the written config reads as that of the pruned model."""
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(partial, trust_remote_code=False).to_dict()
    if wrong := _differing(decoder.model.config.to_dict(), read):
        raise ShortGPTError(f"config.json cannot hold what the removal changes in {wrong}")


def _differing(expected: Mapping[str, object], read: Mapping[str, object]) -> list[str]:
    """The keys whose values differ, except those that loading sets or that are dropped."""
    own = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}
    own.add("auto_map")  # dropped on purpose
    wrong = []
    for key, value in expected.items():
        other = read.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            wrong += [f"{key}.{name}" for name in _differing(value, other)]
        elif key not in own and value != other:
            wrong.append(key)
    return wrong
