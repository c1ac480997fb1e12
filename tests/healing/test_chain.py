"""Steps of healing one after the other: what they give, and what is left when one fails."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import interrupted, random_windows, refuses, short_llama, weights_of
from families import make
from processes import killed_at
from transformers import Trainer

from short_gpt.healing import (
    Distillation,
    HealingJob,
    HealingWindows,
    PatchSettings,
    Recipe,
    heal_lora,
    heal_patch,
    heal_refit,
    lora,
)
from short_gpt.healing.job import clear
from short_gpt.wrappers.short_hf import ShortHFModel

WINDOWS = HealingWindows(
    random_windows(6, 16, vocab=8, seed=1),
    random_windows(2, 16, vocab=8, seed=5),
    random_windows(3, 16, vocab=8, seed=7),
)
TOKENS = torch.tensor(random_windows(2, 16, seed=9))
QUICK = Recipe(rank=4, steps=3, warmup=0, batch_size=2, eval_every=1, learning_rate=1e-2)
# a weak patch, which leaves something to learn
PATCH, DISTILL = {"patch": PatchSettings(ridge=30.0)}, {"distill": replace(QUICK, top_k=8)}
REFIT, LORA = {"refit": None}, {"lora": QUICK}
LAYERS = [4, 2]


def whole() -> ShortHFModel:
    return ShortHFModel(make("llama"))


def job(short, steps, *, layers=LAYERS, **options) -> HealingJob:
    return HealingJob(short, WINDOWS, layers, steps=steps, progress=False, **options)


def test_a_chain_does_what_its_steps_do_and_is_recorded_as_one(tmp_path):
    short, by_hand = whole(), whole()
    chain = job(short, PATCH | DISTILL, work_dir=tmp_path / "work")
    refuses("call run first", chain.save, tmp_path / "out", error=RuntimeError)
    evidence = chain.run()
    windows = [*WINDOWS.training, *WINDOWS.validation]
    recipe = Recipe(top_k=8)
    teacher = Distillation(tmp_path / "teacher", by_hand, windows, recipe)  # of the whole model
    teacher.fill(progress=False)
    options = {"held": WINDOWS.validation, "progress": False}
    heal_patch(by_hand, LAYERS, WINDOWS.training, ridge=30.0, **options)
    patched = by_hand.perplexity(WINDOWS.evaluation, progress=False)
    options = {"recipe": QUICK, "distillation": teacher, "progress": False}
    heal_lora(by_hand, WINDOWS.training, WINDOWS.validation, **options)
    assert torch.equal(short.decoder.logits(TOKENS), by_hand.decoder.logits(TOKENS))
    assert short.removed == LAYERS and [c.how for c in short.changes] == list(evidence.steps)
    states = ["original, 6 layers", "pruned, 4 layers", "patch", "healed"]
    assert list(evidence.perplexity) == states
    assert evidence.perplexity["patch"].value == pytest.approx(patched.value)
    assert list(evidence.changes) == ["patch", "distill"]
    parts = sum(change.nats for change in evidence.changes.values())
    assert evidence.change.nats == pytest.approx(parts)
    pruned, healed = (each.kld.value for each in [*evidence.perplexity.values()][1::2])
    assert evidence.kld_change.nats == pytest.approx(healed - pruned)
    (tmp_path / "work" / "notes.txt").write_text("of the user")
    healed = by_hand.perplexity(WINDOWS.evaluation, progress=False)
    assert evidence.perplexity["healed"].value == pytest.approx(healed.value)
    out = chain.save(tmp_path / "out", facts={"data": "eight words"})
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]
    record = json.loads((out / "pruning.json").read_text())
    assert [step["method"] for step in record["healing"]] == ["patch", "distillation"]
    assert record["healing"] == json.loads(json.dumps(evidence.to_dict()["healing"]))
    told = {name: evidence.to_dict()[name] for name in ("perplexity", "change")}
    assert record == record | told | {"data": "eight words"}
    card, (low, high) = (out / "README.md").read_text(), healed.interval()
    assert "changed by patch (96 tokens), then distillation (96 tokens)" in card
    assert f"| healed | {healed.value:.3f} | {low:.3f} to {high:.3f} | 45 |" in card


def test_a_refit_is_judged_by_the_windows_that_validate():
    short, by_hand = whole(), whole()
    evidence = job(short, REFIT | LORA).run()
    heal_refit(by_hand, LAYERS, WINDOWS.training, held=WINDOWS.validation, progress=False)
    refitted = by_hand.perplexity(WINDOWS.evaluation, progress=False)
    assert evidence.perplexity["refit"].value == pytest.approx(refitted.value)
    assert [step["method"] for step in evidence.steps] == ["refit", "LoRA"]
    assert evidence.steps[0]["held"] == len(WINDOWS.validation)


@pytest.mark.parametrize(
    ("most", "steps", "expected"),
    [
        (2, 2, [2, 3, 4, 5]),  # the rest suffices
        (4, 2, [4, 5, 0, 1]),  # and then those of the closed form
        (None, 2, [0, 1, 2, 3]),  # which read them all
        (2, 9, [2, 3, 4, 5, 0, 1]),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "distill"])
def test_training_begins_with_windows_that_the_closed_form_did_not_read(
    kind, most, steps, expected, monkeypatch
):
    run, read = lora.heal_run, []

    def seen(short, training, evaluation):
        read.append([WINDOWS.training.index(window) for window in training.training])
        return run(short, training, evaluation)

    monkeypatch.setattr(lora, "heal_run", seen)
    recipe = replace(QUICK, steps=steps)
    evidence = job(whole(), {"patch": None, kind: recipe}, max_windows=most).run()
    assert read == [expected]
    closed, trained = evidence.steps
    assert closed["windows"] == (most or 6) and trained["windows"] == len(expected)


def stopped(steps, folder, *, at: int) -> None:
    """A healing that is interrupted in this micro-step of training; all must be as it was."""
    short = whole()
    before, measured = weights_of(short), short.perplexity(WINDOWS.evaluation, progress=False)
    with interrupted(Trainer, "training_step", at - 1):
        job(short, steps, work_dir=folder).run()
    assert short.kept == [*range(6)] and not short.removed and not short.changes
    assert all(map(torch.equal, weights_of(short), before))
    assert short.quality[0, 1, 2, 3, 4, 5] == measured  # of the original model, and still true


@pytest.mark.parametrize("closed", [PATCH, REFIT])
def test_an_interrupted_chain_goes_on_bit_for_bit_and_does_nothing_twice(
    closed, tmp_path, monkeypatch
):
    one, steps = whole(), closed | LORA | DISTILL
    first = job(one, steps).run()
    # each training has 3 steps of 2: the last of lora, then the second of distill
    stopped(steps, tmp_path / "work", at=5)
    monkeypatch.setattr(
        ShortHFModel, "window_logits", lambda *_, **__: pytest.fail("the teacher asked again")
    )
    resumed = whole()
    second = job(resumed, steps, work_dir=tmp_path / "work").run()
    assert all(map(torch.equal, weights_of(one), weights_of(resumed)))
    assert second == replace(first, steps=second.steps)
    for ours, theirs in zip(second.steps, first.steps, strict=True):
        assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
    assert resumed.changed == one.changed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_what_a_kill_leaves_of_a_finished_run_stands_in_no_ones_way(tmp_path):
    steps, done, work = PATCH | DISTILL, tmp_path / "done", tmp_path / "work"
    expected = job(whole(), steps, work_dir=done).run().perplexity["healed"]

    for name in ("mine", "distill/mine"):  # of the user's
        shutil.copytree(done, work)
        (work / name).write_text("mine")
        clear(work)
        assert [p for p in work.rglob("*") if p.is_file()] == [work / name]
        shutil.rmtree(work)
    shutil.copytree(done, work)
    calls = killed_at(0, lambda: clear(work))
    assert calls > 20 and not work.exists()
    for call in range(1, calls, calls // 3):
        shutil.copytree(done, work)
        assert killed_at(call, lambda: clear(work)) is None
        again = job(whole(), steps, work_dir=work)
        assert again.run().perplexity["healed"] == expected
        shutil.rmtree(work)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (LORA | PATCH, "lora,patch: patch is fitted on the original model, so"),
        ({"lorra": QUICK}, "ways to heal = lorra: expected different ones of refit, patch"),
        ({}, "ways to heal = none"),
    ],
)
def test_steps_that_cannot_follow_each_other_are_refused(steps, message):
    refuses(message, job, whole(), steps)


@pytest.mark.parametrize(
    ("steps", "layers", "teacher", "message"),
    [
        (DISTILL, [], None, "distillation learns from the model with all its layers: name the"),
        (PATCH, [], None, "patch reads the original model: name the layers to remove"),
        (DISTILL, [], lambda: short_llama(vocab_size=40), "the teacher knows 40 tokens, the model"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(steps, layers, teacher, message):
    refuses(message, job(whole(), steps, layers=layers, teacher=teacher).run)


def test_a_model_cut_before_learns_from_the_one_that_it_was_cut_from():
    short = whole()
    short.remove_layers(LAYERS)
    steps = {"distill": replace(QUICK, top_k=8, temperature=2.0)}
    evidence = job(short, steps, layers=[], teacher=whole).run()
    assert list(evidence.perplexity) == ["before, 4 layers", "healed"]
    how = evidence.how
    assert how["kept_step"] and how["divergence"][how["kept_step"]] < how["divergence"][0]
