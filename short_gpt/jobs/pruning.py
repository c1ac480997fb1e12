"""A checkpoint without some layers, from named layers, saved scores, or a limit of quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama.io.files import check_new, resolved
from llama.io.outputs import check_output, new_file
from llama.io.sources import is_gguf
from short_gpt.checkpoints.gguf import about_kinds, check_new_gguf, out_paths
from short_gpt.checkpoints.mergekit import is_recipe, mergekit_recipe, recipe_dtype
from short_gpt.checkpoints.provenance import PROVENANCE
from short_gpt.checkpoints.prune import format_of, prune_checkpoint
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
from short_gpt.wrappers.short_hf import ShortHFModel


@dataclass(frozen=True)
class Written:
    """How a pruned checkpoint is written.

    Args:
        recipe: also write a mergekit passthrough recipe to this file.
        to: the format to write: meta or gguf (a Llama only, but from GGUF to GGUF) or hf. If not
            given, gguf where OUT ends with .gguf, else the source's, or hf from GGUF. From GGUF,
            Meta's is in float32, which holds what quantized weights stand for exactly.
        verify: whether to prove the result: the same logits as the source without the layers in
            memory, and the same greedy generation with and without the cache. If not given, yes
            where Hugging Face's format is read or written, whose config can fail to say which
            layers are left, and no from Meta's to Meta's and to GGUF, which is read again and
            compared in any case.
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
        out: the new directory or file.
        chosen: the layers removed, how they were chosen, and what was tried.
        recipe: the mergekit recipe's file, if one was wanted.
        proof: what was verified, in a sentence; None if nothing was.
        remark: what other programs may get wrong of it, or what it still lacks; None if nothing.
    """

    out: Path
    chosen: Chosen
    recipe: Path | None
    proof: str | None
    remark: str | None = None

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
        model: Meta checkpoint directory, Hugging Face directory or hub id (safetensors), or GGUF
            file of any architecture.
        out: new directory, or file if it ends with .gguf; appears whole or not at all.
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
    opening.check(model)
    to = format_of(model, out, written.to)
    choice.check()
    check_target(out, to, overwrite=written.overwrite)
    dtype = _recipe_dtype(model, out, written, to)
    if to == "gguf" and written.verify and len(out_paths(out)) > 1:
        raise ShortGPTError(
            f"`verify` loads {out}, which transformers does not read in several files; name "
            "one file, or leave it to be read again and compared"
        )
    found = _chosen(model, choice, limit, opening)
    with interruptible():
        write = _write_opened if is_gguf(model) and to == "hf" else _write
        proof = write(model, out, found, written, opening)
        if proof is None and is_gguf(model) and to == "gguf":
            proof = "verified: read again, every tensor left is the source's, byte for byte"
    remarks = (
        [about_kinds(model, found.layers, found.record.block_influence)]
        if is_gguf(model) and to == "gguf"
        else []
    )
    remark = "\n".join(said for said in remarks if said) or None
    return Pruned(Path(out), found, _recipe(model, out, written, dtype), proof, remark)


def check_target(out: str, to: str, *, overwrite: bool, marker: str = PROVENANCE) -> None:
    """Raises FileExistsError or PermissionError where a model in this format could not go."""
    if to == "gguf":
        check_new_gguf(out, overwrite=overwrite)
    else:
        check_new(Path(out), marker=marker, overwrite=overwrite)


def _write_opened(
    model: str, out: str, found: Chosen, written: Written, opening: Opening
) -> str | None:
    """Opens a model, removes the layers, and writes it in Hugging Face's format."""
    short = opening.whole(model, size=1024)
    if found.importance is not None:
        short.importance = found.importance
    short.remove_layers(found.layers)
    short.evidence |= found.record.evidence
    verify, facts = written.verify is not False, found.record.facts
    assert isinstance(short, ShortHFModel)
    short.save_pretrained(out, verify=verify, overwrite=written.overwrite, facts=facts)
    said = "verified: loaded again it gives the logits of the model in memory, bit for bit"
    return said if verify else None


def _chosen(model: str, choice: Choice, limit: PerplexityLimit | None, opening: Opening) -> Chosen:
    if limit is None or limit.max_perplexity_ratio is None:
        return chosen(model, choice)
    return chosen_within(model, choice, limit, opening=opening)


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


def _recipe_dtype(source: str, out: str, written: Written, to: str) -> str:
    """The dtype of a model that mergekit is to read; checks that it can, and the file's place."""
    if written.recipe is None:
        return ""
    if to == "gguf":
        raise ShortGPTError("`recipe`: mergekit writes no GGUF; leave one of them out")
    dtype, path = recipe_dtype(source), Path(written.recipe)
    check_output(path, overwrite=written.overwrite, ours=is_recipe)
    if resolved(Path(out)) in resolved(path).parents:
        raise ShortGPTError(
            f"`recipe` {path} lies in {out}, which holds the checkpoint alone: else it could not "
            "be replaced later; name a file beside it"
        )
    return dtype
