"""The closed-form linear patch: what removed layers added, as a linear map of the MLP before them.

After ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819). Let layers i..j be removed, M the output
of the MLP of layer i - 1 and Y the stream that it is added to, so that Y + M is the state in
front of layer i, and X the original model's state behind layer j. The map T that minimises

    sum over tokens ||M T + Y - X||^2 + ridge (tr(M^T M) / D) ||T - 1||^2

goes into the weights that make M: no parameter is added, nothing is trained. The penalty pulls
towards the identity, that is towards no patch at all.

Shapes: B windows, S tokens, N tokens in all, D width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.parallel import model_parallel_size
from short_gpt.data.windows import batches, count_of
from short_gpt.healing.folding import put_map
from short_gpt.healing.moments import Moments
from short_gpt.models.decoder import pad
from short_gpt.models.layer_hooks import States, check_added, mlp_output
from short_gpt.models.numbering import check_layers, runs, span
from short_gpt.models.weight_changes import WeightChange, parameters_of, restored_on_error
from short_gpt.runtime.errors import NotFiniteError, ShortGPTError
from short_gpt.runtime.progress import bar, set_rate
from short_gpt.wrappers.scored_model import ScoredModel

# On calibration text kept apart from the fit (SmolLM2-135M, 64 windows of 1024, 8 layers less),
# 1e-5 and 1e-4 were best, 1e-3 was 3% and 1e-2 10% worse in perplexity for scattered layers, and
# all were equal for one block.
RIDGE = 1e-4


@dataclass(frozen=True)
class Patch:
    """Maps that stand in for removed layers.

    Attributes:
        layers: the layers to remove, in the original model's numbering.
        maps: for the layer in front of every run of them, by its original number, T: (D, D)
            float64.
        restored: for the same layers, the share of what the run adds to the stream, in squares
            over the calibration tokens, that the map gives back: 1 is all, 0 is nothing.
        ridge: as given to `fit`.
        windows, tokens: read.
    """

    layers: list[int]
    maps: dict[int, Tensor]
    restored: dict[int, float]
    ridge: float
    windows: int
    tokens: int

    def to_dict(self) -> dict[str, object]:
        """All but the maps, ready for JSON."""
        return {
            "method": "linear patch",
            "layers": self.layers,
            "restored": {str(layer): share for layer, share in self.restored.items()},
            "ridge": self.ridge,
            "windows": self.windows,
            "tokens": self.tokens,
        }


def heal(
    short: ScoredModel,
    layers: Sequence[int],
    windows: Iterable[Sequence[int]],
    *,
    ridge: float = RIDGE,
    batch_size: int = 1,
    progress: bool = True,
) -> Patch:
    """Removes layers and patches what is left: `fit`, ``remove_layers`` and `fold`.

    Args and errors as in `fit`; after any of them the model is as it was, with all its layers.

    Example:
        >>> patch = heal(short, [21, 22, 25], windows)  # doctest: +SKIP
    """
    patch = fit(short, layers, windows, ridge=ridge, batch_size=batch_size, progress=progress)
    with short.without_layers(patch.layers):
        undo = fold(short, patch)
    try:
        short.remove_layers(patch.layers)
    except BaseException:
        undo()
        raise
    return patch


def fit(
    short: ScoredModel,
    layers: Sequence[int],
    windows: Iterable[Sequence[int]],
    *,
    ridge: float = RIDGE,
    batch_size: int = 1,
    total: int | None = None,
    progress: bool = True,
) -> Patch:
    """The patch for one set of layers; the model is read, not changed. See `fit_many`."""
    return fit_many(
        short,
        [layers],
        windows,
        ridge=ridge,
        batch_size=batch_size,
        total=total,
        progress=progress,
    )[0]


def fit_many(
    short: ScoredModel,
    sets: Sequence[Sequence[int]],
    windows: Iterable[Sequence[int]],
    *,
    ridge: float = RIDGE,
    batch_size: int = 1,
    total: int | None = None,
    progress: bool = True,
) -> list[Patch]:
    """Patches for several sets of layers from one pass over calibration windows.

    All states are those of the whole model, which is why one pass serves all runs and sets; it
    takes 16 D^2 bytes for every distinct run of layers.

    Args:
        short: the model with all the layers; it is only read.
        sets: each with original layer numbers, in any order; runs of them may lie apart.
        windows: token ids of calibration text, never of text to evaluate on. A map has D^2
            numbers: several times D tokens are needed.
        ridge: of the penalty, relative to the mean square of an entry of M.
        batch_size: windows read at once.
        total: number of windows, for the progress bar.
        progress: whether to show one.

    Returns:
        One patch a set.

    Raises:
        ShortGPTError: a layer does not exist; a set holds layer 0, in front of which there is no
            MLP; the MLP in front of a run does not simply add to the stream, see
            `layer_hooks.check_added`; no window; several model-parallel ranks.
        NotFiniteError: a state is NaN or infinite.
    """
    _check(short, sets, ridge)
    wanted = sorted({run for layers in sets for run in runs(layers, short.kept)})
    sums = {run: Moments() for run in wanted}
    read = tokens = 0
    with bar("fitting", total=total or count_of(windows), unit="window", show=progress) as shown:
        for batch in batches(windows, batch_size):
            tokens += _add(short, sums, batch, prove=read == 0)
            read += len(batch)
            set_rate(shown, tokens)
            shown.update(len(batch))
    if not read:
        raise ShortGPTError("expected at least one window of calibration tokens, got none")
    patches = []
    for layers in sets:
        solved = {_front(short, run): sums[run].solve(ridge) for run in runs(layers, short.kept)}
        maps = {front: linear_map for front, (linear_map, _) in solved.items()}
        restored = {front: share for front, (_, share) in solved.items()}
        patches.append(Patch(list(layers), maps, restored, ridge, read, tokens))
    return patches


@torch.no_grad()
def fold(short: ScoredModel, patch: Patch) -> Callable[[], None]:
    """Puts a patch's maps into the weights of a model without the patch's layers.

    Args:
        short: the model, its layers removed.
        patch: from `fit` on the same model.

    Returns:
        A function that puts the former weights back.

    Raises:
        ShortGPTError: the patched layers are not those that the model has.
    """
    present = short.present
    if not set(patch.maps) <= set(present) or set(patch.layers) & set(present):
        raise ShortGPTError(
            f"the patch stands for layers {patch.layers} and changes {list(patch.maps)}; the model "
            f"has {span(present)}: remove the former, keep the latter"
        )
    fronts = {front: short.decoder.layers[present.index(front)] for front in patch.maps}
    ends = [parameters_of(front, layer, [mlp_output(layer)]) for front, layer in fronts.items()]
    change = WeightChange(patch.to_dict(), frozenset().union(*ends))
    modules = {front: mlp_output(layer) for front, layer in fronts.items()}

    def undo() -> None:
        restore()
        short.forget_change(change)

    with restored_on_error(p for m in modules.values() for p in m.parameters()) as restore:
        for front, module in modules.items():
            put_map(module, patch.maps[front], front)
    short.note_change(change)
    return undo


def _check(short: ScoredModel, sets: Sequence[Sequence[int]], ridge: float) -> None:
    if model_parallel_size() > 1:
        raise ShortGPTError(
            f"the linear patch needs the whole model on one rank, got {model_parallel_size()} "
            "model-parallel ranks; convert the checkpoint, which merges its shards, and patch that"
        )
    if not 0 < ridge < float("inf"):
        raise ShortGPTError(f"ridge = {ridge}: expected a number above 0, such as {RIDGE}")
    short.check_whole()
    for layers in sets:
        check_layers(layers, short.kept)
        for start, end in runs(layers, short.kept):
            if start == 0:
                run = [short.kept[place] for place in range(end + 1)]
                raise ShortGPTError(
                    f"layers {run} cannot be patched: they begin the model, and the patch goes "
                    "into the MLP of the layer in front. Choose other layers, or heal by LoRA"
                )
            mlp_output(short.decoder.layers[start - 1])


def _front(short: ScoredModel, run: tuple[int, int]) -> int:
    return short.kept[run[0] - 1]


def _add(
    short: ScoredModel,
    sums: dict[tuple[int, int], Moments],
    batch: Sequence[Sequence[int]],
    *,
    prove: bool,
) -> int:
    """One pass: adds a batch to all sums, and returns its tokens."""
    tokens, mask = pad(batch, short.decoder)  # (B, S) each; mask is False at padding
    fronts = {start - 1 for start, _ in sums}
    seen = States(short.decoder.layers, fronts, {end for _, end in sums} | fronts)
    with seen:
        short.decoder.run(tokens)
    if prove:
        for place in sorted(fronts):
            check_added(short.decoder.layers[place], *seen.calls[place])
    for (start, end), moments in sums.items():
        front = seen.behind[start - 1]  # (B, S, D), the stream Y + M in front of the run
        here = mask.to(front.device)  # layers may lie on several devices
        # some families flatten tokens in front of the MLP, hence the shape of the stream
        mlp = seen.mlp[start - 1].reshape(front.shape)[here].float()  # M (N, D)
        rest = (seen.behind[end].to(front.device).float() - front.float())[here]  # R (N, D)
        _check_finite((mlp, rest), _front(short, (start, end)), short.kept[end])
        moments.add(mlp, rest)
    return int(mask.sum())


def _check_finite(states: Sequence[Tensor], front: int, end: int) -> None:
    if not all(state.isfinite().all() for state in states):
        raise NotFiniteError(
            f"a state between layers {front} and {end} is NaN or infinite; check the weights, or "
            "try another dtype"
        )
