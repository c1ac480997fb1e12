"""Two models on the same documents of tasks: changes as worked out by hand and by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from test_harness import pair as made

from short_gpt.cli.tables import comparison
from short_gpt.evaluation.tasks import (
    TaskRun,
    TaskSuite,
    _name,
    documents_of,
    task_changes,
    task_difference,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return made(tmp_path_factory.mktemp("pair"), bos=True)


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
    with pytest.raises(ValueError, match="values of the same documents, got 2 and 1"):
        task_difference([1, 0], [1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        task_difference([], [])


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


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.filterwarnings("default")
def test_the_mean_over_documents_is_the_harness_metric(pair, tasks):
    suite = TaskSuite([str(tasks / f"tiny_{kind}.yaml") for kind in ("choice", "generate")])
    found = suite.documents(pair[0])
    for task, metric in (("tiny_choice", "acc"), ("tiny_choice", "acc_norm")):
        values = found.documents[task][metric]
        assert len(values) == 6 and {*values} <= {0.0, 1.0}
        assert np.mean(values) == pytest.approx(found.metrics[task][metric])
    assert found.documents["tiny_generate"]["exact_match"]
    theirs = suite.documents(pair[1])
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
