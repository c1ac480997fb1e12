"""The closed-form refit: output projections of the kept layers, solved again one after the other.

Kept layers were trained on the hidden states of the original model. After the first gap they read
others. So each kept layer k from there on has a target: T_k, the original model's state entering
the next kept layer. That is the state after the gap for a layer before one (the idea of ReplaceMe,
Shopkhoev et al. 2025, arXiv:2505.02819), else the layer's own output. Its matrix W, which maps F
inputs m to what the sublayer adds to the stream h, becomes W + step_size C^T, where C minimises

    sum over tokens w ||h + W m + C^T m - T_k||^2 + ridge (tr(M^T M) / F) ||C||^2.

The inputs are those of the model pruned and refitted before k, and so later layers restore what
earlier ones could not. w = 1 / ||T_k||^2, because RMSNorm makes a token's scale irrelevant; where
T_k is more than twice as long as h + W m, w = 1 / (2 ||h + W m||)^2: a layer that makes an
attention sink may have gone, and the layer before the gap has to make it (`sink_weights`). The
attention's o_proj is solved first, for the original state between the sublayers, then down_proj.
The ridge is 2 F / N: the error of a single matrix on held-out windows does not tell which ridge has
the lowest loss. A matrix whose error rises there stays. The patch is the same for the
layers before gaps alone, with the original model's inputs.

Shapes: B windows, S tokens, N tokens in all, L layers, D width of the stream, F inputs of a matrix.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from short_gpt.checkpoints.gguf import round_layer
from short_gpt.data.windows import batches as batches_of
from short_gpt.healing.context import Heal, HealingContext, TokenWindows
from short_gpt.healing.refit_layer import Batches, LayerRefit
from short_gpt.healing.refit_state import ORIGINAL, PRUNED, RefitState, plan_of
from short_gpt.healing.settings import PatchSettings, RefitSettings
from short_gpt.healing.solver import Fit
from short_gpt.models.decoder import Parameter, full_float32, pad
from short_gpt.models.numbering import check_layers, layer_numbers, span
from short_gpt.runtime import replicas
from short_gpt.runtime.digest import windows_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError, check
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import joined
from short_gpt.wrappers.opening import as_short, as_windows
from short_gpt.wrappers.scored_model import ScoredModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_EVERY = 8  # every eighth window is held out


@dataclass(frozen=True, repr=False)
class Refit:
    """New values for the output projections of kept layers."""

    layers: list[int]  # those to remove, original numbers
    values: Mapping[Parameter, Tensor]  # by (original layer number, name in it), on the CPU
    fits: list[Fit]  # of every matrix, in the order in which they were solved
    settings: RefitSettings  # of `fit`
    windows: int  # read to fit the matrices
    tokens: int  # in these windows
    held: int  # held-out windows
    # matrices that cannot be solved, and why; such as those of experts
    unsolved: Sequence[Fit] = ()
    short: ScoredModel | None = None  # the healed model, of `heal`

    def __repr__(self) -> str:
        return (
            f"Refit({len(self.layers)} layers removed, {len(self.values)} parameters solved, "
            f"{self.windows} windows)"
        )

    def to_dict(self) -> dict[str, object]:
        """All except the values, ready for JSON."""
        fits = [asdict(fit) for fit in self.fits]
        for fit in fits:
            del fit["why"]  # they were solved
        return {
            "method": "patch" if self.settings.where == "gaps" else "refit",
            "layers": self.layers,
            "parts": list(self.settings.parts),
            "lost": self.settings.lost,
            "step_size": self.settings.step_size,
            **({"type": self.settings.type} if self.settings.type else {}),
            "fits": fits,
            **({"unsolved": groups} if (groups := self._unsolved_groups()) else {}),
            "windows": self.windows,
            "tokens": self.tokens,
            "held": self.held,
        }

    def _unsolved_groups(self) -> list[dict[str, object]]:
        """The unsolved matrices, those of one part and one reason together."""
        layers: dict[tuple[str, str], list[int]] = {}
        for one in self.unsolved:
            layers.setdefault((one.part, str(one.why)), []).append(one.layer)
        return [{"part": part, "layers": each, "why": why} for (part, why), each in layers.items()]


def heal(
    model: ScoredModel | str | PathLike[str] | PreTrainedModel,
    layers: Sequence[int],
    texts: Iterable[str | Sequence[int]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Refit:
    """Removes layers and refits the pruned model: `fit`, ``remove_layers`` and `apply_refit`.

    Other arguments and errors as in `fit`; after an error the model is as it was.

    Args:
        model: Opened model, loaded model of transformers, or name of a checkpoint, which is opened.
        layers: Layers to remove, original numbers.
        texts: Calibration text: strings, or windows of token ids.
        tokenizer: Tokenizer of a loaded model.

    Returns:
        What was solved; the healed model is its ``short``.

    Example:
        >>> refit = heal_refit(short, [21, 22, 25], windows)  # doctest: +SKIP
    """
    short = as_short(model, tokenizer)
    refit = fit(short, layers, as_windows(texts, short), **options)
    with ExitStack() as undo:
        with short.without_layers(refit.layers):
            undo.callback(apply_refit(short, refit))
        short.remove_layers(refit.layers)
        undo.pop_all()  # nothing failed: the new values stay
    return replace(refit, short=short)


def heal_patch(
    model: ScoredModel | str | PathLike[str] | PreTrainedModel,
    layers: Sequence[int],
    texts: Iterable[str | Sequence[int]],
    *,
    ridge: float | None = None,
    **options: Any,
) -> Refit:
    """Removes layers and solves those before the gaps; no ``ridge``: held-out windows choose it.

    Example:
        >>> patch = heal_patch(short, [21, 22, 25], windows)  # doctest: +SKIP
    """
    settings = PatchSettings() if ridge is None else PatchSettings(ridge=ridge)
    return heal(model, layers, texts, settings=settings, **options)


@torch.no_grad()
@full_float32()
def fit(
    short: ScoredModel,
    layers: Sequence[int],
    windows: TokenWindows,
    *,
    held: TokenWindows | None = None,
    settings: RefitSettings | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **changes: Any,
) -> Refit:
    """Solves output projections of the kept layers, and leaves the model unchanged.

    All windows pass a layer before the next one, in the original model and in the pruned one. Held
    beside the model are three states (N, D), the inputs of a matrix (N, F) and one (F, F) float64
    matrix; states for which there is no room go into temporary files. Replicas (torchrun) share
    the windows, which changes the rounding of sums alone, and get the same values. An accelerator
    holds the sums, and takes windows of one length together, as far as its memory goes.

    Args:
        short: Model with all the layers, in memory or streamed.
        layers: Layers to remove, original numbers in any order.
        windows: Token ids of calibration text for all kinds of use, never of evaluation text.
        held: Held-out windows, on which a change must lower the error. Default: every eighth of
            ``windows``.
        settings: Settings, of which ``changes`` replace some. Default: `RefitSettings()`.
        work_dir: Folder to continue from, bit for bit from the last finished layer, as a streamed
            refit does; the new values are read from there. Not with several replicas, as all would
            write into it. Default: none.

    Raises:
        ShortGPTError: a layer does not exist; too few windows; nothing can be solved; a patch of
            layers that begin the model; several model-parallel ranks; too little memory or disk;
            ``work_dir`` is of another refit, damaged, in use, or set with several replicas.
        NotFiniteError: a state is NaN or infinite.
    """
    settings, layers = replace(settings or RefitSettings(), **changes), layer_numbers(layers)
    _check(short, layers, settings)
    windows, held = split_held_out(windows) if held is None else (windows, held)
    least = max(1, replicas.current(short.decoder.device).count)
    check(work_dir is None or least == 1, "work_dir", work_dir, f"none with {least} replicas")
    check(len(windows) >= least, "windows to fit on", len(windows), f"{least} or more")
    check(held, "held-out windows", len(held), "1 or more")
    folder = None if work_dir is None else Path(os.fspath(work_dir))
    identity = {} if folder is None else _identity(short, layers, windows, held, settings)
    state = RefitState(folder, identity)
    try:
        _solve(short, layers, windows, held, settings, state, progress)
    except BaseException as error:
        if not state.done or isinstance(error, NotFiniteError):
            state.clear()  # there is nothing to continue from
        raise
    unsolved = [one for one in state.fits if one.why is not None]
    if len(unsolved) == len(state.fits):
        state.clear()
        why = "; ".join(dict.fromkeys(str(one.why) for one in unsolved))
        raise ShortGPTError(f"nothing of this model can be refitted: {why}")
    counts = (len(windows), sum(map(len, windows)), len(held))
    solved = [one for one in state.fits if one.why is None]
    return Refit(list(layers), state.values, solved, settings, *counts, unsolved)


def _solve(
    short: ScoredModel,
    layers: Sequence[int],
    windows: TokenWindows,
    held: TokenWindows,
    settings: RefitSettings,
    state: RefitState,
    progress: bool,
) -> None:
    """Solves what the state lacks, in the planned memory."""
    every, team = [*windows, *held], replicas.current(short.decoder.device)
    for window in every:
        pad([window], short.decoder)  # refuses what the model cannot read, before any work
    plan = plan_of(short, every, folder=state.folder)
    calls, removed = short.layer_calls(), [short.kept.index(layer) for layer in layers]
    kept = [index for index in range(calls.count) if index not in removed]
    visits = _visits(kept, calls.count, settings)
    if state.done == len(visits):
        state.finish()  # which a killed run may not have reached
        return
    # held-out windows go on where those to fit on end
    shares = (team.own_items(windows), team.own_items(held, first=len(windows)))
    fitted, held_out = ([*equal_lengths(part, plan.at_once)] for part in shares)
    with ExitStack() as stack:
        if plan.spilled and state.states is None:
            state.states = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rest = visits[state.done :]
        passes = visits[-1].next_kept - (rest[0].layer if state.done else 0)
        passes += sum(visit.solved for visit in rest)  # these the pruned model has, too
        title, total = f"refitting {len(every)} windows", passes * sum(map(len, shares))
        shown = stack.enter_context(bar(title, total=total, unit="layer", show=progress))
        stack.callback(calls.close)
        batches = Batches(calls, state, fitted, held_out, team, plan.room, shown.update)
        batches.embed(removed=range(visits[0].layer))
        types = short.types_in(settings.type) if settings.type else {}
        _refit_layers(batches, visits, short.kept, settings, types)
    state.finish()


def _refit_layers(
    batches: Batches,
    visits: Sequence[Visit],
    numbers: Sequence[int],
    settings: RefitSettings,
    types: Mapping[int, Mapping[str, int]],
) -> None:
    """Runs each layer, solves it, and runs it again."""
    calls, state = batches.calls, batches.state
    for index, next_kept, solved, copied in visits[state.done :]:
        target = state.leaving(ORIGINAL)  # T, (B, S, D) of every batch
        if not solved:  # up to here both models are one
            batches.run_all(index, state.entering(ORIGINAL), target)
            state.advance()
            continue
        if copied:
            for batch in batches:
                state.entering(PRUNED)[batch] = state.entering(ORIGINAL)[batch]  # (B, S, D)
        with calls.loaded(index):
            number = numbers[index]
            layer = LayerRefit(batches, index, number, settings, types.get(number, {}))
            layer.run_original()
        for removed in range(index + 1, next_kept):  # the target is the state after the gap
            batches.run_all(removed, target, target)
        with calls.loaded(index), layer.restored:
            fits, values = layer.solve()  # which puts the solutions in place
            layer.run_pruned()  # with them
        state.advance([*fits, *layer.unsolved], values)
        del fits, values, layer  # before the next layer's weights are loaded


class Visit(NamedTuple):
    """A kept layer that windows pass."""

    layer: int  # its index in the decoder
    next_kept: int  # that of the next kept layer
    solved: bool  # whether its output projections are
    copied: bool  # whether the original model's states enter it, and not those of the pruned model


def _visits(kept: Sequence[int], count: int, settings: RefitSettings) -> list[Visit]:
    pairs = [*zip(kept, [*kept[1:], count], strict=True)]
    if settings.where == "gaps":  # nothing to do after the last gap
        visits = [Visit(i, after, after > i + 1, copied=True) for i, after in pairs]
        return visits[: 1 + max(n for n, visit in enumerate(visits) if visit.solved)]
    first_removed = next(i for i in range(count + 1) if i not in kept)
    # the first layer whose output is not its target: of rounded ones the very first
    start = 0 if settings.type else max(first_removed - 1, 0)
    return [Visit(i, after, i >= start, copied=i == start > 0) for i, after in pairs]


def _identity(
    short: ScoredModel,
    layers: Sequence[int],
    windows: TokenWindows,
    held: TokenWindows,
    settings: RefitSettings,
) -> dict[str, object]:
    """All that a refit depends on, by the names that an error shows."""
    read = {"windows": windows, "held-out windows": held}
    digests = {name: windows_digest(part) for name, part in read.items()}
    changes = {"kept": list(short.kept), "layers": list(layers)}
    return joined(short.identity(), changes, vars(settings), digests)


def prepare_refit(context: HealingContext, settings: RefitSettings | None) -> Heal:
    """The refit as a step; one that streams, which takes hours, continues from its folder."""
    name = "patch" if settings is not None and settings.where == "gaps" else "refit"
    lasting = context.folder if context.lasting and context.short.streamed else None
    refit = fit(
        context.short,
        context.layers,
        context.calibration,
        held=context.windows.validation or None,
        settings=settings,
        work_dir=None if lasting is None else lasting / name,
        progress=context.progress,
    )
    return lambda: (refit.to_dict(), apply_refit(context.short, refit))


def prepare_patch(context: HealingContext, settings: RefitSettings | None) -> Heal:
    return prepare_refit(context, settings or PatchSettings())


@torch.no_grad()
def apply_refit(short: ScoredModel, refit: Refit) -> Callable[[], None]:
    """Puts the new values into a model without the layers; returns what undoes it."""
    present = short.present
    changed = {layer for layer, _ in refit.values}
    if not changed <= set(present) or set(refit.layers) & set(present):
        raise ShortGPTError(
            f"the refit is for a model without layers {refit.layers}; this one has "
            f"{span(present)}: remove the former, keep the others"
        )
    with ExitStack() as undo:
        undo.callback(short.change_weights(refit.to_dict(), refit.values))
        if kind := refit.settings.type:
            types = short.types_in(kind)
            for number, layer in zip(present, short.decoder.layers, strict=True):
                # what was solved is rounded once, when it is written
                rest = {n: t for n, t in types[number].items() if (number, n) not in refit.values}
                undo.callback(round_layer(layer, rest))
        return undo.pop_all().close


def equal_lengths(windows: TokenWindows, tokens: int) -> Iterator[Tensor]:
    """Token ids (B, S) of windows, in their order: those of one length, up to so many tokens.

    Example:
        >>> [batch.tolist() for batch in equal_lengths([[1, 2], [3, 4], [5]], 4)]
        [[[1, 2], [3, 4]], [[5]]]
    """
    for length, equal in groupby(windows, key=len):
        for batch in batches_of(equal, max(1, tokens // length)):
            yield torch.tensor([[*window] for window in batch])  # (B, S)


def split_held_out(windows: TokenWindows) -> tuple[TokenWindows, TokenWindows]:
    """The windows to fit on, and every eighth, or the last, which is held out.

    Example:
        >>> split_held_out([[1], [2], [3]])
        ([[1], [2]], [[3]])
    """
    chosen = range(len(windows))[HELD_EVERY - 1 :: HELD_EVERY] or range(len(windows))[-1:]
    return [w for i, w in enumerate(windows) if i not in chosen], [windows[i] for i in chosen]


def _check(short: ScoredModel, layers: Sequence[int], settings: RefitSettings) -> None:
    replicas.require_whole_model("a refit")
    short.check_whole()
    check_layers(layers, short.kept)
    if settings.where == "gaps" and short.kept[0] in layers:
        raise ShortGPTError(
            f"layer {short.kept[0]} cannot be patched: it begins the model; the patch goes into "
            "the layer before a gap. Choose other layers, or heal by the refit"
        )
