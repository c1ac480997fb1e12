"""A checkpoint with layers removed: named ones, or by saved scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llama.sources import Source, find_source, is_gguf
from short_gpt.checkpoints.gguf import about_kinds
from short_gpt.checkpoints.prune import kept_tensors, prune_checkpoint
from short_gpt.checkpoints.scores import ChosenLayers
from short_gpt.checkpoints.target import Target, format_of
from short_gpt.jobs.conversion import prove
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.jobs.settings import Choice
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.options import FLOAT32, OpenOptions
from short_gpt.wrappers.short_hf import ShortHFModel


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What `prune` wrote."""

    out: Path  # the new directory or file
    chosen: ChosenLayers  # the layers removed, how they were chosen, and what was tried
    proof: str | None  # what was verified, in a sentence, if anything
    remark: str | None = None  # what other programs may get wrong, or what is still missing
    address: str | None = None  # of the model on the hub, if it was uploaded

    def __repr__(self) -> str:
        return f"PruneResult({self.out}, layers removed {self.layers})"

    @property
    def layers(self) -> list[int]:
        """The layers removed, in original numbers."""
        return self.chosen.layers


@interruptible()
def prune(
    model: str,
    out: str,
    choice: Choice,
    verify: bool | None,
    opening: OpenOptions,
    saving: Saving,
) -> PruneResult:
    """What `jobs.prune` does."""
    source = find_source(model)
    target = Target(out, saving.overwrite)
    choice.check()
    target.check()
    saving.check(out, format_of(source, out))
    copied = source.kind == "gguf" and is_gguf(out)
    opened = source.kind == "gguf" and not copied
    if opening.dtype is not None and not opened:
        raise ShortGPTError("`dtype` is of a GGUF file written as a directory: leave it out")
    removal = choice.chosen(model)
    proof = (_write_opened if opened else _write)(source, target, removal, verify, opening)
    remark = about_kinds(source, removal.layers) if copied else None
    result = PruneResult(target.path, removal, proof, remark)
    return replace(result, address=saving.push(target.path, result))


def _write_opened(
    source: Source, target: Target, removal: ChosenLayers, verify: bool | None, opening: OpenOptions
) -> str | None:
    short = open_model(str(source), opening, max_seq_len=1024, precision=FLOAT32)
    if removal.importance is not None:
        short.importance = removal.importance
    short.remove_layers(removal.layers)
    short.evidence |= removal.record.evidence
    prove, facts = verify is not False, removal.record.facts
    assert isinstance(short, ShortHFModel)
    short.save_pretrained(target.out, verify=prove, overwrite=target.overwrite, facts=facts)
    proof = "verified: loaded again it gives the logits of the model in memory, bit for bit"
    return proof if prove else None


def _write(
    source: Source, target: Target, removal: ChosenLayers, verify: bool | None, opening: OpenOptions
) -> str | None:
    """Writes the checkpoint, verified before it takes its place; returns what was verified."""
    proofs: list[str | None] = []

    def check(directory: Path) -> None:
        layers = removal.layers
        proofs.append(prove(directory, source, str(target.out), opening, verify, drop=layers))

    names = kept_tensors(source, removal.layers)
    with bar("writing", total=len(names) or None, unit="tensor") as shown:
        prune_checkpoint(
            source,
            replace(target, verify=check),
            removal.layers,
            provenance=removal.record,
            progress=lambda _: shown.update(),
        )
    return proofs[0] if proofs else None
