"""A checkpoint with some layers removed, from any format in any format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llama.checkpoint.meta import CONVERSION, Checkpoint, args_of_params, read_params
from llama.files import json_text, read_json, read_marker, write_json
from llama.formats.gguf import SOURCE_KEY, GGUFFile, llama_to_gguf, to_meta
from llama.formats.gguf_read import GGUFParts
from llama.formats.hf import HFCheckpoint, meta_to_hf
from llama.formats.safetensors import open_weights
from llama.formats.tokenizers import find_hf_tokenizer
from llama.sources import Source, find_source, public_name, resolve
from short_gpt.checkpoints.gguf import write_gguf
from short_gpt.checkpoints.gguf_layers import Stack
from short_gpt.checkpoints.hf import skeleton, write_hf
from short_gpt.checkpoints.hub import write_provenance
from short_gpt.checkpoints.meta import write_meta
from short_gpt.checkpoints.provenance import NAME, PROVENANCE, RECORD, Provenance
from short_gpt.checkpoints.target import StrPath, Target
from short_gpt.models.config_file import explained, read_config
from short_gpt.models.numbering import check_layers
from short_gpt.runtime.errors import ShortGPTError


def prune_checkpoint(
    source: StrPath | Source,
    target: Target | StrPath,
    layers: Sequence[int],
    *,
    provenance: Provenance | None = None,
    progress: Callable[[str], object] = str,
) -> Path:
    """Writes a checkpoint with some layers removed, tensor by tensor; no weight is ever loaded.

    The tensors' bytes are copied, so the result equals the model pruned in memory bit for bit.
    Another format is reached by way of the source's own: meanwhile, the pruned weights are on disk
    twice. ShortGPTError names what differs if the format cannot hold the model.

    Args:
        source: Meta or Hugging Face directory, hub id (safetensors), or GGUF file.
        target: where and in which format; a path is enough.
        layers: numbers of the layers to remove.
        provenance: how the layers were chosen; completed here and written with the weights.
        progress: called with every tensor's name before it is written.

    Example:
        >>> facts = Provenance.of_scores(importance, facts={"data": "PG-19"})  # doctest: +SKIP
        >>> prune_checkpoint("7b", "5b", [21, 22], provenance=facts)  # doctest: +SKIP
    """
    target, source = Target.of(target).resolved(source), find_source(source)
    target.check(source=source.path)
    write = _writer(source, layers, provenance or Provenance(), progress)
    if target.format == {"hub": "hf"}.get(source.kind, source.kind):
        return write(target)
    if source.kind == "gguf" and target.format == "hf":
        raise ShortGPTError(
            f"{source} is a GGUF file, which goes to Hugging Face's format by way of the model in "
            "memory: open it, remove the layers and save it, as short-gpt prune does"
        )
    return _write_converted(source, target, write, progress)


def _writer(
    source: Source,
    layers: Sequence[int],
    provenance: Provenance,
    progress: Callable[[str], object],
) -> Callable[[Target], Path]:
    """What writes a checkpoint in its own format without some layers."""
    if source.kind == "gguf":
        stack = Stack(source.path)
        keep = stack.kept(layers)
        own = [i for i in keep if i < stack.layers]
        done = provenance.pruned(source, removed=layers, kept=own)
        return partial(write_gguf, stack, keep=keep, done=done, progress=progress)
    if source.kind == "meta":
        checkpoint = Checkpoint(source)
        keep = check_layers(layers, range(checkpoint.args.n_layers))
        done = provenance.pruned(source, removed=layers, kept=keep)
        return partial(write_meta, checkpoint, keep=keep, record=done, progress=progress)
    directory = resolve(source)
    decoder = skeleton(directory)
    keep = check_layers(layers, range(len(decoder.layers)))
    done = provenance.pruned(source, removed=layers, kept=keep, directory=directory)
    how: dict[str, Any] = {"replaced": {}, "decoder": decoder, "progress": progress}
    return partial(write_hf, directory, keep=keep, record=done, **how)


def kept_tensors(source: Source, removed: Sequence[int] = ()) -> list[str]:
    """The names of a checkpoint's tensors without some layers', in every file that has them.

    None of them where the checkpoint is not local.
    """
    names: Iterable[str] = ()
    if source.kind == "gguf":
        names = GGUFParts(source.path).tensors
    elif source.kind == "meta":
        names = [name for shard in Checkpoint(source).shards for name in shard.infos]
    elif source.kind == "hf":
        names = open_weights(source.path)
    matches = {name: re.match(r"\D*(\d+)\.", name) for name in names}  # the first is the layer's
    return [n for n in names if (match := matches[n]) is None or int(match[1]) not in removed]


def _write_converted(
    source: Source,
    target: Target,
    write: Callable[[Target], Path],
    progress: Callable[[str], object],
) -> Path:
    """Writes a Llama in another format, converted from what ``write`` writes in the source's."""
    if source.kind == "gguf":
        GGUFFile(source.path).args()  # refuses other models now rather than after they are pruned
    elif source.kind != "meta":
        find_hf_tokenizer(HFCheckpoint(resolve(source)).directory)
    if target.format == "gguf":
        with target.new_file() as file:
            pruned = write(Target(file.with_name("pruned")))
            done = Provenance.read(pruned / PROVENANCE)
            also = {RECORD: json_text(done.to_dict()), NAME: done.named(source.path.name)}
            also |= {SOURCE_KEY: public_name(source)}
            llama_to_gguf(pruned, file, also=also, progress=progress)
        return target.path
    with target.new_directory(None, card=False) as folder:
        name = "pruned.gguf" if source.kind == "gguf" else "pruned"
        pruned = write(Target(folder.with_name(name)))
        folder.rmdir()
        convert = meta_to_hf if source.kind == "meta" else to_meta
        convert(pruned, folder, progress=progress)
        record = Provenance.of_checkpoint(pruned)
        assert record is not None  # a pruned checkpoint has one
        write_provenance(folder, record, card=source.kind == "meta")
        marker = read_marker(folder / CONVERSION)  # names the pruned model, which is not kept
        write_json(folder / CONVERSION, {**marker, "source": public_name(source)})
    return target.path


def layers_of(source: StrPath | Source) -> int | None:
    """How many layers a checkpoint here has, by its files; None if they do not say."""
    source = find_source(source)
    if source.kind == "meta":
        return args_of_params(source.path, read_params(source.path)).n_layers
    if source.kind == "gguf":
        with suppress(ShortGPTError):  # raised when it is opened, if it matters then
            return Stack(source.path).layers
    if source.kind != "hf":
        return None
    plain = read_json(source.path / "config.json")
    if "auto_map" in plain:  # code of its own, which is not run
        return plain.get("num_hidden_layers")
    try:
        config = read_config(str(source))
    except Exception as error:
        raise ShortGPTError(f"{source} cannot be loaded: {explained(error)}") from error
    return config.get_text_config(decoder=True).num_hidden_layers
