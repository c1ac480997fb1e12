"""Tasks of the lm-evaluation-harness: both wrappers on the same weights agree.

Changes between two models on the same documents are worked out by hand and by scipy.
"""

from __future__ import annotations

import json
import math
import sys
from http.client import RemoteDisconnected
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import DOCS, refuses, save_meta

from llama.formats.hf import meta_to_hf
from llama.tokenizer import with_bos
from short_gpt import ShortHFModel, ShortLlama
from short_gpt.cli.tables import comparison
from short_gpt.evaluation.tasks import (
    TaskRun,
    TaskSuite,
    _name,
    documents_of,
    run_tasks,
    task_changes,
    task_difference,
)

pytestmark = pytest.mark.usefixtures("lm_eval")
SIZE = 64  # max_seq_len


def pair(folder: Path, *, bos: bool) -> tuple[ShortLlama, ShortHFModel]:
    """A random Llama of 3 layers in both forms, and its tokenizer in both."""
    save_meta(folder / "meta", n_layers=3)
    words = folder / "meta/tokenizer.json"
    if bos:  # as the files of Llamas say it: a step of the tokenizer puts bos in front
        words.write_text(with_bos(words.read_text(), "<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    words.with_name("tokenizer_config.json").write_text(json.dumps(names))
    theirs = ShortHFModel(meta_to_hf(folder / "meta", folder / "hf"))
    theirs.model.config.max_position_embeddings = SIZE
    ours = ShortLlama.from_checkpoint(folder / "meta", max_seq_len=SIZE, device="cpu")
    return ours, theirs


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def both(request, tmp_path_factory) -> tuple[ShortLlama, ShortHFModel]:
    return pair(tmp_path_factory.mktemp("pair"), bos=request.param)


def test_the_tokenizers_agree(both):
    ours, theirs = both
    for text in ("", "Ice is", " naïve\n"):
        assert ours.encode(text) == theirs.encode(text)


def requests(kind: str, *arguments: tuple) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, found, i) for i, found in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_agree(both, batch_size):
    asked = requests("loglikelihood", *((q, choice) for q, c, _ in DOCS for choice in c))
    ours, theirs = (
        m.harness_model(batch_size=batch_size).loglikelihood(asked, disable_tqdm=True) for m in both
    )
    for (found, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert greedy == expected_greedy


def test_what_greedy_decoding_gives_is_greedy(both):
    ours, theirs = (m.harness_model() for m in both)
    encoded = ours.tok_encode("Once")
    (made,), _ = both[0].llama.generate([encoded], 5, temperature=0)
    for model in (ours, theirs):
        asked = [(("", ""), encoded, made), (("", ""), encoded, [*made[:-1], made[-1] ^ 1])]
        found = model._loglikelihood_tokens(asked, disable_tqdm=True)
        assert [greedy for _, greedy in found] == [True, False]
        assert found[0][0] > found[1][0]


def test_rolling_loglikelihoods_agree(both):
    texts = ["", "x", "short", "a" * (SIZE - 1), "b" * SIZE, "c" * (SIZE + 1), "Long text. " * 20]
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    ours, theirs = (m.harness_model().loglikelihood_rolling(asked, disable_tqdm=True) for m in both)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert min(map(abs, ours[1:])) > 1  # not the empty text, which may have no token
    logits = both[0].decoder.logits(torch.tensor([[0]]))[0, 0]  # after bos
    of_bos = logits.log_softmax(-1)[0] if both[0].llama.tokenizer.add_bos else torch.tensor(0.0)
    assert ours[0] == pytest.approx(of_bos.item(), rel=1e-5)


def test_generations_agree(both):
    settings = [
        {"until": ["e"], "max_gen_toks": 40},
        {"until": "\n", "max_new_tokens": 50, "do_sample": False, "temperature": 0.0},
        {"until": ["zq", "o", "x"], "max_gen_toks": 3, "top_p": 1.0},
        {"max_gen_toks": 45},
    ]
    prompts = ["Once upon", "A long one. " * 8, "Q"]
    asked = requests("generate_until", *((p, s) for p in prompts for s in settings))
    ours, theirs = (m.harness_model().generate_until(asked, disable_tqdm=True) for m in both)
    assert ours == theirs
    assert not any("e" in text for text in ours[0::4])
    assert any(len(text) > 32 for text in ours)  # longer than the first look for a stop string


def test_a_llama_of_metas_own_which_cannot_be_asked_generates_the_same(both):
    ours = both[0].llama
    parts = {"model": ours.model, "tokenizer": ours.tokenizer}
    own = ShortLlama(SimpleNamespace(**parts, generate=lambda *given: ours.generate(*given)))
    settings = {"until": ["e"], "max_gen_toks": 50}
    asked = requests("generate_until", *((p, settings) for p in ("Once", "A long", "Q", "of")))
    found, expected = (
        m.harness_model().generate_until(asked, disable_tqdm=True) for m in (own, both[0])
    )
    assert found == expected and max(map(len, found)) > 32


def test_metrics_of_local_tasks_agree(both, tasks):
    names = ["tiny_choice", "tiny_generate", "tiny_rolling"]
    paths = [str(tasks / f"{name}.yaml") for name in names]
    ours, theirs = (run_tasks(model, paths) for model in both)
    assert [*ours] == names
    assert json.loads(json.dumps(ours, allow_nan=False)) == ours
    assert {*ours["tiny_choice"]} == {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}
    assert {*ours["tiny_rolling"]} >= {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_task_named_by_its_file_is_that_of_its_folder(both, tasks):
    path = str(tasks / "tiny_choice.yaml")
    expected = run_tasks(both[0], path)
    # the folder of a file has the others too
    both_tasks = run_tasks(both[0], ["tiny_choice", str(tasks / "tiny_rolling.yaml")])
    assert both_tasks["tiny_choice"] == expected["tiny_choice"] and len(both_tasks) == 2
    with pytest.raises(FileNotFoundError):
        run_tasks(both[0], str(tasks / "none.yaml"))


def test_the_metric_is_that_of_the_model_after_removal(tmp_path, tasks):
    both = pair(tmp_path, bos=True)
    before = [run_tasks(m, str(tasks / "tiny_rolling.yaml"), limit=2) for m in both]
    for model in both:
        model.remove_layers([1])
    after = [run_tasks(m, str(tasks / "tiny_rolling.yaml"), limit=2) for m in both]
    perplexities = [r["tiny_rolling"]["byte_perplexity"] for r in (*before, *after)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)
    assert perplexities[2] == pytest.approx(perplexities[3], rel=1e-5)
    assert not math.isclose(perplexities[0], perplexities[2], rel_tol=1e-3)


def test_the_users_tokenizer_is_left_as_it_is(both):
    both[1].harness_model()
    assert both[1].tokenizer.pad_token is None


def test_mistakes_get_one_line(both, tasks):
    ours, theirs = both
    with pytest.raises(ValueError, match=r"no tasks \['tiny_chioce'\]; `lm-eval ls tasks`.* YAML"):
        run_tasks(ours, [str(tasks / "tiny_choice.yaml"), "tiny_chioce"])
    refuses("lm-eval has no tasks", run_tasks, ours, [])
    refuses("pass tokenizer=", ShortHFModel(theirs.model).harness_model)
    model = ours.harness_model()
    with pytest.raises(ValueError, match=r"settings \{'num_beams': 4\} have no meaning"):
        model.generate_until(requests("generate_until", ("a", {"num_beams": 4})))
    with pytest.raises(ValueError, match="256 tokens to generate leave no room .* takes 64"):
        model.generate_until(requests("generate_until", ("a", {})))
    with pytest.raises(ValueError, match="65 to predict; this model takes .* 1 to 64"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 65)))


@pytest.mark.parametrize("error", [BrokenPipeError, ConnectionResetError])
def test_a_broken_pipe_is_not_the_hubs(lm_eval, both, tasks, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error("of a process")

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", fail)
    refuses("^of a process$", run_tasks, both[0], str(tasks / "tiny_choice.yaml"), error=error)


def test_a_connection_that_the_hub_resets_is_the_hubs(lm_eval, both, tasks, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RemoteDisconnected("without response")

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", fail)
    with pytest.raises(ConnectionError, match="on the hub, which cannot be reached"):
        run_tasks(both[0], str(tasks / "tiny_choice.yaml"))


def test_a_missing_package_is_named(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [*sys.modules]:
        if name.startswith("lm_eval."):
            monkeypatch.setitem(sys.modules, name, None)
    for act in (lambda model: model.harness_model(), lambda model: run_tasks(model, ["piqa"])):
        for model in both:
            refuses(r"tasks needs lm_eval .*pip install lm_eval$", act, model, error=ImportError)


# documents


def test_the_change_is_paired_over_the_documents():
    first, second = [1, 1, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 0, 1, 0]
    found = task_difference(first, second)
    changes = np.array(second) - np.array(first)
    assert found.change == changes.mean() == -0.25
    assert found.standard_error == pytest.approx(changes.std(ddof=1) / math.sqrt(8))
    assert (found.documents, found.better, found.worse) == (8, 1, 3)
    assert found.p == pytest.approx(scipy.stats.binomtest(1, 4).pvalue)


def test_equal_answers_differ_by_nothing_for_sure():
    found = task_difference([1, 0, 1], [1, 0, 1])
    assert (found.change, found.standard_error, found.p) == (0, 0, 1)


def test_values_that_are_no_answers_have_no_such_test():
    found = task_difference([-2.5, -1.0], [-3.0, -1.0])
    assert found.change == -0.25 and math.isnan(found.p)
    assert {*found.named("t perplexity")} == {"t perplexity change", "t perplexity change_stderr"}
    assert "t acc change_p" in task_difference([1, 0], [0, 0]).named("t acc")
    assert [*task_difference([1], [0]).named("t")] == ["t change", "t change_p"]  # no error of one


def test_documents_of_other_numbers_are_refused():
    refuses("values of the same documents, got 2 and 1", task_difference, [1, 0], [1])
    refuses("got 0 and 0", task_difference, [], [])


def test_only_what_both_have_is_compared():
    first = TaskRun({}, {"a": {"acc": [1, 0], "f1": [0.5, 0.5]}, "b": {"acc": [1]}})
    second = TaskRun({}, {"a": {"acc": [0, 0]}})
    assert task_changes(first, second)["a acc change"] == -0.5
    assert {name.split()[0] for name in task_changes(first, second)} == {"a"}


def test_documents_are_in_order_and_numbers_alone():
    rows = [
        {"doc_id": 10, "filter": "none", "metrics": ["acc", "word"], "acc": 1.0, "word": (1, 2)},
        {"doc_id": 2, "filter": "none", "metrics": ["acc", "word"], "acc": 0.0, "word": (3, 4)},
        {"doc_id": 2, "filter": "strict", "metrics": ["acc"], "acc": 1},
    ]
    assert documents_of({"t": rows}) == {"t": {"acc": [0.0, 1.0], "acc,strict": [1.0]}}


def test_a_measure_of_one_model_stands_in_its_column():
    rows = comparison({"whole": {"layers": 3.0}, "cut": {"layers": 2.0, "x change": -0.5}})
    assert rows.splitlines()[-1].endswith("-0.5")
    assert rows.splitlines()[-1].index("-0.5") > rows.splitlines()[1].index("3")


def test_the_mean_over_documents_is_the_harness_metric(both, tasks):
    suite = TaskSuite([str(tasks / f"tiny_{kind}.yaml") for kind in ("choice", "generate")])
    found = suite.documents(both[0])
    for task, metric in (("tiny_choice", "acc"), ("tiny_choice", "acc_norm")):
        values = found.documents[task][metric]
        assert len(values) == 6 and {*values} <= {0.0, 1.0}
        assert np.mean(values) == pytest.approx(found.metrics[task][metric])
    assert found.documents["tiny_generate"]["exact_match"]
    theirs = suite.documents(both[1])
    assert theirs.documents == found.documents
    assert found.named()["tiny_choice acc"] == found.metrics["tiny_choice"]["acc"]
    assert all(v == 0 for k, v in task_changes(found, theirs).items() if k.endswith("change"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task: mine\ngroup: ours", "mine"),
        ("group: ours\ntask:\n  - a\n  - b", "ours"),
        ("task: [a, b]\ngroup: ours", "ours"),
        ("task: 'my own # task'  # quoted", "my own # task"),
        ("dataset_path: json", "file"),
    ],
)
def test_the_name_of_a_task_is_that_in_its_file(tmp_path, text, name):
    (tmp_path / "file.yaml").write_text(text)
    assert _name(str(tmp_path / "file.yaml")) == name


def test_of_the_folder_of_a_task_only_its_own_files_count(tmp_path):
    path, data = tmp_path / "mine.yaml", tmp_path / "docs.jsonl"
    path.write_text("task: mine\ndataset_kwargs: {data_files: docs.jsonl}")
    data.write_text("{}")
    suite = TaskSuite(str(path))
    first = suite.identity()
    (tmp_path / "model.safetensors").write_text("weights")
    assert suite.identity() == first
    data.write_text("{1}")
    assert suite.identity() != first
