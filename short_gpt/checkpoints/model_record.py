"""What a model knows of itself: its layers, its scores, and what was done to its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity, window_perplexities
from short_gpt.models.decoder import Decoder, Parameter, WeightChange, restored_on_error
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.models.numbering import span
from short_gpt.runtime import replicas
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.frames import html_table
from short_gpt.scoring.importance import Importance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelRecord:
    """The record of one model. Layer numbers are the original model's, from 0.

    Attributes:
        decoder: the model.
        n_layers: how many layers it had at first.
        kept: the layers that it has now, ascending.
        removed: the layers removed so far, in order of removal.
        importance: the sums of all windows scored since the last removal.
        chosen_by: the scores before the last removal; None without.
        changes: what was done to the weights of layers that stayed, in order.
        quality: the last perplexity of the weights as they are, by the layers that the model had;
            with all layers, that of the original.
        evidence: how layers were chosen and what healing brought, ready for JSON; jobs fill it.
        max_memory: of the process, as a streamed model was opened with.
        history: of each source that it was saved with, the record there and the card's entries.
    """

    max_memory: str | int | None = None

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.n_layers = len(decoder.layers)
        self.kept = list(range(self.n_layers))
        self.removed: list[int] = []
        self.changes: list[WeightChange] = []
        self.importance = Importance.empty(self.kept)
        self.chosen_by: Importance | None = None
        self.quality: dict[tuple[int, ...], Perplexity] = {}
        self.evidence: dict[str, object] = {}
        self.history: dict[str, tuple[Any, dict[str, object]]] = {}  # `Provenance` or None
        self._trial: list[int] | None = None

    def _about(self) -> dict[str, object]:
        gone = {"removed": self.removed} if self.removed else {}
        source = getattr(self, "source", None)
        name = {} if source is None else {"model": str(source)}
        healed = {"changed parameters": len(self.changed)} if self.changed else {}
        layers = {"layers": len(self.kept), **gone, **healed}
        return {**name, **layers, "windows scored": self.n_windows}

    def __repr__(self) -> str:
        parts = (f"{name} {value}" for name, value in self._about().items())
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        columns = {name: [value] for name, value in self._about().items()}
        return html_table(columns, type(self).__name__)

    @property
    def importance(self) -> Importance:
        return self._importance

    @importance.setter
    def importance(self, scores: Importance) -> None:
        self._importance, self._scored_changes = scores, self.changes

    @property
    def present(self) -> list[int]:
        """The layers that the model has at this moment: `kept` without those of a trial."""
        return self.kept if self._trial is None else self._trial

    @property
    def importances(self) -> Tensor:
        """Mean Block Influence of every original layer, (L,) float64; NaN if it was not scored."""
        return self.by_layer(self._scored(), "block_influence")

    @property
    def n_windows(self) -> int:
        """Windows scored."""
        return self.importance.n_windows

    def _scored(self) -> Importance:
        if self.importance.n_windows == 0:
            raise ShortGPTError("no scores yet; call eval_importance or measure first")
        return self.importance

    def by_layer(self, scores: Importance, name: str) -> Tensor:
        """A score by its name, (L,): NaN for layers that were not scored."""
        full = torch.full((self.n_layers,), math.nan, dtype=torch.float64)
        full[scores.layers] = getattr(scores, name)
        return full

    @property
    def changed(self) -> set[Parameter]:
        """The parameters of the kept layers that have other values than the source's."""
        every = set().union(*(change.parameters for change in self.changes))
        return {(number, name) for number, name in every if number in self.kept}

    def note_change(self, change: WeightChange) -> None:
        """Records a change of weights; what was measured without some layers is dropped."""
        self._set_changes([*self.changes, change])

    def forget_change(self, change: WeightChange) -> None:
        """Takes a record back, when the weights are as they were."""
        self._set_changes([c for c in self.changes if c is not change])

    def _set_changes(self, changes: list[WeightChange]) -> None:
        self.changes = changes
        # the original's stays, unless it is what changed
        original = {tuple(range(self.n_layers))} - {tuple(self.present)}
        self.quality = {key: self.quality[key] for key in self.quality.keys() & original}

    def trainable(self) -> PreTrainedModel:
        """The model of transformers that LoRA trains; ShortGPTError where there is none."""
        raise ShortGPTError(
            f"LoRA heals a ShortHFModel, got {type(self).__name__}: convert the checkpoint first"
        )

    def types_in(self, kind: str) -> dict[int, dict[str, int]]:
        """Ggml's types of the matrices of layers that are requantized in a type of GGUF files.

        By original layer number and name; ShortGPTError if the model is from no such file.
        """
        raise ShortGPTError(f"{kind}: only a model from a GGUF file is requantized")

    def layer_calls(self) -> LayerCalls:
        """The model's layers, called one at a time; ShortGPTError if they need more than states."""
        return LayerCalls(self.decoder)

    @torch.no_grad()
    def change_weights(
        self, how: Mapping[str, object], values: Mapping[Parameter, Tensor]
    ) -> Callable[[], None]:
        """Gives parameters new values, records it, and returns a function that undoes both.

        ``how`` tells what made them, ready for JSON, with its name as "method"; ``values`` go by a
        layer's original number and a name in it.
        """
        layers = zip(self.present, self.decoder.layers, strict=True)
        every = {(i, name): p for i, layer in layers for name, p in layer.named_parameters()}
        change = WeightChange(how, frozenset(values))

        def undo() -> None:
            restore()
            self.forget_change(change)

        with restored_on_error(every[key] for key in values) as restore:
            for key, value in values.items():
                every[key].copy_(value)
        self.note_change(change)
        return undo

    def window_perplexities(
        self,
        windows: Sequence[Sequence[int]],
        *,
        progress: bool = True,
        reference: Reference | None = None,
    ) -> list[Perplexity]:
        """What every window gave on its own, of the model as it is now, for `difference`.

        With a ``reference``, as `ScoredModel.reference` gives, also its distance from the original.
        Replicas share the windows; all ranks must call it.
        """
        team = replicas.current(self.decoder.device)
        own = team.own_items(windows)
        return team.merged(
            window_perplexities(self.decoder, own, progress=progress, reference=reference)
        )

    def note_quality(self, result: Perplexity) -> None:
        """Records a perplexity of the model as it is, unless layers were removed unrecorded."""
        if len(self.present) == len(self.decoder.layers):
            self.quality[tuple(self.present)] = result

    def check_source(self, source: object, count: int) -> None:
        """Raises ShortGPTError unless the model began with all ``count`` layers of a source."""
        self.check_whole()  # in a trial, numbers of layers are not those of `kept`
        if count != self.n_layers:
            raise ShortGPTError(
                f"{source} has {count} layers, this model began with {self.n_layers}: it is not "
                "where the model came from, or layers were removed before it was wrapped"
            )

    def check_whole(self) -> None:
        """Raises ShortGPTError where the model lacks layers for a trial, or lost some elsewhere."""
        count = len(self.decoder.layers)
        if count != len(self.kept):
            raise ShortGPTError(
                f"the model has {count} layers, expected {len(self.kept)} ({span(self.kept)}): "
                "in a trial, or after a removal elsewhere, it cannot be scored, pruned or saved"
            )
