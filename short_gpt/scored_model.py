"""What every wrapper can do, streamed ones included: score, choose, remove, evaluate, save.

Layer numbers are the original model's, from 0, before and after removal. L = its layers.
"""

from __future__ import annotations

import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from short_gpt.data.windows import batches, count_of
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.models.decoder import Decoder
from short_gpt.models.numbering import check_count, check_layers, span
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import weights_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.scoring.hooks import Scores, score
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.run import ScoringRun
from short_gpt.scoring.state import RunState
from short_gpt.scoring.stopping import Stop, Verdict
from short_gpt.selection.methods import choose
from short_gpt.surgery.changes import Parameter, WeightChange
from short_gpt.surgery.layers import remove_layers, without_layers


class ScoredModel(ABC):
    """A model whose layers can be scored and removed.

    A wrapper of another family says how it encodes, what a text it reads is and how it is saved;
    all else is here.

    Args:
        decoder: the model.
        n_prune_layers: how many layers `remove_layers` takes out, 1 to L - 1; may be set later.

    Attributes:
        decoder: the model.
        n_layers: L, before any removal.
        kept: the layers that the model has now, ascending.
        removed: the layers taken out so far, in order of removal.
        changes: what was done to the weights of layers that stayed, in order.
        importance: the sums of all windows scored since the last removal.
        quality: the last perplexity measured, by the layers that the model had.
    """

    def __init__(self, decoder: Decoder, n_prune_layers: int | None = None) -> None:
        self.decoder = decoder
        self.n_layers = len(decoder.layers)
        self.kept = list(range(self.n_layers))
        self.removed: list[int] = []
        self.importance = Importance.empty(self.kept)
        self.changes: list[WeightChange] = []
        self.quality: dict[tuple[int, ...], Perplexity] = {}
        self._trial: list[int] | None = None
        self._weights_checked = False
        self.n_prune_layers = n_prune_layers
        if n_prune_layers is not None:
            check_count(n_prune_layers, len(self.kept), name="n_prune_layers")

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens in front that the model expects."""

    @abstractmethod
    def save(
        self,
        out_dir: str | os.PathLike[str],
        *,
        facts: Mapping[str, object] | None = None,
        measured: Mapping[str, Perplexity] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes the model as it is now as an ordinary checkpoint, with ``pruning.json``.

        Args:
            out_dir: the new directory; appears whole or not at all.
            facts: more to keep in ``pruning.json``, such as ``{"data": "PG-19"}``; what the
                library records itself cannot be named.
            measured: perplexities to keep, by the name of the model's state when each was
                measured; None takes those that the model remembers.
            overwrite: whether an earlier checkpoint of this library is replaced; nothing else is.

        Raises:
            FileExistsError: ``out_dir`` exists.
            ShortGPTError: a fact has the name of a record of the library's own.
            RuntimeError: nothing was changed, or what was saved is not the model in memory.
        """

    def plan_text(self, batch_size: int = 1) -> str | None:
        """What a run will take in memory, in one line; None for a model that is in memory."""
        return None

    @property
    def present(self) -> list[int]:
        """The layers that the model has at this moment: `kept`, less those of a trial."""
        return self.kept if self._trial is None else self._trial

    @property
    def changed(self) -> set[Parameter]:
        """The parameters of the layers left that have other values than the source's."""
        found = set().union(*(change.parameters for change in self.changes))
        return {(number, name) for number, name in found if number in self.kept}

    def note_change(self, change: WeightChange) -> None:
        """Records a change of weights; what was measured of this model before is dropped."""
        self.changes = [*self.changes, change]
        self.quality.pop(tuple(self.present), None)

    def forget_change(self, change: WeightChange) -> None:
        """Takes a record back, when the weights are as they were."""
        self.changes = [c for c in self.changes if c is not change]
        self.quality.pop(tuple(self.present), None)

    def measure(
        self,
        windows: Iterable[Sequence[int]],
        *,
        batch_size: int = 1,
        total: int | None = None,
        progress: bool = True,
        stop: Stop | None = None,
        state: RunState | None = None,
        sublayers: bool = False,
        all_tokens: bool = False,
    ) -> Verdict | None:
        """Scores windows of token ids and adds them to the scores so far.

        One pass gives Block Influence of every layer and the angular distances of every block.

        Args:
            windows: token ids, each at most ``max_seq_len`` long.
            batch_size: windows read at once.
            total: number of windows, for the progress bar; taken from ``len(windows)`` if known.
            progress: whether to show one.
            stop: ends the run when its answer is settled; the windows must then be in random
                order, as those of `data.windows` with a seed are.
            state: saves the run and continues it; the scores so far are then those saved.
            sublayers: also score the attention and the MLP of every layer.
            all_tokens: also take angular distances at all tokens; keeps the states of all layers.

        Returns:
            With ``stop``, whether the answer is settled and what that rests on.

        Raises:
            ShortGPTError: a window does not fit the model, the state is of another run, or the rule
                is for a number of layers out of range.
            NotFiniteError: a weight or a state is NaN or infinite. Like after an
                interruption, the batches read before count.
        """
        if stop is not None:
            check_count(stop.n, len(self.kept))
        self.check_whole()
        self._check_weights()
        into = Importance.empty(self.kept) if self._stale else self.importance
        if state is not None:
            into = state.sums(self.kept)
        run = ScoringRun(
            self.decoder,
            into,
            batch_size=batch_size,
            population=getattr(windows, "population", None),
            stop=stop,
            state=state,
            score=self.score,
        )
        try:
            run.read(
                windows,
                total=count_of(windows) if total is None else total,
                progress=progress,
                sublayers=sublayers,
                all_tokens=all_tokens,
            )
        finally:
            if run.into.n_windows:
                self.importance = run.into
        return run.verdict

    def perplexity(
        self,
        windows: Iterable[Sequence[int]],
        *,
        batch_size: int = 1,
        total: int | None = None,
        progress: bool = True,
    ) -> Perplexity:
        """Perplexity of the model as it is now; arguments and errors as in `measure`."""
        found = perplexity(
            self.decoder,
            batches(windows, batch_size),
            total=count_of(windows) if total is None else total,
            progress=progress,
        )
        if len(self.present) == len(self.decoder.layers):
            self.quality[tuple(self.present)] = found
        return found

    @contextmanager
    def without_layers(self, layers: Sequence[int]) -> Iterator[None]:
        """The model without some layers inside a ``with`` block, whole again after it.

        Args:
            layers: original layer numbers; none changes nothing.

        Raises:
            ShortGPTError: a layer does not exist (any more), is named twice, or none would stay.
        """
        present = self.present  # fewer than kept inside another trial
        if layers:
            check_layers(layers, present)
        with without_layers(self.decoder, [present.index(i) for i in layers]):
            before, self._trial = self._trial, [i for i in present if i not in layers]
            try:
                yield
            finally:
                self._trial = before

    @property
    def importances(self) -> Tensor:
        """Mean Block Influence of every original layer, (L,) float64; see `Importance`.

        NaN for layers that were not in the model when it was scored.
        """
        return self._by_layer(self._scored().block_influence)

    @property
    def standard_errors(self) -> Tensor:
        """Standard error of every entry of `importances`, (L,); NaN below two windows."""
        return self._by_layer(self._scored().standard_error)

    @property
    def agreement(self) -> float:
        """Rank correlation of the scores between two halves of the windows, in [-1, 1]."""
        return self._scored().agreement

    @property
    def angular(self) -> Tensor:
        """Mean angular distances, (L' + 1, L' + 1) over the L' layers scored; see `Importance`."""
        return self._scored().angular

    @property
    def n_windows(self) -> int:
        """Windows scored."""
        return self.importance.n_windows

    @property
    def n_tokens(self) -> int:
        """Tokens scored; padding does not count."""
        return self.importance.n_tokens

    def layers_to_remove(
        self,
        *,
        angular: bool = False,
        n: int | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> list[int]:
        """The n layers that the scores would remove, without removing them.

        Args:
            angular: the best block of consecutive layers instead of the lowest Block Influence.
            n: how many; None takes ``n_prune_layers``.
            method: a name of `methods.METHODS`, in the place of ``angular``.
            seed: of the random method.

        Returns:
            Original layer numbers: least important first, or a block in ascending order.

        Raises:
            ShortGPTError: n is not set or out of range.
            RuntimeError: nothing was scored, or the scored model is no longer this one.
        """
        n = self.n_prune_layers if n is None else n
        if n is None:
            raise ShortGPTError("set n_prune_layers, or name the layers: remove_layers([...])")
        check_count(n, len(self.kept), name="n_prune_layers")
        importance = self._scored()
        if self._stale:
            raise RuntimeError(
                f"layers {self.removed} were removed since these scores were measured; score "
                "the model again before removing more by score"
            )
        return choose(importance, n, method=method or ("angular" if angular else "bi"), seed=seed)

    def remove_layers(
        self, layers_to_remove: Sequence[int] | None = None, angular: bool = False
    ) -> list[int]:
        """Removes layers from the model in place.

        Args:
            layers_to_remove: original layer numbers; None (or empty) removes the
                ``n_prune_layers`` least important ones by the scores.
            angular: by score, the best block of consecutive layers (Gromov et al.) instead of
                the lowest Block Influence (ShortGPT).

        Returns:
            The removed layers: as given, or least important first, or a block in ascending order.

        Raises:
            ShortGPTError: a layer does not exist (any more), or the number is out of range.
            RuntimeError: nothing was scored, or the scores are of the model before a removal.
                Or the model lacks layers for a trial. It is unchanged after any error.
        """
        if isinstance(layers_to_remove, int):
            raise ShortGPTError(
                f"expected a list of layers, got {layers_to_remove}: pass it in a list"
            )
        if layers_to_remove is None or len(layers_to_remove) == 0:
            drop = self.layers_to_remove(angular=angular)
        else:
            drop = [i if isinstance(i, bool) else operator.index(i) for i in layers_to_remove]
        check_layers(drop, self.kept)
        self.check_whole()
        remove_layers(self.decoder, [self.kept.index(i) for i in drop])
        self.kept = [i for i in self.kept if i not in drop]
        self.removed += drop
        return drop

    def weights_digest(self) -> str:
        """A digest of the weights, by which another model is told; the same on all ranks."""
        parts = replicas.of_model(weights_digest(self.decoder.module))
        return parts[0] if len(parts) == 1 else "-".join(parts)

    def score(
        self, windows: Sequence[Sequence[int]], *, sublayers: bool = False, all_tokens: bool = False
    ) -> Scores:
        """Scores of single windows from one pass, without adding them; see `hooks.score`."""
        return score(
            self.decoder, windows, layers=self.kept, sublayers=sublayers, all_tokens=all_tokens
        )

    @property
    def _stale(self) -> bool:
        return self.importance.layers != self.kept

    def _check_weights(self) -> None:
        """Once: attention kernels may turn NaN weights into finite states that look harmless."""
        if self._weights_checked:
            return
        for number, layer in zip(self.kept, self.decoder.layers, strict=True):
            for name, weight in layer.named_parameters():
                if not weight.isfinite().all():
                    raise NotFiniteError(f"layer {number} has NaN or infinite weights in {name}")
        self._weights_checked = True

    def check_whole(self) -> None:
        """Raises RuntimeError where the model lacks layers for a trial, or lost some elsewhere."""
        found = len(self.decoder.layers)
        if found != len(self.kept):
            raise RuntimeError(
                f"the model has {found} layers, expected {len(self.kept)} ({span(self.kept)}): "
                "in a trial, or after a removal elsewhere, it cannot be scored, cut or saved"
            )

    def _scored(self) -> Importance:
        if self.importance.n_windows == 0:
            raise RuntimeError("no scores yet; call eval_importance or measure first")
        return self.importance

    def _by_layer(self, values: Tensor) -> Tensor:
        full = torch.full((self.n_layers,), math.nan, dtype=torch.float64)
        full[self.importance.layers] = values
        return full
