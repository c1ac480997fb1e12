"""Bringing quality back after layers were removed: closed forms, LoRA, distillation.

`heal_refit` solves the output projections of the kept layers again, `heal_patch` only the last one
of each layer before a gap. `heal_lora` trains low-rank changes and merges them; given a
`Distillation` it learns what the original model predicts. `HealingJob` runs several of these and
measures before, between and after. `choose_healed` chooses layers by the loss after a refit. No
architecture changes: the result loads wherever the model does.
"""

from __future__ import annotations

from short_gpt.healing.choosing import HealedChoice, choose_healed
from short_gpt.healing.closed_form import Step
from short_gpt.healing.distillation import TOP_K, CachedTeacher, Distillation, LiveTeacher
from short_gpt.healing.job import STEPS, HealingEvidence, HealingJob
from short_gpt.healing.lora import DistillSettings, LoraResult, LoraSettings, require_packages
from short_gpt.healing.lora import heal as heal_lora
from short_gpt.healing.recipe import PRESETS, Recipe, recipe_for
from short_gpt.healing.refit import PatchSettings, Refit, RefitSettings, heal_patch
from short_gpt.healing.refit import heal as heal_refit
from short_gpt.healing.solver import Fit
from short_gpt.healing.texts import HealingTexts, Learning

__all__ = ["PRESETS", "STEPS", "TOP_K", "CachedTeacher", "DistillSettings", "Distillation", "Fit"]
__all__ += ["HealedChoice", "HealingEvidence", "HealingJob", "HealingTexts", "Learning"]
__all__ += ["LiveTeacher", "LoraResult", "LoraSettings", "PatchSettings", "Recipe", "Refit"]
__all__ += ["RefitSettings", "Step", "choose_healed", "heal_lora", "heal_patch", "heal_refit"]
__all__ += ["recipe_for", "require_packages"]
