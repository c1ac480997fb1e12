"""One healing as a whole: what it measures, what it saves, and what an error leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import (
    BYTE_VOCAB,
    make_transformer,
    random_windows,
    refuses,
    save_byte_llama,
    short_llama,
    weights_of,
)
from families import make
from peft.tuners.lora import Linear

from short_gpt.checkpoints import meta as meta_checkpoint
from short_gpt.evaluation.distance import Reference
from short_gpt.healing import (
    HealingJob,
    HealingWindows,
    PatchSettings,
    Recipe,
    RefitSettings,
    healing_windows,
)
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

WINDOWS = HealingWindows(
    random_windows(6, 16, vocab=8, seed=1),
    random_windows(3, 16, vocab=8, seed=5),
    random_windows(4, 16, vocab=8, seed=7),
)
TOKENS = torch.tensor(random_windows(2, 16, seed=9))
QUICK = Recipe(rank=4, steps=2, warmup=0, batch_size=2, eval_every=2, learning_rate=1e-2)
LORA, PATCH = {"lora": QUICK}, {"patch": None}


def test_the_original_reads_the_evaluation_windows_once(monkeypatch):
    short, read = short_llama(), []
    plain = short.decoder.logits
    monkeypatch.setattr(short.decoder, "logits", lambda tokens: read.append(1) or plain(tokens))
    monkeypatch.setattr(Reference, "read", lambda *_, **__: 1 / 0)
    evidence = HealingJob(short, WINDOWS, [2], steps={"patch": None}, progress=False).run()
    assert [p.kld.value > 0 for p in evidence.perplexity.values()] == [False, True, True]
    # of the others also the original's head, for each window
    assert len(read) == (1 + 2 + 2) * len(WINDOWS.evaluation)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_windows": -3}, "max_windows = -3: expected a whole number of at least 1"),
        ({"max_windows": 2.5}, "max_windows = 2.5"),
        ({"max_windows": "4"}, "max_windows = '4'"),
        ({"steps": "refit"}, "steps = 'refit': expected a dict"),
        ({"steps": {"refit": Recipe()}}, "settings of refit = .*: expected RefitSettings or None"),
        ({"steps": {"patch": RefitSettings()}}, "settings of patch = .*: expected PatchSettings"),
        ({"steps": {"refit": PatchSettings()}}, "settings of refit = .*: expected RefitSettings"),
    ],
)
def test_a_job_refuses_what_it_would_not_do(options, said):
    refuses(said, HealingJob, short_llama(), WINDOWS, [2], **options)


def test_lora_removes_heals_and_takes_its_checkpoints_away(tmp_path):
    short = ShortHFModel(make("llama"))
    options = {"steps": LORA, "work_dir": tmp_path / "training"}
    job = HealingJob(short, WINDOWS, [2], **options, progress=False)
    evidence = job.run()
    assert short.kept == [0, 1, 3, 4, 5] and {number for number, _ in short.changed} == {
        *short.kept
    }
    assert short.model.config.use_cache  # which training turns off
    assert evidence.how["kept_step"] and any((tmp_path / "training").glob("lora/checkpoint-*"))
    again = ShortHFModel(str(job.save(tmp_path / "out")))
    assert torch.equal(again.decoder.logits(TOKENS), short.decoder.logits(TOKENS))
    assert not (tmp_path / "training").exists()
    job.save(tmp_path / "out", release=True, overwrite=True)
    assert all(weight.is_meta for weight in short.model.parameters())
    anew = ShortHFModel(str(tmp_path / "out"))
    assert torch.equal(anew.decoder.logits(TOKENS), again.decoder.logits(TOKENS))


@pytest.mark.parametrize("steps", [LORA, PATCH])
@pytest.mark.parametrize("step", ["the last measurement", "the removal"])
def test_an_error_behind_the_healing_takes_it_back(monkeypatch, steps, step):
    short, measured = ShortHFModel(make("llama")), []
    before, config = weights_of(short), short.model.config.to_dict()
    job = HealingJob(short, WINDOWS, [2, 4], steps=steps, progress=False)

    def fails(*_):
        changed = [
            not torch.equal(w, old) for w, old in zip(weights_of(short), before, strict=False)
        ]
        assert short.changes and any(changed)  # the healing was there
        raise MemoryError

    plain = job._measure
    if step == "the removal":
        monkeypatch.setattr(short, "remove_for_now", fails)
    else:
        monkeypatch.setattr(
            job,
            "_measure",
            lambda *a: measured.append(1) or (fails() if measured[2:] else plain(*a)),
        )
    with pytest.raises(MemoryError):
        job.run()
    assert short.kept == [0, 1, 2, 3, 4, 5] and not short.changes and not short.removed
    assert all(map(torch.equal, weights_of(short), before))
    assert short.model.config.to_dict() == config and not short.evidence
    monkeypatch.undo()
    job.run()  # and it can be done anew
    assert short.kept == [0, 1, 3, 5]


@pytest.mark.parametrize("layers", [[2, 4], []])
def test_a_merge_that_ends_in_the_middle_is_taken_back(layers, monkeypatch):
    short = ShortHFModel(make("llama"))
    before, config, plain = weights_of(short), short.model.config.to_dict(), Linear.merge
    merged = []

    def merge(self, *args, **kwargs):
        if len(merged) == 3:
            merged.clear()
            raise KeyboardInterrupt
        merged.append(plain(self, *args, **kwargs))

    monkeypatch.setattr(Linear, "merge", merge)
    job = HealingJob(short, WINDOWS, layers, steps=LORA, progress=False)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert short.kept == [0, 1, 2, 3, 4, 5] and not short.removed and not short.changes
    assert all(map(torch.equal, weights_of(short), before))
    assert short.model.config.to_dict() == config
    assert not any("lora" in name for name, _ in short.model.named_modules())


def test_a_meta_model_goes_through_transformers_and_comes_back_in_its_format(tmp_path):
    directory = save_byte_llama(tmp_path / "dense")
    short = ShortHFModel.from_meta(directory, device="cpu")
    job = HealingJob(short, WINDOWS, [2], steps=LORA, progress=False)
    assert job.run().how["kept_step"]
    out = job.save(tmp_path / "out")
    ours = ShortLlama.from_checkpoint(out, max_seq_len=64, device="cpu")
    off = (ours.decoder.logits(TOKENS) - short.decoder.logits(TOKENS)).abs().max()
    assert off < 1e-4 * short.decoder.logits(TOKENS).abs().max()
    record = json.loads((out / "pruning.json").read_text())
    assert record["source"] == directory.name and record["original_layers"] == [0, 1, 3, 4]
    assert (out / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    assert not (out / "README.md").exists()  # a Meta directory has no card


def heals_meta(tmp_path: Path, dtype: torch.dtype) -> HealingJob:
    """A job that has patched a Meta checkpoint of some dtype, read in float32."""
    model = make_transformer(vocab_size=BYTE_VOCAB).to(dtype)
    save_byte_llama(tmp_path / "meta", model)
    short = open_model(str(tmp_path / "meta"), max_seq_len=32, device="cpu", dtype="float32")
    job = HealingJob(short, WINDOWS, [2], steps=PATCH, progress=False)
    job.run()
    return job


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_meta_checkpoint_is_proved_before_it_is_there(tmp_path, monkeypatch, dtype):
    job = heals_meta(tmp_path, dtype)
    short, (layer, name) = job.short, next(iter(job.short.changed))
    weight = short.decoder.layers[short.kept.index(layer)].get_parameter(name)
    exact = weight.detach().clone()
    job.save(tmp_path / "out")
    assert torch.equal(weight, exact)  # rounded as on disk only while the two are compared
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    write = meta_checkpoint.write_meta

    def without_patch(*arguments, replaced, **more):  # the patch is lost on the way
        assert replaced
        return write(*arguments, replaced={}, **more)

    monkeypatch.setattr(meta_checkpoint, "write_meta", without_patch)
    with pytest.raises(RuntimeError, match="the saved model is not the model in memory"):
        job.save(tmp_path / "out", overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_every_kind_of_text_is_judged_by_itself(tmp_path):
    kinds = {"low": "abcd", "high": "wxyz"}
    for number, (name, letters) in enumerate(kinds.items()):
        (tmp_path / name).mkdir()
        for text, ids in enumerate(random_windows(5, 70, vocab=4, seed=10 * number)):
            (tmp_path / f"{name}/{text}.txt").write_text("".join(letters[i] for i in ids))
    short = ShortHFModel(make("llama"))
    low, high = (f"{tmp_path}/{name}" for name in kinds)

    def encode(text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    read = healing_windows(f"{low},{high}", encode, 16, seed=3, eval_windows=4)
    assert read.kinds == [low if max(window) < 5 else high for window in read.evaluation]
    assert sorted(read.kinds) == sorted([low, high] * 2)
    evidence = HealingJob(short, read, [2], steps=PATCH, progress=False).run()
    own = [w for w in read.evaluation if max(w) < 5]
    by_hand = short.perplexity(own, progress=False)
    assert evidence.by_kind[low]["healed"].value == pytest.approx(by_hand.value)
    assert list(evidence.by_kind[high]) == list(evidence.perplexity)
    assert [*healing_windows(low, encode, 16, eval_data=f"{low},{high}").kinds]
