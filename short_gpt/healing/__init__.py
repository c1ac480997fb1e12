"""Bringing quality back after layers were removed: closed forms, LoRA, distillation.

`heal_refit` solves the output projections of the kept layers again, `heal_patch` only the last one
of each layer before a gap. `heal_lora` trains low-rank changes and merges them; given a
`Distillation` it learns what the original model predicts. `HealingJob` runs several of these and
measures before, between and after. `choose_healed` chooses layers by the loss after a refit. No
architecture changes: the result loads wherever the model does.
"""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.healing.choosing import HealedChoice, choose_healed
    from short_gpt.healing.context import HealingContext, HealingWindows, Step, healing_windows
    from short_gpt.healing.distillation import Distillation
    from short_gpt.healing.job import STEPS, HealingEvidence, HealingJob
    from short_gpt.healing.lora import LoraResult
    from short_gpt.healing.lora import heal as heal_lora
    from short_gpt.healing.refit import Refit, heal_patch
    from short_gpt.healing.refit import heal as heal_refit
    from short_gpt.healing.settings import PRESETS, PatchSettings, Recipe, RefitSettings, recipe_for
    from short_gpt.healing.solver import Fit
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["PRESETS", "STEPS", "Distillation", "Fit", "HealedChoice"]
__all__ += ["HealingContext", "HealingEvidence", "HealingJob", "HealingWindows"]
__all__ += ["LoraResult", "PatchSettings", "Recipe", "Refit", "RefitSettings", "Step"]
__all__ += ["choose_healed", "heal_lora", "heal_patch", "heal_refit", "healing_windows"]
__all__ += ["recipe_for"]
