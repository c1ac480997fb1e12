"""A checkpoint with some layers removed: from any format in any format, or as mergekit's recipe."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from pathlib import Path

from llama.checkpoint.meta import CONVERSION, Checkpoint
from llama.formats.convert import gguf_to_meta, hf_to_meta, meta_to_hf
from llama.formats.gguf import SOURCE_KEY, GGUFFile, llama_to_gguf
from llama.formats.gguf_read import GGUFParts
from llama.formats.hf import HFCheckpoint
from llama.formats.safetensors import open_weights
from llama.io.files import read_marker
from llama.io.json_files import json_text, write_json
from llama.io.sources import Source, find_source, public_name, resolve
from short_gpt.checkpoints.gguf import prune_gguf
from short_gpt.checkpoints.hf import prune_hf
from short_gpt.checkpoints.meta import prune_meta
from short_gpt.checkpoints.provenance import Provenance, write_provenance
from short_gpt.checkpoints.records import NAME, PROVENANCE, RECORD
from short_gpt.checkpoints.target import StrPath, Target
from short_gpt.models.config_file import read_config
from short_gpt.models.numbering import grouped
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import read_record


def prune_checkpoint(
    source: StrPath | Source,
    target: Target | StrPath,
    layers: Sequence[int],
    *,
    tokenizer_path: StrPath | None = None,
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
        tokenizer_path: of a Meta checkpoint, copied along; None looks in its directory.
        provenance: how the layers were chosen; completed here and written with the weights.
        progress: called with every tensor's name before it is written.

    Example:
        >>> facts = Provenance.of_scores(importance, facts={"data": "PG-19"})  # doctest: +SKIP
        >>> prune_checkpoint("7b", "5b", [21, 22], provenance=facts)  # doctest: +SKIP
    """
    target, source = Target.of(target).resolved(source), find_source(source)
    writers: dict[str, Callable[..., Path]] = {"gguf": prune_gguf}
    writers["meta"] = partial(prune_meta, tokenizer_path=tokenizer_path)
    writer = writers.get(source.kind, prune_hf)
    settings = {"layers": layers, "provenance": provenance, "progress": progress}
    write = partial(writer, source, **settings)
    if target.format == {"hub": "hf"}.get(source.kind, source.kind):
        return write(target)
    if source.kind == "gguf" and target.format == "hf":
        raise ShortGPTError(
            f"{source} is a GGUF file, which goes to Hugging Face's format by way of the model in "
            "memory: open it, remove the layers and save it, as short-gpt prune does"
        )
    return _write_converted(source, target, write, progress)


def kept_tensors(source: Source, layers: Sequence[int], to: str | None = None) -> int | None:
    """How many tensors are written of a checkpoint without some layers; None if it is not local.

    Those of every file, and each once more where they are then converted ``to`` another format.
    """
    if source.kind == "hub":
        return None
    names = tensor_names(source)
    removed = re.compile(rf"\D*({'|'.join(map(str, layers))})\.")  # the first number is the layer
    kept = [name for name in names if not removed.match(name)]
    return len(kept) + (0 if to in (None, source.kind) else len({*kept}))


def tensor_names(source: Source) -> list[str]:
    """The names of a local checkpoint's tensors, in every file that has them."""
    if source.kind == "gguf":
        return [*GGUFParts(source.path).tensors]
    if source.kind == "meta":
        return [name for shard in Checkpoint(source).shards for name in shard.infos]
    return [*open_weights(source.path)]


def _write_converted(
    source: Source,
    target: Target,
    write: Callable[[Target], Path],
    progress: Callable[[str], object],
) -> Path:
    """Writes a Llama in another format, converted from what ``write`` writes in the source's."""
    target.check(source=source.path)
    if source.kind == "gguf":
        GGUFFile(source.path).args()  # refuses other models now rather than after they are pruned
    elif source.kind != "meta":
        HFCheckpoint(resolve(source))
    if target.format == "gguf":
        with target.new_file() as file:
            pruned = write(Target(file.with_name("pruned")))
            done = Provenance.read(pruned / PROVENANCE)
            also = {RECORD: json_text(done.to_dict()), NAME: done.named(source.path.name)}
            also |= {SOURCE_KEY: public_name(source)}
            llama_to_gguf(pruned, file, also=also, progress=progress)
        return target.path
    converters: dict[str, Callable[..., Path]] = {"meta": meta_to_hf, "gguf": gguf_to_meta}
    with target.new_directory(None, card=False) as folder:
        name = "pruned.gguf" if source.kind == "gguf" else "pruned"
        pruned = write(Target(folder.with_name(name)))
        folder.rmdir()
        converters.get(source.kind, hf_to_meta)(pruned, folder, progress=progress)
        record = Provenance.of_checkpoint(pruned)
        assert record is not None  # a pruned checkpoint has one
        write_provenance(folder, record, card=source.kind == "meta")
        marker = read_marker(folder / CONVERSION)  # names the pruned model, which is not kept
        write_json(folder / CONVERSION, {**marker, "source": public_name(source)})
    return target.path


def mergekit_recipe(source: str, keep: Sequence[int], dtype: str = "bfloat16") -> str:
    """A passthrough recipe for mergekit that makes a model of the layers ``keep``, in YAML.

    A directory gets its absolute path: mergekit takes a relative one for a hub id.

    Example:
        >>> print(mergekit_recipe("llama-2-7b", [0, 1, 3]))
        slices:
          - sources:
              - model: "llama-2-7b"
                layer_range: [0, 2]
          - sources:
              - model: "llama-2-7b"
                layer_range: [3, 4]
        merge_method: passthrough
        dtype: bfloat16
        <BLANKLINE>
    """
    keep = list(keep)
    if not keep or keep[0] < 0 or keep != sorted(set(keep)):
        raise ShortGPTError(f"expected ascending numbers of the layers that stay, got {keep}")
    name = os.path.abspath(source) if Path(source).is_dir() else str(source)
    lines = ["slices:"]
    for run in grouped(keep):
        lines += ["  - sources:", f"      - model: {json.dumps(name, ensure_ascii=False)}"]
        lines += [f"        layer_range: [{run.start}, {run.stop}]"]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}", ""])


def recipe_dtype(source: str | PathLike[str]) -> str:
    """The dtype that the config of a Hugging Face directory or hub id has for its weights.

    ShortGPTError for another format, which mergekit does not read, and for a config that lists its
    layers' kinds, of which mergekit (0.1.5) changes only the number.
    """
    if find_source(source).kind in ("meta", "gguf"):
        raise ShortGPTError("`recipe`: mergekit reads Hugging Face's format; convert it first")
    directory = resolve(source)
    config = read_record(directory / "config.json")
    kinds = None
    with suppress(ValueError):  # of no known family, which pruning itself will say
        text = read_config(str(directory)).get_text_config(decoder=True)
        kinds = getattr(text, "layer_types", None)
    if kinds:
        raise ShortGPTError(
            "`recipe`: this model's config lists the kinds of its layers (layer_types), of which "
            "mergekit changes only the number: its result has no config.json. Leave `recipe` out "
            "and use the pruned checkpoint, which is complete"
        )
    config = {**config, **(config.get("text_config") or {})}
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe that `mergekit_recipe` made."""
    content = path.read_bytes()
    return content.startswith(b"slices:") and b"\nmerge_method: passthrough\n" in content
