"""A model in memory: scored and pruned as any, and searched, tried and generated with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.models.decoder import Decoder
from short_gpt.models.families import part
from short_gpt.models.layer_hooks import Output, attention_output, first, mlp_output
from short_gpt.models.numbering import check_count, check_exist, check_layers, layer_numbers
from short_gpt.models.prefill import skipped_in_prefill
from short_gpt.models.weight_changes import (
    REMOVED_SUBLAYERS,
    Parameter,
    WeightChange,
    parameters_of,
)
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.hooks import score
from short_gpt.scoring.importance import Importance
from short_gpt.selection.perplexity_budget import CONFIDENCE, Budget, most_layers
from short_gpt.selection.search import Options, Search, by_loss
from short_gpt.wrappers.scored_model import ScoredModel

Prompts = Sequence[str]


def check_texts(texts: Prompts) -> None:
    """Raises ShortGPTError for one text where a list of texts is expected."""
    if isinstance(texts, str):
        raise ShortGPTError("expected a list of texts, got one string: pass [text]")


class ShortModel(ScoredModel):
    """A model in memory whose layers can be scored, searched, tried without and removed.

    Example:
        >>> removed = open_model("llama-2-7b").search(windows, n=9)  # doctest: +SKIP
    """

    @abstractmethod
    def greedy(self, ids: list[int], count: int, *, use_cache: bool = True) -> list[int]:
        """Up to ``count`` likeliest next tokens after ``ids``."""

    @abstractmethod
    def continued(
        self, ids: Sequence[Sequence[int]], count: int, choose: Callable[[Tensor], Tensor]
    ) -> None:
        """Writes ``count`` tokens after B sequences of one length; none of them ends a text.

        ``choose`` takes the logits of the next tokens, (B, V) float32, and returns the tokens (B,).
        """

    @abstractmethod
    def opening(self, *, chat: bool = False) -> list[int]:
        """What a text of the model's own begins with: bos, or the chat template's opening.

        That is the system prompt, if the template has one, and a user's turn that is still open.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end a text, where `greedy` writes on after them; none where it stops."""
        return frozenset()

    @abstractmethod
    def generate(
        self, prompts: Prompts, max_gen_len: int = 50, temperature: float = 0.6, top_p: float = 0.9
    ) -> list[str]:
        """Continuations of texts; ``temperature`` 0 takes the likeliest token."""

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
        """The layers to remove by the loss without them; see `search.by_loss`.

        Args:
            windows: token ids, all read for every candidate.
            method: "sleb", or "perplexity" for the one-shot choice.
            candidates: original numbers of the layers that "sleb" may remove; None for all.
            max_memory: of stored states, in bytes.
        """
        self.check_whole()
        self.check_weights()
        few = None
        if candidates is not None:
            candidates = layer_numbers(candidates)
            check_exist(candidates, self.kept)
            few = [self.kept.index(i) for i in candidates]
        options = Options(few, batch_size, max_memory, state, progress)
        result = by_loss(self.decoder, windows, n, options, method=method)
        # a search counts positions in the model as it is now; a user sees original numbers
        numbers = [{self.kept[i]: v for i, v in loss.items()} for loss in result.losses]
        removed = [self.kept[i] for i in result.removed]
        return Search(removed, numbers)

    def layers_within(
        self,
        windows: Iterable[Sequence[int]],
        ratio: float,
        *,
        choose: Callable[[int], list[int]] | None = None,
        most: int | None = None,
        confidence: float = CONFIDENCE,
    ) -> Budget:
        """The largest removal up to which every smaller one keeps the perplexity, and all tried.

        Args:
            windows: token ids of text that neither chose the layers nor trained the model.
            ratio: most that the perplexity may rise by, at least 1.
            choose: from a number of layers to the layers; None takes those of least influence.
            most: layers to try at most; None is all except one.
            confidence: that the perplexity rises by no more; see `perplexity_budget.most_layers`.
        """

        if most is not None:
            most = check_count(most, len(self.kept), name="most")
        read = list(windows)  # again and again, which an iterator is not

        def perplexity_without(layers: list[int]) -> Perplexity:
            with self.without_layers(layers):
                return self.perplexity(read)

        choose = choose or (lambda n: self.layers_to_remove(n=n))
        limits = {"ratio": ratio, "confidence": confidence}
        most = len(self.kept) - 1 if most is None else most
        return most_layers(perplexity_without, choose, most=most, **limits)

    @contextmanager
    def skipped_in_prefill(self, layers: Sequence[int]) -> Iterator[None]:
        """The model that skips layers (original numbers) in prompts; see `models.prefill`."""
        layers = layer_numbers(layers)
        if layers:
            check_layers(layers, self.present)
        with skipped_in_prefill(self.decoder, [self.present.index(i) for i in layers]):
            yield

    def remove_sublayers(self, *, attention: Sequence[int] = (), mlp: Sequence[int] = ()) -> None:
        """As the function `remove_sublayers`, by the layers' original numbers; it is recorded."""
        self.check_whole()
        removed = {"attention": layer_numbers(attention), "mlp": layer_numbers(mlp)}
        for layers in removed.values():
            check_exist(layers, self.kept)
        positions = {kind: [self.kept.index(i) for i in each] for kind, each in removed.items()}
        changes = []
        for kind, layers in [(kind, layers) for kind, layers in removed.items() if layers]:
            own: Any = {**dict.fromkeys(removed, ()), kind: positions[kind]}
            parameters = sublayer_parameters(self.decoder, self.kept, **own)
            how = {"method": REMOVED_SUBLAYERS, kind: layers}
            changes.append(WeightChange(how, frozenset(parameters)))
        remove_sublayers(self.decoder, **positions)
        for change in changes:
            self.note_change(change)
        self.importance = Importance.empty(self.kept)


def remove_sublayers(
    decoder: Decoder, *, attention: Sequence[int] = (), mlp: Sequence[int] = ()
) -> Callable[[], None]:
    """Zeroes output projections of attention and MLP, by position; returns what puts them back.

    A sublayer then adds nothing to the stream, and saved files keep their shape and load anywhere.
    ShortGPTError, and no change, if a layer does not exist or is named twice, none is named, or
    one is not x + attention, then + MLP, each ended by one plain matrix.
    """
    layers = decoder.layers
    for positions in (attention, mlp):
        check_exist(positions, range(len(layers)))
    if not attention and not mlp:
        raise ShortGPTError("expected layers whose attention or MLP is to go, got none")
    sublayers = _sublayers(decoder, attention, mlp)
    window = [i % decoder.vocab_size for i in range(8)]
    scores = score(decoder, [window], layers=range(len(layers)), sublayers=True)
    known = scores.sublayers[0].isfinite().all(0).tolist()  # of every layer
    if odd := sorted({one.position for one in sublayers if not known[one.position]}):
        raise ShortGPTError(
            f"layers {odd} are not x + attention, then + MLP (or {type(layers[odd[0]]).__name__} "
            "names them otherwise); their sublayers cannot be removed alone"
        )
    with ExitStack() as undo:
        undo.callback(_zero([one.output for one in sublayers]))
        with ExitStack() as hooks:
            for one in sublayers:
                module = part(layers[one.position], getattr(decoder.family, one.kind))
                assert module is not None  # else nothing is known of the layer
                hooks.enter_context(module.register_forward_hook(one.check_zero))
            decoder.run(torch.tensor([window], device=decoder.device))  # (1, S)
        return undo.pop_all().close


def sublayer_parameters(
    decoder: Decoder, numbers: Sequence[int], *, attention: Sequence[int], mlp: Sequence[int]
) -> set[Parameter]:
    """The parameters that `remove_sublayers` makes zero, by the original numbers of all layers."""
    layers = decoder.layers
    sublayers = _sublayers(decoder, attention, mlp)
    each = [parameters_of(numbers[i], layers[i], [output]) for i, _, output in sublayers]
    return set().union(*each)


class _Sublayer(NamedTuple):
    position: int  # of its layer
    kind: str  # "attention" or "mlp", as `Family` names them
    output: nn.Module  # its output projection

    def check_zero(self, _: nn.Module, __: object, output: Output) -> None:
        """Forward hook; raises ShortGPTError where the sublayer adds anything, in any rounding."""
        if first(output).any():
            raise ShortGPTError(
                f"the {'MLP' if self.kind == 'mlp' else self.kind} of layer {self.position} adds "
                "more than its output projection gives; it cannot be removed alone"
            )


def _sublayers(decoder: Decoder, attention: Sequence[int], mlp: Sequence[int]) -> list[_Sublayer]:
    layers, family = decoder.layers, decoder.family
    removed = [_Sublayer(i, "attention", attention_output(layers[i], family)) for i in attention]
    return removed + [_Sublayer(i, "mlp", mlp_output(layers[i], family)) for i in mlp]


def _zero(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """Replaces all parameters by zeros; the old tensors stay as they are for the undo."""
    before = [(m, name, p) for m in modules for name, p in m.named_parameters(recurse=False)]
    # all are made before any is put in place: memory may run short
    zeros = [nn.Parameter(torch.zeros_like(p), requires_grad=False) for _, _, p in before]
    for (module, name, _), zero in zip(before, zeros, strict=True):
        setattr(module, name, zero)

    def undo() -> None:
        for module, name, parameter in before:
            setattr(module, name, parameter)

    return undo
