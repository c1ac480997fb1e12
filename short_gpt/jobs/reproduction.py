"""The ShortGPT paper's protocol on a checkpoint, beside the paper's list."""

from __future__ import annotations

from dataclasses import dataclass

from llama.checkpoint.meta import Checkpoint
from short_gpt.data.texts import pg19, shown
from short_gpt.experiments.published import PaperComparison, compare_with_paper, identify
from short_gpt.jobs.inputs import Opening, StridedCut, known_total
from short_gpt.jobs.scored import UNKNOWN, Scored
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance


@dataclass(frozen=True)
class Reproduced:
    """What `reproduce` found.

    Attributes:
        comparison: the paper's layers and ours.
        importance: our scores.
        scored: of which weights and tokenizer.
    """

    comparison: PaperComparison
    importance: Importance
    scored: Scored = UNKNOWN

    @property
    def n(self) -> int:
        """How many layers the paper removes."""
        return len(self.comparison.paper)

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        found = {"result": vars(self.comparison), "importance": self.importance.to_dict()}
        return {**found, "scored": vars(self.scored)}


def reproduce(
    model: str | None,
    *,
    data: str | None = None,
    paper_model: str | None = None,
    cut: StridedCut | None = None,
    batch_size: int = 1,
    opening: Opening | None = None,
) -> Reproduced:
    """Scores a checkpoint by the ShortGPT paper's protocol (arXiv:2403.03853).

    PG-19 validation in windows of 1024 tokens, 256 apart; lowest Block Influence; as many layers
    as the paper's Table 9 removes.

    Args:
        model: Meta checkpoint directory of Llama-2-7B or Llama-2-13B.
        data: local copy of PG-19; None streams it from the hub.
        paper_model: which of the paper's models this is; None tells it by its shape.
        cut: of the texts, should it be another.
        batch_size: windows read at once.
        opening: of the model.

    Raises:
        ShortGPTError: the model is none of the paper's.

    Example:
        >>> reproduce("llama-2-7b").comparison.ours  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """
    if model is None:
        raise ShortGPTError(
            "reproduce needs a checkpoint of one of the paper's models in Meta's format, "
            "Llama-2-7B or Llama-2-13B (llama.com, or meta-llama/Llama-2-7b on the hub), and "
            "PG-19 (streamed, or a folder as `data`): short-gpt reproduce llama-2-7b"
        )
    name, cut = _name(model, paper_model), cut or StridedCut()
    cut.check()
    found = shown(pg19("validation", path=data))
    short = (opening or Opening()).whole(model, size=cut.size, batch_size=batch_size)
    windows = cut.windows(found, short.encode)
    total = known_total(windows, cut.max_windows)
    short.measure(windows, batch_size=batch_size, total=total)
    n = len(compare_with_paper(name, []).paper)
    ours = compare_with_paper(name, short.layers_to_remove(n=n))
    scored = Scored.of(model, opening.tokenizer_path if opening else None)
    return Reproduced(ours, short.importance, scored)


def _name(model: str, given: str | None) -> str:
    """The paper's name of a checkpoint, which has layers enough."""
    args = Checkpoint(model).args
    name = given or identify(args.dim, args.n_layers, args.vocab_size)
    if given is None and args.kv_heads != args.n_heads:
        raise ShortGPTError(
            f"{model} has the size of {name} but groups its keys and values, so it is another "
            f"model; compare anyway with `paper_model` {name}"
        )
    check_count(
        len(compare_with_paper(name, []).paper), args.n_layers, name=f"layers that {name} loses"
    )
    return name
