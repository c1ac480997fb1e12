"""The closed-form refit: the last matrices of the kept layers, solved again one after the other.

Layers that stay were made for the states of the whole model. Behind the first gap they meet others,
and so every kept layer k from there on gets the target

    T_k = the whole model's state where the next kept layer begins,

which is the state behind the gap for a layer in front of one (the idea of ReplaceMe, Shopkhoev et
al. 2025, arXiv:2505.02819) and the layer's own output elsewhere. Its matrix W, which maps F inputs
m to what the half adds to the stream h, becomes W + C^T, where C minimises

    sum over tokens w ||h + W m + C^T m - T_k||^2 + ridge (tr(M^T M) / F) ||C||^2.

The inputs are those of the model as cut and refitted in front of k, so that later layers mend what
earlier ones could not. w = 1 / ||T_k||^2, for an RMSNorm makes a token's scale irrelevant to what
follows. The attention's matrix is solved first, for the whole model's state between the halves,
then the MLP's. The ridge of every matrix is the one that restores most on windows kept apart.
Nothing is trained and no parameter is added: the result loads wherever the model does.

Shapes: B windows, S tokens, N tokens in all, D width of the stream, F inputs of a matrix.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llama.parallel import model_parallel_size
from short_gpt.healing.refit_memory import plan_of
from short_gpt.healing.refit_pass import RefitPass
from short_gpt.healing.refit_state import Fit, RefitState
from short_gpt.healing.solving import PARTS, RIDGES, WEIGHTS, Solving
from short_gpt.models.decoder import pad
from short_gpt.models.numbering import check_layers, span
from short_gpt.models.weight_changes import Parameter
from short_gpt.runtime.digest import json_digest
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import bar
from short_gpt.runtime.state import joined
from short_gpt.wrappers.scored_model import ScoredModel

HELD_EVERY = 8  # every eighth window chooses the ridge


@dataclass(frozen=True)
class Refit:
    """New values for the last matrices of layers that stay.

    Attributes:
        layers: those to remove, in the original model's numbering.
        values: by a layer's original number and a parameter's name in it, on the CPU.
        fits: of every matrix, in the order in which they were solved.
        solving: as given to `fit`.
        windows, tokens: read to fit the matrices.
        held: windows read to choose the ridges.
        tried: of `fit_best`, the perplexity on those windows by the name of what was tried, and as
            "none" that without any.
    """

    layers: list[int]
    values: Mapping[Parameter, Tensor]
    fits: list[Fit]
    solving: Solving
    windows: int
    tokens: int
    held: int
    tried: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """All but the values, ready for JSON."""
        return {
            "method": "refit",
            "layers": self.layers,
            "parts": list(self.solving.parts),
            "weights": self.solving.weights,
            "aim": self.solving.aim,
            "fits": [asdict(fit) for fit in self.fits],
            "windows": self.windows,
            "tokens": self.tokens,
            "held": self.held,
            **({"tried": dict(self.tried)} if self.tried else {}),
        }


def heal(
    short: ScoredModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    *,
    held: Sequence[Sequence[int]] | None = None,
    parts: Sequence[str] = PARTS,
    ridges: Sequence[float] = RIDGES,
    weights: str = WEIGHTS[0],
    aim: float = 1.0,
    batch_size: int = 1,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Refit:
    """Removes layers and refits what is left: `fit`, ``remove_layers`` and `fold`.

    Args and errors as in `fit`; after any of them the model is as it was, with all its layers.

    Example:
        >>> refit = heal_refit(short, [21, 22, 25], windows)  # doctest: +SKIP
    """
    refit = fit(
        short,
        layers,
        windows,
        held=held,
        parts=parts,
        ridges=ridges,
        weights=weights,
        aim=aim,
        batch_size=batch_size,
        work_dir=work_dir,
        progress=progress,
    )
    with short.without_layers(refit.layers):
        undo = fold(short, refit)
    try:
        short.remove_layers(refit.layers)
    except BaseException:
        undo()
        raise
    return refit


@torch.no_grad()
def fit(
    short: ScoredModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    *,
    held: Sequence[Sequence[int]] | None = None,
    parts: Sequence[str] = PARTS,
    ridges: Sequence[float] = RIDGES,
    weights: str = WEIGHTS[0],
    aim: float = 1.0,
    batch_size: int = 1,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Refit:
    """Solves the last matrices of the layers that stay; the model is as it was afterwards.

    Windows pass the layers together, one layer after the other, as the whole model's states and as
    those of what is left: three states (N, D) are held beside the model, what a matrix is given
    (N, F), and one (F, F) matrix of float64. States for which there is no room go into temporary
    files. With a folder all are there, and the same call continues from the last whole layer, bit
    for bit; after an error before the first whole one, or a state that is not finite, it is empty.
    A streamed model has one layer at a time in memory.

    Args:
        short: the model with all the layers, in memory or streamed.
        layers: to remove, original numbers in any order.
        windows: token ids of calibration text, never of text to evaluate on: of all the kinds that
            the model is to be used for.
        held: windows kept apart, by which ridges are chosen; None takes every eighth of
            ``windows`` out for it.
        parts, ridges, weights, aim: of every matrix, see `Solving`.
        batch_size: windows of one length read at once.
        work_dir: a folder for this refit alone; it may be deleted once the model is saved, which
            reads new values from there.
        progress: whether to show a bar.

    Returns:
        The new values, and how much each matrix restores.

    Raises:
        ShortGPTError: a layer does not exist; fewer than two windows; no layer that stays ends in
            a matrix whose output is added to the stream; several model-parallel ranks; too little
            memory or disk; ``work_dir`` holds a refit of another model, text or setting, or files
            that were damaged; another process refits there.
        NotFiniteError: a state is NaN or infinite.
    """
    solving = Solving((*parts,) if not isinstance(parts, str) else parts, ridges, weights, aim)
    _check(short, layers)
    windows, held = held_apart(list(windows)) if held is None else (windows, held)
    if not windows or not held:
        raise ShortGPTError("expected at least two windows of calibration tokens")
    settings = joined(_settings(solving), {"batch_size": batch_size})
    state = _state(short, layers, windows, held, settings, work_dir)
    calls, gone = short.layer_calls(), [short.kept.index(layer) for layer in layers]
    work = RefitPass(calls, short.kept, gone, solving=solving, state=state)
    try:
        _run(short, work, windows, held, batch_size, progress)
    except BaseException as error:
        if not state.done or isinstance(error, NotFiniteError):
            state.clear()  # there is nothing to go on from
        raise
    if not state.fits:
        state.clear()
        raise ShortGPTError(f"nothing of this model can be refitted: {work.refusal}")
    tokens, fits = sum(map(len, windows)), state.fits
    counts = (len(windows), tokens, len(held))
    return Refit(list(layers), state.values, fits, solving, *counts)


def _run(
    short: ScoredModel,
    work: RefitPass,
    windows: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    batch_size: int,
    progress: bool,
) -> None:
    """Runs the pass, in the memory that is planned for it."""
    every = [*windows, *held]
    for window in every:
        pad([window], short.decoder)  # refuses what the model cannot read, before any work
    planned = plan_of(short, every, batch_size=batch_size, folder=work.state.folder)
    work.room, steps = planned.room, work.steps * len(every)
    with ExitStack() as stack:
        if planned.disk and work.state.folder is None:  # the states are more than there is room for
            work.state.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        title = f"refitting {len(every)} windows"
        shown = stack.enter_context(bar(title, total=steps, unit="layer", show=progress))
        work.run(windows, held, batch_size=batch_size, step=shown.update)


def _state(
    short: ScoredModel,
    layers: Sequence[int],
    windows: Sequence[Sequence[int]],
    held: Sequence[Sequence[int]],
    settings: Mapping[str, object],
    work_dir: str | os.PathLike[str] | None,
) -> RefitState:
    """What the refit continues from, if it has a folder; told by all that the refit depends on."""
    if work_dir is None:
        return RefitState(None, {})
    read = {"windows": windows, "windows kept apart": held}
    digests = {name: json_digest([[*window] for window in part]) for name, part in read.items()}
    changes = {"kept": list(short.kept), "layers": list(layers)}
    identity = joined(short.identity(), changes, settings, digests)
    return RefitState(Path(os.fspath(work_dir)), identity)


def _settings(solving: Solving) -> dict[str, object]:
    """How matrices are solved, by names that differ from those in a model's identity."""
    names = {"weights": "weights of tokens"}
    return {
        names.get(name, name): [*value] if isinstance(value, tuple) else value
        for name, value in vars(solving).items()
    }


@torch.no_grad()
def fold(short: ScoredModel, refit: Refit) -> Callable[[], None]:
    """Puts the new values into a model without the removed layers.

    Args:
        short: the model, its layers removed.
        refit: from `fit` on the same model.

    Returns:
        A function that puts the former values back.

    Raises:
        ShortGPTError: the refit is for other layers than those that the model has.
    """
    present = short.present
    changed = {number for number, _ in refit.values}
    if not changed <= set(present) or set(refit.layers) & set(present):
        raise ShortGPTError(
            f"the refit is for a model without layers {refit.layers}; this one has "
            f"{span(present)}: remove the former, keep the others"
        )
    return short.change_weights(refit.to_dict(), refit.values)


def held_apart(windows: list[Sequence[int]]) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """The windows to fit on, and every eighth, or the last, which chooses ridges.

    Example:
        >>> held_apart([[1], [2], [3]])
        ([[1], [2]], [[3]])
    """
    places = range(len(windows))[HELD_EVERY - 1 :: HELD_EVERY] or range(len(windows))[-1:]
    return [w for i, w in enumerate(windows) if i not in places], [windows[i] for i in places]


def _check(short: ScoredModel, layers: Sequence[int]) -> None:
    if model_parallel_size() > 1:
        raise ShortGPTError(
            f"the refit needs the whole model on one rank, got {model_parallel_size()} "
            "model-parallel ranks; convert the checkpoint, which merges its shards, and refit that"
        )
    short.check_whole()
    check_layers(layers, short.kept)
