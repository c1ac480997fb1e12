"""LoRA healing, held-out texts, healed models on disk, and the command."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import fails, run
from conftest import (
    BYTE_VOCAB,
    CharTokenizer,
    interrupted,
    make_transformer,
    random_windows,
    refuses,
    save_byte_llama,
    short_llama,
    weights_of,
)
from families import make
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    integrations,
)

from llama.formats.hf import meta_to_hf
from short_gpt.checkpoints import Provenance
from short_gpt.data.disjoint import hold_out
from short_gpt.data.texts import Conversation
from short_gpt.evaluation.perplexity import (
    Difference,
    Perplexity,
    combined,
    difference,
    window_perplexities,
)
from short_gpt.healing import STEPS, HealingEvidence, trainer
from short_gpt.healing import heal_patch as patch
from short_gpt.healing import lora as healing
from short_gpt.healing.lora import adapt, heal, target_modules
from short_gpt.healing.settings import ALL, OUTPUTS, Healing, Recipe, recipe_for
from short_gpt.healing.trainer import TrainingRun
from short_gpt.runtime.replicas import Replicas
from short_gpt.runtime.state import StateFile
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

TRAINING, VALIDATION = random_windows(6, 16), random_windows(3, 16, seed=5)
# text of eight tokens, which is quickly learned
FEW_WORDS = random_windows(6, 16, vocab=8), random_windows(3, 16, vocab=8, seed=5)
TOKENS = torch.tensor(random_windows(2, 16, seed=9))
QUICK = Recipe(rank=4, steps=6, warmup=1, batch_size=2, eval_every=2, learning_rate=2e-2)


changed = partial(replace, QUICK)


def test_trainable_parameters_are_those_published_for_mistral():
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(num_hidden_layers=23))
        adapted = adapt(model, recipe_for(model.config, "demo"))
    assert adapted.get_nb_trainable_parameters() == (2_449_408, 5_281_173_504)


@pytest.mark.parametrize(
    ("family", "maps", "sizes"),
    [
        ("llama", ("gate_proj", "up_proj", "down_proj"), 3 * (32 + 48)),
        ("phi", ("fc1", "fc2"), 2 * (32 + 48)),
        ("phi3", ("gate_up_proj", "down_proj"), (32 + 96) + (48 + 32)),
        ("gpt2", ("mlp.c_fc", "mlp.c_proj"), 2 * (32 + 128)),
        ("gpt_neox", ("dense_h_to_4h", "dense_4h_to_h"), 2 * (32 + 48)),
        ("opt", ("fc1", "fc2"), 2 * (32 + 48)),
    ],
)
def test_the_mlps_maps_are_found_in_every_layer(family, maps, sizes):
    model = make(family)
    found = target_modules(model)
    assert len(found) == 6 * len(maps) and all(name.endswith(maps) for name in found)
    trainable, _ = adapt(model, QUICK).get_nb_trainable_parameters()
    assert trainable == 6 * QUICK.rank * sizes


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", 4), ("phi", 3), ("phi3", 1), ("gpt2", 0), ("gpt_oss", 4), ("mixtral", 4)],
)
def test_all_maps_are_the_attentions_too_where_they_have_llamas_names(family, more):
    model = make(family)
    every = target_modules(model, ALL)
    mlp = [name for name in every if not name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
    assert len(every) == len(mlp) + 6 * more
    if family not in ("gpt_oss", "mixtral"):  # whose experts are one tensor
        assert mlp == target_modules(model)
    outputs = [name for name in every if name.endswith(("o_proj", "down_proj"))]
    assert family != "llama" or target_modules(model, OUTPUTS) == outputs
    small = recipe_for(model.config, "small")
    assert small.modules == ALL and small.learning_rate == 1e-3
    assert recipe_for(LlamaConfig(hidden_size=576), "small").learning_rate == 1e-3
    assert recipe_for(LlamaConfig(hidden_size=640), "small").learning_rate == 2.5e-4
    adapt(model, replace(QUICK, modules=ALL))


# training


def test_the_loss_falls_and_what_is_merged_is_what_was_trained(monkeypatch):
    short = ShortHFModel(make("llama"))
    short.remove_layers([2, 4])
    before = window_perplexities(short.decoder, TRAINING)
    seen = {}
    merge = healing._merge

    def look(adapted, healed):
        seen["adapter"] = adapted.get_base_model().eval()(TOKENS).logits.detach()
        return merge(adapted, healed)

    monkeypatch.setattr(healing, "_merge", look)
    healed = heal(short, TRAINING, VALIDATION, recipe=QUICK, progress=False)
    assert healed.kept_step
    assert torch.allclose(short.decoder.logits(TOKENS), seen["adapter"], atol=1e-5)
    assert difference(before, window_perplexities(short.decoder, TRAINING)).nats < -0.02
    assert healed.trainable == 4 * 4 * 3 * (32 + 48)
    assert not any("lora" in name for name, _ in short.model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in short.model.parameters())
    assert not short.model.training and not torch.are_deterministic_algorithms_enabled()
    assert set(healed.validation) == {0, 2, 4, 6} and healed.steps == 6
    json.dumps(healed.to_dict())


def test_the_same_seed_gives_the_same_weights_and_resuming_those_of_one_run(tmp_path):
    recipe = changed(dropout=0.1)
    whole, again, broken, resumed = (ShortHFModel(make("llama")) for _ in range(4))
    first = heal(whole, TRAINING, VALIDATION, recipe=recipe, progress=False)
    heal(again, TRAINING, VALIDATION, recipe=recipe, work_dir=tmp_path / "a", progress=False)
    assert all(map(torch.equal, weights_of(whole), weights_of(again)))

    untouched = weights_of(broken)
    # in step 4 of 6; the last checkpoint is that of step 2
    with interrupted(Trainer, "training_step", 7):
        heal(broken, TRAINING, VALIDATION, recipe=recipe, work_dir=tmp_path / "b", progress=False)
    assert all(map(torch.equal, weights_of(broken), untouched))
    options = {"work_dir": tmp_path / "b", "progress": False}
    models = [ShortHFModel(make("llama")), ShortHFModel(make("llama", seed=1))]
    models[0].model.config.rms_norm_eps = 0.5
    for short, windows, other, what in (
        (resumed, TRAINING, QUICK, "dropout: 0.1, now 0.05; go on with the former dropout, or"),
        (resumed, TRAINING[1:], recipe, "text"),
        (models[0], TRAINING, recipe, "configuration"),
        (models[1], TRAINING, recipe, "model"),
    ):
        with pytest.raises(ValueError, match=f"is the state of a run with another {what}"):
            heal(short, windows, VALIDATION, recipe=other, **options)
    resumed.model.config.use_cache = False  # which changes nothing that is computed
    second = heal(resumed, TRAINING, VALIDATION, recipe=recipe, **options)
    assert all(map(torch.equal, weights_of(whole), weights_of(resumed)))
    assert second.validation == first.validation and second.losses == first.losses


def test_a_gpu_warns_where_it_has_no_deterministic_kernel():
    for device, warns in (("cpu", False), ("cuda", True)):
        with trainer.deterministic(torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    assert not torch.are_deterministic_algorithms_enabled()


def test_weights_that_cannot_be_trained_are_refused_first(monkeypatch):
    monkeypatch.setattr(healing, "adapt", lambda *_: pytest.fail("it began"))
    half, named, small = (ShortHFModel(make("llama")) for _ in range(3))
    half.model.half()
    named.model.is_quantized = True
    matrix = small.model.model.layers[1].mlp.down_proj
    matrix.weight = torch.nn.Parameter(matrix.weight.to(torch.int8), requires_grad=False)
    floats = "float16 loses small gradients on cpu: open the model"
    quantized = "not quantized, and this model's are: open it without"
    for short, message in ((half, floats), (named, quantized), (small, quantized)):
        refuses(message, heal, short, TRAINING, VALIDATION, recipe=QUICK, progress=False)
        refuses(message, healing.seconds_a_step, short, TRAINING[0], QUICK)


def test_frozen_parameters_stay_frozen_and_layers_are_those_named():
    model = make("llama")
    model.other = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in model.model.layers)
    model.config.model_type = "odd"
    short = ShortHFModel(model, layers_path="model.layers")
    names = target_modules(model, layers_path="model.layers")
    assert names and all(name.startswith("model.layers.") for name in names)
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    assert healing.seconds_a_step(short, TRAINING[0], QUICK) > 0
    assert not frozen.requires_grad and model.model.norm.weight.requires_grad
    assert heal(short, TRAINING, VALIDATION, recipe=QUICK, progress=False).kept_step
    assert not frozen.requires_grad and model.model.norm.weight.requires_grad


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        (torch.bfloat16, (True, False)),
        (torch.float16, (False, True)),
        (torch.float32, (False, False)),
    ],
)
def test_training_is_in_the_models_dtype(dtype, flags, monkeypatch):
    import transformers

    monkeypatch.setattr(
        transformers, "TrainingArguments", lambda **given: SimpleNamespace(n_gpu=1, **given)
    )
    card = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype)
    run = trainer.TrainingRun(TRAINING, VALIDATION, QUICK)
    model = SimpleNamespace(parameters=lambda: iter([card]))
    arguments = trainer._arguments(model, run, Path("none"))
    assert (arguments.bf16, arguments.fp16) == flags


def test_training_that_only_harms_leaves_the_model_as_it_was():
    short = ShortHFModel(make("llama"))
    before = weights_of(short)
    recipe = changed(learning_rate=5.0, steps=2)
    healed = heal(short, TRAINING, VALIDATION, recipe=recipe, progress=False)
    assert healed.kept_step == 0 and healed.validation[2] > healed.validation[0]
    assert all(map(torch.equal, weights_of(short), before))


def test_patience_goes_on_where_it_was_and_a_checkpoint_cut_short_is_passed_over(tmp_path):
    options = {"recipe": changed(learning_rate=5.0, patience=2, steps=20), "progress": False}
    whole = heal(ShortHFModel(make("llama")), TRAINING, VALIDATION, **options)
    assert whole.validation[whole.steps - 2] > whole.validation[whole.kept_step]
    options["work_dir"] = tmp_path
    # after the first evaluation that was not better
    with interrupted(Trainer, "training_step", 2 * (whole.steps - 1)):
        heal(ShortHFModel(make("llama")), TRAINING, VALIDATION, **options)
    last = tmp_path / f"checkpoint-{whole.steps}"
    last.mkdir()
    (last / "adapter_config.json").write_text("{}")  # killed while it was written
    short = ShortHFModel(make("llama"))
    resumed = heal(short, TRAINING, VALIDATION, **options)
    assert resumed.validation == whole.validation and resumed.steps == whole.steps


def test_a_training_that_patience_ended_keeps_the_best_and_does_not_go_on(tmp_path):
    recipe = changed(learning_rate=5.0, patience=1, steps=40)
    options = {"recipe": recipe, "work_dir": tmp_path / "a", "progress": False}
    first, again = (ShortHFModel(make("llama")) for _ in range(2))
    whole = heal(first, TRAINING, VALIDATION, **options)
    assert whole.steps == max(whole.validation)
    options["work_dir"] = shutil.move(tmp_path / "a", tmp_path / "b")
    resumed = heal(again, TRAINING, VALIDATION, **options)
    assert (resumed.steps, resumed.kept_step) == (whole.steps, whole.kept_step)
    assert resumed.validation == whole.validation and whole.steps < recipe.steps
    best = min(whole.validation.values())
    assert whole.validation[whole.kept_step] == best < whole.validation[whole.steps]
    for short in (first, again):
        assert short.perplexity(VALIDATION, progress=False).value == pytest.approx(best, rel=1e-4)


def test_an_error_before_the_first_checkpoint_leaves_no_folder(tmp_path):
    short, work = ShortHFModel(make("llama")), tmp_path / "work"
    with interrupted(Trainer, "training_step", 1):
        heal(short, TRAINING, VALIDATION, recipe=QUICK, work_dir=work)
    assert not work.exists()


def test_tokens_are_those_that_were_read():
    short = ShortHFModel(make("llama"))
    recipe = changed(batch_size=4, steps=3)  # 6 windows: steps of 4 and of 2
    assert heal(short, TRAINING, VALIDATION, recipe=recipe, progress=False).tokens == 10 * 16


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, saving = ShortHFModel(make("llama")), ShortHFModel(make("llama"))
    recipe = changed(dropout=0.0, steps=2)
    heal(plain, TRAINING, VALIDATION, recipe=recipe, progress=False)
    recipe = changed(dropout=0.0, steps=2, gradient_checkpointing=True)
    heal(saving, TRAINING, VALIDATION, recipe=recipe, progress=False)
    for ours, theirs in zip(weights_of(plain), weights_of(saving), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert not saving.model.model.gradient_checkpointing


def test_windows_of_different_lengths_and_gpt2s_transposed_maps():
    short = ShortHFModel(make("gpt2"))
    for module in short.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    windows = [w[: 5 + 2 * i] for i, w in enumerate(TRAINING)]
    healed = heal(
        short, windows, VALIDATION, recipe=changed(micro_batch=2, steps=2), progress=False
    )
    # the first step reads two windows by the weights so far; transformers divides the loss of
    # what is predicted by all tokens, by the version with or without those that are only read
    each = [
        window_perplexities(ShortHFModel(make("gpt2")).decoder, [w], progress=False)[0]
        for w in windows
    ]
    pairs = [combined(pair) for pair in combinations(each, 2)]
    expected = [p.nats / (p.tokens + more) for p in pairs for more in (0, 2)]
    assert any(healed.losses[1] == pytest.approx(loss, rel=1e-4) for loss in expected)


def test_without_an_alpha_changes_count_as_they_are():
    for alpha, scale in ((None, 1.0), (8, 2.0)):
        model, name = make("llama"), "model.layers.1.mlp.down_proj"
        before = model.get_submodule(name).weight.detach().clone()
        adapted = adapt(model, changed(rank=4, alpha=alpha))
        change = model.get_submodule(name)
        down, up = (m["default"].weight for m in (change.lora_A, change.lora_B))
        with torch.no_grad():
            up.normal_()
            expected = before + scale * up @ down
            merged = adapted.merge_and_unload().get_submodule(name).weight
            assert torch.allclose(merged, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ((TRAINING, VALIDATION, TRAINING[2:4]), {}, "2 of 6 training windows share text"),
        ((TRAINING, TRAINING[:1]), {}, "1 of 6 training windows share"),
        ((TRAINING, VALIDATION, VALIDATION), {}, "3 of 3 training windows share"),
        (([], VALIDATION), {}, "training windows = 0: expected some of at least 2 tokens"),
        ((TRAINING, VALIDATION), {"modules": ("nothing",)}, "no linear maps named nothing"),
    ],
)
def test_healing_refused(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        heal(ShortHFModel(make("llama")), *arguments, recipe=changed(**changes), progress=False)


def test_what_other_models_need():
    said = "heals a ShortHFModel, got ShortLlama: convert"
    refuses(said, heal, short_llama(), TRAINING, VALIDATION, recipe=QUICK, progress=False)


# texts


def test_texts_held_out_are_whole_and_the_rest_is_for_training():
    texts = [str(i) * (20 + i) for i in range(30)]
    training, held = hold_out(texts, share=0.2, seed=1)
    assert sorted(training + held) == sorted(texts) and not set(training) & set(held)
    assert 0.1 < sum(map(len, held)) / sum(map(len, texts)) < 0.3
    assert hold_out(texts, share=0.2, seed=1) == (training, held)
    assert [*map(len, hold_out(["a", "b"]))] == [1, 1]


def test_of_one_text_the_end_is_held_out():
    text = " ".join(f"word{i}" for i in range(200)) + "\nend"
    (first,), (last,) = hold_out([text], share=0.2)
    assert first + last == text and first.endswith(" ")
    assert 0.15 < len(last) / len(text) < 0.25
    for texts in ([], ["unbroken"], [Conversation('[{"role": "user", "content": "a b c d e"}]')]):
        refuses(f"{len(texts)} text cannot be split", hold_out, texts)


# on disk


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_byte_llama(tmp_path / "dense")


def opened(path: Path):
    return open_model(str(path), max_seq_len=64, device="cpu")


MEASURED = {
    "pruned": Perplexity(20 * math.log(3.5), 20, 2),
    "healed": Perplexity(20 * math.log(2.25), 20, 2),
}


def test_a_healed_hugging_face_model_is_an_ordinary_checkpoint(dense, tmp_path):
    meta_to_hf(dense, tmp_path / "hf")
    short = opened(tmp_path / "hf")
    short.remove_layers([3])
    assert heal(short, *FEW_WORDS, recipe=changed(steps=2), progress=False).kept_step
    out = short.save(tmp_path / "out", measured=MEASURED)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(loaded(TOKENS).logits, short.decoder.logits(TOKENS), atol=1e-5)
    assert not [p.name for p in out.iterdir() if "adapter" in p.name]
    card = (out / "README.md").read_text()
    assert "# hf without 1 of its 5 layers, healed" in card and "| healed | 2.250 |  | 20 |" in card
    assert "No weight" not in card and "changed by LoRA" in card

    further = opened(out)  # removing more: the map goes back to the first model
    patch(further, [1], TRAINING, progress=False)
    twice = further.save(tmp_path / "twice")
    record = json.loads((twice / "pruning.json").read_text())
    assert record["kept_layers"] == [0, 2, 3] and record["original_layers"] == [0, 2, 4]
    assert Provenance.read(twice / "pruning.json").original_layers == [0, 2, 4]
    card = (twice / "README.md").read_text()
    assert "# hf without 2 of its 5 layers" in card and "    [3, 1]\n" in card
    assert "were changed by LoRA (64 tokens), then patch (80 tokens)." in card


def test_several_shards_are_refused(tmp_path):
    model = make_transformer(vocab_size=BYTE_VOCAB)
    directory = save_byte_llama(tmp_path / "two", model, shards=2)
    short = ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))
    patch(short, [3], TRAINING, held=TRAINING, progress=False)
    with pytest.raises(ValueError, match=r"model-parallel ranks and files = \(1, 2\): expected"):
        short.save(tmp_path / "out", ckpt_dir=directory)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


# the command


@pytest.fixture
def books(dense, monkeypatch) -> Path:
    """Ten texts of random letters; the working directory holds them."""
    monkeypatch.chdir(dense.parent)
    folder = dense.parent / "books"
    folder.mkdir()
    for number in range(10):
        letters = random_windows(1, 400, vocab=26, seed=number)[0]
        (folder / f"{number}.txt").write_text("".join(chr(97 + i) for i in letters))
    return folder


SMALL = ("--data", "books", "--size", 32, "--eval_windows", 4)


def test_heal_by_refit_a_checkpoint_of_the_same_shapes(books, capsys):
    refit = ("--layers", "3,1", "--heal_by", "refit", "--ridge", 0.1, "--step_size", 0.25)
    run("heal", "dense", "out", *SMALL, *refit, "--json", "e.json")
    assert "healing changes the loss by" in capsys.readouterr().out
    record = json.loads(Path("out/pruning.json").read_text())
    (step,) = record["healing"]
    assert (step["method"], step["step_size"]) == ("refit", 0.25)
    assert {fit["ridge"] for fit in step["fits"]} <= {0.1, None} and step["held"] > 0
    cut = opened(Path("dense"))
    cut.remove_layers([3, 1])
    ours = opened(Path("out")).decoder.module.state_dict()
    differ = {k for k, v in cut.decoder.module.state_dict().items() if not torch.equal(v, ours[k])}
    assert differ and all(re.search(r"feed_forward\.w2|attention\.wo", name) for name in differ)


RECIPE = "paper,batch_size=2,rank=2,warmup=0,steps="


def test_a_disk_that_is_full_at_a_checkpoint_is_one_line(books, capsys, monkeypatch):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    recipe = ("--heal_by", "lora", "--recipe", f"{RECIPE}2,eval_every=1")
    train = ("heal", "dense", "out", *SMALL, *recipe, "--layers", "2")
    real, left = torch.save, [5]  # in the second checkpoint

    def full(*args: object, **options: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise error
        real(*args, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit):
        run(*train)
    assert "the disk is full, or cannot be written to (" in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in Path("out.training/lora").glob("checkpoint-*")] == ["checkpoint-1"]
    run(*train)
    assert Path("out/params.json").is_file() and not Path("out.training").exists()


def test_heal_by_a_chain_a_meta_model_and_back(books, capsys):
    recipe = f"{RECIPE}8,learning_rate=0.02,top_k=8,temperature=2,kl_share=0.5"
    chain = ("--heal_by", "patch,distill", "--recipe", recipe)
    run("heal", "dense", "out", *SMALL, "--layers", "3,1", *chain, "--json", "e.json")
    out = capsys.readouterr().out
    assert "patch changes the loss by" in out and "distill changes the loss by" in out
    evidence = json.loads(Path("e.json").read_text())["result"]
    states = ["original, 5 layers", "pruned, 3 layers", "patch", "healed"]
    assert list(evidence["perplexity"]) == states
    record = json.loads(Path("out/pruning.json").read_text())
    patched, distilled = record["healing"]
    assert patched["method"] == "patch" and distilled["method"] == "distillation"
    settings = {"top_k": 8, "temperature": 2.0, "kl_share": 0.5}
    assert settings.items() <= distilled["distillation"].items() and distilled["kept_step"]
    assert isinstance(opened(Path("out")), ShortLlama) and not Path("out.training").exists()


@pytest.mark.parametrize(
    ("method", "expected"),
    # one of 5 validates; a closed form alone reads as many as were asked for
    [("patch,lora", [2, 4]), ("patch", [4])],
)
def test_heal_by_a_chain_leaves_windows_for_the_training(books, monkeypatch, method, expected):
    monkeypatch.setattr("short_gpt.jobs.healing.CLOSED_WINDOWS", 2)
    options = ("--layers", 1, "--max_windows", 5, "--heal_by", method)
    recipe = ("--recipe", f"{RECIPE}2,learning_rate=0.005")
    trains = recipe if "lora" in method else ()
    run("heal", "dense", "out", *SMALL, *options, *trains)
    steps = json.loads(Path("out/pruning.json").read_text())["healing"]
    assert [step["windows"] for step in steps] == expected


@pytest.mark.parametrize(
    ("method", "tokens", "most", "read", "steps"),
    [
        ("lora", 1000, None, 1024, 16),  # 32 windows, once each
        # 9 windows three times, in 4 steps of two and one of one, and 3 steps of two
        ("distill", "1k", 10, 33 * 32, 18),
        ("patch,lora", "0.1k", None, 128, 2),
    ],
)
def test_a_training_reads_so_many_tokens_in_a_schedule_that_ends_there(
    books, method, tokens, most, read, steps
):
    windows = () if most is None else ("--max_windows", most)
    how = ("--heal_by", method, "--recipe", "paper,batch_size=2,rank=2,eval_every=5")
    run("heal", "dense", "out", *SMALL, *windows, "--layers", 1, *how, "--tokens", tokens)
    step = json.loads(Path("out/pruning.json").read_text())["healing"][-1]
    assert (step["tokens"], step["steps"]) == (read, steps)
    assert (step["recipe"]["steps"], step["recipe"]["eval_every"]) == (steps, 5)


def test_a_long_training_is_evaluated_40_times_unless_its_recipe_says_otherwise():
    config = make("llama").config
    for recipe, every in (("small", 40), ("small,eval_every=7", 7), (QUICK, QUICK.eval_every)):
        found = Healing(tokens="1.6M", recipe=recipe).trained(config, seed=3, steps=1563)
        assert (found.steps, found.eval_every) == (1563, every)
    assert Healing(tokens="1k", recipe="small").trained(config, seed=3, steps=5).eval_every == 20


@pytest.mark.parametrize("how", [("--stream",), ()], ids=["streamed", "in memory"])
def test_heal_a_pruned_model_by_what_the_whole_one_says(books, capsys, how):
    run("prune", "dense", "small", "--layers", "2")
    recipe = f"{RECIPE}2,learning_rate=0.02"
    distill = ("--heal_by", "distill", "--recipe", recipe)
    run("heal", "small", "out", *SMALL, *distill, "--teacher", "dense", *how)
    assert "before, 4 layers" in capsys.readouterr().out
    (step,) = json.loads(Path("out/pruning.json").read_text())["healing"]
    assert step["divergence"][str(step["kept_step"])] < step["divergence"]["0"]


def test_heal_refuses_before_it_works(books, capsys):
    base = ("heal", "dense", "out", *SMALL)
    assert "the refit reads the original model" in fails(capsys, *base)
    for method, flags, message in (
        ("refit", ("--recipe", "small"), "--recipe is for --heal_by lora or distill"),
        ("lora", ("--ridge", 1), "--ridge is for --heal_by refit or patch"),
        ("patch", ("--teacher", "dense"), "--teacher is for --heal_by distill"),
        ("patch,prayer", (), "'prayer': expected one of refit, patch, lora, distill, or several"),
        ("lora,patch", (), "patch is fitted on the original model, so nothing may heal"),
        ("lora", ("--recipe", "small,stepps=3"), "setting of a recipe = 'stepps': expected steps"),
        ("refit", ("--ridge", -1), "ridge = -1.0: expected a number above 0"),
        ("lora", ("--stream",), "--stream holds one layer at a time"),
        ("refit", ("--tokens", "400k"), "--tokens is for --heal_by lora or distill"),
        ("lora", ("--tokens", "many"), "--tokens = 'many': expected a number, such as 400k"),
        ("lora", ("--tokens", 0), "tokens = 0: expected a whole number of at least 1"),
        ("lora", ("--tokens", 9, "--recipe", "small,steps=3"), "expected a recipe without steps"),
    ):
        assert message in fails(capsys, *base, "--layers", "1", "--heal_by", method, *flags)
    line = fails(capsys, *base, "--heal_by", "distill")
    assert "or a --teacher that still has them" in line
    assert "it begins the model" in fails(capsys, *base, "--layers", "0", "--heal_by", "patch")
    Path("out").mkdir()
    assert "out exists" in fails(capsys, *base, "--layers", "1")


def test_a_healing_that_makes_it_worse_says_so(books, capsys):
    Path("odd.txt").write_text("zqzq qzzq " * 200)  # of which the evaluation has nothing
    arguments = ("--layers", "2", "--heal_by", "patch", "--data", "odd.txt", "--ridge", 1e-6)
    arguments += ("--eval_data", "books/3.txt")
    run("heal", "dense", "out", *SMALL, *arguments, "--json", "worse.json")
    assert (
        "WORSE: on held-out text the healed model is further from the original"
        in capsys.readouterr().out
    )
    result = json.loads(Path("worse.json").read_text())["result"]
    assert result["worse"] is True and result["kld_change"]["nats"] > 0
    assert result["perplexity"]["healed"] > result["perplexity"]["pruned, 4 layers"]


def test_worse_is_further_from_the_original_and_without_one_a_higher_loss():
    def change(nats: float) -> Difference:
        return Difference(nats, 0.01, 8)

    for loss, kld, worse in ((-1, 1, True), (1, -1, False), (1, None, True), (-1, None, False)):
        apart = None if kld is None else change(kld)
        assert HealingEvidence([], {}, change(loss), kld_change=apart).worse is worse


def test_a_training_goes_on_with_as_many_processes_alone(tmp_path, monkeypatch):
    model, learned = adapt(make("llama"), QUICK), TrainingRun([[1]], [[2]], QUICK)
    StateFile(tmp_path / "one", alone := learned.identity(model)).save({})
    monkeypatch.setattr(trainer.replicas, "current", lambda: Replicas(1, 2))
    two = learned.identity(model)
    assert {**alone, "number of processes": 2} == two != alone
    refuses("with another number of processes: 1, now 2; go on", StateFile, tmp_path / "one", two)


def test_the_training_reports_where_the_recipe_says(tmp_path, monkeypatch):
    """And nowhere else; where it reports to is no part of what a run continues."""
    model = adapt(make("llama"), QUICK)
    for asked, expected in (
        (None, []),
        ("wandb", ["wandb"]),
        ("wandb,trackio", ["wandb", "trackio"]),
    ):
        run = TrainingRun([[1]], [[2]], changed(report_to=asked))
        assert trainer._arguments(model, run, tmp_path).report_to == expected
    runs = [TrainingRun([[1]], [[2]], changed(report_to=to)) for to in (None, "wandb")]
    assert runs[0].identity(model) == runs[1].identity(model)
    assert runs[0].identity(model) != TrainingRun([[1]], [[2]], changed(steps=7)).identity(model)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    for name in ("wandb", "none", None):
        healing.check_installed(changed(report_to=name))
    with pytest.raises(ValueError, match="report_to = 'mlflow': expected an installed service of"):
        Healing("lora", recipe="report_to=wandb+mlflow").check(STEPS)
