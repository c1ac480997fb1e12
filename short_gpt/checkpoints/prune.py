"""A checkpoint with some layers removed, written in its own format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from llama.checkpoint.meta import Checkpoint, args_of_params, read_params
from llama.files import read_json
from llama.formats.gguf_read import GGUFParts
from llama.formats.safetensors import open_weights
from llama.sources import Source, find_source, is_gguf, resolve
from short_gpt.checkpoints.gguf import Stack, write_gguf
from short_gpt.checkpoints.hf import skeleton, write_hf
from short_gpt.checkpoints.meta import write_meta
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import StrPath, Target
from short_gpt.models.loading import explained, read_config
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

    The tensors' bytes are copied, so the result equals the model pruned in memory bit for bit. It
    has the source's format. ShortGPTError names what differs if the format cannot hold the model.

    Args:
        source: Meta or Hugging Face directory, hub id (safetensors), or GGUF file.
        target: where, a path is enough: a file from GGUF, else a directory.
        layers: numbers of the layers to remove.
        provenance: how the layers were chosen; completed here and written with the weights.
        progress: called with every tensor's name before it is written.
    """
    target, source, record = Target.of(target), find_source(source), provenance or Provenance()
    check_same_format(source, target.out)
    target.check(source=source.path)
    if source.kind == "gguf":
        stack = Stack(source.path)
        keep = stack.kept(layers)
        own = [i for i in keep if i < stack.layers]
        done = record.pruned(source, removed=layers, kept=own)
        return write_gguf(stack, target, keep, done=done, progress=progress)
    if source.kind == "meta":
        checkpoint = Checkpoint(source)
        keep = check_layers(layers, range(checkpoint.args.n_layers))
        done = record.pruned(source, removed=layers, kept=keep)
        return write_meta(checkpoint, target, keep, done, progress=progress)
    directory = resolve(source)
    decoder = skeleton(directory)
    keep = check_layers(layers, range(len(decoder.layers)))
    done = record.pruned(source, removed=layers, kept=keep, directory=directory)
    return write_hf(directory, target, keep, done, {}, decoder=decoder, progress=progress)


def check_same_format(source: Source, out: StrPath) -> None:
    """Raises ShortGPTError unless a file is written of a GGUF file, and a directory of others."""
    if is_gguf(out) != (source.kind == "gguf"):
        way = f"convert {source} first, by short-gpt convert"
        raise ShortGPTError(f"{out} is of another format than {source}: {way}")


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
