"""Settings of distillation: who teaches, and how much of what is said is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from short_gpt.healing import TOP_K, DistillSettings, Recipe
from short_gpt.healing.distillation import check_share
from short_gpt.healing.teacher import Predictor, check_targets
from short_gpt.runtime.errors import ShortGPTError


@dataclass(frozen=True)
class Distilling:
    """How distill learns from the whole model.

    Args:
        teacher: the whole model of which MODEL is a part; MODEL itself, before layers go, if not
            given.
        stream_teacher: hold one layer of the teacher at a time in memory, as for rank --stream.
        live_teacher: ask the teacher in every step, as a second model in memory; without it, it
            is asked once and what it says kept on disk, in OUT.training, until the model is saved.
        top_k: tokens kept of each prediction, beside the total of all others; 64 if not given.
        temperature: by which both models' logits are divided; 1 if not given.
        kl_share: of the divergence in the loss, above 0 and at most 1; 1 if not given. The rest is
            the text's own.
    """

    teacher: str | None = None
    stream_teacher: bool = False
    live_teacher: bool = False
    top_k: int | None = None
    temperature: float | None = None
    kl_share: float | None = None

    @property
    def given(self) -> list[str]:
        """The names of the settings that are."""
        return [
            name for name, value in vars(self).items() if value is not None and value is not False
        ]

    def check(self, methods: Sequence[str]) -> None:
        """Raises ShortGPTError for what no method here uses, or cannot be."""
        if "distill" not in methods:
            if self.given:
                raise ShortGPTError(f"`{self.given[0]}` is for `method` distill")
            return
        if self.stream_teacher and self.live_teacher:
            raise ShortGPTError(
                "`stream_teacher` reads the teacher's files once: leave out `live_teacher`, which "
                "asks it in every step"
            )
        step = self.step(None, None)
        check_targets(step.top_k, step.temperature)
        check_share(step.kl_share)

    def step(
        self, recipe: Recipe | None, teacher: Callable[[], Predictor] | None
    ) -> DistillSettings:
        """The step of healing."""
        return DistillSettings(
            recipe,
            teacher=teacher,
            live=self.live_teacher,
            top_k=TOP_K if self.top_k is None else self.top_k,
            temperature=1.0 if self.temperature is None else self.temperature,
            kl_share=1.0 if self.kl_share is None else self.kl_share,
        )
