"""What a healing did, and what a file that was written in other types gives when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llama.io.sources import is_gguf
from short_gpt.checkpoints.gguf import out_paths
from short_gpt.evaluation import Difference, Perplexity, difference, losses, together
from short_gpt.healing import (
    HealingEvidence,
    Learning,
)
from short_gpt.jobs.inputs import (
    Opening,
)


@dataclass(frozen=True)
class Healing:
    """What `heal` did.

    Attributes:
        out: the new directory or file.
        evidence: what healed the model, and what that brought.
        left_out: what was not learned from because it is evaluated on, in words; None if all was.
        unchecked: what could not be checked of the scores, in words; None if nothing.
        texts: names of the texts learned from and evaluated on, tokens in a window, and which
            windows began with bos.
        remark: what a GGUF file holds otherwise than its source; None if nothing.
        written: of a GGUF file, read again, what it gives on the windows of the evidence; None
            of a directory, and of several files, which transformers does not read.
        quantization: how far that is from the healed model before its changed tensors went back
            to their own types.
    """

    out: Path
    evidence: HealingEvidence
    left_out: str | None = None
    unchecked: str | None = None
    texts: Mapping[str, object] = field(default_factory=dict)
    remark: str | None = None
    written: Perplexity | None = None
    quantization: Difference | None = None

    @property
    def perplexity(self) -> dict[str, Perplexity]:
        """Of every state of the model, and of what was written where that was read again."""
        found = dict(self.evidence.perplexity)
        return found if self.written is None else {**found, "as written": self.written}

    def to_dict(self) -> dict[str, object]:
        """The evidence, ready for JSON."""
        values = {name: found.value for name, found in self.perplexity.items()}
        content = {**self.evidence.to_dict(), "perplexity": values, **self.texts}
        if self.quantization is not None:
            content["quantization"] = asdict(self.quantization)
        return content


def reread(done: Healing, parts: Learning, opening: Opening, size: int) -> Healing:
    """The same with what a written GGUF file gives on the windows that the model was judged by.

    Changed tensors were rounded to their own types behind all that was measured before.

    Args:
        done: what was done; unchanged where a directory was written, or several files.
        parts: the windows.
        opening, size: of the file as a model, and of a window.
    """
    if not is_gguf(done.out) or len(out_paths(done.out)) > 1:
        return done
    short = opening.of(str(done.out)).whole(str(done.out), size=size)
    found = together(losses(short.decoder, parts.evaluation))
    change = difference([done.evidence.perplexity["healed"]], [found])
    return replace(done, written=found, quantization=change)
