"""A whole model in memory: scored and cut as any, and searched, tried and generated with.

Layer numbers are the original model's, from 0, before and after removal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.numbering import check_exist, check_layers
from short_gpt.models.prefill import skipped_in_prefill
from short_gpt.models.weight_changes import REMOVED_SUBLAYERS, WeightChange
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.importance import Importance
from short_gpt.selection.perplexity_budget import CONFIDENCE, Budget, most_layers
from short_gpt.selection.search import Options, Search, by_loss
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.sublayers import remove_sublayers, sublayer_parameters


def check_texts(texts: Sequence[str]) -> None:
    """Raises ShortGPTError for one text where a list of texts is expected."""
    if isinstance(texts, str):
        raise ShortGPTError("expected a list of texts, got one string: pass [text]")


class ShortModel(ScoredModel):
    """A model in memory whose layers can be scored, searched, tried without and removed.

    Example:
        >>> short = open_model("llama-2-7b")  # doctest: +SKIP
        >>> isinstance(short, ShortModel)  # doctest: +SKIP
        True
    """

    @abstractmethod
    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        """Up to ``count`` likeliest next tokens behind ``ids``."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text, where `greedy` writes on behind them; none where it stops."""
        return frozenset()

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[str],
        max_gen_len: int = 50,
        temperature: float = 0.6,
        top_p: float = 0.9,
    ) -> list[str]:
        """Continuations of texts; ``temperature`` 0 takes the likeliest token.

        Raises:
            ShortGPTError: one text instead of a list, or a text without a token.
        """

    @abstractmethod
    def harness_model(self, *, batch_size: int = 1) -> object:
        """The model as the lm-evaluation-harness knows models; see `evaluation.tasks`."""

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
        """The layers to remove by the loss without them; see `search.sleb` and `search.one_shot`.

        Args:
            windows: token ids, all read for every candidate.
            n: how many layers.
            method: "sleb", or "perplexity" for the one-shot choice.
            candidates: original numbers of the layers that may be removed; None for all, as the
                one-shot choice takes in any case.
            batch_size, max_memory, state, progress: as there.

        Returns:
            Layers in original numbers, in order of removal, and the losses of all trials.

        Raises:
            ShortGPTError: a number is out of range or the method is unknown.
            NotFiniteError: a weight or a loss is NaN or infinite.
        """
        self.check_whole()
        self._check_weights()
        few = None if candidates is None else [self.kept.index(i) for i in candidates]
        options = Options(few, batch_size, max_memory, state, progress)
        found = by_loss(self.decoder, windows, n, options, method=method)
        # a search counts places in the model as it is now; what a user sees are original numbers
        numbers = [{self.kept[i]: v for i, v in loss.items()} for loss in found.losses]
        removed = [self.kept[i] for i in found.removed]
        return Search(removed, numbers, found.evaluations)

    def layers_within(
        self,
        windows: Sequence[Sequence[int]],
        ratio: float,
        *,
        choose: Callable[[int], list[int]] | None = None,
        most: int | None = None,
        confidence: float = CONFIDENCE,
    ) -> Budget:
        """As many layers as the perplexity surely allows; none is removed. See `perplexity_budget`.

        Args:
            windows: token ids of text that neither chose the layers nor trained the model.
            ratio: most that the perplexity may rise by, at least 1.
            choose: from a number of layers to the layers; None takes those of least influence.
            most: layers to try at most; None is all but one.
            confidence: that the perplexity rises by no more; see `perplexity_budget.most_layers`.

        Returns:
            The largest removal up to which every smaller one holds the ratio, and all tried.

        Raises:
            ShortGPTError: the ratio is below 1, or the confidence out of range.

        Example:
            >>> short.layers_within(held_out, 1.2).layers  # doctest: +SKIP
        """
        by_score = choose or (lambda n: self.layers_to_remove(n=n))
        most = len(self.kept) - 1 if most is None else most

        def perplexity_without(layers: list[int]) -> Perplexity:
            with self.without_layers(layers):
                return self.perplexity(windows)

        return most_layers(
            perplexity_without, by_score, ratio=ratio, most=most, confidence=confidence
        )

    @contextmanager
    def skipped_in_prefill(self, layers: Sequence[int]) -> Iterator[None]:
        """The model that skips some layers while it reads a prompt; see `prefill`.

        Args:
            layers: original layer numbers; none changes nothing.

        Raises:
            ShortGPTError: a layer does not exist, or the family cannot do this.
        """
        if layers:
            check_layers(layers, self.present)
        with skipped_in_prefill(self.decoder, [self.present.index(i) for i in layers]):
            yield

    def remove_sublayers(self, *, attention: Sequence[int] = (), mlp: Sequence[int] = ()) -> None:
        """Takes out the attention or the MLP of some layers, in place; see `sublayers`.

        Args:
            attention, mlp: original numbers of the layers that lose this half.

        Raises:
            ShortGPTError: a layer does not exist (any more), or its halves cannot be told apart.
        """
        self.check_whole()
        for half in (attention, mlp):
            check_exist(half, self.kept)
        places = [[self.kept.index(i) for i in layers] for layers in (attention, mlp)]
        parameters = sublayer_parameters(
            self.decoder, self.kept, attention=places[0], mlp=places[1]
        )
        remove_sublayers(self.decoder, attention=places[0], mlp=places[1])
        how = {"method": REMOVED_SUBLAYERS, "attention": list(attention), "mlp": list(mlp)}
        self.note_change(WeightChange(how, frozenset(parameters)))
        self.importance = Importance.empty(self.kept)

    @property
    def removed_sublayers(self) -> dict[str, list[int]]:
        """The layers that lost their attention, and those that lost their MLP."""
        found: dict[str, list[int]] = {"attention": [], "mlp": []}
        for change in self.changes:
            if change.how["method"] == REMOVED_SUBLAYERS:
                for half, layers in found.items():
                    layers += cast(list[int], change.how[half])
        return found
