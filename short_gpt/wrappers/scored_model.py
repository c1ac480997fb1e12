"""What every wrapper can do, streamed ones included: score, choose, remove, evaluate, save.

Layer numbers are the original model's, from 0, before and after removal. L = its layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.checkpoints.target import StrPath
from short_gpt.data.windows import batches, count_of, starts_texts
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.models.decoder import (
    Decoder,
    damaged_weight,
    multiplies_faster,
    padded,
    remove_layers,
    without_layers,
)
from short_gpt.models.loading import config_digest
from short_gpt.models.numbering import check_count, check_layers, layer_numbers
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import weights_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.scoring.hooks import Scores, score_batch
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import RunState, ScoringRun, seconds_a_pass
from short_gpt.scoring.stopping import Stop, Verdict, check_sample
from short_gpt.selection.methods import choose
from short_gpt.wrappers.options import FASTER, FLOAT32, MIXED

S = TypeVar("S", bound="ScoredModel")


class ScoredModel(ModelRecord, ABC):
    """A model whose layers can be scored and removed; ``n_prune_layers`` is 1 to L - 1.

    ``verdict`` says whether the answer of the last run with a stop is settled, and on what.
    A wrapper of another kind of model implements `encode`, `configuration` and `save`.
    """

    streamed: ClassVar[bool] = False  # whether every pass reads the weights again

    def __init__(self, decoder: Decoder, n_prune_layers: int | None = None) -> None:
        super().__init__(decoder)
        self._weights_checked = False
        self.verdict: Verdict | None = None
        self.n_prune_layers = n_prune_layers
        if n_prune_layers is not None:
            self.n_prune_layers = check_count(n_prune_layers, len(self.kept), name="n_prune_layers")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after the special tokens that the model expects before it."""

    @property
    def bos(self) -> str:
        """Which windows of texts begin with bos: "first", or "every" for families such as Gemma."""
        return "every" if self.decoder.family.needs_bos and starts_texts(self.encode) else "first"

    @abstractmethod
    def save(
        self,
        out_dir: StrPath,
        *,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes the model as it is now as an ordinary checkpoint, with ``pruning.json``.

        Args:
            out_dir: New directory; appears complete or not at all.
            facts: Facts to keep in ``pruning.json``, such as ``{"data": "PG-19"}``. Default: none.
            measured: Perplexities by the model's state. Default: those that the model remembers.
            overwrite: Replace an earlier checkpoint of this library, and nothing else.
        """

    @property
    @abstractmethod
    def configuration(self) -> Mapping[str, object]:
        """The entries of the model's own configuration."""

    def plan_text(self, batch_size: int = 1) -> str | None:
        """What a run will take in memory, in one line; None for a model that is in memory."""
        return None

    def measure(
        self,
        windows: Iterable[Sequence[int]],
        *,
        batch_size: int = 1,
        total: int | None = None,
        progress: bool = True,
        stop: Stop | None = None,
        state: RunState | None = None,
        random_order: bool = False,
    ) -> Importance:
        """Scores windows of at most ``max_seq_len`` token ids; returns the sums with those so far.

        One pass gives the measures of both papers. A text that is read again counts as a new one.

        Args:
            stop: Ends the run when its answer is settled, see ``verdict``; needs a random sample
                (`data.windows` with a seed, or ``random_order``) and no scores so far.
            state: Saves the run and continues it; the scores so far are then those saved.
            random_order: Other windows stand in random order, which nothing can check.

        Raises:
            NotFiniteError: a weight or a state is NaN or infinite; batches before it count.
        """
        self.check_whole()
        self.check_weights()
        total = count_of(windows) if total is None else total
        population = getattr(windows, "population", None)
        sums = self._sums_so_far(state)
        if stop is not None:
            check_count(stop.n, len(self.kept))
            check_sample(random_order or population is not None, sums.n_windows * (state is None))
        if state is not None:  # refused before anything is replaced
            windows = state.unread(windows, sums.n_windows)
        run = ScoringRun(
            self.decoder,
            sums,
            batch_size=self.windows_at_once(batch_size, progress),
            population=population,
            stop=stop,
            state=state,
            score_batch=self.score_batch,
        )
        try:
            run.read(windows, total=total, progress=progress)
        finally:  # also after Ctrl-C: what was read before counts
            if run.into.n_windows:
                self.importance = run.into
            self.verdict = run.verdict
        return self.importance

    def _sums_so_far(self, state: RunState | None) -> Importance:
        """Those that a run adds to: saved ones, or this model's of its present weights."""
        if state is not None:
            state.agree(replicas.current(self.decoder.device))
            return state.sums(self.kept)
        restart = self._stale or self._scored_changes != self.changes
        return Importance.empty(self.kept) if restart else self.importance

    def windows_at_once(self, batch_size: int, progress: bool = False) -> int:
        """How many windows a run hands to `score` at once."""
        return batch_size

    def seconds_a_window(self, window: Sequence[int]) -> float:
        """Seconds that a window takes, measured on one."""
        return seconds_a_pass(self.decoder, [window])

    def perplexity(
        self,
        windows: Iterable[Sequence[int]],
        *,
        batch_size: int = 1,
        total: int | None = None,
        progress: bool = True,
        reference: Reference | None = None,
    ) -> Perplexity:
        """Perplexity of the model as it is now; arguments and errors as in `measure`.

        With a ``reference``, as `reference` of another model gives, also the distance from that.
        """
        total = count_of(windows) if total is None else total
        result = self._perplexity(windows, batch_size, total, progress, reference)
        result = replace(result, precision=self.precision)
        self.note_quality(result)
        return result

    def _perplexity(
        self,
        windows: Iterable[Sequence[int]],
        batch_size: int,
        total: int | None,
        progress: bool,
        reference: Reference | None = None,
    ) -> Perplexity:
        read = batches(windows, batch_size)
        return perplexity(self.decoder, read, total=total, progress=progress, reference=reference)

    def reference(self, windows: Sequence[Sequence[int]], *, read: bool = True) -> Reference | None:
        """What the model as it is now predicts for windows, for the distance of later states.

        None for a streamed model. Replicas share the windows as in `window_perplexities`. Without
        ``read``, the perplexity of the model as it is now, measured next, reads them on the way.
        """
        if self.streamed:
            return None
        reference = Reference(self.decoder)
        own = replicas.current(self.decoder.device).own_items(windows)
        if read:
            reference.read(own)
        else:
            reference.expect(own)
        return reference

    def window_logits(
        self, windows: Sequence[Sequence[int]], *, batch_size: int = 1
    ) -> Iterator[Tensor]:
        """Logits of the model as it is now at all tokens of each window: (tokens, vocabulary)."""
        for batch in batches(windows, batch_size):
            by_index: dict[int, Tensor] = {}
            for indices, tokens, mask in padded(batch, self.decoder):
                logits = self.decoder.logits(tokens)  # (B, S, V)
                by_index |= {i: logits[row, mask[row]] for row, i in enumerate(indices)}
            yield from (by_index[i] for i in range(len(batch)))

    @contextmanager
    def without_layers(self, layers: Sequence[int]) -> Iterator[None]:
        """The model without these layers (original numbers; maybe none) inside a ``with`` block."""
        present = self.present  # fewer than `kept` inside another trial
        layers = layer_numbers(layers)
        if layers:
            check_layers(layers, present)
        with without_layers(self.decoder, [present.index(i) for i in layers]):
            before, self._trial = self._trial, [i for i in present if i not in layers]
            try:
                yield
            finally:
                self._trial = before

    def remove_layers(
        self,
        layers_to_remove: Sequence[int] | None = None,
        angular: bool = False,
        *,
        n: int | None = None,
        method: str | None = None,
    ) -> list[int]:
        """Removes layers (original numbers), or else those of `layers_to_remove`; returns them.

        ``n``, ``angular`` and ``method`` are as there, for layers that are not named. To undo it,
        use `remove_for_now`, which returns what puts the layers back, or `without_layers`.
        """
        if layers_to_remove is None:
            drop = self.layers_to_remove(n, angular=angular, method=method)
        elif angular or n is not None or method is not None:
            expected = "expected layers, or n and a method (or angular) to choose them by"
            raise ShortGPTError(f"{expected}; got both")
        else:
            drop = layer_numbers(layers_to_remove)
        self.remove_for_now(drop)
        return drop

    def remove_for_now(self, drop: Sequence[int]) -> Callable[[], None]:
        """Removes layers (original numbers); returns what puts them back, which holds them."""
        check_layers(drop, self.kept)
        self.check_whole()
        undo = remove_layers(self.decoder, [self.kept.index(i) for i in drop])
        if not self._stale:
            self.chosen_by = self.importance
        before = self.kept, self.removed
        self.kept = [i for i in self.kept if i not in drop]
        self.removed = [*self.removed, *drop]

        def put_back() -> None:
            undo()
            self.kept, self.removed = before

        return put_back

    def weights_digest(self) -> str:
        """A digest of the weights, which differs for another model; the same on all ranks."""
        parts = replicas.of_model(weights_digest(self.decoder.module))
        return parts[0] if len(parts) == 1 else "-".join(parts)

    def identity(self) -> dict[str, object]:
        """What two runs must share for one to continue the other's state, ready for JSON."""
        dtype, device = self.runs_in()
        runs = {"dtype": str(dtype), "device": device.type, "stream": self.streamed}
        runs |= {"model_parallel_size": len(replicas.of_model(None))}
        runs |= {"configuration": config_digest(self.configuration)}
        return {**runs, "weights": self.weights_digest(), **self.about_precision}

    @property
    def precision(self) -> str:
        """In which precision of `OpenOptions` windows are read, "float32" or "mixed"."""
        return MIXED if self.decoder.mixed else FLOAT32

    @property
    def about_precision(self) -> dict[str, str]:
        """Its entry in identities and results, where it is mixed."""
        return {"precision": MIXED} if self.decoder.mixed else {}

    def in_precision(self: S, precision: str) -> S:
        """The model, which from here on reads windows in this precision of `OpenOptions`.

        All ranks must call it: they take the same one.
        """
        dtype, device = self.runs_in()
        if precision == FASTER:
            slow = replicas.current(device).any_rank(not multiplies_faster(device))
            precision = FLOAT32 if slow else MIXED
        # a model in half precision stays as it is
        self.decoder.mixed = precision == MIXED and dtype is torch.float32
        self.evidence |= self.about_precision
        return self

    def runs_in(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and the device of the layers."""
        return next(self.decoder.layers.parameters()).dtype, self.decoder.device

    def score_batch(self, windows: Sequence[Sequence[int]]) -> Scores:
        """Scores of single windows from one pass, without adding them; see `hooks.score_batch`."""
        return score_batch(self.decoder, windows, layers=self.kept)

    def layers_to_remove(
        self, n: int | None = None, *, angular: bool = False, method: str | None = None
    ) -> list[int]:
        """The layers to remove by the scores, least important first or an ascending block.

        Args:
            n: Layers to remove. Default: ``n_prune_layers``.
            angular: Take the best block (Gromov et al.), not the lowest Block Influence.
            method: Name of `methods.METHODS`, in place of ``angular``. Default: "bi".
        """
        name, count = ("n_prune_layers", self.n_prune_layers) if n is None else ("n", n)
        if count is None:
            raise ShortGPTError(
                "say how many layers, n=..., set n_prune_layers, or name them: remove_layers([...])"
            )
        count = check_count(count, len(self.kept), name=name)
        importance = self._scored()
        if self._stale:
            raise ShortGPTError(
                f"layers {self.removed} were removed since these scores were measured; score "
                "the model again before removing more by score"
            )
        method = method or ("angular" if angular else "bi")
        return choose(importance, count, method=method)

    @property
    def _stale(self) -> bool:
        # scores of a model with other layers
        return self.importance.layers != self.kept

    def check_weights(self) -> None:
        """Raises NotFiniteError for NaN or infinite weights; looks at them once.

        Attention may turn them into finite states, and no text may read them, until it is saved.
        A streamed model looks at those of its layers whenever it reads them.
        """
        if not self._weights_checked and (damaged := damaged_weight(self.decoder, self.kept)):
            raise NotFiniteError(
                f"the model has NaN or infinite weights, {damaged}; fetch them again, or take a "
                "dtype that holds them"
            )
        self._weights_checked = True
