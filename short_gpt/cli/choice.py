"""Which layers a command removes: named, chosen by saved scores, or as many as quality allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama.io.hub import resolve
from llama.io.sources import is_meta
from short_gpt.checkpoints import Provenance
from short_gpt.cli.shared import importance_of, open_short, say
from short_gpt.data.texts import texts
from short_gpt.data.windows import windows
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.opening import layers_of
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.results import read_record
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import METHODS, check_method, choose
from short_gpt.selection.perplexity_budget import most_layers


class Choice:
    """Layers to remove from a checkpoint, and what is to be kept of how they were chosen.

    Args:
        ckpt_dir: the checkpoint.
        layers: numbers as fire gives them; or None, to choose by ``scores``.
        scores: JSON file that rank wrote.
        method: a name of `methods.METHODS`; None takes that of the file.

    Raises:
        ShortGPTError: neither or both are given, or the scores are of another model.
    """

    def __init__(
        self, ckpt_dir: str, layers: Any, scores: str | None, method: str | None = None
    ) -> None:
        if (layers is None) == (scores is None):
            raise ShortGPTError(
                "expected either --layers 21,22,23 or --scores FILE --n_prune_layers N"
            )
        if method is not None:
            check_method(method)
        if layers is not None and method is not None:
            raise ShortGPTError("--method chooses from --scores, not from --layers")
        self.facts: dict[str, Any] = {}
        self._ckpt_dir, self._scores = ckpt_dir, scores
        self._named = None if layers is None else layer_list(layers)
        self._importance: Importance | None = None
        self._found: list[int] | None = None
        if scores is not None:
            self._read(read_record(scores), scores, method)

    def _read(self, record: dict[str, Any], scores: str, method: str | None) -> None:
        ranked = record.get("arguments") or {}
        if "chosen" in record:
            self.method = record["chosen"]["method"]
            if method not in (None, self.method):
                raise ShortGPTError(f"{scores} holds the layers of {self.method}, not of {method}")
            self._found = list(record["chosen"]["layers"])
        else:
            self.method = method or ranked.get("method") or "bi"
            self._importance = importance_of(record, scores)
            self._check(self._importance, scores)
        if ranked.get("data"):
            self.facts["data"] = ranked["data"]
        self.facts |= {"method": METHODS[self.method], "scored_by": ranked}

    def _check(self, importance: Importance, scores: str) -> None:
        source = self._ckpt_dir
        found = layers_of(source if is_meta(source) else str(resolve(source)))
        if found is not None and importance.layers != list(range(found)):
            raise ShortGPTError(
                f"{scores} scores {len(importance.layers)} layers, {source} has {found}; they "
                "do not belong together"
            )

    @property
    def provenance(self) -> Provenance:
        """The scores and facts to keep beside the weights."""
        return Provenance.of_scores(self._importance, self.facts)

    def layers(self, n: int | None) -> list[int]:
        """The layers, n of them where scores choose."""
        if self._named is not None:
            if n is not None:
                raise ShortGPTError("--n_prune_layers chooses from --scores, not from --layers")
            return self._named
        if n is None:
            raise ShortGPTError("with --scores, say how many layers to remove: --n_prune_layers N")
        if self._found is not None:
            if not 1 <= n <= len(self._found):
                raise ShortGPTError(
                    f"--n_prune_layers {n}; {self._scores} holds {len(self._found)} layers that "
                    f"{self.method} chose"
                )
            return self._found[:n]
        assert self._importance is not None
        seed = (self.facts.get("scored_by") or {}).get("seed") or 0
        return choose(self._importance, n, method=self.method, seed=seed)

    def most(
        self,
        ratio: float,
        eval_data: str,
        *,
        size: int,
        limit: int,
        device: str | None,
        tokenizer_path: str | None = None,
    ) -> list[int]:
        """As many layers as the perplexity on held-out text allows; keeps the evidence."""
        if self._named is not None:
            raise ShortGPTError("--max_perplexity_ratio chooses from --scores, not from --layers")
        if _same_texts(eval_data, self.facts.get("data")):
            raise ShortGPTError(f"--eval_data {eval_data} is what the scores were measured on")
        short = open_short(self._ckpt_dir, tokenizer_path, size, 1, device, None, None)
        options = {"size": size, "stride": size, "seed": 0, "limit": limit}
        held = list(windows(texts(eval_data), short.encode, **options))  # type: ignore[arg-type]
        bound = len(self._found) if self._found is not None else short.n_layers - 1

        def perplexity_without(layers: list[int]) -> Perplexity:
            with short.without_layers(layers):
                return short.perplexity(held)

        gate = most_layers(perplexity_without, self.layers, ratio=ratio, most=bound)
        dense = gate.tried[0].value
        if not gate.layers:
            raise ShortGPTError(
                f"not even one layer may go: without {self.layers(1)} the perplexity on "
                f"{eval_data} rises by a factor of {gate.tried[1].value / dense:.4f}, above {ratio}"
            )
        for n, found in gate.tried.items():
            rise = f"ratio {found.value / dense:.4f}"
            say(f"{n:>3} layers less: perplexity {found.value:.3f}, {rise}")
        self.facts["quality_gate"] = {"eval_data": eval_data, **gate.to_dict()}
        return gate.layers


def chosen(
    ckpt_dir: str,
    layers: Any,
    scores: str | None,
    n: int | None,
    *,
    angular: bool = False,
    method: str | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """The layers to remove, and the facts to keep; ``angular`` is short for that method."""
    choice = Choice(ckpt_dir, layers, scores, method_of(angular, method))
    return choice.layers(n), choice.facts


def _same_texts(eval_data: str, data: str | None) -> bool:
    """Whether texts to evaluate on are, hold or are part of those that the scores come from."""
    if data is None or not (Path(eval_data).exists() and Path(data).exists()):
        return eval_data == data
    ours, theirs = Path(eval_data).resolve(), Path(data).resolve()
    return ours.is_relative_to(theirs) or theirs.is_relative_to(ours)


def method_of(angular: bool, method: str | None) -> str | None:
    """The method that two flags name."""
    if angular and method not in (None, "angular"):
        raise ShortGPTError(f"--angular and --method {method} contradict each other")
    return "angular" if angular else method


def layer_list(layers: Any) -> list[int]:
    """Layer numbers as fire gives them: one number, or several."""
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, list | tuple) or not all(type(i) is int for i in numbers):
        raise ShortGPTError(f"expected layer numbers as in --layers 21,22,23, got {layers!r}")
    return list(numbers)
