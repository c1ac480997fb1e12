"""Bringing quality back after layers were removed: closed forms, LoRA, distillation.

`heal_refit` solves the last matrices of the kept layers again, one layer after the other.
`heal_patch` folds a least-squares map into the MLP in front of every gap, from one pass over text.
`heal_lora` trains low-rank changes of the layers that stayed and merges them; given a
`Distillation` it learns what the whole model predicts. `HealingJob` does these one after the other
with its measurements before, between and after. No architecture changes: the result loads wherever
the model does. `search_healed` chooses the layers that cost least once the gaps are refitted.
"""

from __future__ import annotations

from short_gpt.healing.closed_forms import PatchSettings, RefitSettings
from short_gpt.healing.distillation import Distillation
from short_gpt.healing.job import HealingEvidence, HealingJob
from short_gpt.healing.linear_patch import RIDGE, Patch
from short_gpt.healing.linear_patch import heal as heal_patch
from short_gpt.healing.lora import Healed, require_packages
from short_gpt.healing.lora import heal as heal_lora
from short_gpt.healing.recipe import PRESETS, Recipe, recipe_for
from short_gpt.healing.refit import Refit
from short_gpt.healing.refit import heal as heal_refit
from short_gpt.healing.refit_state import Fit
from short_gpt.healing.steps import DistillSettings, LoraSettings
from short_gpt.healing.teacher import TOP_K, CachedTeacher, LiveTeacher
from short_gpt.healing.texts import Learning, Source
from short_gpt.healing.work import Step

__all__ = [
    "PRESETS",
    "RIDGE",
    "TOP_K",
    "CachedTeacher",
    "DistillSettings",
    "Distillation",
    "Fit",
    "Healed",
    "HealingEvidence",
    "HealingJob",
    "Learning",
    "LiveTeacher",
    "LoraSettings",
    "Patch",
    "PatchSettings",
    "Recipe",
    "Refit",
    "RefitSettings",
    "Source",
    "Step",
    "heal_lora",
    "heal_patch",
    "heal_refit",
    "recipe_for",
    "require_packages",
]
