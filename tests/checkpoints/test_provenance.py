"""The record of a pruned model: numberings, the chain of healings, and the card made from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import random_windows, refuses, save_byte_llama
from families import make
from huggingface_hub import errors

from short_gpt.checkpoints import (
    ROUNDING,
    Fingerprint,
    Provenance,
    check_same,
    copy_weights,
    model_card,
    prune_checkpoint,
)
from short_gpt.checkpoints.provenance import KEYS, source_card
from short_gpt.checkpoints.verify import fingerprint
from short_gpt.data.windows import windows
from short_gpt.healing import Recipe, heal_lora, heal_patch
from short_gpt.models.decoder import WeightChange
from short_gpt.scoring.importance import Importance
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

WINDOWS = random_windows(8, 16, vocab=8)
TRAINING, VALIDATION = (
    random_windows(6, 16, vocab=8, seed=1),
    random_windows(3, 16, vocab=8, seed=5),
)
QUICK = Recipe(rank=4, steps=2, warmup=0, batch_size=2, eval_every=2, learning_rate=1e-2)


def record_of(directory: Path) -> dict[str, object]:
    return json.loads((directory / "pruning.json").read_text())


def test_a_fact_by_the_name_of_the_librarys_own_record_is_refused():
    for key in KEYS:
        refuses(f"facts name {key}, which the", Provenance, facts={key: "mine", "data": "a book"})


def test_exactly_the_weights_that_a_healed_model_names_are_others():
    short = ShortHFModel(make("llama"))
    before = {name: p.detach().clone() for name, p in short.model.named_parameters()}
    heal_patch(short, [2, 4], WINDOWS, progress=False)
    assert heal_lora(short, TRAINING, VALIDATION, recipe=QUICK, progress=False).kept_step
    differ = set()
    for place, number in enumerate(short.kept):
        for name, weight in short.decoder.layers[place].named_parameters():
            if not torch.equal(weight, before[f"model.layers.{number}.{name}"]):
                differ.add((number, name))
    assert differ == short.changed
    mlps = {f"mlp.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")}
    assert differ == {(number, name) for number in short.kept for name in mlps}


def test_what_is_not_in_the_changed_set_comes_from_the_file(tmp_path, monkeypatch):
    directory = save_byte_llama(tmp_path / "dense")
    short = ShortLlama.from_checkpoint(directory, max_seq_len=64, device="cpu")
    heal_patch(short, [3], WINDOWS, progress=False)
    assert short.changed == {(2, "feed_forward.w2.weight")}
    with torch.no_grad():  # behind the record's back: not written, and told when it is proved
        short.decoder.layers[0].attention.wq.weight.zero_()
    refuses("the saved model is not the model", short.save, tmp_path / "out", error=RuntimeError)
    monkeypatch.setattr(ShortLlama, "_check_saved", lambda *_: None)
    out = short.save(tmp_path / "out")
    dense, left = (torch.load(d / "consolidated.00.pth") for d in (directory, out))
    new = {0: 0, 1: 1, 2: 2, 3: 4}
    differ = set()
    for name, weight in left.items():
        head, _, rest = name.partition(".")
        if head == "layers":
            number, _, inner = rest.partition(".")
            old = f"layers.{new[int(number)]}.{inner}"
        else:
            old = name
        if not torch.equal(weight, dense[old]):
            differ.add(name)
    assert differ == {"layers.2.feed_forward.w2.weight"}
    patched = short.decoder.layers[2].feed_forward.w2.weight
    assert torch.equal(left["layers.2.feed_forward.w2.weight"], patched)


RECORD = {  # after two patches and a training
    "removed_layers": [3, 1],
    "kept_layers": [0, 2, 4],
    "source": "dense",
    "original_layers": [0, 2, 4],
    "healing": [
        {"method": "linear patch"},
        {"method": "linear patch", "layers": [1]},
        {"method": "LoRA", "steps": 6},
    ],
    "perplexity": {"whole, 5 layers": 3.5, "healed": None},
    "scored": {"windows": 4, "tokens": 128},
    "block_influence": [0.5, 0.1, None, 0.2, 0.3],
    "data": "a book",
    "method": "Block Influence",
    "versions": {"python": "3.10"},
}


def test_names_with_line_breaks_leave_the_card_whole():
    """A heading, a sentence and a table's row end where their line does."""
    record = Provenance.of_scores(
        Importance.empty([0, 1, 2]), evidence={"scored_by": {"data": "no\nvels"}}
    ).pruned("some\n---\n# model", removed=[1], kept=[0, 2])
    lines = model_card(record).splitlines()
    assert r"# some\n---\n# model without 1 of its 3 layers" in lines
    assert sum(line.startswith("#") for line in lines) == 1 and lines.count("---") == 2


def test_the_cards_table_begins_a_paragraph():
    lines = model_card(Provenance([1], [0, 2], perplexity={"2 layers": 9.5})).splitlines()
    assert lines[lines.index("| model | perplexity | 95% | tokens |") - 1] == ""


def test_the_card_says_how_layers_were_chosen():
    assert "They were chosen by hand." in model_card(Provenance([1], [0, 2]))
    searched = Provenance([1], [0, 2], evidence={"method": "greedily"})
    assert "Method: greedily." in model_card(searched)  # a search keeps no scores
    healed = Provenance(
        [1],
        [0, 2],
        scored={"windows": 4, "tokens": 128},
        evidence={"method": "low", "scored_by": {"data": "novels"}},
        facts={"data": "what it was healed by"},
    )
    assert "Scores: low, on 128 tokens of novels in 4 windows." in model_card(healed)


def head(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


def test_the_card_carries_licence_and_base_model(tmp_path):
    """Of a model that was downloaded and put under a name of its own, cut, cut again and healed."""
    make("llama").save_pretrained(tmp_path / "own")
    said = "---\nlicense: other\nlicense_name: 'their: own'\nlicense_link: https://a.b/c\n"
    said += "base_model: [them/one, them/two]\ntags: [a]\n---\n# A model\n---\nlicense: mit\n"
    (tmp_path / "own/README.md").write_text(said)
    once = prune_checkpoint(tmp_path / "own", tmp_path / "once", [1])
    found = head((once / "README.md").read_text())
    expected = {"license": "other", "license_name": "their: own", "license_link": "https://a.b/c"}
    assert found == {**found, **expected} and found["base_model"] == ["them/one", "them/two"]
    config = json.loads((tmp_path / "own/config.json").read_text())
    config["_name_or_path"] = "them/model-7b"
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    other = prune_checkpoint(tmp_path / "own", tmp_path / "a", [1])
    twice = prune_checkpoint(other, tmp_path / "b", [1])
    short = ShortHFModel(str(twice))
    heal_patch(short, [2], WINDOWS, progress=False)
    saved = short.save(tmp_path / "healed")
    for path in (twice, saved):
        found = head((path / "README.md").read_text())
        assert found == {**found, **expected} and found["base_model"] == "them/model-7b"
    assert Provenance.read(saved / "pruning.json").source_card["license"] == "other"


@pytest.mark.parametrize(
    "text",
    ["", "---\nlicense: [\n---\n", "---\n- a\n---", "license: mit", "---\nlicense: {a: 1}\n---"],
)
def test_a_card_that_says_nothing_gives_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert source_card(tmp_path) == {} == source_card(tmp_path / "none") == source_card("gone")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert source_card(tmp_path) == {}
    assert source_card("them/model") == {"base_model": "them/model"}
    assert "library_name" in model_card(Provenance([1], [0, 2])).splitlines()[1]


def test_record_and_card_carry_the_intervals(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")
    short = ShortHFModel(str(tmp_path / "whole"))
    texts = ["abcdefgh" * 8, "hgfedcba" * 8, "aabbccdd" * 8]
    cut = list(windows(texts, lambda t: [ord(c) - 97 for c in t], size=16, stride=16))
    measured = short.perplexity(cut, progress=False)
    alone = short.perplexity(cut[:1], progress=False)  # of which no error is known
    short.remove_layers([1])
    saved = short.save(tmp_path / "out", measured={"whole": measured, "alone": alone})
    found = record_of(saved)["perplexity_error"]
    low, high = measured.interval()
    assert found == {"whole": {"interval_95": [low, high], "windows": 12, "texts": 3}}
    card = (saved / "README.md").read_text()
    row = f"| whole | {measured.value:.3f} | {low:.3f} to {high:.3f} | {measured.tokens:,} |"
    assert row in card and "Over 12 windows of 3 texts, the texts being the samples." in card
    assert Provenance.read(saved / "pruning.json").perplexity_error["whole"]["texts"] == 3


def test_a_record_is_read_and_written_as_it_was(tmp_path):
    path = tmp_path / "pruning.json"
    path.write_text(json.dumps({**RECORD, "files": ["model.safetensors"]}))
    record = Provenance.read(path)
    assert [step["method"] for step in record.steps] == ["linear patch", "linear patch", "LoRA"]
    assert record.steps[1] == {"method": "linear patch", "layers": [1]}
    assert (record.original_layers, record.all_removed) == ([0, 2, 4], [3, 1])
    # JSON has no infinity
    assert record.perplexity == {"whole, 5 layers": 3.5, "healed": math.inf}
    assert record.facts == {"data": "a book"}
    assert record.evidence == {"method": "Block Influence"}
    card = model_card(record)
    assert "# dense without 2 of its 5 layers, healed" in card
    assert "linear patch, then linear patch, then LoRA." in card
    assert "Scores: Block Influence, on 128 tokens of a book in 4 windows." in card
    path.write_text(json.dumps(record.to_dict()))
    assert Provenance.read(path).to_dict() == record.to_dict()
    assert json.loads(path.read_text())["healing"][-1] == {"method": "LoRA", "steps": 6}


@pytest.mark.parametrize(
    "changes",
    [
        {"removed_layers": "3"},
        {"kept_layers": None},
        {"kept_layers": [0, 2, 5]},
        {"healing": "LoRA"},
        {"healing": [{"steps": 6}]},
        {"perplexity": {"healed": "low"}},
        {"source_pruning": [1]},
        {"source_pruning": {"removed_layers": [1]}},
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, changes):
    path = tmp_path / "pruning.json"
    path.write_text(json.dumps({**RECORD, **changes}))
    said = f"{path}, the record of a pruned model, is damaged .*: correct it, or delete it"
    refuses(said, Provenance.read, path)


def test_a_record_beside_another_model_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")  # six layers; the record leaves three
    (tmp_path / "whole" / "pruning.json").write_text(json.dumps(RECORD))
    with pytest.raises(ValueError, match="has 6 layers, its pruning.json tells of 3"):
        prune_checkpoint(tmp_path / "whole", tmp_path / "out", [1])
    assert not (tmp_path / "out").exists()


def test_numbers_go_through_all_removals_to_the_first_model():
    first = Provenance([1], [0, 2, 3, 4, 5], "whole")
    second = Provenance([1, 4], [0, 2, 3], "first", earlier=first)
    assert second.original_layers == [0, 3, 4] and second.all_removed == [1, 2, 5]
    assert second.first_source == "whole"
    record = second.to_dict()
    assert record["source_pruning"] == first.to_dict() and record["original_layers"] == [0, 3, 4]


def test_healing_a_pruned_model_continues_its_record(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")
    facts = Provenance(facts={"by": "me"}, perplexity={"5 layers": 9.5})
    cut = prune_checkpoint(tmp_path / "whole", tmp_path / "cut", [1], provenance=facts)
    short = ShortHFModel(str(cut))
    assert Provenance.of(short, cut).perplexity == {"5 layers": 9.5}  # still the same model
    short.measure(WINDOWS, progress=False)
    short.perplexity(WINDOWS, progress=False)
    short.note_change(WeightChange({"method": "a test"}, frozenset()))
    record = Provenance.of(short, cut, facts={"data": "eight words"})
    assert (record.removed_layers, record.kept_layers) == ([1], [0, 2, 3, 4, 5])
    assert record.source == "whole" and record.earlier is None
    assert [step["method"] for step in record.steps] == ["a test"]
    assert record.facts == {"by": "me", "data": "eight words"}
    assert record.perplexity == {}  # what was measured before is another model's
    short.measure(WINDOWS, progress=False)
    influence = Provenance.of(short, cut).block_influence
    assert math.isnan(influence[1]) and len(influence) == 6
    assert [b for i, b in enumerate(influence) if i != 1] == short.importances.tolist()


def test_cut_in_files_or_from_memory_the_record_is_the_same(tmp_path):
    make("llama").save_pretrained(tmp_path / "whole")
    short = ShortHFModel(str(tmp_path / "whole"), n_prune_layers=2)
    short.measure(WINDOWS, progress=False)
    scores = short.importance
    layers = short.remove_layers()
    short.importance = scores
    kept = Provenance.of_scores(scores, facts={"data": "eight words"})
    files = prune_checkpoint(tmp_path / "whole", tmp_path / "files", layers, provenance=kept)
    memory = short.save(tmp_path / "memory", facts={"data": "eight words"})
    assert record_of(files) == record_of(memory)
    assert (files / "README.md").read_text() == (memory / "README.md").read_text()


def test_named_measurements_go_before_those_that_the_model_remembers(tmp_path):
    short = ShortHFModel(make("llama"))
    whole = short.perplexity(WINDOWS, progress=False)
    assert list(Provenance.of(short, "x").perplexity) == ["6 layers"]
    assert list(Provenance.of(short, "x", measured={"as it came": whole}).perplexity) == [
        "as it came"
    ]


def test_a_perplexity_of_weights_that_changed_since_is_not_recorded():
    short, windows = ShortHFModel(make("llama")), random_windows(3, 16)
    original = short.perplexity(windows, progress=False)
    with short.without_layers([3]):
        short.perplexity(windows, progress=False)
        assert len(short.quality) == 2
    weight = short.decoder.layers[4].mlp.down_proj.weight
    with short.without_layers([2]):
        short.change_weights(
            {"method": "test"}, {(4, "mlp.down_proj.weight"): torch.zeros_like(weight)}
        )
    short.remove_layers([3])
    assert Provenance.of(short, "source").perplexity == {"6 layers": original.value}
    short.perplexity(windows, progress=False)
    assert [*Provenance.of(short, "source").perplexity] == ["6 layers", "5 layers"]


def print_of(logits: list[float], tokens: list[int], consistent: bool = True) -> Fingerprint:
    return Fingerprint(torch.tensor([[logits]]), tokens, consistent)


def test_what_makes_two_models_the_same():
    ours = print_of([1.0, -2.0], [1, 2])
    assert check_same(ours, ours) == "bit for bit"
    near = print_of([1.0, -2.0 - 1e-5], [1, 3])
    assert check_same(ours, near, rounding=ROUNDING) == "except for the last digits"
    for other, rounding, message in (
        (near, 0.0, "the saved model is not the model in memory: logits differ by up to"),
        (print_of([1.0, -2.0 - 1e-3], [1, 2]), ROUNDING, "logits differ by up to 0.001"),
        (print_of([1.0, math.nan], [1, 2]), ROUNDING, "logits differ by up to nan"),
        (print_of([1.0, -2.0], [1, 2], False), 0.0, "otherwise with its cache than without"),
        (print_of([1.0, -2.0], [1, 4]), 0.0, "generates otherwise than the model in"),
        (print_of([1.0], [1, 2]), 0.0, "logits differ"),
    ):
        refuses(message, check_same, ours, other, rounding=rounding, error=RuntimeError)


@pytest.mark.parametrize(
    ("dtype", "scale", "same"),
    [
        (torch.float32, 1 - 1e-6, True),
        (torch.float32, 0.99, False),
        (torch.bfloat16, 0.99, True),
        (torch.bfloat16, 0.5, False),
    ],
)
def test_the_cache_may_give_another_token_only_where_both_are_as_likely(
    monkeypatch, dtype, scale, same
):
    """In 16 bits a token computed alone rounds more."""
    short = ShortHFModel(make("llama").to(dtype))
    head, tokens = short.model.lm_head.weight.data, short.greedy([*range(8)], 8)
    at = next(i for i, token in enumerate(tokens) if token != tokens[0])
    twin = (tokens[at] + 1) % short.decoder.vocab_size
    head[twin] = head[tokens[at]] * scale
    cached = [*tokens[:at], twin, *tokens[at + 1 :]]
    monkeypatch.setattr(short, "greedy", lambda *_, use_cache: cached if use_cache else tokens)
    assert fingerprint(short).consistent is same


def test_copied_weights_are_the_same_and_tied_ones_stay_tied():
    model = make("llama, tied")
    before = [p.detach().clone() for p in model.parameters()]
    held = [p.data for p in model.parameters()]  # so that no copy takes their places
    copy_weights(model)
    assert all(map(torch.equal, before, model.parameters()))
    assert not {p.data_ptr() for p in held} & {p.data_ptr() for p in model.parameters()}
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_the_record_of_a_model_opened_by_its_hub_id_is_that_of_the_commit(tmp_path, monkeypatch):
    make("llama").save_pretrained(tmp_path / "whole")
    cut = prune_checkpoint(tmp_path / "whole", tmp_path / "cut", [1])
    asked, failures = [], {"me/plain": errors.EntryNotFoundError, "me/far": ConnectionError}

    def fetch(name: str, file: str, *, revision: str) -> str:
        asked.append((name, revision))
        if name in failures:
            raise failures[name].__new__(failures[name], "not there")
        return str(cut / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    short = ShortHFModel(str(cut))
    short.remove_layers([2])
    assert Provenance.of(short, "me/cut").original_layers == [0, 1, 3, 4] and not asked
    short = ShortHFModel(str(cut))
    short.model.config._commit_hash = "c0ffee"  # as of a model that the hub had
    short.remove_layers([2])
    assert Provenance.of(short, "me/cut").original_layers == [0, 2, 4, 5]
    assert Provenance.of(short, "me/plain").original_layers == [0, 1, 3, 4]
    assert Provenance.of(short, "me/far").original_layers == [0, 1, 3, 4]
    assert asked == [(name, "c0ffee") for name in ("me/cut", "me/plain", "me/far")]
