"""How the matrices of a refit are solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.runtime.errors import ShortGPTError

PARTS = ("attention", "mlp")
RIDGES = (1e-2, 1e-1, 1.0)
# How a token weighs: by the inverse square of its target, or as much as any other.
WEIGHTS = ("inverse", "equal")


@dataclass(frozen=True)
class Solving:
    """Settings of every matrix of a refit.

    Attributes:
        parts: the halves whose last matrix is solved again.
        ridges: candidates, relative to the mean square of the weighted inputs.
        weights: w of a token, "inverse" for 1 / ||T||^2, or "equal" for all alike.
        aim: the share of what is missing at the target that a change is to give, above 0 and at
            most 1. Least squares are linear, so that it is a factor of the change.

    Raises:
        ShortGPTError: a value out of range.

    Example:
        >>> Solving(aim=0.7).parts
        ('attention', 'mlp')
    """

    parts: Sequence[str] = PARTS
    ridges: Sequence[float] = RIDGES
    weights: str = WEIGHTS[0]
    aim: float = 1.0

    def __post_init__(self) -> None:
        parts, ridges = self.parts, self.ridges
        if not parts or isinstance(parts, str) or not set(parts) <= set(PARTS):
            raise ShortGPTError(f"parts = {parts!r}: expected some of {', '.join(PARTS)}")
        if not ridges or not all(0 < ridge < float("inf") for ridge in ridges):
            raise ShortGPTError(
                f"ridges = {ridges!r}: expected numbers above 0, such as {RIDGES[0]}"
            )
        if self.weights not in WEIGHTS:
            raise ShortGPTError(f"weights = {self.weights!r}: expected one of {', '.join(WEIGHTS)}")
        if not 0 < self.aim <= 1:
            raise ShortGPTError(f"aim = {self.aim}: expected above 0 and at most 1")

    @property
    def name(self) -> str:
        """Parts, weights and aim in a few words."""
        return f"{','.join(self.parts)} {self.weights} {self.aim:g}"
