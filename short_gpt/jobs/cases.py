"""What a comparison compares: methods, numbers of layers, healings, and on how many windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from short_gpt.data.windows import at_least
from short_gpt.jobs.comparing import DEFAULT_METHODS, Cases
from short_gpt.jobs.comparison_lora import LoraSettings
from short_gpt.jobs.inputs import Cut, listed
from short_gpt.jobs.rows import TRAINED, check_healing
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.selection.methods import check_method
from short_gpt.wrappers.scored_model import ScoredModel

Windows = list[list[int]]


@dataclass(frozen=True)
class CaseNames:
    """What is compared, as it is written in a command line.

    Args:
        methods: names as of the method of rank, with commas between.
        counts: numbers of layers to remove, as in 2,4,8.
        healing: of raw, refit, lora and distill, with commas between.
        seeds: random sets for every number of layers.
        lora_only: what to heal by lora or distill, which take far longer than all the rest, as in
            bi:8,angular:8; all if not given.
    """

    methods: str = ",".join(DEFAULT_METHODS)
    counts: object = (2, 4, 8, 12)
    healing: str = "raw,refit"
    seeds: int = 3
    lora_only: str | None = None

    @property
    def numbers(self) -> list[int]:
        """The numbers of layers; raises ShortGPTError for what is none."""
        given = [self.counts] if isinstance(self.counts, int) else self.counts
        numbers = isinstance(given, Sequence) and all(type(i) is int and i > 0 for i in given)
        if not isinstance(given, Sequence) or not given or not numbers:
            raise ShortGPTError(f"expected whole numbers as in `counts` 2,4,8, got {self.counts!r}")
        return list(given)

    @property
    def names(self) -> list[str]:
        """The methods."""
        return listed(self.methods)

    @property
    def healings(self) -> list[str]:
        """The healings."""
        return listed(self.healing)

    @property
    def pairs(self) -> list[tuple[str, int]] | None:
        """Methods and numbers to heal by lora or distill; None is all.

        Raises:
            ShortGPTError: one is not among the cases, or neither healing is.
        """
        if self.lora_only is None:
            return None
        if not {*TRAINED} & {*self.healings}:
            raise ShortGPTError("`lora_only` is for `healing` lora or distill")
        cases = {f"{m}:{n}": (m, n) for m in self.names for n in self.numbers}
        if odd := [part for part in listed(self.lora_only) if part not in cases]:
            raise ShortGPTError(
                f"`lora_only` {odd[0]}: expected METHOD:NUMBER of `methods` and `counts`, as in "
                f"{next(iter(cases))}"
            )
        return [cases[part] for part in listed(self.lora_only)]

    def check(self) -> None:
        """Raises ShortGPTError for a name or a number that is none."""
        for healing in self.healings:
            check_healing(healing)
        for method in self.names:
            check_method(method)
        _ = self.numbers, self.pairs  # each refuses what it cannot read

    def cases(self, search_windows: int) -> Cases:
        """The cases; the searches by loss read so many of the windows."""
        self.check()
        return Cases(
            self.names,
            self.numbers,
            healings=self.healings,
            seeds=self.seeds,
            search_windows=search_windows,
            lora_only=self.pairs,
        )


@dataclass(frozen=True)
class Shares:
    """How many windows of which size are read for what.

    Args:
        eval_data: texts to evaluate on; if not given, a tenth of the texts of data is held out.
        size: tokens in a window.
        max_windows: windows of data for scores and refits.
        search_windows: of these, how many the searches by loss read.
        eval_windows: windows to evaluate on.
        seed: of the choice of windows.
        bos: as rank's; which windows begin with it.
    """

    eval_data: str | None = None
    size: int = 1024
    max_windows: int = 24
    search_windows: int = 4
    eval_windows: int = 16
    seed: int = 0
    bos: str | None = None

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a text is read."""
        Cut(self.size, bos=self.bos).check()
        for name in ("max_windows", "eval_windows"):
            at_least(1, name, getattr(self, name))

    def cut(
        self, short: ScoredModel, texts: Sequence[str], limit: int | None, size: int | None = None
    ) -> Windows:
        """Windows of texts in random order."""
        cut = Cut(size or self.size, limit, self.seed, bos=self.bos)
        return list(cut.windows(texts, short.encode, short.bos))


@dataclass(frozen=True)
class LoraNames:
    """How lora and distill heal in a comparison, the latter behind a refit.

    Args:
        steps: steps of training, a tenth of them warm-up but at most 100; the recipe's 5000 if not
            given.
        rank: its rank; the recipe's if not given.
        learning_rate: its peak; the recipe's if not given.
        batch: windows a step; the recipe's 16 if not given.
        lora_size: tokens in a window of training; the recipe's if not given.
    """

    steps: int | None = None
    rank: int | None = None
    learning_rate: float | None = None
    batch: int | None = None
    lora_size: int | None = None

    def settings(self) -> LoraSettings:
        """The same for `experiments.LoraHealing`."""
        return LoraSettings(
            steps=self.steps,
            rank=self.rank,
            learning_rate=self.learning_rate,
            batch=self.batch,
            size=self.lora_size,
        )
