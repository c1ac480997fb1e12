"""What chooses layers, as settings: a method and a number, layers by name, saved scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import CHOOSE, Settings, setting, whole_numbers

if TYPE_CHECKING:
    from short_gpt.scoring.stopping import Stop


@dataclass(frozen=True)
class Answer(Settings):
    """What a ranking must answer.

    Raises:
        ShortGPTError: there is no such method, or it needs a number of layers.
    """

    HEADING: ClassVar = CHOOSE
    n: int | None = setting(
        None, "Number of layers to remove; also print which ones each method would remove."
    )
    method: str = setting(
        "bi",
        "bi, angular, deepest, relative_magnitude, norm, sequential, reverse, random, "
        "perplexity, sleb, greedy_kld or auto, which refits the sets of several methods and takes "
        "the one nearest to the original on held-out windows.",
    )
    # share of all runs that do not end early with another answer; None never ends early
    confidence: float | None = 0.99

    def __post_init__(self) -> None:
        if self.method != Answer.method:  # the default is valid, without an import
            from short_gpt.selection.methods import check_method

            check_method(self.method)
            if self.by_loss and self.n is None:
                raise ShortGPTError(f"`method` {self.method} needs `n`")

    @property
    def by_loss(self) -> bool:
        from short_gpt.selection.methods import BY_LOSS

        return self.method in BY_LOSS

    def rule(self, seed: int | None) -> Stop | None:
        """The rule that ends a run early, where the answer can be settled.

        That takes a method that chooses n layers by means over windows, which a seed shuffles.
        """
        from short_gpt.scoring.stopping import Stop

        if self.confidence is None:
            return None
        rule = Stop(self.n or 1, self.method == "angular", self.confidence)
        can_settle = self.n is not None and seed is not None and self.method in ("bi", "angular")
        return rule if can_settle else None


@dataclass(frozen=True)
class Choice(Settings):
    """Layers to remove: named, or chosen by saved scores."""

    HEADING: ClassVar = CHOOSE
    layers: object = setting(
        None,
        "Numbers of the layers to remove, as in 21,22,23; or choose them by scores.",
        value="N,N",
    )
    scores: str | None = setting(None, "JSON file that rank wrote.", value="FILE")
    n: int | None = setting(None, "Number of layers to remove by the scores.")
    method: str | None = setting(
        None,
        "Method of rank to choose by. Default: the one that the scores were ranked by.",
        rare=True,
    )

    def checked(self) -> dict[str, Any]:
        """What `checkpoints.scores.chosen` takes; ShortGPTError unless it is layers or scores."""
        from short_gpt.selection.methods import check_method

        if (self.layers is None) == (self.scores is None):
            raise ShortGPTError("expected either `layers`, as in 21,22,23, or `scores` and `n`")
        if self.method is not None:
            check_method(self.method)
            if self.layers is not None:
                raise ShortGPTError("`method` chooses from `scores`, not from `layers`")
        layers = None
        if self.layers is not None:
            named = self.layers, "layers", "21,22,23"
            layers = whole_numbers(*named, what="layer numbers", empty=True)
        return {**asdict(self), "layers": layers}
