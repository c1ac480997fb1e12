"""The ShortGPT paper's protocol on a checkpoint, beside the paper's list."""

from __future__ import annotations

from dataclasses import dataclass

from llama.parallel import choose_device, choose_dtype
from short_gpt.jobs.inputs import (
    STRIDE,
    Cut,
    Notify,
    Running,
    TextSource,
    about_bos,
    ignore,
    source_of,
)
from short_gpt.jobs.published import (
    PaperComparison,
    PaperOrder,
    bear_out,
    compare_with_paper,
    identify,
    layers_in_paper,
    published_scores,
)
from short_gpt.jobs.ranking import Ranking, check_ranking, rank
from short_gpt.jobs.saving import Saving
from short_gpt.jobs.settings import Answer
from short_gpt.models.shape import Shape, shape_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.memory import free_memory, shown
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import spearman
from short_gpt.wrappers.options import OpenOptions

PROTOCOL = Cut(stride=STRIDE, bos="first")


@dataclass(frozen=True)
class Reproduced:
    """What `reproduce` found.

    Attributes:
        comparison: the paper's layers and ours.
        order: how far our scores bear out the paper's order.
        ranking: our scores, as `rank` gives them.
        changed: what was not done as in the paper's protocol, in words.
    """

    comparison: PaperComparison
    order: PaperOrder
    ranking: Ranking
    changed: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """How many layers the paper removes."""
        return len(self.comparison.paper)

    @property
    def importance(self) -> Importance:
        """Our scores."""
        assert self.ranking.importance is not None  # one pass was asked for
        return self.ranking.importance

    @property
    def published(self) -> float | None:
        """Rank correlation of our Block Influence with a published one of all layers."""
        scores = published_scores(self.comparison.model)
        return None if scores is None else spearman(scores[0], self.importance.block_influence)

    def to_dict(self) -> dict[str, object]:
        """All of it, ready for JSON."""
        found = {"result": vars(self.comparison), "order": self.order.to_dict()}
        more = {"published_rank_correlation": self.published, "changed": list(self.changed)}
        return {**found, **more, **self.ranking.to_dict()}

    def finish(self) -> None:
        """Deletes the state, once the result is safe."""
        self.ranking.finish()


def reproduce(
    model: str | None,
    data: str | TextSource = "pg19",
    *,
    paper: Answer | None = None,
    cut: Cut | None = None,
    opening: OpenOptions | None = None,
    running: Running | None = None,
    saving: Saving | None = None,
    notify: Notify = ignore,
) -> Reproduced:
    """Ranks a checkpoint by the ShortGPT paper's protocol (arXiv:2403.03853), beside its list.

    PG-19 validation in windows of 1024 tokens, 256 apart; lowest Block Influence; as many layers
    as the paper's Table 9 removes. It is `rank` with these settings.

    Args:
        model: Llama-2-7B or Llama-2-13B: Meta directory, Hugging Face directory or hub id.
        data: PG-19, streamed from the hub, or a local copy of it.
        paper: which model it is, and how surely the answer is to be that of all windows.
        cut, opening, running, saving: as for `rank`.
        notify: called with what the run will take and how it stands.

    Raises:
        OSError, ShortGPTError: the model is none of the paper's, or as those of `rank`.

    Example:
        >>> reproduce("llama-2-7b").comparison.ours  # doctest: +SKIP
        [27, 26, 25, 28, 24, 29, 23, 21, 22]
    """
    paper, cut = paper or Answer(), cut or PROTOCOL
    opening, running = opening or OpenOptions(), running or Running()
    if model is None:
        raise ShortGPTError(
            "reproduce needs a checkpoint of one of the paper's models, Llama-2-7B or Llama-2-13B "
            "(a directory, or meta-llama/Llama-2-7b-hf on the hub), and PG-19 (streamed, or a "
            "folder as `data`): short-gpt reproduce llama-2-7b"
        )
    shape = shape_of(model, trust_remote_code=opening.trust_remote_code)
    name = _name(model, shape, paper.paper_model)
    n = len(compare_with_paper(name, []).paper)
    answer = Answer(n, confidence=paper.confidence, rare=paper.rare)
    check_ranking(model, answer, cut, running, opening)  # before anything is said
    if not running.stream:
        notify(_whole(shape, opening))
    result = rank(
        model,
        data,
        answer=answer,
        cut=cut,
        opening=opening,
        running=running,
        saving=saving,
        notify=notify,
        detailed=True,
    )
    ours = compare_with_paper(name, result.layers)
    assert result.importance is not None  # of Block Influence, which is no search
    order = bear_out(ours.paper, result.importance)
    return Reproduced(ours, order, result, _changed(cut, source_of(data), result.bos))


def _name(model: str, shape: Shape, given: str | None) -> str:
    """The paper's name of a checkpoint, which has as many layers as the paper's model."""
    try:
        name = given or identify(shape.dim, shape.n_layers, shape.vocab_size)
    except ShortGPTError as error:
        raise ShortGPTError(f"{model} is none of the paper's models: {error}") from None
    if given is None and shape.kv_heads != shape.n_heads:
        raise ShortGPTError(
            f"{model} has the size of {name} but groups its keys and values, so it is another "
            f"model; compare anyway with `paper_model` {name}"
        )
    if shape.n_layers != (layers := layers_in_paper(name)):
        raise ShortGPTError(
            f"{model} has {shape.n_layers} layers, {name} has {layers}: their numbers do not "
            "compare; use the model with all its layers"
        )
    return name


def _whole(shape: Shape, opening: OpenOptions) -> str:
    """What a model in memory takes, by its shape, before it is loaded."""
    device = choose_device(opening.device)
    dtype = choose_dtype(opening.dtype, device)
    size, kind = shape.parameters * dtype.itemsize, str(dtype).removeprefix("torch.")
    line = f"the whole model in memory: {shown(size)} of weights in {kind}"
    if device.type != "cpu":
        return f"{line}, on {device}"
    free = free_memory()
    way = "; stream holds one layer at a time, bfloat16 half as much" if size > free else ""
    return f"{line}, of {shown(free)} that are free{way}"


def _changed(cut: Cut, texts: TextSource, bos: str) -> tuple[str, ...]:
    found = []
    for name, ours, theirs in (
        ("size", cut.size, PROTOCOL.size),
        ("stride", cut.step, PROTOCOL.step),
    ):
        found += [f"{name} {ours:,}, not {theirs:,}"] if ours != theirs else []
    found += [f"at most {cut.max_windows:,} windows"] if cut.max_windows is not None else []
    found += [f"at most {texts.max_texts:,} texts"] if texts.max_texts is not None else []
    found += [f"the split {texts.split}"] if texts.split != "validation" else []
    return (*found, *([said] if (said := about_bos(bos)) else []))
