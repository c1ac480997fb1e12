"""Settings of healing: published recipes, recipes in text, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from short_gpt.healing.settings import RIDGES, PatchSettings, Recipe, RefitSettings, recipe_for


def config(kind: str, **values: object) -> SimpleNamespace:
    text = SimpleNamespace(model_type=kind, **values)
    text.get_text_config = lambda decoder: text
    return text


SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}


def test_the_papers_table_knows_its_models_pruned_or_not():
    found = recipe_for(config("llama", **SEVEN, num_hidden_layers=23))
    assert (found.rank, found.learning_rate, found.size) == (2, 3e-4, 2048)
    assert (found.alpha, found.dropout, found.warmup_steps) == (None, 0.05, 100)
    assert found.steps * found.batch_size * found.size == 163_840_000  # its 164M tokens
    assert Recipe(steps=50).warmup_steps == 5 and Recipe(steps=50, warmup=20).warmup_steps == 20
    mistral = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    found = recipe_for(config("mistral", **mistral))
    assert (found.rank, found.learning_rate) == (4, 3e-6)
    assert recipe_for(config("llama", **{**SEVEN, "vocab_size": 128256})) == Recipe()
    demo = recipe_for(config("llama", **SEVEN), "demo", steps=7)
    assert (demo.rank, demo.alpha, demo.learning_rate, demo.steps) == (8, 32, 1e-6, 7)
    assert demo.modules == ("q_proj", "v_proj")
    narrow = [recipe_for(config("llama", hidden_size=64), "small", steps=n) for n in (4, 40)]
    assert [one.warmup for one in narrow] == [2, 8] and narrow[0].learning_rate == 1e-3
    assert recipe_for(config("llama", hidden_size=1024), "small").learning_rate == 2.5e-4


def test_a_recipe_is_a_presets_name_and_changes():
    text = "small, steps=400,rank=16,learning_rate=1e-4,gradient_checkpointing=yes,warmup=none"
    changes = {"steps": 400, "rank": 16, "learning_rate": 1e-4, "warmup": None}
    changes |= {"gradient_checkpointing": True}
    made = Recipe.parse(text)
    assert made == recipe_for(None, "small", **changes)
    assert Recipe.parse({"preset": "small", **changes}) == made == Recipe.parse(made, seed=3)
    assert Recipe.parse() == Recipe() == Recipe.parse("paper")
    assert Recipe.parse("rank=8", config("llama", **SEVEN)).size == 2048
    several = Recipe.parse("modules=q_proj+v_proj,report_to=wandb+tensorboard")
    assert several.modules == ("q_proj", "v_proj") and several.report_to == "wandb,tensorboard"
    defaults = {"modules": ("outputs",), "seed": 3}
    yields = Recipe.parse("small,modules=all", **defaults)
    assert yields.modules == ("all",) and yields.seed == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recipe.parse("best"), "preset of a recipe = 'best': expected paper, demo, small"),
        (lambda: Recipe.parse("small,step=4"), "setting of a recipe = 'step': expected steps"),
        (lambda: Recipe.parse("rank=x"), "rank = 'x': expected int"),
        (
            lambda: Recipe.parse("small,gradient_checkpointing=2"),
            "gradient_checkpointing = '2': expected bool",
        ),
        (lambda: Recipe.parse({"dropout": "x"}), "dropout = 'x': expected at least 0"),
        (lambda: Recipe.parse(None), "recipe = None: expected text, a dict or a Recipe"),
        (lambda: Recipe.parse("steps=4,small"), "expected changes such as steps=400, not small"),
        (lambda: Recipe(batch_size=16, micro_batch=3), "expected a multiple of `micro_batch` 3"),
        (lambda: Recipe(rank=0), "rank = 0: expected a whole number of at least 1"),
        (lambda: Recipe(patience=0), "patience = 0: expected a whole number"),
        (lambda: Recipe(warmup=-1), "warmup = -1: expected a whole number of at least 0"),
        (lambda: Recipe(alpha=0), "alpha = 0: expected a number above 0"),
        (lambda: Recipe(temperature=math.nan), "temperature = nan: expected a number above 0"),
        (lambda: Recipe(kl_share=1.5), "kl_share = 1.5: expected a number above 0 and at most 1"),
        (lambda: Recipe(dropout=1), "dropout = 1: expected at least 0 and below 1"),
        (lambda: RefitSettings(parts=("mlps",)), "parts = .*: expected some of attention, mlp"),
        (lambda: RefitSettings(ridge=(1.0, math.inf)), "ridge = inf: expected a number above 0"),
        (lambda: RefitSettings(lost=0.5), "lost = 0.5: expected 1 or more"),
        (
            lambda: RefitSettings(step_size=2),
            "step_size = 2: expected a number above 0 and at most",
        ),
    ],
)
def test_settings_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_patch_is_a_refit_of_other_defaults():
    patch = PatchSettings()
    assert (patch.ridges, patch.step_size, patch.where) == (RIDGES, 1.0, "gaps")
    assert RefitSettings().ridges is None and RefitSettings(ridge=0.5).ridges == (0.5,)
