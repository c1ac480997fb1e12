"""Healing that several processes share: 2 and 4 of them give what one gives."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import children
import pytest
import torch
from commands import TEXT, run
from conftest import CharTokenizer, make_transformer, random_windows
from families import make
from processes import ranks

from llama import Llama
from short_gpt import ShortLlama, open_model, own_samples
from short_gpt.cli.app import main
from short_gpt.healing import HealingJob, HealingWindows, Recipe
from short_gpt.healing.refit import fit
from short_gpt.wrappers.short_hf import ShortHFModel

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo")
HEAL = ["--layers", "2,3", "--data", "book.txt,self", "--eval_data", "other.txt", "--size", "16"]
HEAL += ["--max_windows", "8", "--eval_windows", "3", "--device", "cpu"]
WINDOWS = [w[: 16 - i % 2] for i, w in enumerate(random_windows(9, 16))]
CASES: dict[str, tuple[str, dict]] = {
    "refit": ("llama", {}),
    "ridges": ("llama", {"ridge": (0.3, 3.0)}),
    "norms": ("gemma2", {"ridge": 0.1}),
    "patch": ("llama", {"where": "gaps", "ridge": 30.0}),
}
QUICK = Recipe(4, steps=4, warmup=0, batch_size=4, eval_every=2, learning_rate=1e-2, dropout=0.0)
TRAINED = {"lora": QUICK, "distill": replace(QUICK, micro_batch=2, top_k=8, kl_share=0.5)}
LEARNING = HealingWindows(
    random_windows(8, 16, vocab=8, seed=1),
    random_windows(2, 16, vocab=8, seed=5),
    random_windows(3, 16, vocab=8, seed=7),
)
WORLDS = {2: [*CASES], 4: ["refit", "ridges"]}


def job(name: str) -> tuple:
    return make("llama"), LEARNING, {"steps": {name: TRAINED[name]}, "progress": False}


def llama() -> Llama:
    return Llama(make_transformer(), CharTokenizer())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[tuple[int, int], dict]:
    """What every rank saved, by the number of processes and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    results = {}
    for world, names in WORLDS.items():
        cases = {name: (make(CASES[name][0]), CASES[name][1]) for name in names}
        given = {"cases": cases, "windows": WINDOWS, "llama": llama(), "trained": {}}
        if world == 2:
            given["trained"] = {name: job(name) for name in TRAINED}
        torch.save(given, folder / "given.pt")
        done = ranks(world, folder / f"world{world}", children.shared_healing, folder).end()
        assert not any(done.codes), done.err
        for rank in range(world):
            path = folder / f"world{world}-rank{rank}.pt"
            results[world, rank] = torch.load(path, weights_only=False) | {"folder": folder}
    return results


@pytest.mark.parametrize("name", CASES)
def test_processes_that_share_the_windows_solve_the_matrices_of_one(found, name):
    family, changes = CASES[name]
    one = fit(ShortHFModel(make(family)), [2, 3], WINDOWS, **changes, progress=False)
    assert any(fit.changed for fit in one.fits)
    for world in [world for world, names in WORLDS.items() if name in names]:
        values, fits = found[world, 0][name]
        assert values.keys() == one.values.keys()
        for ours, theirs in zip(fits, one.fits, strict=True):
            assert (ours.ridge, ours.norm_ridge) == (theirs.ridge, theirs.norm_ridge)
            assert ours.restored == pytest.approx(theirs.restored, abs=1e-5)
            assert ours.restored_held == pytest.approx(theirs.restored_held, abs=1e-5)
        for key, expected in one.values.items():
            assert (values[key] - expected).abs().max() <= 1e-6 * expected.abs().max(), key
        for rank in range(1, world):
            others = found[world, rank][name]
            assert others[1] == fits
            assert all(torch.equal(others[0][key], value) for key, value in values.items())


def test_windows_for_fewer_processes_than_there_are_are_refused(found):
    assert "windows to fit on = 1: expected 4 or more" in found[4, 3]["few"]


def test_processes_without_groups_of_a_model_are_refused(found):
    for (world, _), saved in found.items():
        expected = f"a refit needs the whole model on every rank, got {world} model-parallel"
        assert saved["ungrouped"].startswith(expected)


@pytest.mark.parametrize("size", [2, None])
def test_processes_share_the_texts_that_a_model_writes(found, size, monkeypatch):
    short = ShortLlama(llama())
    one = own_samples(short, 7, 12, batch_size=size, progress=False)
    written, plain = [], short.continued
    monkeypatch.setattr(short, "continued", lambda *args: (written.append(args), plain(*args)))
    for (world, _), saved in found.items():
        assert saved["own", size] == one
        assert [window.text for window in saved["own", size]] == [*range(7)]
        kept = saved["folder"] / f"own{world}-{size}" / "out"
        assert len([*kept.parent.iterdir()]) == 1
        assert own_samples(short, 7, 12, beside=kept, progress=False) == one
    assert not written


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_as_one_with_the_whole_batch(found, name, tmp_path):
    model, windows, options = job(name)
    short = ShortHFModel(model)
    evidence = HealingJob(short, windows, [4, 2], work_dir=tmp_path / "work", **options).run()
    how = evidence.how
    assert how["kept_step"] and len(how["losses"]) == QUICK.steps
    ours, theirs = (found[2, rank][name] for rank in range(2))
    shared = ours["evidence"]["healing"][0]
    for name in {"losses", "validation", "divergence"} & how.keys():
        assert shared[name] == pytest.approx(how[name], rel=1e-5), name
    assert shared["kept_step"] == how["kept_step"]
    assert ours["evidence"] == theirs["evidence"]
    one = [*short.decoder.module.parameters()]
    for first, second, alone in zip(ours["weights"], theirs["weights"], one, strict=True):
        assert torch.equal(first, second)
        assert (first - alone).abs().max() <= 1e-4 * alone.abs().max()


def weights(folder: str) -> list[torch.Tensor]:
    return [*open_model(folder, device="cpu", max_seq_len=16).decoder.module.parameters()]


def test_a_command_of_two_processes_ends_together_and_starts_again(ckpt):
    here = ckpt.parent
    (here / "other.txt").write_text(TEXT[::-1])
    line = ["heal", "ckpt", "out", *HEAL]
    done = ranks(2, here / "first", children.heals_and_fails, ["whole", *HEAL], line).end()
    assert any(done.codes)
    said = {line for line in done.err.splitlines() if line.startswith("short-gpt:")}
    # the launcher ends the other rank, which may say so
    assert said - {"short-gpt: interrupted"} == {"short-gpt: rank 1 alone"}, done.err
    assert not any(here.glob("out*"))
    done = ranks(2, here / "again", main, [*line, "--json", "out.json"]).end()
    assert not any(done.codes), done.err
    assert done.out.count("written: out\n") == 1, done.out
    for ours, whole in zip(weights("out"), weights("whole"), strict=True):
        assert torch.equal(ours, whole)
    run("heal", "ckpt", "one", *HEAL, "--json", "one.json")
    for ours, alone in zip(weights("out"), weights("one"), strict=True):
        assert (ours - alone).abs().max() <= 1e-6 * alone.abs().max()
    ours, alone = (
        json.loads(Path(name).read_text())["result"] for name in ("out.json", "one.json")
    )
    assert ours["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
