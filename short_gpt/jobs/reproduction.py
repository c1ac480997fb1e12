"""The ShortGPT paper's protocol on a checkpoint, and lists and scores that others published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from scipy.stats import kendalltau

from llama.files import JsonObject
from short_gpt.data.texts import PG19, TextName, is_local, source_names
from short_gpt.jobs.inputs import SIZE, STRIDE, WindowSettings, about_bos
from short_gpt.jobs.ranking import Ranking, rank
from short_gpt.jobs.saving import Running
from short_gpt.models.loading import shape_of
from short_gpt.models.numbering import check_exist
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.selection.settings import Answer
from short_gpt.wrappers.options import OpenOptions


def published() -> JsonObject:
    """Published lists and scores, each group with its "source" and its "models".

    Layers count from 0. "paper", "sleb" and "evopress" list the layers "removed" of each model, in
    order, "authors_repository" the first and the last. "reimplementation" has "importance" and
    "angular_n9" of two 7B models; only the first 32 - 9 + 1 = 24 entries of that are distances, and
    the rest is padding with 0.
    """
    file = files("short_gpt.jobs").joinpath("published.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _paper_model(name: str) -> JsonObject:
    models = published()["paper"]["models"]
    if name not in models:
        raise ShortGPTError(f"the paper has no list for {name!r}, only for {', '.join(models)}")
    return models[name]


def identify(dim: int, n_layers: int, vocab_size: int) -> str:
    """Which of the paper's models has this shape, by the name that `compare_with_paper` knows.

    A shape does not prove identity: LLaMA 1 7B and Mistral 7B share that of Llama-2-7B.

    Example:
        >>> identify(4096, 32, 32000)
        'Llama-2-7B'
    """
    models = published()["paper"]["models"]
    shapes = {(m["dim"], m["n_layers"], m["vocab_size"]): name for name, m in models.items()}
    if (dim, n_layers, vocab_size) not in shapes:
        known = "; ".join(f"{name} {shape}" for shape, name in shapes.items())
        raise ShortGPTError(
            f"the paper has no list for a model of dim {dim}, {n_layers} layers and a vocabulary "
            f"of {vocab_size}; it covers {known}"
        )
    return shapes[dim, n_layers, vocab_size]


class PaperComparison(NamedTuple):
    """Two lists of removed layers, the paper's and ours, least important first."""

    model: str  # the paper's name of the model
    paper: list[int]  # the paper's layers (arXiv:2403.03853v3, Table 9), in order of removal
    ours: list[int]  # ours, in order of removal
    same_set: bool  # whether both have the same layers, in any order
    overlap: int  # how many layers both have
    same_order: bool  # whether the lists are equal
    same_places: int  # at how many positions both lists have the same layer
    kendall_tau: float | None  # of the order of the shared layers, in [-1, 1]; None if fewer than 2

    def table(self) -> str:
        """Both lists, one above the other, and how they agree, for a terminal."""
        numbers = [f"{n + 1}." for n in range(max(len(self.paper), len(self.ours)))]
        lines = [f"{self.model}, layers in order of removal"]
        rows: dict[str, Sequence[object]] = {"removed": numbers, "paper": self.paper}
        rows["ours"] = self.ours
        lines += [f"{name:<8}" + "".join(f"{c!s:>4}" for c in row) for name, row in rows.items()]
        tau = "-" if self.kendall_tau is None else f"{self.kendall_tau:.2f}"
        count, yes = len(self.paper), {True: "yes", False: "no"}
        lines += [
            f"same layers: {yes[self.same_set]} ({self.overlap} of {count})",
            f"same places: {self.same_places} of {count}",
            f"same order: {yes[self.same_order]} (Kendall's tau {tau})",
        ]
        theirs, ours = {*self.paper} - {*self.ours}, {*self.ours} - {*self.paper}
        lines += [f"only the paper removes {sorted(theirs)}"] if theirs else []
        lines += [f"only we remove {sorted(ours)}"] if ours else []
        return "\n".join(lines)


def compare_with_paper(model: str, ours: Sequence[int]) -> PaperComparison:
    """Compares a list of removed layers with the paper's (arXiv:2403.03853v3, Table 9).

    Args:
        model: "Llama-2-7B", "Llama-2-13B", "Baichuan-2-7B" or "Baichuan-2-13B".
        ours: layers counted from 0, least important first; it may be of another length.

    Example:
        >>> compare_with_paper("Llama-2-7B", [25, 27, 24, 26, 28, 29, 23, 22, 21]).same_set
        True
    """
    ours = [int(layer) for layer in ours]
    known = _paper_model(model)
    check_exist(ours, range(known["n_layers"]))
    paper = known["removed"]
    shared = [layer for layer in paper if layer in ours]
    places = [ours.index(layer) for layer in shared]
    # scipy's ends in ...99 for some equal lists
    tau = kendalltau(range(len(shared)), places).statistic if shared[1:] else None
    return PaperComparison(
        model=model,
        paper=paper,
        ours=ours,
        same_set=sorted(paper) == sorted(ours),
        overlap=len(shared),
        same_order=paper == ours,
        same_places=sum(a == b for a, b in zip(paper, ours, strict=False)),
        kendall_tau=None if tau is None else round(float(tau), 12),
    )


class ReproductionResult(NamedTuple):
    """What `reproduce` gives."""

    comparison: PaperComparison  # the paper's layers and ours
    ranking: Ranking  # our scores
    changed: tuple[str, ...] = ()  # departures from the paper's protocol, in words
    taken: tuple[str, ...] = ()  # local texts in place of PG-19

    @property
    def importance(self) -> Importance:
        assert self.ranking.importance is not None  # one pass was asked for
        return self.ranking.importance

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return {
            "result": self.comparison._asdict(),
            "changed": list(self.changed),
            "taken_for_pg19": list(self.taken),
            **self.ranking.to_dict(),
        }


def reproduce(
    model: str,
    windows: WindowSettings,
    confidence: float | None,
    opening: OpenOptions,
    running: Running,
) -> ReproductionResult:
    """What `jobs.reproduce` does."""
    shape = shape_of(model, trust_remote_code=opening.trust_remote_code)
    name = identify(shape.dim, shape.n_layers, shape.vocab_size)
    if shape.kv_heads != shape.n_heads:
        raise ShortGPTError(
            f"{model} has the size of {name} but groups its keys and values, so it is another model"
        )
    answer = Answer(len(_paper_model(name)["removed"]), confidence=confidence)
    result = rank(model, windows, answer, opening, running)
    ours = compare_with_paper(name, result.layers)
    local = tuple(filter(is_local, source_names(windows.name)))
    return ReproductionResult(ours, result, _changed(windows, result.bos), local)


def _changed(windows: WindowSettings, bos: str) -> tuple[str, ...]:
    """Departures from the paper's protocol, in words."""
    numbers = (("size", windows.size, SIZE), ("stride", windows.step, STRIDE))
    changed = [f"{name} {ours:,}, not {paper:,}" for name, ours, paper in numbers if ours != paper]
    limit = windows.max_windows
    changed += [f"at most {limit:,} windows"] if limit is not None else []
    theirs = [(source, split, None) for source in PG19 for split in (None, "validation")]
    texts = [name for name in source_names(windows.name) if not is_local(name)]
    others = [name for name in texts if TextName.of(name) not in theirs]
    changed += [f"the text {', '.join(others)}, not PG-19"] if others else []
    return (*changed, *filter(None, [about_bos(bos)]))
