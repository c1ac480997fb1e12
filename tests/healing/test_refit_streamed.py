"""The refit with one layer at a time in memory, and continued where it was interrupted."""

from __future__ import annotations

import json
import os
import random
import shutil
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TEXT, run
from conftest import (
    BYTE_VOCAB,
    interrupted,
    make_transformer,
    random_windows,
    refuses,
    save_byte_llama,
    short_llama,
)
from processes import killed_at
from torch import nn

from llama.checkpoint.meta import Checkpoint
from llama.formats.gguf import to_meta
from llama.formats.hf import meta_to_hf
from short_gpt import ShortLlama
from short_gpt.healing import refit_state
from short_gpt.healing.job import unchanged
from short_gpt.healing.refit import Refit, fit, heal
from short_gpt.healing.refit_layer import LayerRefit
from short_gpt.healing.refit_state import HiddenStates
from short_gpt.runtime.errors import NotFiniteError
from short_gpt.wrappers.streamed_llama import StreamedCalls, StreamedLlama

LAYERS = [2, 3]
WINDOWS = [w[: 16 - i % 2] for i, w in enumerate(random_windows(6, 16, vocab=BYTE_VOCAB))]
TOKENS = torch.tensor(random_windows(2, 16, vocab=BYTE_VOCAB, seed=9))
QUIET = {"progress": False}
KILLS = 8
HEAL = ("--heal_by", "refit", "--layers", "2,3", "--data", "book.txt", "--eval_data", "other.txt")
HEAL += ("--size", 16, "--max_windows", 8, "--eval_windows", 2, "--device", "cpu")


def checkpoint(folder: Path, *, shards: int = 1, dtype=torch.float32, seed: int = 0) -> Path:
    model = make_transformer(seed, vocab_size=BYTE_VOCAB).to(dtype)
    return save_byte_llama(folder, model, shards=shards)


def source(kind: str, folder: Path) -> Path:
    """A checkpoint of five layers."""
    if kind == "hf":
        return meta_to_hf(checkpoint(folder / "first"), folder / "ckpt")
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    return checkpoint(folder / "ckpt", shards=2 if kind == "shards" else 1, dtype=dtype)


def memory(seed: int = 0) -> ShortLlama:
    return short_llama(seed, vocab_size=BYTE_VOCAB)


def streamed(folder: Path) -> StreamedLlama:
    return StreamedLlama(folder, max_seq_len=16, device="cpu")


def opened(folder: Path) -> ShortLlama:
    return ShortLlama.from_checkpoint(folder, max_seq_len=16, device="cpu")


def same(ours: Refit, theirs: Refit) -> None:
    assert ours.fits == theirs.fits and ours.values.keys() == theirs.values.keys()
    assert ours.values and all(torch.equal(v, theirs.values[k]) for k, v in ours.values.items())


@pytest.mark.parametrize("kind", ["meta", "shards", "hf", "bfloat16"])
def test_one_layer_at_a_time_gives_the_matrices_of_the_model_in_memory(kind, tmp_path):
    path = source(kind, tmp_path)
    short, whole = streamed(path), memory()
    if kind == "bfloat16":
        whole = opened(path)
    ours = heal(short, LAYERS, WINDOWS, work_dir=tmp_path / "work", **QUIET)
    theirs = heal(whole, LAYERS, WINDOWS, **QUIET)
    same(ours, theirs)
    assert all(p.is_meta for p in short.decoder.layers.parameters())
    assert short.perplexity(WINDOWS, **QUIET).value == pytest.approx(
        whole.perplexity(WINDOWS, **QUIET).value, rel=2e-3 if kind == "bfloat16" else 1e-6
    )
    out = short.save(tmp_path / "out")
    saved = opened(to_meta(out, tmp_path / "back") if kind == "hf" else out)
    for place, number in enumerate(short.kept):
        layers = (saved.decoder.layers[place], whole.decoder.layers[place])
        for (name, found), expected in zip(
            layers[0].named_parameters(), layers[1].parameters(), strict=True
        ):
            stored = torch.bfloat16 if kind == "bfloat16" else torch.float32
            assert torch.equal(found, expected.to(stored).float()), (number, name)
    record = json.loads((out / "pruning.json").read_text())
    assert record["healing"][0]["method"] == "refit" and record["removed_layers"] == LAYERS
    if kind == "shards":
        assert len(Checkpoint(out).shards) == 2


def test_a_solved_layer_frees_what_is_not_needed_any_more(tmp_path, monkeypatch):
    """Both solved layers, of which only the first is read a second time."""
    short, plain, left = streamed(checkpoint(tmp_path / "ckpt")), StreamedCalls.keep_only, []

    def keep_only(self, index, modules):
        kept = {id(p) for module in modules for p in module.parameters()}
        named = self.layer(index).named_parameters()
        gone = {n: weakref.ref(p) for n, p in named if not p.is_meta and id(p) not in kept}
        plain(self, index, modules)
        left.append((index, len(gone), [name for name, p in gone.items() if p() is not None]))

    monkeypatch.setattr(StreamedCalls, "keep_only", keep_only)
    refit = fit(short, LAYERS, WINDOWS, held=WINDOWS, **QUIET)
    changed = [(fit.layer, fit.part) for fit in refit.fits if fit.changed]
    assert changed == [(1, "mlp"), (4, "attention"), (4, "mlp")]
    # all but the output projections: q, k, v, the MLP's other two matrices and both norms
    assert left == [(index, 7, []) for index in (1, 4)]


def test_a_directory_that_is_not_the_healed_model_is_not_written(tmp_path, monkeypatch):
    short = streamed(checkpoint(tmp_path / "ckpt"))
    heal(short, LAYERS, WINDOWS, **QUIET)
    source = short.stream.source
    plain = source.as_stored
    monkeypatch.setattr(source, "as_stored", lambda *weight: 2 * plain(*weight))
    refuses("the saved model is not the model", short.save, tmp_path / "out", error=RuntimeError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_refit_goes_on_bit_for_bit_and_does_nothing_twice(after, tmp_path):
    checkpoint(tmp_path / "ckpt")
    short = partial(streamed, tmp_path / "ckpt")
    expected = fit(short(), LAYERS, WINDOWS, **QUIET)
    options = {"work_dir": tmp_path / "work", **QUIET}
    with interrupted(LayerRefit, "solve", after):  # of layers 1 and 4
        fit(short(), LAYERS, WINDOWS, **options)
        raise KeyboardInterrupt  # behind the last
    if after:
        told = json.loads((tmp_path / "work" / "refit.json").read_text())
        assert told["done"] == after + 1 and len(told["fits"]) == 2 * after
    learned, plain = [], LayerRefit.solve
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LayerRefit, "solve", lambda self: (learned.append(1), plain(self))[1])
        same(fit(short(), LAYERS, WINDOWS, **options), expected)
    assert len(learned) == 2 - after
    left = {path.name for path in (tmp_path / "work").iterdir()}
    assert left == {"refit.json", "values.2", "values.3"}  # no states
    same(fit(short(), LAYERS, WINDOWS, **options), expected)


def test_a_model_that_lacks_other_layers_is_another(tmp_path):
    """Its files are the same, and so is the shape of what is left."""
    checkpoint(tmp_path / "ckpt")
    for gone in (3, 4):
        short = streamed(tmp_path / "ckpt")
        short.remove_layers([gone])
        if gone == 3:
            fit(short, [2], WINDOWS, work_dir=tmp_path / "work", **QUIET)
            continue
        refuses("another kept", fit, short, [2], WINDOWS, work_dir=tmp_path / "work", **QUIET)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_refit_killed_again_and_again_goes_on_bit_for_bit(tmp_path):
    """Wherever it writes: each process is killed a little later than the one before."""
    windows, options = WINDOWS[:4], {"held": WINDOWS[:2], **QUIET}
    expected = fit(memory(), LAYERS, windows, **options)
    work, draw, kills = tmp_path / "work", random.Random(0), 0
    calls = killed_at(0, lambda: fit(memory(), LAYERS, windows, work_dir=work, **options))
    shutil.rmtree(work)
    assert calls > 100
    while kills < KILLS:
        moment = draw.randrange(1, calls + 10)
        if killed_at(moment, lambda: fit(memory(), LAYERS, windows, work_dir=work, **options)):
            same(fit(memory(), LAYERS, windows, work_dir=work, **options), expected)
            shutil.rmtree(work)
        else:
            kills += 1
    same(fit(memory(), LAYERS, windows, work_dir=work, **options), expected)
    assert {path.name for path in work.iterdir()} == {"refit.json", "values.2", "values.3"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"windows": WINDOWS[1:]}, "another windows"),
        ({"held": WINDOWS[:1]}, "another held-out windows"),
        ({"ridge": 0.5}, "another ridge"),
        ({"parts": ("mlp",)}, "another parts"),
        ({"layers": [2]}, "another layers"),
        ({"lost": None}, "another lost: 2.0, now "),
        ({"step_size": 0.7}, "another step_size"),
        ({"seed": 1}, "another weights: '.*', now '"),
    ],
)
def test_the_state_of_another_refit_is_refused_by_name(changes, named, tmp_path):
    held = WINDOWS[4:]
    with interrupted(LayerRefit, "solve", 1):
        fit(memory(), LAYERS, WINDOWS, held=held, work_dir=tmp_path, **QUIET)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = {"held": held, "work_dir": tmp_path, **QUIET, **changes}
    layers, windows = options.pop("layers", LAYERS), options.pop("windows", WINDOWS)
    short = memory(options.pop("seed", 0))
    refuses(named, fit, short, layers, windows, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_one_layer_needs_goes_into_a_file_where_there_is_no_room(tmp_path, monkeypatch):
    expected = fit(memory(), LAYERS, WINDOWS, **QUIET)
    monkeypatch.setattr(refit_state, "free_memory", lambda: 0)
    seen, plain = set(), HiddenStates.__init__

    def make(states, shapes, width, dtype, path=None, **more):
        seen.add(path and path.name)
        plain(states, shapes, width, dtype, path, **more)

    monkeypatch.setattr(HiddenStates, "__init__", make)
    same(fit(memory(), LAYERS, WINDOWS, **QUIET), expected)  # in temporary files, gone by now
    files = {"inputs of mlp", "inputs of attention", "between"}
    files |= {"original.0", "original.1", "pruned.0", "pruned.1"}
    assert files <= seen
    seen.clear()
    same(fit(memory(), LAYERS, WINDOWS, work_dir=tmp_path / "work", **QUIET), expected)
    assert files <= seen


def test_a_refit_does_not_go_on_without_its_states(tmp_path):
    with interrupted(LayerRefit, "solve", 1):
        fit(memory(), LAYERS, WINDOWS, work_dir=tmp_path, **QUIET)
    (tmp_path / "states/pruned.0").unlink()
    with pytest.raises(ValueError, match=r"pruned.0 is damaged .it is missing.: delete"):
        fit(memory(), LAYERS, WINDOWS, work_dir=tmp_path, **QUIET)


def test_too_little_memory_is_said_before_anything_is_done(tmp_path):
    short = streamed(checkpoint(tmp_path / "ckpt"))
    short.max_memory = "100MB"
    with pytest.raises(ValueError, match=r"the refit of this model needs at least .* \(.* layer"):
        fit(short, LAYERS, WINDOWS, work_dir=tmp_path / "work", **QUIET)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("itemsize", "size"), [(4, 128), (2, 512)])
def test_a_llama_2_7b_is_refitted_within_3_gb(itemsize, size, tmp_path, monkeypatch):
    monkeypatch.setattr(refit_state, "resident", lambda: 400 * 10**6)
    weights, matrix = 2 * 4096 + 4 * 4096**2 + 3 * 4096 * 11008, 4096 * 11008
    calls = SimpleNamespace(
        count=32,
        widths=lambda: (4096, 11008, itemsize),
        memory=lambda: {"layer": weights * itemsize, "weights as stored": 2 * matrix * 2},
    )
    decoder = SimpleNamespace(layers=nn.Linear(1, 1), device=torch.device("cpu"))
    short = SimpleNamespace(layer_calls=lambda: calls, decoder=decoder, max_memory="3GB")
    planned = refit_state.plan_of(short, [[0] * size] * 8, folder=tmp_path / "work")
    # of F x F and F x D numbers of float64 one each
    assert planned.host["sums"] == 8 * 11008 * (11008 + 4096)
    assert sum(planned.host.values()) <= 3 * 10**9


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    Path("other.txt").write_text("Call me Ishmael. Some years ago, never mind how long. " * 8)
    return tmp_path


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_the_command_heals_streamed_as_in_memory_and_goes_on_where_it_was(kind, here):
    source(kind, here)
    run("heal", "ckpt", "memory", *HEAL, "--json", "memory.json")
    with pytest.raises(SystemExit), interrupted(LayerRefit, "solve", 1):
        run("heal", "ckpt", "out", *HEAL, "--stream", "20GB")
    assert (here / "out.refit").is_dir() and not (here / "out").exists()
    run("heal", "ckpt", "out", *HEAL, "--stream", "20GB", "--json", "out.json")
    assert not (here / "out.refit").exists() and not (here / "memory.refit").exists()
    ours, theirs = (json.loads(Path(f"{n}.json").read_text())["result"] for n in ("out", "memory"))
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    fits = [[fit["restored"] for fit in made["healing"][0].pop("fits")] for made in (ours, theirs)]
    assert len(fits[0]) == 4 and fits[0] == pytest.approx(fits[1], abs=1e-4)
    assert ours["healing"] == theirs["healing"]


def test_an_interruption_in_the_first_layer_leaves_no_folder(tmp_path):
    work = tmp_path / "a" / "work"
    with interrupted(LayerRefit, "solve", 0):
        fit(memory(), [0, 1], WINDOWS, work_dir=work, **QUIET)
    assert not work.exists()


def test_a_nan_in_a_later_layer_leaves_no_folder(tmp_path):
    work, short = tmp_path / "work", memory()
    short.decoder.layers[4].feed_forward.w1.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError):  # as the same call would again
        fit(short, LAYERS, WINDOWS, work_dir=work, **QUIET)
    assert not work.exists()


@pytest.mark.parametrize(("kind", "size"), [("meta", 2), ("hf", 7)])
def test_a_streamed_heal_reads_windows_shorter_than_its_proof(kind, size, here):
    source(kind, here)
    argv = [size if value == 16 else value for value in HEAL]
    run("heal", "ckpt", "out", *argv, "--stream")
    assert (here / "out").is_dir()


def test_a_training_in_vain_is_said():
    assert unchanged({"method": "LoRA", "kept_step": 8}) == []
    assert unchanged({"method": "LoRA", "kept_step": 0}) == [
        "LoRA changed nothing: no step lowered the loss on the validation windows; train longer, "
        "or on more text"
    ]
