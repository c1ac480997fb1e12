"""A teacher's predictions on disk, and asked for as they are needed."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from conftest import random_windows, share_model, short_llama
from families import make

from short_gpt.healing.distillation import Distillation, Targets, divergence
from short_gpt.wrappers.short_hf import ShortHFModel

WINDOWS = [w[: 16 - 3 * i] for i, w in enumerate(random_windows(4, 16))]


@pytest.fixture(scope="module")
def short() -> ShortHFModel:
    return ShortHFModel(make("llama"))


def filled(folder, short, windows=WINDOWS, **options) -> Distillation:
    teacher = Distillation(folder, short, windows, **options)
    teacher.fill(progress=False)
    return teacher


def test_what_is_read_is_what_the_model_predicts(short, tmp_path):
    teacher = filled(tmp_path, short, k=5, temperature=2.0)
    found = teacher.targets([2, 0], [WINDOWS[2], WINDOWS[0]])
    for number, ours in zip((2, 0), found, strict=True):
        logits = short.decoder.logits(torch.tensor([WINDOWS[number]]))[0, :-1]
        expected = Targets.of(logits, 5, 2.0)
        assert torch.equal(ours.ids, expected.ids) and ours.ids.shape == (len(logits), 5)
        assert torch.allclose(ours.logs, expected.logs, atol=5e-3)  # float16 on disk
        assert torch.allclose(ours.rest, expected.rest, atol=5e-3)
        assert divergence(logits, ours, temperature=2.0).max() < 1e-5
    tokens = sum(len(window) - 1 for window in WINDOWS)
    assert (tmp_path / "predictions.bin").stat().st_size == tokens * (6 * 5 + 2)


def test_a_vocabulary_below_k_is_kept_whole(short, tmp_path):
    most = short.decoder.vocab_size
    teacher = filled(tmp_path, short, k=most + 10)
    (found,) = teacher.targets([1], [WINDOWS[1]])
    assert teacher.k == found.ids.shape[-1] == most
    assert (found.rest == -torch.inf).all() and found.logs.isfinite().all()


def test_padding_changes_no_target(short, tmp_path):
    one_by_one = filled(tmp_path / "a", short)
    at_once = Distillation(tmp_path / "b", short, WINDOWS)
    at_once.fill(batch_size=4, progress=False)
    for number, window in enumerate(WINDOWS):
        (ours,), (theirs,) = (t.targets([number], [window]) for t in (at_once, one_by_one))
        assert torch.allclose(ours.logs.exp().sum(-1), theirs.logs.exp().sum(-1), atol=1e-4)
        assert ours.ids.shape == theirs.ids.shape == (len(window) - 1, ours.ids.shape[-1])


def test_an_interrupted_cache_goes_on_where_it_was(short, tmp_path, monkeypatch):
    whole = filled(tmp_path / "whole", short)
    broken = Distillation(tmp_path / "broken", short, WINDOWS)
    asked = []

    def logits(windows, *, batch_size):
        for window in windows:
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(window)
            yield from ShortHFModel.window_logits(short, [window])

    with monkeypatch.context() as patched:
        patched.setattr(short, "window_logits", logits)
        with pytest.raises(KeyboardInterrupt):
            broken.fill(progress=False)
    with pytest.raises(RuntimeError, match="lacks predictions: call fill first"):
        broken.targets([0], WINDOWS[:1])
    with open(tmp_path / "broken/predictions.bin", "ab") as file:
        file.write(b"half of a window, then a kill")
    asked.clear()
    monkeypatch.setattr(short, "window_logits", logits)
    filled(tmp_path / "broken", short)
    assert asked == WINDOWS[2:]
    bytes_of = [(tmp_path / name / "predictions.bin").read_bytes() for name in ("whole", "broken")]
    assert bytes_of[0] == bytes_of[1] and whole.identity() == broken.identity()
    filled(tmp_path / "broken", short)  # and is not asked again
    assert asked == WINDOWS[2:]


def test_the_logits_of_one_window_are_gone_before_the_next(short, tmp_path, monkeypatch):
    plain = short.window_logits

    def logits(windows, *, batch_size):
        for window in windows:
            held = [*plain([window])]
            before = weakref.ref(held[0])
            yield held.pop()
            assert before() is None

    monkeypatch.setattr(short, "window_logits", logits)
    filled(tmp_path, short)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short": ShortHFModel(make("llama", seed=1))}, "another weights"),
        ({"windows": WINDOWS[1:]}, "another windows"),
        ({"k": 3}, "another top_k: 4, now 3; go on with the former top_k, or delete .* to start"),
        ({"temperature": 2.0}, "another temperature: 1.0, now 2.0"),
    ],
)
def test_predictions_of_something_else_are_refused(short, tmp_path, change, message):
    filled(tmp_path, short, k=4)
    before = (tmp_path / "predictions.bin").read_bytes()
    with pytest.raises(ValueError, match=f"is the state of a run with {message}"):
        filled(tmp_path, **{"short": short, "k": 4, **change})
    assert (tmp_path / "predictions.bin").read_bytes() == before


def test_a_teacher_is_told_by_all_that_its_predictions_depend_on(short, tmp_path):
    """A training that is continued takes no other: see `TrainingRun.identity`."""
    other = ShortHFModel(make("llama", seed=1))
    cases = [(short, 4, 1.0), (short, 4, 2.0), (short, 3, 1.0), (other, 4, 1.0), (short, 4, 1.0)]
    said = [
        Distillation(tmp_path / str(i), model, WINDOWS, k=k, temperature=t).identity()
        for i, (model, k, t) in enumerate(cases)
    ]
    assert said[0] == said[-1] and said[1]["temperature"] == 2.0
    assert len({json.dumps(one, sort_keys=True) for one in said}) == 4


def test_settings_that_cannot_be_are_refused(short, tmp_path):
    for options, message in (({"k": 0}, "top_k = 0"), ({"temperature": 0.0}, "temperature = 0.0")):
        with pytest.raises(ValueError, match=message):
            Distillation(tmp_path, short, WINDOWS, **options)


def test_ranks_that_share_a_model_do_not_write_one_file(short, tmp_path, monkeypatch):
    teacher = Distillation(tmp_path, short, WINDOWS)
    share_model(monkeypatch, 2)
    with pytest.raises(ValueError, match="the whole model on every rank, got 2 model-parallel"):
        teacher.fill(progress=False)
    assert not [*tmp_path.iterdir()]


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    short = ShortHFModel(make("llama"))
    with torch.no_grad():
        short.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the teacher gave a NaN or infinite logit"):
        filled(tmp_path, short)


def test_a_meta_model_teaches_too(tmp_path):
    short = short_llama()
    (found,) = filled(tmp_path, short, k=3).targets([0], WINDOWS[:1])
    logits = short.decoder.logits(torch.tensor(WINDOWS[:1]))[0, :-1]
    assert torch.equal(found.ids, logits.topk(3).indices)
