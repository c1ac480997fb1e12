"""The table of families: every kind under test has a row, and the rows name what is there."""

from __future__ import annotations

import pytest
from conftest import refuses
from families import FAMILIES as KINDS
from families import make
from torch import nn

from short_gpt.models.families import ANY, FAMILIES, META, family_of, only_part, part
from short_gpt.models.hf import HFDecoder, find_layers
from short_gpt.models.layer_calls import attention_output, mlp_output

FIELDS = ("attention", "mlp", "attention_output", "mlp_output")
# what a row names for other members of the family: layers without experts
ELSEWHERE = {("qwen3_next", "mlp_output")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_row_that_names_what_its_layers_have(kind):
    model = make(kind)
    decoder = HFDecoder(model)
    family = decoder.family
    assert family is FAMILIES[decoder.config.model_type]
    layers = decoder.layers
    for field in FIELDS:
        names = getattr(family, field)
        if names and (kind, field) not in ELSEWHERE:
            assert any(part(layer, names) is not None for layer in layers), field
    # what the row says of the path holds, but for a decoder inside another model
    inside = model.config is not decoder.config
    assert (find_layers(model) in family.layers) is not inside
    ends = {name.rpartition("layers.")[2] for name, _ in model.named_modules()}
    assert all(any(end.endswith(f".{name}") for end in ends) for name in family.lora) or (
        kind == "mixtral"  # one tensor for all experts since transformers 5
    )


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "lfm2", "opt", "phi", "starcoder2"])
def test_a_family_without_a_row_is_recognised_by_the_same_names(kind):
    decoder = HFDecoder(make(kind))
    decoder.config.model_type = "brand_new"
    assert decoder.family is ANY
    for layer in decoder.layers:
        for field in ("mlp_output", "attention_output"):
            names = getattr(FAMILIES[KINDS[kind][0].replace("gemma3", "gemma3_text")], field)
            assert only_part(layer, getattr(ANY, field)) is only_part(layer, names)


def test_a_map_named_twice_ends_nothing():
    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(2, 2)})})
    assert mlp_output(layer) is layer.mlp.down_proj
    layer.fc2 = nn.Linear(2, 2)
    refuses("no plain matrix at the end of its MLP", mlp_output, layer)
    assert mlp_output(layer, family_of("llama")) is layer.mlp.down_proj
    refuses("no plain matrix at the end of its MLP", mlp_output, layer, META)
    refuses("no plain matrix at the end of its attention", attention_output, layer, META)


def test_the_familys_list_is_taken_where_another_has_as_many_layers():
    model = make("llama")
    model.others = nn.ModuleList(nn.Identity() for _ in range(6))
    assert find_layers(model) == "model.layers"
    model.config.model_type = "brand_new"
    refuses(r"has 2 lists of 6 layers .*name one with layers_path", find_layers, model)
