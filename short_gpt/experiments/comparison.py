"""Methods against each other on one model: what each removal costs, and what healing brings back.

Everything is measured once: scores come from one pass, a search's list holds those of all smaller
numbers, patches of all sets are fitted in one pass, and a set of layers that several methods
choose is evaluated once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from short_gpt.data.disjoint import check_disjoint
from short_gpt.evaluation.paired import difference, losses, together
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.healing import linear_patch
from short_gpt.models.numbering import check_count
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import spearman
from short_gpt.selection.methods import BY_LOSS, check_method, choose
from short_gpt.selection.search import Search
from short_gpt.short_model import ShortModel

RAW, PATCHED, LORA = "raw", "patched", "lora"
Windows = Sequence[Sequence[int]]
Heal = Callable[[list[int]], list[Perplexity]]


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        method, seed: what chose the layers; the seed is None but for the random method.
        n: layers removed.
        healing: raw, patched or lora.
        layers: removed, original numbers.
        perplexity: on the evaluation text.
        nats, standard_error: mean loss less that of the whole model, paired over the windows.
        gain, gain_error: the same less that of the raw model, if this one is healed; else None.
        parameters: of the model without the layers.
        megabytes: of its weights.
        tokens_per_second: greedy generation with the cache, one sequence.
    """

    method: str
    seed: int | None
    n: int
    healing: str
    layers: list[int]
    perplexity: float
    nats: float
    standard_error: float
    gain: float | None
    gain_error: float | None
    parameters: int
    megabytes: float
    tokens_per_second: float


class Comparison:
    """Compares methods on one model.

    Args:
        short: the whole model; it is left as it was.
        calibration: windows of token ids that choose layers and fit patches.
        evaluation: windows of other text.
        few: how many of the calibration windows the searches by loss read.
        state: saves what was measured and continues from it.

    Raises:
        ShortGPTError: calibration and evaluation share text.
    """

    def __init__(
        self,
        short: ShortModel,
        calibration: Windows,
        evaluation: Windows,
        *,
        few: int = 4,
        state: StateFile | None = None,
    ) -> None:
        check_disjoint(calibration, evaluation)
        self.short, self._calibration, self._evaluation = short, calibration, evaluation
        self._few, self._state = calibration[:few], state
        content = state.content if state and state.content else {}
        self._cells: dict[str, Any] = content.get("cells", {})

    def rows(
        self,
        methods: Sequence[str],
        counts: Sequence[int],
        *,
        healings: Sequence[str] = (RAW,),
        seeds: int = 3,
        lora: Heal | None = None,
        lora_only: Collection[tuple[str, int]] | None = None,
    ) -> list[Row]:
        """Measures every method x number of layers x healing, and the whole model first.

        Args:
            methods: names of `methods.METHODS`; ``random`` is drawn ``seeds`` times.
            counts: numbers of layers to remove.
            healings: of raw, patched and lora. Sets that cannot be patched have no such row.
            seeds: how many random sets for every number.
            lora: heals the model without these layers and gives the loss of every evaluation
                window.
            lora_only: the methods and numbers to heal so, which takes far longer than all the
                rest; None means all.

        Raises:
            ShortGPTError: a method is unknown or a number is out of range.
        """
        for method in methods:
            check_method(method)
        for n in counts:
            check_count(n, len(self.short.kept), name="counts")
        cases = [
            (method, seed, n)
            for method in methods
            for seed in (range(seeds) if method == "random" else [None])
            for n in counts
        ]
        sets = [self.layers(method, n, seed or 0, most=max(counts)) for method, seed, n in cases]
        if PATCHED in healings:
            self._patch_all(sets)
        trained = [(m, n) for m, _, n in cases] if lora_only is None else lora_only
        found = [self._row("dense", None, 0, RAW, [])]
        with bar("comparing", total=len(cases) * len(healings), unit="model") as shown:
            for healing in healings:
                for (method, seed, n), layers in zip(cases, sets, strict=True):
                    shown.update()
                    if healing == LORA and (method, n) not in trained:
                        continue
                    if healing == LORA and lora is not None:
                        self._measured(LORA, layers, partial(lora, layers))
                    if healing != PATCHED or 0 not in layers:
                        found.append(self._row(method, seed, n, healing, layers))
        return found

    def layers(self, method: str, n: int, seed: int = 0, *, most: int | None = None) -> list[int]:
        """The n layers that a method removes; searches go on to ``most`` at once."""
        if method in BY_LOSS:
            return self._search(method, most or n).removed[:n]
        return choose(self.importance, n, method=method, seed=seed)

    @property
    def importance(self) -> Importance:
        """Scores of the calibration windows."""
        return self._scored("importance", self._calibration)

    def _scored(self, key: str, windows: Windows) -> Importance:
        """Scores of some windows; the model keeps those that it has."""
        if key not in self._cells:
            before, self.short.importance = self.short.importance, Importance.empty(self.short.kept)
            try:
                self.short.measure(windows, all_tokens=True)
                self._keep(key, self.short.importance.to_dict())
            finally:
                self.short.importance = before
        return Importance.from_dict(self._cells[key])

    def _search(self, method: str, n: int) -> Search:
        key = f"{method} {n}"
        if key not in self._cells:
            part = None if self._state is None else self._state.part(key.replace(" ", "-"))
            found = self.short.search(self._few, n, method=method, state=part)
            self._keep(key, {"removed": found.removed, "losses": found.losses})
            if part is not None:
                part.clear()
        content = self._cells[key]
        losses = [{int(i): v for i, v in loss.items()} for loss in content["losses"]]
        return Search(content["removed"], losses)

    def agreement(self, n: int, most: int) -> dict[str, Any]:
        """Whether the cheap rankings hold: Block Influence, angle and greedy search, all on the
        windows that the searches read.

        Returns:
            The share of n layers that each pair of methods has in common, and Spearman's
            correlation of Block Influence with the loss without each layer alone, over the
            layers that the search tries first.
        """
        few = self._scored("importance of few", self._few)
        sets = {m: set(choose(few, n, method=m)) for m in ("bi", "angular")}
        sets["sleb"] = set(self.layers("sleb", n, most=most))
        pairs = (("bi", "angular"), ("bi", "sleb"), ("angular", "sleb"))
        shared = {f"{a}, {b}": len(sets[a] & sets[b]) / n for a, b in pairs}
        alone = self._search("sleb", most).losses[0]
        scores = few.block_influence
        correlation = spearman(scores[list(alone)], torch.tensor(list(alone.values())).double())
        return {"n": n, "overlap": shared, "rank_correlation_of_bi_with_loss": correlation}

    def tasks(self, rows: Sequence[Row], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a task suite gives for the models without healing.

        Args:
            rows: from `rows`.
            run: scores the model as it is at the call.

        Returns:
            Results by the layers removed, as in ``"[3, 4]"``.
        """
        found: dict[str, Any] = {}
        for layers in [r.layers for r in rows if r.healing == RAW]:
            key = f"tasks {sorted(layers)}"
            if key not in self._cells:
                with self.short.without_layers(layers):
                    self._keep(key, run())
            found[str(sorted(layers))] = self._cells[key]
        return found

    def _row(self, method: str, seed: int | None, n: int, healing: str, layers: list[int]) -> Row:
        dense = self._measured(RAW, [], partial(self._losses, []))
        raw = self._measured(RAW, layers, partial(self._losses, layers))
        parts = raw if healing == RAW else self._kept(healing, layers)
        change, gain = difference(dense, parts), difference(raw, parts)
        parameters, size = self._size(layers)
        return Row(
            method=method,
            seed=seed,
            n=n,
            healing=healing,
            layers=layers,
            perplexity=together(parts).value,
            nats=change.nats,
            standard_error=change.standard_error if n else 0.0,
            gain=None if healing == RAW else gain.nats,
            gain_error=None if healing == RAW else gain.standard_error,
            parameters=parameters,
            megabytes=size / 1e6,
            tokens_per_second=self._speed(n, layers),
        )

    def _losses(self, layers: list[int]) -> list[Perplexity]:
        with self.short.without_layers(layers):
            return losses(self.short.decoder, self._evaluation, progress=False)

    def _measured(
        self, healing: str, layers: list[int], measure: Callable[[], list[Perplexity]]
    ) -> list[Perplexity]:
        """Losses of the evaluation windows, measured once for every set of layers."""
        key = f"{healing} {sorted(layers)}"
        if key not in self._cells:
            found = measure()
            self._keep(key, [[p.nats, p.tokens, p.windows] for p in found])
        return self._kept(healing, layers)

    def _kept(self, healing: str, layers: list[int]) -> list[Perplexity]:
        return [Perplexity(*values) for values in self._cells[f"{healing} {sorted(layers)}"]]

    def _patch_all(self, sets: Sequence[list[int]]) -> None:
        """Fits patches of all sets at once and measures the patched models."""
        missing = {tuple(sorted(layers)) for layers in sets if 0 not in layers}
        missing = {s for s in missing if f"{PATCHED} {list(s)}" not in self._cells}
        if not missing:
            return
        wanted = [list(layers) for layers in sorted(missing)]
        patches = linear_patch.fit_many(self.short, wanted, self._calibration)
        with bar("patched", total=len(wanted), unit="model") as shown:
            for layers, patch in zip(wanted, patches, strict=True):
                with self.short.without_layers(layers):
                    undo = linear_patch.fold(self.short, patch)
                    try:
                        found = losses(self.short.decoder, self._evaluation, progress=False)
                    finally:
                        undo()
                self._keep(f"{PATCHED} {layers}", [[p.nats, p.tokens, p.windows] for p in found])
                shown.update()

    def _size(self, layers: list[int]) -> tuple[int, int]:
        """Parameters and bytes of the model without some layers; tied ones count once."""
        gone = {id(p) for i in layers for p in self.short.decoder.layers[i].parameters()}
        model = self.short.decoder.module
        left = {id(p): p for p in model.parameters() if id(p) not in gone}.values()
        return sum(p.numel() for p in left), sum(p.numel() * p.element_size() for p in left)

    def _speed(self, n: int, layers: list[int], *, prompt: int = 64, count: int = 32) -> float:
        """Tokens per second of greedy generation; it depends on the number of layers alone."""
        key = f"speed {n}"
        if key not in self._cells:
            room = self.short.decoder.max_seq_len
            prompt, count = min(prompt, room // 2), min(count, room // 2)
            ids = list(self._evaluation[0][:prompt])
            seconds = []
            with self.short.without_layers(layers):
                for _ in range(4):
                    started = time.perf_counter()
                    made = len(self.short.greedy(ids, count))
                    seconds.append((time.perf_counter() - started) / max(made, 1))
            self._keep(key, 1 / statistics.median(seconds[1:]))  # the first one warms up
        return float(self._cells[key])

    def _keep(self, key: str, value: Any) -> None:
        self._cells[key] = value
        if self._state is not None:
            self._state.save({"cells": self._cells})
