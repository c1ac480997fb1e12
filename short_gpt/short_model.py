"""All that the wrappers of both model families share: score, look, remove.

Layer numbers are the original model's, from 0, before and after removal. L = its layers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from short_gpt import replicas
from short_gpt.data import batches
from short_gpt.decoder import Decoder
from short_gpt.evaluate import Perplexity, perplexity
from short_gpt.greedy import Search, one_shot, sleb
from short_gpt.importance import Importance
from short_gpt.layer_removal import check_layers, remove_layers, span, without_layers
from short_gpt.methods import BY_LOSS, choose
from short_gpt.prefill import skipped_in_prefill
from short_gpt.resume import RunState, StateFile, weights_digest
from short_gpt.scoring import ScoringRun
from short_gpt.stopping import Stop, Verdict
from short_gpt.sublayers import remove_sublayers


class ShortModel:
    """A model whose layers can be scored and removed.

    Args:
        decoder: the model.
        n_prune_layers: how many layers `remove_layers` takes out, 1 to L - 1; may be set later.

    Attributes:
        decoder: the model.
        n_layers: L, before any removal.
        kept: the layers that the model has now, ascending.
        removed: the layers taken out so far, in order of removal.
        removed_sublayers: the layers that lost their attention, and those that lost their MLP.
        healing: how weights of the layers left were changed, ready for JSON, with what went
            before as its ``earlier``; None if they were not.
        importance: the sums of all windows scored since the last removal.
        quality: the last perplexity measured, by the layers that the model had.
    """

    def __init__(self, decoder: Decoder, n_prune_layers: int | None = None) -> None:
        self.decoder = decoder
        self.n_layers = len(decoder.layers)
        self.kept = list(range(self.n_layers))
        self.removed: list[int] = []
        self.importance = Importance.empty(self.kept)
        self.removed_sublayers: dict[str, list[int]] = {"attention": [], "mlp": []}
        self.healing: dict[str, Any] | None = None
        self.quality: dict[tuple[int, ...], Perplexity] = {}
        self._present = self.kept  # kept, less those of a trial
        self._weights_checked = False
        self.n_prune_layers = n_prune_layers
        if n_prune_layers is not None:
            self._check_count(n_prune_layers)

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
            ValueError: a window does not fit the model, the state is of another run, or the rule
                is for a number of layers out of range.
            FloatingPointError: a weight or a state is NaN or infinite. Like after an
                interruption, the batches read before count.
        """
        if stop is not None:
            self._check_count(stop.n)
        self._check_whole()
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
        )
        try:
            run.read(
                windows,
                total=_count(windows) if total is None else total,
                progress=progress,
                sublayers=sublayers,
                all_tokens=all_tokens,
            )
        finally:
            if run.into.n_windows:
                self.importance = run.into
        return run.verdict

    def search(
        self,
        windows: Sequence[Sequence[int]],
        n: int,
        *,
        method: str = "sleb",
        candidates: Sequence[int] | None = None,
        batch_size: int = 1,
        max_memory: int = 2**31,
        state: StateFile | None = None,
        progress: bool = True,
    ) -> Search:
        """The layers to remove by the loss without them; see `greedy.sleb` and `greedy.one_shot`.

        Args:
            windows: token ids, all read for every candidate.
            n: how many layers.
            method: "sleb", or "perplexity" for the one-shot choice.
            candidates: original numbers of the layers that sleb may remove; None for all.
            batch_size, max_memory, state, progress: as there.

        Returns:
            Layers in original numbers, in order of removal, and the losses of all trials.

        Raises:
            ValueError: a number is out of range or the method is unknown.
            FloatingPointError: a weight or a loss is NaN or infinite.
        """
        self._check_whole()
        self._check_weights()
        options: dict[str, Any] = {"batch_size": batch_size, "max_memory": max_memory}
        options |= {"state": state, "progress": progress}
        if method not in BY_LOSS:
            raise ValueError(f"no search by {method!r}; expected one of {', '.join(BY_LOSS)}")
        if method == "sleb":
            few = None if candidates is None else [self.kept.index(i) for i in candidates]
            found = sleb(self.decoder, windows, n, candidates=few, **options)
        else:
            found = one_shot(self.decoder, windows, n, **options)
        numbers = [{self.kept[i]: v for i, v in loss.items()} for loss in found.losses]
        return Search([self.kept[i] for i in found.removed], numbers, found.evaluations)

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
            total=_count(windows) if total is None else total,
            progress=progress,
        )
        if len(self._present) == len(self.decoder.layers):
            self.quality[tuple(self._present)] = found
        return found

    @contextmanager
    def without_layers(self, layers: Sequence[int]) -> Iterator[None]:
        """The model without some layers inside a ``with`` block, whole again after it.

        Args:
            layers: original layer numbers; none changes nothing.

        Raises:
            ValueError: a layer does not exist (any more), is named twice, or none would stay.
        """
        present = self._present  # fewer than kept inside another trial
        if layers:
            check_layers(layers, present)
        with without_layers(self.decoder, [present.index(i) for i in layers]):
            self._present = [i for i in present if i not in layers]
            try:
                yield
            finally:
                self._present = present

    @contextmanager
    def skipped_in_prefill(self, layers: Sequence[int]) -> Iterator[None]:
        """The model that skips some layers while it reads a prompt; see `prefill`.

        Args:
            layers: original layer numbers; none changes nothing.

        Raises:
            ValueError: a layer does not exist, or the family cannot do this.
        """
        if layers:
            check_layers(layers, self._present)
        with skipped_in_prefill(self.decoder, [self._present.index(i) for i in layers]):
            yield

    def remove_sublayers(self, *, attention: Sequence[int] = (), mlp: Sequence[int] = ()) -> None:
        """Takes out the attention or the MLP of some layers, in place; see `sublayers`.

        Args:
            attention, mlp: original numbers of the layers that lose this half.

        Raises:
            ValueError: a layer does not exist (any more), or its halves cannot be told apart.
        """
        self._check_whole()
        if unknown := [i for i in (*attention, *mlp) if i not in self.kept]:
            raise ValueError(f"layers {unknown} do not exist; the model has {span(self.kept)}")
        places = [[self.kept.index(i) for i in layers] for layers in (attention, mlp)]
        remove_sublayers(self.decoder, attention=places[0], mlp=places[1])
        self.removed_sublayers["attention"] += attention
        self.removed_sublayers["mlp"] += mlp
        self.importance = Importance.empty(self.kept)
        self.quality.pop(tuple(self.kept), None)

    def note_healing(self, how: dict[str, Any] | None) -> None:
        """Keeps how weights were changed; what was measured of this model before is dropped."""
        self.healing = how
        self.quality.pop(tuple(self._present), None)

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
            ValueError: n is not set or out of range.
            RuntimeError: nothing was scored, or the scored model is no longer this one.
        """
        n = self.n_prune_layers if n is None else n
        if n is None:
            raise ValueError("set n_prune_layers, or name the layers: remove_layers([...])")
        self._check_count(n)
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
            ValueError: a layer does not exist (any more), or the number is out of range.
            RuntimeError: nothing was scored, or the scores are of the model before a removal.
                Or the model lacks layers for a trial. It is unchanged after any error.
        """
        if isinstance(layers_to_remove, int):
            raise ValueError(
                f"expected a list of layers, got {layers_to_remove}: pass it in a list"
            )
        if layers_to_remove is None or len(layers_to_remove) == 0:
            drop = self.layers_to_remove(angular=angular)
        elif any(isinstance(i, bool) for i in layers_to_remove):
            raise ValueError(f"expected layer numbers, got {list(layers_to_remove)}")
        else:
            drop = [operator.index(i) for i in layers_to_remove]
        check_layers(drop, self.kept)
        self._check_whole()
        remove_layers(self.decoder, [self.kept.index(i) for i in drop])
        self.kept = self._present = [i for i in self.kept if i not in drop]
        self.removed += drop
        return drop

    def weights_digest(self) -> str:
        """A digest of the weights, by which another model is told; the same on all ranks."""
        parts = replicas.of_model(
            weights_digest(getattr(self.decoder, "model", self.decoder.layers))
        )
        return parts[0] if len(parts) == 1 else "-".join(parts)

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
                    raise FloatingPointError(
                        f"layer {number} has NaN or infinite weights in {name}"
                    )
        self._weights_checked = True

    def _check_whole(self) -> None:
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

    def _check_count(self, n: Any) -> None:
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n < len(self.kept):
            raise ValueError(
                f"n_prune_layers = {n!r}; the model has {len(self.kept)} layers "
                f"({span(self.kept)}): expected 1 to {len(self.kept) - 1}"
            )


def _count(windows: Iterable[Sequence[int]]) -> int | None:
    return len(windows) if isinstance(windows, Sized) else None


def fingerprint(short: Any, count: int = 8) -> tuple[torch.Tensor, list[int], list[int]]:
    """What two models must share to be the same: logits, and greedy tokens with and without cache.

    Args:
        short: the model.
        count: tokens read, and tokens generated.

    Returns:
        Logits (1, count, V), and the tokens generated with and without the cache.
    """
    ids = [i % short.decoder.vocab_size for i in range(count)]
    logits = short.decoder.logits(torch.tensor([ids], device=short.decoder.device)).cpu()
    cached, uncached = (short.greedy(ids, count, use_cache=c) for c in (True, False))
    return logits, cached, uncached
