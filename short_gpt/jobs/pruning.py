"""A checkpoint without some layers, from named layers, saved scores, or a limit of quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama.io.files import check_new
from llama.io.outputs import check_output, new_file
from llama.io.sources import is_meta
from llama.parallel import several_ranks
from short_gpt.checkpoints.mergekit import is_recipe, mergekit_recipe, recipe_dtype
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.prune import prune_checkpoint, refuse_gguf
from short_gpt.jobs.choice import (
    Choice,
    Chosen,
    MethodChoice,
    PerplexityLimit,
    chosen,
    chosen_within,
)
from short_gpt.jobs.inputs import Opening
from short_gpt.jobs.saving import interruptible
from short_gpt.opening import same_model
from short_gpt.runtime.progress import bar
from short_gpt.runtime.results import read_record


@dataclass(frozen=True)
class Written:
    """How a pruned checkpoint is written.

    Args:
        recipe: also write a mergekit passthrough recipe to this file.
        to: the format to write, meta or hf (a Llama only); the source's if not given.
        verify: whether to prove the result: the same logits as the source without the layers in
            memory, and the same greedy generation with and without the cache. If not given, yes
            where Hugging Face's format is read or written, whose config can fail to say which
            layers are left, and no from Meta's to Meta's.
        overwrite: replace an earlier pruned checkpoint.
    """

    recipe: str | None = None
    to: str | None = None
    verify: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Pruned:
    """What `prune` wrote.

    Attributes:
        out: the new directory.
        chosen: the layers removed, how they were chosen, and what was tried.
        recipe: the mergekit recipe's file, if one was wanted.
        proof: what was verified, in a sentence; None if nothing was.
    """

    out: Path
    chosen: Chosen
    recipe: Path | None
    proof: str | None

    @property
    def layers(self) -> list[int]:
        """The layers removed, in original numbers."""
        return self.chosen.layers


def prune(
    model: str,
    out: str,
    *,
    layers: object = None,
    scores: str | None = None,
    n: int | None = None,
    method: str | None = None,
    to: str | None = None,
    verify: bool | None = None,
    overwrite: bool = False,
) -> Pruned:
    """Writes a checkpoint without some layers, tensor by tensor, in either format.

    The model is not loaded for that: memory is bounded by the largest tensor. To verify, source
    and result are then loaded, one after the other, and compared.

    Args:
        model: Meta checkpoint directory, or Hugging Face directory or hub id (safetensors).
        out: new directory; appears whole or not at all.
        layers, scores, n, method: which layers; see `MethodChoice`.
        to, verify, overwrite: how the result is written; see `Written`.

    Returns:
        What was removed, and what was proved of the result.

    Raises:
        FileExistsError: ``out`` exists.
        ShortGPTError: the choice, the format or the source.
        RuntimeError: the result is not the source without the layers. It is deleted, and an
            earlier checkpoint at ``out`` stays.

    Example:
        >>> prune("llama-2-7b", "llama-2-5b", layers=[21, 22, 25]).layers  # doctest: +SKIP
        [21, 22, 25]
    """
    written = Written(to=to, verify=verify, overwrite=overwrite)
    choice = MethodChoice(layers, scores, n, method=method)
    return prune_by(model, out, choice, written=written)


def prune_by(
    model: str,
    out: str,
    choice: Choice,
    *,
    limit: PerplexityLimit | None = None,
    written: Written | None = None,
    opening: Opening | None = None,
) -> Pruned:
    """What `prune` does, with all its settings.

    Args:
        model, out: as there.
        choice: which layers.
        limit: in the place of their number, how far the perplexity may rise.
        written: format, proof, recipe, and whether an earlier checkpoint is replaced.
        opening: of the model, where it is loaded.
    """
    written, opening = written or Written(), opening or Opening()
    refuse_gguf(model)
    choice.check()
    check_new(Path(out), marker=PROVENANCE, overwrite=written.overwrite)
    found = _chosen(model, choice, limit, opening)
    dtype = _recipe_dtype(model, written)
    with interruptible():
        proof = _write(model, out, found, written, opening)
    return Pruned(Path(out), found, _recipe(model, out, written, dtype), proof)


def _chosen(model: str, choice: Choice, limit: PerplexityLimit | None, opening: Opening) -> Chosen:
    if limit is None or limit.max_perplexity_ratio is None:
        return chosen(model, choice)
    return chosen_within(model, choice, limit, opening=opening)


def _write(model: str, out: str, found: Chosen, written: Written, opening: Opening) -> str | None:
    """Writes the checkpoint and proves it before it is there; says what was proved, if anything."""
    proof = _Proof(model, out, found.layers, opening, written.verify)
    with bar("writing", total=None, unit="tensor") as shown:
        prune_checkpoint(
            model,
            out,
            found.layers,
            to=written.to,
            tokenizer_path=opening.tokenizer_path,
            provenance=found.record,
            overwrite=written.overwrite,
            progress=lambda _: shown.update(),
            verify=proof,
        )
    return proof.said


@dataclass
class _Proof:
    """Compares a finished directory with its source, if that is to be.

    Attributes:
        source, out, drop, opening, wanted: the model, what the directory will be called, the
            layers gone, how to open it, and `Written.verify`.
        said: what was proved, in a sentence; None if nothing was.
    """

    source: str
    out: str
    drop: list[int]
    opening: Opening
    wanted: bool | None
    said: str | None = None

    def __call__(self, directory: Path) -> None:
        only_meta = is_meta(self.source) and is_meta(str(directory))
        if not (self.wanted or (self.wanted is None and not only_meta)):
            return
        if several_ranks():
            self.said = "not verified: that loads the model on one rank; run it without torchrun"
            return
        self.said = same_model(
            self.source,
            str(directory),
            self.drop,
            tokenizer_path=self.opening.tokenizer_path,
            trust_remote_code=self.opening.trust_remote_code,
            name=self.out,
        )


def _recipe(model: str, out: str, written: Written, dtype: str) -> Path | None:
    """Writes the mergekit recipe, if there is to be one."""
    if written.recipe is None:
        return None
    path = Path(written.recipe)
    keep = read_record(f"{out}/{PROVENANCE}")["kept_layers"]
    with new_file(path, overwrite=written.overwrite, ours=is_recipe) as partial:
        partial.write_text(mergekit_recipe(model, keep, dtype), encoding="utf-8")
    return path


def _recipe_dtype(source: str, written: Written) -> str:
    """The dtype of a model that mergekit is to read; checks that it can."""
    if written.recipe is None:
        return ""
    dtype = recipe_dtype(source)
    check_output(Path(written.recipe), overwrite=written.overwrite, ours=is_recipe)
    return dtype
