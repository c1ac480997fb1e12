"""A checkpoint without some layers, from named layers, saved scores, or a limit of quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama.io.files import check_new, resolved
from llama.io.outputs import check_output, new_file
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
from short_gpt.jobs.proof import Proof
from short_gpt.jobs.saving import interruptible
from short_gpt.runtime.errors import ShortGPTError
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
    dtype = _recipe_dtype(model, out, written)
    if limit is None or limit.max_perplexity_ratio is None:
        found = chosen(model, choice)
    else:
        found = chosen_within(model, choice, limit, opening=opening)
    with interruptible():
        proof = _write(model, out, found, written, opening)
    return Pruned(Path(out), found, _recipe(model, out, written, dtype), proof)


def _write(model: str, out: str, found: Chosen, written: Written, opening: Opening) -> str | None:
    """Writes the checkpoint and proves it before it is there; says what was proved, if anything."""
    proof = Proof(model, out, opening, written.verify, found.layers)
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


def _recipe(model: str, out: str, written: Written, dtype: str) -> Path | None:
    """Writes the mergekit recipe, if there is to be one."""
    if written.recipe is None:
        return None
    path = Path(written.recipe)
    keep = read_record(f"{out}/{PROVENANCE}")["kept_layers"]
    with new_file(path, overwrite=written.overwrite, ours=is_recipe) as partial:
        partial.write_text(mergekit_recipe(model, keep, dtype), encoding="utf-8")
    return path


def _recipe_dtype(source: str, out: str, written: Written) -> str:
    """The dtype of a model that mergekit is to read; checks that it can, and the file's place."""
    if written.recipe is None:
        return ""
    dtype, path = recipe_dtype(source), Path(written.recipe)
    check_output(path, overwrite=written.overwrite, ours=is_recipe)
    if resolved(Path(out)) in resolved(path).parents:
        raise ShortGPTError(
            f"`recipe` {path} lies in {out}, which holds the checkpoint alone: else it could not "
            "be replaced later; name a file beside it"
        )
    return dtype
