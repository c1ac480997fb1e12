"""A checkpoint with layers removed: named ones, or by saved scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llama.sources import find_source, is_gguf
from short_gpt.checkpoints.gguf import about_kinds
from short_gpt.checkpoints.prune import check_same_format, kept_tensors, prune_checkpoint
from short_gpt.checkpoints.scores import ChosenLayers, chosen
from short_gpt.checkpoints.target import Target, format_of
from short_gpt.jobs.conversion import prove
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.runtime.progress import bar
from short_gpt.selection.settings import Choice
from short_gpt.wrappers.options import OpenOptions


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
    model: str, out: str, choice: Choice, verify: bool | None, opening: OpenOptions, saving: Saving
) -> PruneResult:
    """What `jobs.prune` does."""
    source, proofs = find_source(model), list[str | None]()
    asked = choice.checked()
    check_same_format(source, out)
    Target(out, saving.overwrite).check()
    saving.check(out, format_of(source, out))
    removal = chosen(model, **asked)

    def prove_it(written: Path) -> None:
        proofs.append(prove(written, source, out, opening, verify, drop=removal.layers))

    names = kept_tensors(source, removal.layers)
    with bar("writing", total=len(names) or None, unit="tensor") as shown:
        path = prune_checkpoint(
            source,
            Target(out, saving.overwrite, prove_it),
            removal.layers,
            provenance=removal.record,
            progress=lambda _: shown.update(),
        )
    remark = about_kinds(source, removal.layers) if is_gguf(out) else None
    result = PruneResult(path, removal, proofs[0], remark)
    return replace(result, address=saving.push(path, result))
