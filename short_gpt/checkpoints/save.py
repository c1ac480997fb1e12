"""A model in memory on disk: an ordinary checkpoint of its format, with its record beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from llama.checkpoint.meta import CONVERSION, Checkpoint, copy_tokenizer
from llama.checkpoint.pth import Shard
from llama.formats.convert import hf_to_meta
from llama.io.files import read_marker
from llama.io.json_files import write_json
from llama.parallel import model_parallel_size
from llama.tokenizer import find_tokenizer
from short_gpt.checkpoints.card import write_provenance
from short_gpt.checkpoints.meta import prune_meta, write_beside, write_kept
from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.provenance import Provenance
from short_gpt.checkpoints.target import StrPath, Target, takes_target
from short_gpt.runtime.errors import ShortGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@takes_target
def save_hf(
    model: PreTrainedModel,
    target: Target,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    record: Provenance,
) -> Path:
    """Writes a model of transformers for plain ``from_pretrained``, with its card and record.

    Args:
        model: the model.
        target: the new directory; a path is enough.
        tokenizer: written beside it; None if there is none.
        record: of what was done.
    """
    with target.new_directory() as partial:
        _write_hf(model, tokenizer, partial, target)
        write_provenance(partial, record, card=True)
    return target.path


@takes_target
def save_converted(
    model: PreTrainedModel, target: Target, *, tokenizer: object, source: StrPath
) -> Path:
    """Writes a model of transformers as it is, as the conversion of another format.

    Args:
        model: as for `save_hf`.
        target: as for `save_hf`.
        tokenizer: as for `save_hf`.
        source: the model that was read; its record, if it has one, goes along.
    """
    with target.new_directory(marker=CONVERSION) as partial:
        _write_hf(model, cast("PreTrainedTokenizerBase | None", tokenizer), partial, target)
        write_json(partial / CONVERSION, {"source": str(source), "dtype": str(model.dtype)})
        if (record := Provenance.beside(source)) is not None:
            write_provenance(partial, record, card=True)
    return target.path


@takes_target
def save_as_meta(
    model: PreTrainedModel, target: Target, *, record: Provenance, tokenizer_path: StrPath
) -> Path:
    """Writes a Llama of transformers that came from a Meta directory in Meta's format again.

    Args:
        model: as for `save_hf`.
        target: as for `save_hf`; it verifies the Hugging Face directory that is then converted.
        record: as for `save_hf`.
        tokenizer_path: the Meta directory's own, which goes along as it is: through transformers
            it may gain tokens.

    Raises:
        ShortGPTError: the model is no Llama.
        FileExistsError: the target exists.
    """
    with target.new_directory() as partial:
        middle, converted = partial.with_name("hugging_face"), partial.with_name("converted")
        middle.mkdir()
        _write_hf(model, None, middle, target)
        copy_tokenizer(Path(str(tokenizer_path)), middle)  # which the conversion asks for
        hf_to_meta(middle, converted)
        shutil.rmtree(middle)
        for path in sorted(converted.iterdir()):
            if not path.name.startswith("tokenizer"):
                path.rename(partial / path.name)
        copy_tokenizer(Path(str(tokenizer_path)), partial)
        made = read_marker(partial / CONVERSION)  # names the directory in between, gone by now
        write_json(partial / CONVERSION, {**made, "source": record.source})
        write_provenance(partial, record, card=False)
    return target.path


@takes_target
def save_meta(
    short: ModelRecord,
    target: Target,
    *,
    source: StrPath,
    record: Provenance,
    tokenizer_path: StrPath | None = None,
) -> Path:
    """Writes a model that came from a Meta directory, tensor by tensor from the files there.

    The bytes of the source are copied, so that its dtype and sharding stay; only the parameters
    that the model's record names as changed come from memory, in the source's dtype.

    Args:
        short: the model.
        target: the new directory; a path is enough. It is verified only where weights were
            changed, while those in memory are rounded as they are on disk.
        source: where the model came from.
        record: of what was done.
        tokenizer_path: copied along; None looks beside the source.

    Raises:
        RuntimeError: nothing was removed or changed, or the model lacks layers for a trial.
        ShortGPTError: the source has another number of layers; or weights were changed and it has
            several files, or several ranks share the model.
        FileExistsError: the target exists.
    """
    if not short.removed and not short.changed:
        raise RuntimeError("nothing was removed yet; call remove_layers first")
    short.check_whole()  # in a trial, numbers of layers are not those of `kept`
    checkpoint = Checkpoint(source)
    check_origin(short, checkpoint)
    if not short.changed:
        target = replace(target, verify=None)  # the source's bytes are copied
        return prune_meta(
            source, target, short.removed, tokenizer_path=tokenizer_path, provenance=record
        )
    check_one_file(checkpoint)
    tokenizer = Path(str(tokenizer_path or find_tokenizer(checkpoint.directory)))
    with target.new_directory() as partial:
        write_kept(checkpoint, partial, short.kept, {n: w.detach for n, w in _changed(short)})
        count = len(short.kept)
        write_beside(checkpoint, partial, n_layers=count, tokenizer=tokenizer, record=record)
        if target.verify is not None:
            with _as_stored(short, checkpoint.shards[0]):
                target.prove(partial)
    return target.path


def check_origin(short: ModelRecord, checkpoint: Checkpoint) -> None:
    """Raises ShortGPTError unless a checkpoint has as many layers as the model began with."""
    count = checkpoint.args.n_layers
    if count != short.n_layers:
        raise ShortGPTError(
            f"{checkpoint.directory} has {count} layers, this model began with {short.n_layers}: "
            "it is not where the model came from, or layers were removed before it was wrapped"
        )


def check_one_file(checkpoint: Checkpoint) -> None:
    """Raises ShortGPTError unless one file, and one rank, hold the weights whole."""
    source, shards, ranks = checkpoint.directory, len(checkpoint.shards), model_parallel_size()
    if shards > 1:
        raise ShortGPTError(
            f"{source} has {shards} shards; changed weights are written to one: "
            f"short-gpt convert {source} DIRECTORY --shards 1, and change that"
        )
    if ranks > 1:
        raise ShortGPTError(
            f"changed weights are written by one rank that holds them whole, got {ranks} "
            "model-parallel ranks; start it without torchrun"
        )


def _changed(short: ModelRecord) -> list[tuple[str, nn.Parameter]]:
    """The parameters that differ from the source's, by their names there."""
    layer_of = dict(zip(short.kept, short.decoder.layers, strict=True))
    changed = sorted(short.changed)
    return [(f"layers.{i}.{name}", layer_of[i].get_parameter(name)) for i, name in changed]


@contextmanager
def _as_stored(short: ModelRecord, shard: Shard) -> Iterator[None]:
    """Rounds changed parameters to the file's dtype inside the block."""
    exact = [(weight, weight.data) for _, weight in _changed(short)]
    for name, weight in _changed(short):
        weight.data = weight.data.to(shard.infos[name].dtype).to(weight.dtype)
    try:
        yield
    finally:
        for weight, data in exact:
            weight.data = data


def _write_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    target: Target,
) -> None:
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    target.prove(out)
