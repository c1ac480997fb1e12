"""What benchmarks check before they measure."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import (
    BYTE_VOCAB,
    make_transformer,
    random_windows,
    save_chat_llama,
    save_checkpoint,
    write_byte_tokenizer,
)
from gguf_files import stack_file

from benchmarks.lib import distilled, outcome, passages
from benchmarks.studies import (
    choice_variance,
    choices,
    coverage,
    healing,
    mixed,
    refit_choices,
    scoring,
    serving,
)
from short_gpt import ShortHFModel
from short_gpt.checkpoints import prune_gguf
from short_gpt.data import check_disjoint, demo
from short_gpt.evaluation.cells import Cells
from short_gpt.healing import (
    CachedTeacher,
    Distillation,
    Learning,
    Recipe,
    heal_lora,
    heal_refit,
)
from short_gpt.healing.refit import PatchSettings, RefitSettings, split_held_out


@pytest.mark.parametrize(
    ("script", "first", "arguments"),
    [
        ("architectures", "staged", {}),
        ("choice_variance", "build", {}),
        ("choices", "build", {"also": "wikitext2_test.txt"}),
        ("coverage", "case", {}),
        ("gemma_kinds", "compared", {}),
        ("greedy", "build", {}),
        ("larger", "write_texts", {"model": "model.gguf"}),
        ("kept", "Run", {"source": "tasks", "also": "wiki.txt", "others": "novels.txt"}),
        ("mixed", "shrink", {"also": "wiki.txt", "others": "novels.txt"}),
        ("optimality", "build", {}),
        ("own_samples", "open_model", {"novels": "novels.jsonl"}),
        ("peers", "kinds", {}),
        ("scoring", "load", {}),
        ("serving", "book", {}),
        ("stopping", "read_scores", {}),
        ("stopping", "attack", {"adversarial": True}),
        ("streaming", "make_checkpoint", {}),
        ("reproduce_7b", "rehearse", {}),
        ("refit_streamed", "refitted", {}),
    ],
)
def test_a_result_that_could_not_be_written_is_told_before_the_work(
    script, first, arguments, tmp_path, monkeypatch
):
    folder = "baselines" if script in ("gemma_kinds", "peers") else "studies"
    module, out = import_module(f"benchmarks.{folder}.{script}"), tmp_path / "result.json"
    monkeypatch.setattr(module, first, lambda *_: pytest.fail("it began"))
    out.write_text("{}")
    with pytest.raises(FileExistsError, match="exists; choose another name or pass `overwrite`"):
        module.main(out=str(out), **arguments)
    with pytest.raises(FileExistsError, match="is not what this would write there"):
        module.main(out=str(out), overwrite=True, **arguments)
    assert out.read_text() == "{}"


ROWS = {
    "piqa": {"query": "Question: A goal: \n\n", "choices": ["this", " that"], "gold": 1},
    "arc_easy": {"query": "Question: Which?", "choices": ["a", "b", "c"], "gold": 2},
    "winogrande": {
        "context_options": ["Sarah met Sam so Sarah", "Sarah met Sam so Sam"],
        "continuation": "left.",
        "gold": 1,
    },
    "lambada_openai": {"context": "He said:\n\n \"I don't", "continuation": "care"},
    "arc_challenge": {"query": "Question: Why?", "choices": ["a", "b", "c", "d"], "gold": 3},
    "boolq": {
        "query": "Passage: In\nQuestion: one.\nQuestion: is it?",
        "choices": ["no", "yes"],
        "gold": 1,
    },
    "openbook_qa": {"query": "Oaks grow from", "choices": ["acorns", "nuts"], "gold": 0},
    "copa": {"query": "He slept, or not, because", "choices": ["it", "a was"], "gold": 1},
    "winograd_wsc": {
        "context_options": ["Sarah met Sam. The Sarah", "Sarah met Sam. The Sad"],
        "continuation": "left.",
        "gold": 1,
    },
}
# contexts and continuations that lm-eval's own templates then ask for
ASKED = {
    "piqa": [("Question: A goal: \n\nAnswer:", f" {c}") for c in ("this", " that")],
    "arc_easy": [("Question: Which?\nAnswer:", f" {c}") for c in "abc"],
    "winogrande": [(f"Sarah met Sam so {c}", " left.") for c in ("Sarah", "Sam")],
    "lambada_openai": [("He said:\n\n \"I don't", " care")],
    "arc_challenge": [("Question: Why?\nAnswer:", f" {c}") for c in "abcd"],
    "boolq": [("In\nQuestion: one.\nQuestion: is it?\nAnswer:", f" {c}") for c in ("no", "yes")],
    "openbook_qa": [("Oaks grow from", f" {c}") for c in ("acorns", "nuts")],
    # two spaces, in wsc273 and in copa, as of lm-eval's own documents
    "copa": [("He slept, or not because", f"  {c}") for c in ("it", "a was")],
    "winograd_wsc": [(f"Sarah met Sam. The {c}", "  left.") for c in ("Sarah", "Sad")],
}


@pytest.mark.filterwarnings("default")
def test_local_documents_are_asked_for_as_lm_eval_asks_for_its_own(lm_eval, tmp_path):
    task_files = import_module("benchmarks.lib.task_files")
    for task, row in ROWS.items():
        tmp_path.joinpath(f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    (folder := tmp_path / "made").mkdir()
    names = task_files.write(tmp_path, folder, [*task_files.OWN, *task_files.MORE])
    from lm_eval.tasks import TaskManager, get_task_dict

    for name, task in get_task_dict(names, TaskManager(include_path=str(folder))).items():
        task.build_all_requests()
        asked = [instance.args for instance in task.instances]
        right = ROWS[name.removeprefix("local_")].get("gold")
        if right is not None:
            doc = task.instances[0].doc
            given = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            assert (choices.index(given) if given in choices else given) == right, name
        if name == "local_piqa":  # the goal's own end of line stays, the file's goes
            assert [c for _, c in asked] == [c for _, c in ASKED["piqa"]]
            assert asked[0][0] == "Question: A goal: \n\nAnswer:"
        else:
            assert asked == ASKED[name.removeprefix("local_")]
        metrics = [*task.aggregation()]
        own = {name: ["acc"] for name in ("winogrande", "boolq", "copa", "winograd_wsc")}
        own["lambada_openai"] = ["perplexity", "acc"]
        assert metrics == own.get(name.removeprefix("local_"), ["acc", "acc_norm"])


def test_documents_that_cannot_be_taken_back_are_refused(lm_eval):
    task_files = import_module("benchmarks.lib.task_files")
    with pytest.raises(ValueError, match="does not begin with"):
        task_files.piqa({**ROWS["piqa"], "query": "What?"})
    with pytest.raises(ValueError, match="has a gap already"):
        task_files.winogrande({**ROWS["winogrande"], "context_options": ["a_ b", "a_ c"]})
    with pytest.raises(ValueError, match="more than a word"):
        task_files.lambada_openai({"context": "a", "continuation": "b c"})
    with pytest.raises(ValueError, match="not no and yes"):
        task_files.boolq({**ROWS["boolq"], "choices": ["yes", "no"]})
    with pytest.raises(ValueError, match="has no question"):
        task_files.boolq({**ROWS["boolq"], "query": "Passage: It is?"})
    with pytest.raises(ValueError, match="does not end with  because"):
        task_files.copa({**ROWS["copa"], "query": "He slept, and"})
    with pytest.raises(ValueError, match="'It' begins with a capital"):
        task_files.copa({**ROWS["copa"], "choices": ["It", "a"]})
    for contexts in (["Ann met the  Ann", "Ann met the  Eve"], ["He saw The man", "He saw Ann"]):
        with pytest.raises(ValueError, match="read as other text"):
            task_files.winograd_wsc({**ROWS["winograd_wsc"], "context_options": contexts})


def test_the_novels_are_lambadas_passages_in_their_order(tmp_path):
    rows = [{"context": "He said:\n\n \"I don't", "continuation": "care"}]
    rows.append({"context": "\u201cAnd\u2028", "continuation": "you\u201d"})
    source, out = tmp_path / "lambada_openai.jsonl", tmp_path / "novels.txt"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    source.write_text("".join(lines), encoding="utf-8")
    passages.main(str(source), str(out))
    text = out.read_bytes().decode("utf-8")
    assert text == "He said:\n\n \"I don't care\n\n\u201cAnd\u2028 you\u201d"
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        passages.main(str(source), str(out))


@pytest.mark.usefixtures("few_timed_tokens", "one_rank")
def test_shrinking_in_both_precisions_runs_and_is_judged(tmp_path, monkeypatch):
    """On a tiny model, whose times mean nothing: every run, and the file."""
    save_chat_llama(tmp_path, 5, "{{ messages[0].content }}")
    letters = ("".join(chr(97 + i) for i in row) for row in random_windows(20, 90, vocab=26))
    parts = {"calibration": [*islice(letters, 8)], "held_out": [*islice(letters, 4)]}
    monkeypatch.setattr(demo, "bible", lambda part="calibration": parts[part])
    for name in ("also", "others"):
        (tmp_path / name).write_text("\n".join(islice(letters, 4)))
    monkeypatch.setitem(mixed.MODELS, "smollm2", lambda: tmp_path / "hf")
    monkeypatch.setattr(mixed, "GOAL", 0.0)
    also, others, out = (str(tmp_path / name) for name in ("also", "others", "out.json"))
    with pytest.raises(SystemExit) as end:
        sizes = {"n": 1, "count": 8, "size": 24, "judged": 3, "repeats": 1}
        mixed.main(also, others, **sizes, out=out)
    assert end.value.code == 1  # the goal is missed
    found = json.loads(Path(out).read_text())
    assert [*found["layers"]] == [*found["seconds"]] == ["float32", "mixed"]
    assert len(found["ratios"]) == 1 and len(found["rows"]) == 3
    assert all(len(layers) == 1 for layers in found["layers"].values())


def test_every_sample_chooses_anew_and_every_set_is_judged_once(tmp_path, monkeypatch):
    """Equal to a model that is measured on the sample alone, and to one without the layers."""
    folder = save_checkpoint(tmp_path / "ckpt", make_transformer(vocab_size=BYTE_VOCAB, n_layers=6))
    write_byte_tokenizer(folder)
    monkeypatch.setattr(choice_variance, "COUNTS", (3,))
    windows = [random_windows(6, 24, seed=seed) for seed in (1, 2)]
    short, cells = scoring.build(folder), Cells()
    found = choice_variance.chosen(short, [*zip("ab", windows, strict=True)], cells)
    expected = []
    for text, sample in zip("ab", windows, strict=True):
        for method, read in [("bi", sample[:4]), ("bi", sample[4:]), ("bi", sample)]:
            alone = scoring.build(folder)
            alone.measure(read, progress=False)
            layers = sorted(alone.layers_to_remove(n=3))
            expected.append((text, len(read), method, layers))
        expected.append((text, 6, "angular", alone.layers_to_remove(angular=True, n=3)))
    named = [tuple(c.values()) for c in found if c["method"] != "relative_magnitude"]
    assert named == expected and len(found) == 10
    sets = [(1,), (1, 2, 4)]
    held_out = random_windows(4, 24, seed=3)
    found = choice_variance.judge(short, sets, held_out, cells)
    assert found["dense"] == pytest.approx(short.perplexity(held_out, progress=False).value)
    for row, layers in zip(found["sets"], sets, strict=True):
        with short.without_layers(layers):
            expected = short.perplexity(held_out, progress=False).value
        assert row["layers"] == [*layers]
        assert row["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert row["nats"] == pytest.approx(math.log(expected / found["dense"]), abs=1e-5)


def test_means_over_draws_are_paired_over_windows():
    """Of two draws, one without the search; each kind has two windows of 10 tokens."""

    def nats(*values: float) -> dict:
        return {kind: [(value, 10) for value in values] for kind in ("a", "b")}

    first = {"bi": nats(30, 20), "sleb": nats(21, 11), "auto": nats(20, 10)}
    second = {"bi": nats(20, 10), "auto": nats(20, 10), "without bi": nats(26, 16)}
    found = choices.over_draws([first, second])
    assert [*found["from auto"]] == ["bi", "sleb"]
    for name, draws, more in (("bi", 2, 0.5), ("sleb", 1, 0.1)):
        own = found["from auto"][name]
        assert own["draws"] == draws and own["all three kinds"]["nats"] == pytest.approx(more)
        assert own["a"]["perplexity"] == pytest.approx(math.exp(1.5 + more))
        assert own["a"]["standard_error"] == pytest.approx(0, abs=1e-6)
    assert found["without it"]["bi"]["a"]["nats"] == pytest.approx(0.6)


def test_a_result_names_the_commit_that_made_it(tmp_path):
    assert outcome.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for asked in (
        ["init", "-q"],
        ["add", "file"],
        ["commit", "-qm", "one"],
        ["tag", "-am", "t", "t"],
    ):
        subprocess.run([*git, *asked], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert outcome.commit(tmp_path) == head.stdout.strip()
    (tmp_path / "file").write_text("two")
    assert outcome.commit(tmp_path) == f"{head.stdout.strip()}-dirty"


def test_one_script_measures_all_results_and_goes_on_where_it_was(tmp_path):
    root = Path(__file__).parents[1]
    text = (root / "benchmarks/all.sh").read_text()
    names = {path.stem for path in (root / "benchmarks/results").glob("*.json")}
    asked = re.findall(r"^(?:script|measure) (\w+) ", text, flags=re.MULTILINE)
    assert {*asked} == names and len(asked) == len(names)
    # by the commands that benchmarks/README.md has
    few = re.search(r'^few="(.+)"$', text, flags=re.MULTILINE)[1]
    every = (
        text.replace("\\\n", "").replace("$few", few).replace(" --scores stopping_windows.npz", "")
    )
    own = re.findall(r"^script \w+ (.+)$", every, flags=re.MULTILINE)
    documented = re.findall(
        r"`python benchmarks/\w+/(\w+)\.py ?([^`]*)`",
        (root / "benchmarks/README.md").read_text().split("The scripts check these limits")[0],
    )
    scripts = {(name, *shlex.split(rest)) for name, _, rest in (o.partition(" ") for o in own)}
    missing = {(name, *shlex.split(rest)) for name, rest in documented} - scripts
    assert not missing
    # with programs that only write what they are asked for, in a copy of the tree's names
    copy, bin_, out = tmp_path / "copy", tmp_path / "bin", tmp_path / "out"
    (copy / "benchmarks/results").mkdir(parents=True)
    (copy / "docs/images").mkdir(parents=True)
    bin_.mkdir()
    (copy / "benchmarks/all.sh").write_text(text)
    (copy / "benchmarks/studies").mkdir()
    (copy / "benchmarks/studies/kept.py").touch()
    said = tmp_path / "said"
    python = bin_ / "python"
    python.write_text(
        f'#!/bin/bash\necho "$@" >> {said}\ncase "$*" in\n'
        f"*greedy*) [ -e {tmp_path}/again ] || exit 130 ;;\nesac\nasked=$*\n"
        "case $asked in *short_gpt\\ compare*) flag=--json ;; *) flag=--out ;; esac\n"
        'while [ $# -gt 1 ]; do [ "$1" = $flag ] && echo "{}" > "$2"; shift; done\n'
        "[[ $asked != *scoring.py* ]]\n"  # which misses a limit
    )
    python.chmod(0o755)
    (tmp_path / "wiki.txt").write_text("text")
    (tmp_path / "tasks").mkdir()
    command = ["bash", copy / "benchmarks/all.sh", tmp_path / "wiki.txt", tmp_path / "tasks", out]
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}
    first = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert first.returncode and not [*(copy / "benchmarks/results").iterdir()]
    (tmp_path / "again").touch()
    last = subprocess.run(command, env=environment, capture_output=True, check=False, text=True)
    assert last.returncode == 1 and last.stderr == "limits were missed: ./scoring.missed\n"
    times = [line.split() for line in (out / "seconds.txt").read_text().splitlines()]
    assert [name for name, _, _ in times[:3]] == ["scoring", "greedy", "greedy"]
    assert len(times) == len(names) + 1 and all(int(seconds) >= 0 for _, seconds, _ in times)
    lines = said.read_text().splitlines()
    assert sum("scoring.py" in line for line in lines) == 1
    assert sum("greedy.py" in line for line in lines) == 2
    assert any("pip install" in line for line in lines)  # by this program, not from the network
    assert lines[-1].endswith("benchmarks/tables/healing_tables.py")
    assert {path.stem for path in (copy / "benchmarks/results").iterdir()} == names
    named = [*command[:-1], tmp_path / "apart", "kept", "choices"]
    subprocess.run(named, env=environment, capture_output=True, check=True)
    assert {path.stem for path in (tmp_path / "apart").glob("*.json")} == {"kept", "choices"}
    assert "studies/kept.py" in said.read_text().splitlines()[-1]  # nothing comes after it
    assert said.read_text().count(f"larger.py {few} --counts 3 ") == 1  # by the whole run alone
    named = subprocess.run([*named[:-1], "kepd"], env=environment, capture_output=True, check=False)
    assert named.returncode == 2 and b"no result is called kepd" in named.stderr


def test_what_is_expected_of_fewer_layers_follows_from_the_bytes(tmp_path):
    """A prompt by the layers alone, writing by all bytes; ratios are to the same repeat's whole."""
    whole = stack_file(tmp_path / "whole.gguf")
    prune_gguf(whole, tmp_path / "cut.gguf", [1, 4])
    paths = {("Q4_1", 0): whole, ("Q4_1", 2): tmp_path / "cut.gguf"}
    layers, rest = serving.weights(whole)
    assert (layers, rest) == (8 * (3 * 18 + 7 * 4), (64 + 8) * 4)  # Q4_0 has 18 bytes for 32 values
    speeds = {0: (100.0, 200.0, 50.0), 2: (150.0, 220.0, 60.0)}
    runs = {
        ("Q4_1", n): [{"prompt": s, "generation": s, "peak_mb": 1.0} for s in values]
        for n, values in speeds.items()
    }
    row = serving.row(("Q4_1", 2), runs, paths)
    assert row["prompt_expected"] == 8 / 6
    assert row["generation_expected"] == (layers + rest) / (layers * 6 / 8 + rest)
    assert row["prompt_ratio"] == {"median": 1.2, "min": 1.1, "max": 1.5}
    assert len(serving.limits([row])) == 0
    row["prompt_ratio"] = {"median": 1.1}
    assert serving.limits([row]) == ["Q4_1 without 2 layers: prompt at 1.10, expected 1.33"]


def test_intervals_that_hold_too_seldom_end_the_benchmark_with_1(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        coverage.main(runs=2000)
    assert ended.value.code == 0
    assert "all intervals held in at least 93%" in capsys.readouterr().out

    def former(means, sizes):
        return coverage.liang_zeger(means, sizes), sizes.shape[1] - 1.0 + 0 * means[:, 0]

    monkeypatch.setattr(coverage, "jackknife", former)
    with pytest.raises(AssertionError):  # it is the library's rule that is judged
        coverage.main(runs=2000)
    monkeypatch.setattr(coverage, "same_as_the_library", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        coverage.main(runs=2000)
    assert ended.value.code == 1
    assert "MISSED: lognormal, sd 1, alike within a text, 3 texts:" in capsys.readouterr().out


def test_windows_to_distil_on_share_nothing_with_what_judges_or_chooses_the_step():
    cut = random_windows(distilled.wanted(6), 80)
    judged = [cut[0][:70]]
    free = [*cut[:-1], [*cut[2][:65], *cut[-1][65:]]]  # the last shares text with the third
    learning = distilled.apart(free, judged, 6)
    assert len(learning.training) == 6 and len(learning.validation) == distilled.VALIDATED
    check_disjoint([*learning.training, *learning.validation], judged)
    check_disjoint(learning.training, learning.validation)
    assert learning.training == [cut[1], *cut[3:8]] and learning.validation[-1] == free[-1]


@pytest.mark.filterwarnings("default")  # transformers' own
def test_a_model_is_refitted_then_distilled_and_opened_again(tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path / "ckpt", make_transformer(vocab_size=BYTE_VOCAB))
    write_byte_tokenizer(folder)
    monkeypatch.setattr(distilled.demo, "checkpoint", lambda: folder)
    fitted, *parts = (random_windows(6, 24, vocab=8, seed=seed) for seed in (1, 2, 3, 4))
    recipe = Recipe(rank=4, steps=4, warmup=0, batch_size=2, eval_every=2, learning_rate=1e-2)
    whole = scoring.build()
    distiller = distilled.Distiller(whole, fitted, Learning(*parts), recipe, tmp_path / "asked")
    short, how = distiller.made([1, 3])
    assert how["method"] == "distillation" and how["kept_step"]
    by_hand = ShortHFModel.from_meta(folder, device="cpu")
    heal_refit(by_hand, [1, 3], fitted, progress=False)
    refitted = by_hand.perplexity(parts[0], progress=False).value
    teacher = CachedTeacher(tmp_path / "teacher", whole, [*parts[0], *parts[1]], k=64)
    teacher.fill(progress=False)
    options = {"recipe": recipe, "distillation": Distillation(teacher), "progress": False}
    heal_lora(by_hand, *parts, **options)
    tokens = torch.tensor(parts[2])
    torch.testing.assert_close(short.decoder.logits(tokens), by_hand.decoder.logits(tokens))
    assert short.decoder.logits(tokens).shape[-1] == BYTE_VOCAB and len(short.kept) == 3
    assert by_hand.perplexity(parts[0], progress=False).value != refitted
    monkeypatch.setattr(CachedTeacher, "fill", lambda _: pytest.fail("it is asked once"))
    distiller.made([2])


@pytest.mark.parametrize("count", [8, 24, 32, 37])
def test_a_refit_holds_out_windows_of_both_texts(count):
    turns = [[i, i % 2] for i in range(count)]
    ordered = healing.both_held_out(turns)
    assert sorted(ordered) == turns
    assert [text for _, text in split_held_out(ordered)[1]] == [1, 0, 1, 0][: count // 8]
    assert all({a[1], b[1]} == {0, 1} for a, b in zip(ordered[::2], ordered[1::2], strict=False))


def test_refits_and_patches_of_sinks_have_the_defaults():
    for case in refit_choices.CASES["sinks"]:
        usual = PatchSettings() if case.where == "gaps" else RefitSettings()
        own = (case.step_size, case.ridges, case.where)
        assert own == (usual.step_size, usual.ridges, usual.where)
        assert case.lost in (usual.lost, None)
