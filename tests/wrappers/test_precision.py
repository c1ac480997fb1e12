"""Windows read with products in bfloat16: what that touches, what it does not, and who says so."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import TEXT, fails, run
from conftest import interrupted, random_windows, refuses, save_byte_llama
from families import FAMILIES, make
from transformers import CohereConfig, CohereForCausalLM

from benchmarks.studies.architectures import random_model
from llama.formats.hf import meta_to_hf
from short_gpt import Recipe, ShortHFModel, heal_lora, heal_refit
from short_gpt.checkpoints.verify import fingerprint
from short_gpt.evaluation.harness import llama_lm
from short_gpt.evaluation.perplexity import combined, perplexity
from short_gpt.healing import HealingJob, HealingWindows, trainer
from short_gpt.healing.choosing import ResultCache
from short_gpt.healing.distillation import Distillation
from short_gpt.jobs import rank
from short_gpt.models import decoder
from short_gpt.models.decoder import without_layers, writing_precision
from short_gpt.models.hf import HFDecoder, find_layers
from short_gpt.models.layer_calls import LayerCalls
from short_gpt.runtime.state import StateFile, read_record
from short_gpt.scoring.hooks import hooked
from short_gpt.scoring.metrics import block_influence
from short_gpt.scoring.run import ScoringRun
from short_gpt.wrappers import scored_model
from short_gpt.wrappers.opening import open_model, open_trainable
from short_gpt.wrappers.options import OpenOptions

WINDOWS = random_windows(3, 24)
CPU = OpenOptions(device="cpu", max_seq_len=32)
RANK = ("rank", "meta", "--data", "book.txt", "--size", 32, "--stride", 16, "--device", "cpu")
MIXED = ("--precision", "mixed")
CHOICES = ("mixed", "float32")
KINDS = [("meta", False), ("hf", False), ("meta", True), ("hf", True)]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    meta_to_hf(save_byte_llama(tmp_path / "meta"), "hf")
    Path("book.txt").write_text(TEXT)
    Path("other.txt").write_text("".join(chr(97 + i * i % 26) for i in range(400)))
    return tmp_path


def taught(folder, model, windows) -> Distillation:
    teacher = Distillation(folder, model, windows, Recipe(top_k=4))
    teacher.fill(progress=False)
    return teacher


def dtypes(layers, read) -> tuple[set, set]:
    """Of what the matrices inside layers give, and of the stream that enters and leaves them."""
    products, stream = set(), set()

    def product(module, args, output):
        if isinstance(output, torch.Tensor):
            products.add(output.dtype)

    def layer(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"], output
        stream.update((s[0] if isinstance(s, tuple) else s).dtype for s in states)

    linear = [m for m in layers.modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    linear = [m for m in linear if "mbedding" not in type(m).__name__]
    handles = [m.register_forward_hook(product) for m in linear]
    handles += [one.register_forward_hook(layer, with_kwargs=True) for one in layers]
    read()
    for handle in handles:
        handle.remove()
    return products, stream


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "falcon", "mixtral"])
def test_products_are_in_bfloat16_and_the_stream_in_float32(family):
    decoder, tokens = HFDecoder(make(family)), torch.tensor(random_windows(2, 10))
    exact = decoder.logits(tokens)
    assert dtypes(decoder.layers, lambda: decoder.run(tokens))[0] == {torch.float32}
    decoder.mixed = True
    for read in (decoder.run, decoder.logits):
        found = dtypes(decoder.layers, lambda read=read: read(tokens))
        assert found == ({torch.bfloat16}, {torch.float32})
    logits = decoder.logits(tokens)
    assert logits.dtype == torch.float32 and not torch.equal(logits, exact)
    # every product keeps 8 bits, and each logit is a sum of many
    assert (logits - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("family", [*FAMILIES, "ernie4_5_moe"])
def test_matrices_rounded_for_writing_give_the_logits_of_mixed_products_bit_for_bit(family):
    """Ernie runs its router with autocast off."""
    model = make(family) if family in FAMILIES else random_model(family)
    decoder, tokens = HFDecoder(model), torch.tensor(random_windows(2, 10))
    decoder.mixed, weights = True, dict(decoder.model.named_parameters())
    logits = decoder.logits(tokens)
    with writing_precision(decoder):
        few = {id(own) for own in weights.values()} - {*map(id, decoder.model.parameters())}
        assert sum(id(own) in few for own in weights.values() if own.ndim == 2) >= len(few) > 4
        decoder.mixed = False  # writing calls the model itself
        assert torch.equal(decoder.logits(tokens), logits)
    assert all(own is weights[name] for name, own in decoder.model.named_parameters())


@pytest.mark.parametrize(("name", "stream"), KINDS)
def test_every_kind_of_model_scores_and_evaluates_in_mixed(name, stream, here):
    short = open_model(name, CPU, stream=stream, precision="mixed")
    plain = open_model(name, CPU, stream=stream)
    found = (
        dtypes(short.decoder.layers, lambda: short.score_batch(WINDOWS)),
        short.score_batch(WINDOWS),
    )
    assert found[0][0] == {torch.bfloat16} and found[0][1] <= {torch.float32}
    exact = plain.score_batch(WINDOWS).influence
    assert found[1].influence.dtype == torch.float32
    assert not torch.equal(found[1].influence, exact)
    assert torch.allclose(found[1].influence, exact, rtol=3e-2)
    ours, theirs = (s.perplexity(WINDOWS, progress=False) for s in (short, plain))
    assert ours.precision == "mixed" and theirs.precision == "float32"
    assert ours.value == pytest.approx(theirs.value, rel=0.05) and ours.value != theirs.value
    logits = [*short.window_logits(WINDOWS)]
    assert not torch.equal(logits[0], next(iter(plain.window_logits(WINDOWS))))
    targets = taught("teacher", short, WINDOWS).targets([0], WINDOWS[:1])  # what it predicts
    expected = logits[0][:-1].log_softmax(-1).topk(4).values
    assert torch.allclose(targets[0].logs, expected, atol=5e-3)  # float16 on disk
    assert "precision" not in plain.identity() and short.identity()["precision"] == "mixed"
    calls = short.layer_calls()  # as the refit calls them
    with calls.loaded(0) as layer:
        state = calls.embed(torch.tensor(WINDOWS[:1]))  # (1, S, D)
        found = dtypes(torch.nn.ModuleList([layer]), lambda: calls.run(0, state))
        assert found == ({torch.bfloat16}, {torch.float32})
    calls.close()


def test_the_arithmetic_of_the_hooks_is_that_of_float64_on_the_same_states(here):
    short = open_model("meta", CPU, precision="mixed")
    tokens, pairs = torch.tensor(WINDOWS), []
    for layer in short.decoder.layers:
        layer.register_forward_hook(lambda _, args, out: pairs.append((args[0], out)))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with hooked(short.decoder.layers, mask) as hooks:
        short.decoder.run(tokens)
    scores = hooks.scores()
    exact = torch.stack([block_influence(x.double(), y.double()).sum(1) for x, y in pairs], dim=1)
    assert torch.allclose(scores.influence.double(), exact, rtol=1e-5)


def test_searches_by_loss_try_in_mixed(here):
    short = open_model("meta", CPU, precision="mixed")
    found = short.search(WINDOWS, 1, progress=False)
    for layer, loss in found.losses[0].items():
        with without_layers(short.decoder, [layer]):
            trial = perplexity(short.decoder, [[w] for w in WINDOWS])
        assert loss == pytest.approx(trial.nats / trial.tokens, abs=1e-6)
    short.decoder.mixed = False
    assert short.search(WINDOWS, 1, progress=False).losses != found.losses


def test_a_refit_reads_in_mixed_and_solves_in_float32(here, monkeypatch):
    short, plain = (open_model("meta", CPU, precision=p) for p in CHOICES)
    fit_on = random_windows(32, 24, seed=3)
    run_layer, seen = LayerCalls.run, []

    def layer(calls, index, state):
        leaving = run_layer(calls, index, state)
        seen.append((state.dtype, leaving.dtype))
        return leaving

    monkeypatch.setattr(LayerCalls, "run", layer)
    ours, theirs = (heal_refit(s, [1, 3], fit_on, progress=False) for s in (short, plain))
    assert {*seen} == {(torch.float32, torch.float32)}
    assert [fit.part for fit in ours.fits] == [fit.part for fit in theirs.fits]
    pairs = zip(ours.fits, theirs.fits, strict=True)
    both = [pair for pair in pairs if pair[0].changed and pair[1].changed]
    assert len(both) > len(ours.fits) // 2  # held-out windows may tell otherwise of a near tie
    for ours_fit, theirs_fit in both:
        assert ours_fit.restored == pytest.approx(theirs_fit.restored, abs=0.02)
    assert {value.dtype for value in ours.values.values()} == {torch.float32}


def test_generation_tasks_and_proofs_are_those_of_float32_bit_for_bit(here):
    for name in ("meta", "hf"):
        short, plain = (open_model(name, CPU, precision=p) for p in CHOICES)
        ours, theirs = fingerprint(short), fingerprint(plain)
        assert torch.equal(ours.logits, theirs.logits) and short.decoder.mixed
        assert (ours.tokens, ours.consistent) == (theirs.tokens, True)
        assert short.generate(["a b"], 8, 0.0) == plain.generate(["a b"], 8, 0.0)
        written = dtypes(short.decoder.layers, lambda s=short: s.greedy([1, 2], 2, use_cache=False))
        assert written[0] == {torch.float32}
    short, plain = (open_model("meta", CPU, precision=p) for p in CHOICES)
    requests = [(None, [1, 2, 3], [4, 5])]
    nats = [llama_lm(s)._loglikelihood_tokens(requests, True) for s in (short, plain)]
    assert nats[0] == nats[1] and short.decoder.mixed
    short = open_model("hf", CPU, precision="mixed")
    short.remove_layers([1])
    short.save_pretrained("out")  # which compares what is read again, bit for bit
    assert json.loads(Path("out/pruning.json").read_text())["precision"] == "mixed"


@pytest.mark.parametrize("distilled", [False, True])
def test_training_multiplies_in_bfloat16_and_learns_in_float32(distilled, here, monkeypatch):
    """As in float32 within what bfloat16 rounds: losses, and the direction of every change."""
    monkeypatch.setenv(trainer.PRECISION, "bf16")  # as an earlier training may have left it
    recipe = Recipe(rank=2, steps=4, warmup=1, batch_size=2, eval_every=4, learning_rate=1e-2)
    before, seen, real = {}, [], trainer.TrainingRun.measure
    changes, losses = {}, {}

    def measure(run, adapted):
        base = adapted.get_base_model()
        layers = base.get_submodule(find_layers(base))
        found = dtypes(layers, lambda: seen.append(real(run, adapted)))
        assert found[0] == {torch.bfloat16 if run.mixed else torch.float32}
        return seen[-1]

    monkeypatch.setattr(trainer.TrainingRun, "measure", measure)
    for name in ("mixed", "float32"):
        short = open_trainable("hf", replace(CPU, precision=name))
        parts = [random_windows(6, 16, seed=seed, vocab=8) for seed in (4, 5, 6)]
        teacher = taught(f"teacher-{name}", open_trainable("hf", CPU), [*parts[0], *parts[1]])
        short.remove_layers([1])
        before = {n: p.detach().clone() for n, p in short.model.named_parameters()}
        learned = teacher if distilled else None
        healed = heal_lora(short, *parts, recipe=recipe, distillation=learned, progress=False)
        after = dict(short.model.named_parameters())
        assert healed.kept_step and {p.dtype for p in after.values()} == {torch.float32}
        changes[name] = torch.cat([(after[n] - p).flatten() for n, p in before.items()])
        losses[name] = list(healed.losses.values())
    assert losses["mixed"] != losses["float32"] and os.environ[trainer.PRECISION] == "bf16"
    assert losses["mixed"] == pytest.approx(losses["float32"], rel=0.02)
    assert torch.cosine_similarity(*changes.values(), dim=0) > 0.95
    assert not torch.equal(*changes.values())


def test_the_norm_of_each_head_is_no_matrix_that_is_rounded():
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "use_qk_norm": True}
    torch.manual_seed(0)
    short = HFDecoder(CohereForCausalLM(CohereConfig(**options, **sizes)).eval())
    norm = short.layers[0].self_attn.q_norm.weight
    torch.nn.init.normal_(norm)
    short.mixed, tokens = True, torch.tensor(random_windows(2, 10, vocab=64))
    logits = short.logits(tokens)
    with writing_precision(short):
        assert norm.ndim == 2 and torch.equal(short.logits(tokens), logits)


def test_a_linear_router_that_multiplies_with_autocast_off_keeps_its_weights():
    class Routed(torch.nn.Module):
        def __init__(self, mlp, width):
            super().__init__()
            self.mlp, self.gate = mlp, torch.nn.Linear(width, 1)

        def forward(self, states):  # (B, S, D)
            with torch.autocast("cpu", enabled=False):
                share = self.gate(states.float()).sigmoid()
            return share * self.mlp(states)

    short = HFDecoder(make("llama"))
    layer = short.layers[1]
    layer.mlp = Routed(layer.mlp, layer.mlp.gate_proj.in_features)
    short.mixed, tokens = True, torch.tensor(random_windows(2, 10))
    logits = short.logits(tokens)
    with writing_precision(short):
        assert layer.mlp.mlp.gate_proj.weight.dtype == torch.bfloat16
        assert torch.equal(short.logits(tokens), logits)


def test_frozen_matrices_that_are_rounded_once_train_to_the_same_weights(here, monkeypatch):
    recipe = Recipe(rank=2, steps=3, warmup=1, batch_size=2, eval_every=1, learning_rate=1e-2)
    parts = [random_windows(4, 16, seed=seed) for seed in (4, 5, 6)]
    weights, seen = [], []
    for free in (2**40, 0):
        short = open_trainable("hf", replace(CPU, precision="mixed"))
        monkeypatch.setattr(decoder, "free_memory", lambda free=free: free)
        up = short.decoder.layers[0].mlp.up_proj
        up.register_forward_hook(lambda own, *_: seen.append((own.weight.dtype, own.training)))
        assert heal_lora(short, *parts, recipe=recipe, progress=False).kept_step
        weights.append(short.model.state_dict())
        assert ((torch.bfloat16, True) in seen and (torch.float32, True) not in seen) or not free
        seen.clear()
    assert all(torch.equal(own, weights[1][name]) for name, own in weights[0].items())


def test_training_goes_on_in_the_precision_that_it_began_with(here):
    recipe = Recipe(rank=2, steps=2, warmup=1, batch_size=2, eval_every=1)
    parts = [random_windows(4, 16, seed=seed) for seed in (4, 5, 6)]
    how = {"recipe": recipe, "work_dir": "work", "progress": False}
    heal_lora(open_trainable("hf", replace(CPU, precision="mixed")), *parts, **how)
    refuses("precision", heal_lora, open_trainable("hf", CPU), *parts, **how)


def test_a_model_that_is_not_in_float32_stays_as_it_is(here):
    short, plain = (open_model("meta", CPU, dtype="bfloat16", precision=p) for p in CHOICES)
    assert short.precision == "float32" and "precision" not in short.identity()
    assert torch.equal(short.score_batch(WINDOWS).influence, plain.score_batch(WINDOWS).influence)


def test_what_cannot_be_is_refused_in_one_line(here, capsys):
    line = fails(capsys, *RANK, "--precision", "half")
    assert line == "short-gpt: --precision = 'half': expected one of float32, mixed, auto"
    refuses("precision = 'half': expected one of", open_model, "meta", precision="half")
    for command in (("generate", "meta", "a"), ("prune", "meta", "out", "--layers", 1)):
        assert "has no flag" in fails(capsys, *command, *MIXED)


def test_a_run_goes_on_in_the_precision_that_it_began_with(here):
    how = {"size": 32, "stride": 16, "device": "cpu"}
    scores = {}
    for first, other in (("mixed", "float32"), ("float32", "mixed")):
        with interrupted(ScoringRun, "_after", 3):
            rank("meta", "book.txt", precision=first, state="state", **how)
        assert read_record("state")["run"].get("precision", "float32") == first
        line = f"the state of a run with another precision: '{first}', now '{other}'"
        refuses(line, rank, "meta", "book.txt", precision=other, state="state", **how)
        again = rank("meta", "book.txt", precision=first, state="state", **how)
        at_once = rank("meta", "book.txt", precision=first, **how)
        scores[first] = at_once.importance.to_dict()
        assert again.importance.to_dict() == scores[first]
        again.finish()
    assert scores["mixed"] != scores["float32"]


@pytest.mark.parametrize(
    "seconds, device, faster",
    [(0.66, "cpu", True), (0.67, "cpu", False), (6.8, "cpu", False), (0.1, "cuda", False)],
)
def test_bfloat16_is_faster_where_it_saves_a_third(monkeypatch, seconds, device, faster):
    timed = []

    def repeat(product, **_: int) -> list[float]:
        timed.append(product().dtype == torch.bfloat16)
        return [seconds if timed[-1] else 1.0, 9.0]  # another program slows some turns down

    monkeypatch.setattr(decoder.timeit, "repeat", repeat)
    assert decoder.multiplies_faster.__wrapped__(torch.device(device)) == faster
    assert {*timed} == ({False, True} if device == "cpu" else set())


@pytest.mark.parametrize("name", ["meta", "hf"])
def test_auto_takes_what_is_faster_here(name, here, monkeypatch):
    for faster, precision in ((True, "mixed"), (False, "float32")):
        monkeypatch.setattr(scored_model, "multiplies_faster", lambda _, faster=faster: faster)
        assert open_model(name, CPU, precision="auto").precision == precision
        short = open_model(name, CPU, precision="auto", dtype="bfloat16")
        assert short.precision == "float32"


def test_auto_goes_on_in_the_precision_that_a_run_began_with(here, monkeypatch):
    how = {"size": 32, "stride": 16, "device": "cpu", "precision": "auto", "state": "state"}
    for faster, precision in ((True, "mixed"), (False, "float32")):
        monkeypatch.setattr(scored_model, "multiplies_faster", lambda _, faster=faster: faster)
        with interrupted(ScoringRun, "_after", 3):
            rank("meta", "book.txt", **how)
        monkeypatch.setattr(scored_model, "multiplies_faster", lambda _, faster=faster: not faster)
        result = rank("meta", "book.txt", **how)
        assert result.to_dict().get("precision", "float32") == precision
        result.finish()
    Path("state").write_text("{")  # is refused as any damaged state
    refuses("is not the state of a run, or is damaged", rank, "meta", "book.txt", **how)


def test_a_healing_reports_in_float32_what_it_did_in_mixed(here):
    windows = HealingWindows(random_windows(8, 24, seed=3), [], WINDOWS)
    short, plain = (open_model("meta", CPU, precision=p) for p in CHOICES)
    reports = [HealingJob(s, windows, [2], progress=False).run() for s in (short, plain)]
    for state in ("original, 5 layers", "pruned, 4 layers"):
        ours, theirs = (report.perplexity[state] for report in reports)
        assert ours == theirs and (ours.kld, ours.precision) == (theirs.kld, "float32")
    ours, theirs = (report.perplexity["healed"] for report in reports)
    assert ours.nats == pytest.approx(theirs.nats, rel=0.01) and ours.nats != theirs.nats
    assert ours.precision == "float32" and short.decoder.mixed


def test_losses_of_windows_say_in_which_precision_they_were_read(here, tmp_path):
    cells = ResultCache(StateFile(tmp_path / "state", {}, every=0.0))
    for precision in CHOICES:
        short = open_model("meta", CPU, precision=precision)
        cells.perplexities(
            precision, lambda short=short: short.window_perplexities(WINDOWS, progress=False)
        )
    again = ResultCache(StateFile(tmp_path / "state", {}))
    said = [combined(again.perplexities(name, list)).to_dict().get("precision") for name in CHOICES]
    assert said == ["mixed", None]


def test_results_say_that_they_are_mixed(here, capsys):
    def result(*argv, name="mixed.json"):
        run(*argv, "--device", "cpu", "--json", name, "--overwrite")
        return read_record(name)

    rank = ("rank", "meta", "--data", "book.txt", "--size", 32, "--n", 1)
    assert "precision" not in result(*rank)
    assert result(*rank, *MIXED)["precision"] == "mixed"
    assert "precision mixed\n" in capsys.readouterr().out
    assert result(*rank, "--method", "sleb", *MIXED, name="s.json")["precision"] == "mixed"
    compared = ("compare", "meta", "--data", "book.txt", "--eval_data", "other.txt", "--size", 32)
    compared += ("--method", "bi", "--n", 1, "--heal_by", "raw")
    assert result(*compared, *MIXED)["precision"] == "mixed"
    assert "precision" not in result(*compared)
    result(*rank, *MIXED)  # a choice by scores names their precision
    run("prune", "meta", "out", "--scores", "mixed.json", "--n", 1)
    assert json.loads(Path("out/pruning.json").read_text())["scored_by"]["precision"] == "mixed"
    heal = ("heal", "hf", "healed", "--layers", 2, "--data", "book.txt", "--eval_data", "other.txt")
    heal += ("--size", 32, "--eval_windows", 2, "--max_windows", 8, *MIXED)
    assert result(*heal)["result"]["precision"] == "mixed"
    assert json.loads(Path("healed/pruning.json").read_text())["precision"] == "mixed"
    pair = result("evaluate", "meta", "out", "--data", "other.txt", "--size", 32, *MIXED)["result"]
    assert "other.txt perplexity, precision mixed" in pair["out"]
    assert isinstance(open_model("hf", CPU, precision="mixed"), ShortHFModel)
