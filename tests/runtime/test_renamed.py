"""Import paths of the last version."""

from __future__ import annotations

import importlib
import sys

import pytest

import short_gpt
from short_gpt.runtime.renamed import MOVED

OLD_NAMES = {
    "short_gpt.cli.results": ("healed", "ranked"),
    "short_gpt.jobs.choice": ("Chosen", "chosen"),
    "short_gpt.jobs.choice_settings": ("Answer", "Choice", "Paper", "layer_list"),
    "short_gpt.jobs.healing_settings": ("Distilling", "Learned", "Settings"),
    "short_gpt.jobs.scored": ("configuration_of", "tokenizer_of"),
    "short_gpt.scoring.differences": ("difference_margins",),
    "short_gpt.scoring.following": ("Following",),
    "short_gpt.scoring.state": ("RunState",),
    "short_gpt.scoring.timing": ("seconds_a_pass",),
    "short_gpt.selection.found": ("Options", "Search"),
    "short_gpt.selection.trials": ("Trials",),
    "short_gpt.experiments": ["Cases", "Comparison", "Row", "compare_with_paper"],
    "short_gpt.opening": ["OpenOptions", "open_model"],
    "short_gpt.report": ["draw_scores", "importance_bars", "perplexities", "results"],
    "short_gpt.short_hf": ["ShortHFModel"],
    "short_gpt.short_llama": ["ShortLlama"],
    "short_gpt.short_model": ["ShortModel"],
    "short_gpt.streaming": ["Plan", "StreamedDecoder", "open_stream"],
    "short_gpt.surgery": ["WeightChange", "remove_layers", "remove_sublayers"],
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_works_and_names_the_new_one(old):
    sys.modules.pop(old, None)
    with pytest.warns(
        DeprecationWarning, match=f"{old} has moved: import from {MOVED[old][0]}"
    ) as w:
        module = importlib.import_module(old)
    assert [one.filename for one in w] == [importlib.__file__]  # the caller, not this library
    for name in OLD_NAMES[old]:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_an_old_class_is_the_new_one():
    with pytest.warns(DeprecationWarning):
        sys.modules.pop("short_gpt.short_llama", None)
        from short_gpt.short_llama import ShortLlama
    assert ShortLlama is short_gpt.ShortLlama
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("short_gpt.nothing")
