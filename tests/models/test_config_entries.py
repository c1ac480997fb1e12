"""What a config says of single layers, with fewer of them: right, or gone."""

from __future__ import annotations

import json
import re

import pytest
from families import make
from transformers import AutoConfig

from short_gpt.checkpoints import Target, prune_checkpoint
from short_gpt.models.decoder import remove_layers
from short_gpt.models.hf import HFDecoder
from short_gpt.models.layer_config import pruned_entries
from short_gpt.runtime.errors import ShortGPTError


def test_numbers_of_layers_are_renumbered_however_many_there_are():
    """A list of all layers' numbers is no list of a value for each layer."""
    for listed, left in (([0, 1, 2, 3], [0, 1, 2]), ([1, 3], [0, 2])):
        entries = {"num_hidden_layers": 4, "rope_scaling_layers": listed}
        found = pruned_entries(entries, [1, 2, 3])
        assert found == {"num_hidden_layers": 3, "rope_scaling_layers": left}


TYPED = ["qwen2, sliding", "gemma2", "gemma3", "gemma3, wrapped", "cohere2", "gpt_oss", "smollm3"]
TYPED += ["qwen3_next", "llama4", "lfm2"]


@pytest.mark.parametrize("keep", [[0, 2, 3, 5], [0, 1, 2, 4, 5], [1, 3, 5]])
@pytest.mark.parametrize("kind", TYPED)
def test_a_cut_config_makes_the_kinds_of_the_layers_left(kind, keep, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path / "whole")
    before = list(model.config.get_text_config().layer_types)
    prune_checkpoint(tmp_path / "whole", tmp_path / "cut", [i for i in range(6) if i not in keep])
    HFDecoder(model).keep_layers(keep)
    model.config.save_pretrained(tmp_path / "live")
    for folder in ("cut", "live"):
        config = AutoConfig.from_pretrained(tmp_path / folder).get_text_config()
        wanted = [before[i] for i in keep]
        assert list(config.layer_types) == wanted
        written = json.loads((tmp_path / folder / "config.json").read_text())
        written = {**written, **written.get("text_config", {})}
        # what transformers and others read where layer_types is not known
        if (period := written.get("_sliding_window_pattern")) is not None:
            made = [(i + 1) % period == 0 for i in range(len(keep))]
            assert made == [w == "full_attention" for w in wanted]
        if kind == "qwen2, sliding":
            full = written["max_window_layers"]
            assert wanted == ["full_attention"] * full + ["sliding_attention"] * (len(keep) - full)
            del written["layer_types"]
            assert type(config).from_dict(written).layer_types == wanted
        if kind == "lfm2":
            full = [i for i, w in enumerate(wanted) if w == "full_attention"]
            assert written["full_attn_idxs"] == full


def test_a_pattern_that_no_number_says_is_gone():
    model = make("gemma3")
    config = model.config
    assert config._sliding_window_pattern == 6
    undo = HFDecoder(model).keep_layers([5, 0, 1])
    assert config._sliding_window_pattern is None
    undo()
    assert config._sliding_window_pattern == 6


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"modules_to_not_convert": ["model.layers.2.mlp"]}, "model.layers.2.mlp"),
        ({"dynamic": {r"-:.*\.2\..*gate.*": {}}}, r"2\\..*gate.*"),
        ({"dynamic": {r"+:.*\.[3-5]\..*": {"bits": 8}}}, r"[3-5]\\..*"),
        ({"ignore": ["lm_head", r"re:.*layers\.2\..*"]}, r"2\\..*"),
        ({"ignore": ["lm_head", "re:.*down_proj"], "targets": ["Linear"], "bits": 4}, None),
        ({"quant_method": "gptq", "dynamic": {r"-:.*\.mlp\..*": {}}, "meta": {"v": "1.9"}}, None),
    ],
)
def test_settings_of_quantization_for_single_layers_are_refused(tmp_path, settings, apart):
    """By name or pattern, in memory and in files: the numbers would be those of other layers."""
    model = make("llama")
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    model.config.quantization_config = settings
    for remove in (
        lambda: remove_layers(HFDecoder(model), [1]),
        lambda: prune_checkpoint(tmp_path / "m", Target(tmp_path / "out"), [1]),
    ):
        if apart is None:
            remove()
            continue
        with pytest.raises(ShortGPTError, match=r"single layers \(.*" + re.escape(apart)):
            remove()
