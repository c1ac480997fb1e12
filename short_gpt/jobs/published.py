"""Published layer lists with their sources, and your own list and scores against the paper's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations, pairwise

import torch
from torch import Tensor

from llama.io.json_files import JsonObject
from short_gpt.models.numbering import check_exist
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance, difference_margins
from short_gpt.scoring.metrics import kendall, spearman

BORNE_OUT, REVERSED, WITHIN = "as in the paper", "the other way", "within the error"


def published() -> JsonObject:
    """Published lists and scores, each group with its "source" and its "models".

    Layers count from 0; lists are in order of removal.

    Returns:
        "paper": of each model dim, n_layers, vocab_size and the layers "removed" (Table 9).
        "authors_repository": first and last removed layer of each model.
        "reimplementation": "importance" and "angular_n9", of two 7B models with 32 layers, and
            the lists "removed" and "removed_angular_n9" printed for them. Of `angular_n9` only
            the first 32 - 9 + 1 = 24 entries are distances; the rest is padding with 0, so that
            the least entry of all is not the best block.
        "sleb", "evopress": one list of removed layers a model.
    """
    return json.loads(
        files("short_gpt.jobs").joinpath("published.json").read_text(encoding="utf-8")
    )


@dataclass(frozen=True)
class PaperComparison:
    """Two lists of removed layers, the paper's and ours, least important first.

    Attributes:
        model: the paper's name of the model.
        paper: the paper's layers (arXiv:2403.03853v3, Table 9), in order of removal.
        ours: ours, in order of removal.
        same_set: whether both hold the same layers, in whatever order.
        overlap: how many layers both hold.
        same_order: whether the lists are equal.
        same_places: at how many places both lists have the same layer.
        kendall_tau: of the order of the layers that both hold, in [-1, 1]: the share of their pairs
            in the same order, minus the share of the others. None if fewer than 2 are
            shared.
        rank_correlation: Spearman's rho between the places in the two lists of the layers that
            both hold, in [-1, 1]; 1 if these come in the same order, -1 if in reverse. None if
            fewer than 2 layers are shared.
    """

    model: str
    paper: list[int]
    ours: list[int]
    same_set: bool
    overlap: int
    same_order: bool
    same_places: int
    kendall_tau: float | None
    rank_correlation: float | None

    def table(self) -> str:
        """Both lists, one above the other, and how they agree, for a terminal."""
        places = [f"{n + 1}." for n in range(max(len(self.paper), len(self.ours)))]
        rows: dict[str, Sequence[object]] = {"removed": places, "paper": self.paper}
        lines = [
            f"{name:<8}" + "".join(f"{cell!s:>4}" for cell in cells)
            for name, cells in {**rows, "ours": self.ours}.items()
        ]
        return "\n".join([f"{self.model}, layers in order of removal", *lines, *self._verdict()])

    def _verdict(self) -> list[str]:
        tau = "-" if self.kendall_tau is None else f"{self.kendall_tau:.2f}"
        rho = "-" if self.rank_correlation is None else f"{self.rank_correlation:.2f}"
        agree = f"Kendall's tau {tau}, rank correlation {rho}"
        only_paper = sorted({*self.paper} - {*self.ours})
        only_ours = sorted({*self.ours} - {*self.paper})
        lines = [
            f"same layers: {_yes(self.same_set)} ({self.overlap} of {len(self.paper)})",
            f"same places: {self.same_places} of {len(self.paper)}",
            f"same order: {_yes(self.same_order)} ({agree})",
        ]
        lines += [f"only the paper removes {only_paper}"] if only_paper else []
        lines += [f"only we remove {only_ours}"] if only_ours else []
        return lines


def compare_with_paper(model: str, ours: Sequence[int]) -> PaperComparison:
    """Compares a list of removed layers with the paper's (arXiv:2403.03853v3, Table 9).

    Args:
        model: "Llama-2-7B", "Llama-2-13B", "Baichuan-2-7B" or "Baichuan-2-13B".
        ours: layers counted from 0, least important first; it may be of another length.

    Raises:
        ShortGPTError: the paper has no list for the model; a layer occurs twice or does not exist.

    Example:
        >>> compare_with_paper("Llama-2-7B", [25, 27, 24, 26, 28, 29, 23, 22, 21]).same_set
        True
    """
    ours = [int(layer) for layer in ours]
    check_exist(ours, range(layers_in_paper(model)))
    paper = published()["paper"]["models"][model]["removed"]
    shared = [layer for layer in paper if layer in ours]
    several = len(shared) >= 2
    places = [torch.tensor([side.index(layer) for layer in shared]) for side in (paper, ours)]
    return PaperComparison(
        model=model,
        paper=paper,
        ours=ours,
        same_set=sorted(paper) == sorted(ours),
        overlap=len(shared),
        same_order=paper == ours,
        same_places=sum(a == b for a, b in zip(paper, ours, strict=False)),
        kendall_tau=kendall(shared, [i for i in ours if i in shared]) if several else None,
        rank_correlation=spearman(*places) if several else None,
    )


def layers_in_paper(model: str) -> int:
    """How many layers one of the paper's models has; ShortGPTError for another name."""
    models = published()["paper"]["models"]
    if model not in models:
        raise ShortGPTError(f"the paper has no list for {model!r}, only for {', '.join(models)}")
    return models[model]["n_layers"]


def published_scores(model: str) -> tuple[Tensor, Tensor] | None:
    """Scores that others published for one of the paper's models; None where there are none.

    Args:
        model: the paper's name.

    Returns:
        Block Influence of every layer, (L,), and the angular distance of every block of 9 layers,
        (L - 9 + 1,), both as sums, of which only ratios mean something.
    """
    found = published()["reimplementation"]["models"].get(model)
    if found is None:
        return None
    influence, angles = (
        torch.tensor(found[name], dtype=torch.float64) for name in ("importance", "angular_n9")
    )
    return influence, angles[: len(angles) - 9 + 1]


def identify(dim: int, n_layers: int, vocab_size: int) -> str:
    """Which of the paper's models has this shape.

    A shape is no proof of identity: LLaMA 1 7B and Mistral 7B share that of Llama-2-7B.

    Args:
        dim: width of the hidden states.
        n_layers: layers before any is removed.
        vocab_size: rows of the embedding.

    Returns:
        A name that `compare_with_paper` knows.

    Raises:
        ShortGPTError: the paper has no model of this shape.

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


@dataclass(frozen=True)
class Pair:
    """Two layers that the paper removes, one before the other.

    Attributes:
        first, second: the layers, in the paper's order.
        difference: Block Influence of the second minus that of the first; above 0 where the scores
            have them in the paper's order.
        margin: half of its interval, of the paired error; NaN if one window was read.
    """

    first: int
    second: int
    difference: float
    margin: float

    @property
    def verdict(self) -> str:
        """Whether the scores have the paper's order, the other one, or cannot tell."""
        if not abs(self.difference) > self.margin:  # nothing is beyond an error that is not known
            return WITHIN
        return BORNE_OUT if self.difference > 0 else REVERSED


@dataclass(frozen=True)
class PaperOrder:
    """What measured scores say of the order of the paper's list.

    Attributes:
        confidence: of the interval of each pair by itself.
        pairs: every two layers of the list, in its order.
    """

    confidence: float
    pairs: list[Pair]

    def of(self, verdict: str) -> list[Pair]:
        """The pairs of one verdict."""
        return [pair for pair in self.pairs if pair.verdict == verdict]

    def to_dict(self) -> dict[str, object]:
        """All pairs with their verdicts, ready for JSON; None stands for NaN."""
        pairs = []
        for pair in self.pairs:
            margin = pair.margin if pair.margin == pair.margin else None
            pairs.append({**vars(pair), "margin": margin, "verdict": pair.verdict})
        return {"confidence": self.confidence, "pairs": pairs}

    def table(self) -> str:
        """Neighbours of the paper's list, and a count of all pairs, for a terminal."""
        layers = list(dict.fromkeys(i for pair in self.pairs for i in (pair.first, pair.second)))
        neighbours = set(pairwise(layers))
        level = f"{self.confidence:.0%}"
        lines = [f"The paper's order by these scores (difference, ± its paired error at {level}):"]
        lines += [
            f"{pair.first:>5} before {pair.second:>3}  {pair.difference:>+10.6f} ± "
            f"{pair.margin:.6f}  {pair.verdict}"
            for pair in self.pairs
            if (pair.first, pair.second) in neighbours
        ]
        counts = [f"{len(self.of(name))} {name}" for name in (BORNE_OUT, WITHIN, REVERSED)]
        return "\n".join([*lines, f"pairs of the list, {len(self.pairs)}: {', '.join(counts)}"])


def bear_out(paper: Sequence[int], importance: Importance, confidence: float = 0.95) -> PaperOrder:
    """Sets the order of a list of removed layers against measured scores.

    Where a difference is within its error, these data do not tell the order: another sample of
    texts may give the other one.

    Args:
        paper: layers in order of removal, all of them scored.
        importance: the scores.
        confidence: of the interval of each pair by itself.
    """
    margins, scores = difference_margins(importance, confidence), importance.block_influence
    pairs = []
    for first, second in combinations(paper, 2):
        a, b = importance.layers.index(first), importance.layers.index(second)
        pairs.append(Pair(first, second, float(scores[b] - scores[a]), float(margins[a, b])))
    return PaperOrder(confidence, pairs)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
