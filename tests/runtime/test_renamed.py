"""Import paths of the last version."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest
import torch

import short_gpt
from llama.renamed import MOVED as LLAMA
from short_gpt.runtime.renamed import MOVED as SHORT_GPT
from short_gpt.runtime.state import StateFile
from short_gpt.scoring import Importance, LayerHooks, Scores, hooked

MOVED = LLAMA | SHORT_GPT
OLD_NAMES = {
    "short_gpt.evaluation.llama_lm": ("llama_lm",),
    "short_gpt.selection.partial_run": ("PartialRun",),
    "short_gpt.models.weights_report": ("without_report",),
    "short_gpt.checkpoints.card": ("write_provenance", "model_card"),
    "short_gpt.checkpoints.mergekit": ("mergekit_recipe",),
    "short_gpt.checkpoints.save": ("save_hf", "save_meta", "save_as_meta"),
    "short_gpt.runtime.abort": ("end_all",),
    "short_gpt.runtime.lock": ("Lock", "hold"),
    "short_gpt.cli.results": ("ranked", "healed"),
    "short_gpt.jobs.choice": ("Chosen", "chosen"),
    "short_gpt.jobs.choice_settings": ("Answer", "Choice"),
    "short_gpt.jobs.healing_settings": ("Settings", "methods_of"),
    "short_gpt.jobs.scored": ("tokenizer_of", "configuration_of"),
    "short_gpt.runtime.results": ("read_record", "write_record"),
    "llama.checkpoint.reshard": ("reshard", "write_model"),
    "llama.dialog": ("Dialog", "encode_dialog"),
    "llama.formats.gguf_from": ("llama_to_gguf",),
    "llama.formats.gguf_header": ("read_header",),
    "llama.formats.gguf_parts": ("GGUFParts",),
    "llama.formats.sentencepiece_model": ("Pieces",),
    "llama.io.outputs": ("new_file",),
    "llama.io.swap": ("lock_file",),
    "llama.loading": ("load_model",),
    "llama.rope": ("apply_rotary_emb",),
    "llama.sampling": ("check_logits", "sample_top_p"),
    "short_gpt.evaluation.documents": ("TaskRun", "task_changes"),
    "short_gpt.healing.moments": ("NormalEquations",),
    "short_gpt.healing.refit_memory": ("RefitPlan", "plan_of"),
    "short_gpt.healing.steps": ("STEPS", "KINDS", "check_order", "LoraSettings", "DistillSettings"),
    "short_gpt.healing.teacher": ("CachedTeacher", "LiveTeacher", "divergence", "TOP_K"),
    "short_gpt.scoring.clusters": ("degrees_of_freedom", "ratio_covariance"),
    "short_gpt.scoring.differences": ("difference_margins",),
    "short_gpt.scoring.following": ("Following",),
    "short_gpt.scoring.halves": ("BetweenSublayers",),
    "short_gpt.scoring.measuring": ("measure", "seconds_a_pass"),
    "short_gpt.scoring.state": ("RunState",),
    "short_gpt.scoring.timing": ("seconds_a_pass",),
    "short_gpt.selection.found": ("Options", "Search"),
    "short_gpt.selection.trials": ("Trials",),
    "short_gpt.experiments": ["Cases", "Comparison", "Row", "compare_with_paper"],
    "short_gpt.models.computation": ["config_digest"],
    "short_gpt.models.config_check": ["check_config"],
    "short_gpt.models.layer_removal": ["remove_layers", "without_layers"],
    "short_gpt.models.rotary": ["longrope_limits"],
    "short_gpt.models.shape": ["Shape", "shape_of"],
    "short_gpt.jobs.calibrating": ("Apart", "calibrate"),
    "short_gpt.jobs.cells": ("Cells",),
    "short_gpt.jobs.published": ("compare_with_paper", "published"),
    "short_gpt.jobs.rows": ("HEALINGS", "Row"),
    "short_gpt.opening": ["OpenOptions", "open_model"],
    "short_gpt.report": ["draw_scores", "importance_bars", "perplexities", "results"],
    "short_gpt.short_hf": ["ShortHFModel"],
    "short_gpt.short_llama": ["ShortLlama"],
    "short_gpt.short_model": ["ShortModel"],
    "short_gpt.streaming": ["Plan", "StreamedDecoder", "open_stream"],
    "short_gpt.streaming.memory": ["Plan", "bytes_of"],
    "short_gpt.wrappers.streamed_weights": ["HFSource", "MetaSource"],
    "short_gpt.wrappers.sublayers": ["remove_sublayers", "sublayer_parameters"],
    "short_gpt.surgery": ["WeightChange", "remove_layers", "remove_sublayers"],
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_works_and_names_the_new_one(old):
    sys.modules.pop(old, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a package that has moved itself
        importlib.import_module(old.rpartition(".")[0])
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


def test_an_old_argument_and_attribute_work_and_name_the_new_one():
    zeros = torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 3, 3)
    with pytest.warns(DeprecationWarning, match="halves of Scores is now sublayers") as caught:
        scores = Scores(*zeros, halves=torch.ones(1, 2, 2))
        assert scores.halves is scores.sublayers
    assert [one.filename for one in caught] == [__file__] * 2
    with pytest.warns(DeprecationWarning, match="halves of Importance is now sublayers"):
        assert Importance.empty([0]).halves.shape == (2, 1)
    with pytest.warns(DeprecationWarning, match="mean_norm is now mean"):
        assert Importance.empty([0]).mean_norm.isnan().all()
    layers, mask = torch.nn.ModuleList([torch.nn.Identity()]), torch.ones(1, 1).bool()
    with (
        pytest.warns(DeprecationWarning, match="halves_of of hooked is now sublayers_of"),
        hooked(layers, mask, halves_of=None) as hooks,
    ):
        assert isinstance(hooks, LayerHooks)
    with (
        pytest.warns(DeprecationWarning, match="on_halves is now on_sublayers"),
        pytest.raises(TypeError),
    ):
        hooks.on_halves()


def test_former_paths_of_llama_work_without_short_gpt():
    code = "import sys, llama.rope as old; print(old.apply_rotary_emb, 'short_gpt' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "apply_rotary_emb" in done.stdout and done.stdout.endswith("False\n")


def test_an_argument_by_both_of_its_names_is_refused(tmp_path):
    with pytest.raises(TypeError, match="takes folder, formerly whole; got both"):
        StateFile(tmp_path / "state.json", {}, whole=tmp_path, folder=tmp_path)
