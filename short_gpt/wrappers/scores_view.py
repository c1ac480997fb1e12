"""What was scored so far, seen by the original model's layers.

Shapes: L layers of the original model, L' of them when it was scored.
"""

from __future__ import annotations

from torch import Tensor

from short_gpt.checkpoints.model_record import ModelRecord
from short_gpt.models.numbering import check_count
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.scoring.importance import Importance
from short_gpt.selection.methods import choose


class ScoresView(ModelRecord):
    """A model's scores, and the choice that they make.

    Attributes:
        n_prune_layers: how many layers are chosen where nobody says; None for no such number.
    """

    n_prune_layers: int | None

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
            method, seed: of `methods.METHODS`, in the place of ``angular``; of the random one.

        Returns:
            Original layer numbers: least important first, or a block in ascending order.

        Raises:
            ShortGPTError: n is not set or out of range.
            RuntimeError: nothing was scored, or the scored model is no longer this one.
        """
        count = self._count(n)
        method = method or ("angular" if angular else "bi")
        return choose(self._current(), count, method=method, seed=seed)

    def _count(self, n: int | None) -> int:
        """How many layers to choose, which has to be possible: n or ``n_prune_layers``."""
        name, count = ("n_prune_layers", self.n_prune_layers) if n is None else ("n", n)
        if count is None:
            raise ShortGPTError("set n_prune_layers, or name the layers: remove_layers([...])")
        check_count(count, len(self.kept), name=name)
        return count

    def _current(self) -> Importance:
        """The scores, which have to be of the layers that the model has now."""
        importance = self._scored()
        if self._stale:
            raise RuntimeError(
                f"layers {self.removed} were removed since these scores were measured; score "
                "the model again before removing more by score"
            )
        return importance

    @property
    def _stale(self) -> bool:
        """Whether the scores are of a model with other layers than this one has."""
        return self.importance.layers != self.kept
