"""Tasks on the real small model: ours and lm-eval's own class for transformers, by document.

The documents are a few of each task's kind; with a folder of more in SHORT_GPT_TASKS (piqa.jsonl,
arc_easy.jsonl, winogrande.jsonl and lambada_openai.jsonl as `benchmarks/lib/task_files.py` reads
them) the first 100 of each are asked as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from llama import Llama
from short_gpt import ShortHFModel, ShortLlama
from short_gpt.data import demo
from short_gpt.evaluation.harness import harness
from short_gpt.evaluation.tasks import TaskSuite, task_changes

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]
QUESTIONS = [
    ("How do I keep soup warm?", ["Pour it into a flask.", "Pour it into a sieve."], 0),
    ("Which of these is a planet?", ["the Moon", "Mars", "Sirius", "a comet"], 1),
    ("What do plants take from the air?", ["carbon dioxide", "helium", "iron"], 0),
]
PAIRS = [
    ("The cup did not fit into the box because the {} was too", ["cup", "box"], "large.", 0),
    ("Ann thanked Eve for the help that {} had", ["Ann", "Eve"], "given.", 1),
]


def write_documents(folder: Path) -> None:
    """A few documents of every task, in the files' form."""
    rows = {
        "piqa": [
            {"query": f"Question: {q}\n", "choices": c[:2], "gold": min(g, 1)}
            for q, c, g in QUESTIONS
        ],
        "arc_easy": [{"query": f"Question: {q}", "choices": c, "gold": g} for q, c, g in QUESTIONS],
        "winogrande": [
            {"context_options": [t.format(o) for o in own], "continuation": end, "gold": gold}
            for t, own, end, gold in PAIRS
        ],
        "lambada_openai": [
            {"context": " ".join(words[:60]), "continuation": words[60]}
            for words in (book.split() for book in demo.bible("held_out")[:6])
        ],
    }
    for name, documents in rows.items():
        lines = "".join(json.dumps(d) + "\n" for d in documents)
        folder.joinpath(f"{name}.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def models():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, file = demo.checkpoint(), demo.gguf_file()
    ours = Llama.build(directory, directory / "tokenizer.json", 1024, 8, device="cpu")
    place = {"gguf_file": file.name}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, **place, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(file.parent, **place)
    return ShortLlama(ours), ShortHFModel(theirs.eval(), tokenizer=words)


@pytest.fixture(params=["a few", "SHORT_GPT_TASKS"])
def suite(request, tmp_path) -> TaskSuite:
    from benchmarks.lib import task_files

    source = tmp_path
    if request.param == "a few":
        write_documents(tmp_path)
    elif not os.environ.get(request.param):
        pytest.skip("SHORT_GPT_TASKS names no folder of documents")
    else:
        source = Path(os.environ[request.param])
    (folder := tmp_path / "made").mkdir()
    names = task_files.write(source, folder)
    return TaskSuite(names, limit=100, include_path=str(folder), batch_size=8)


def asked(suite: TaskSuite, model: ShortLlama | ShortHFModel) -> dict[tuple, tuple[float, bool]]:
    """Nats, and whether greedy decoding gives it, of every request by task, document and number."""
    from lm_eval.tasks import TaskManager

    done = harness("evaluator").simple_evaluate(
        model.harness_model(batch_size=suite.batch_size),
        tasks=list(suite.tasks),
        limit=suite.limit,
        task_manager=TaskManager(include_path=suite.include_path),
    )
    return {
        (task, row["doc_id"], i): response[0]
        for task, rows in done["samples"].items()
        for row in rows
        for i, response in enumerate(row["resps"])
    }


def test_every_request_and_answer_is_that_of_lm_evals_own_class(lm_eval, models, suite):
    ours, theirs = (asked(suite, model) for model in models)
    assert ours.keys() == theirs.keys() and len({task for task, *_ in ours}) == 4
    for key, (nats, greedy) in ours.items():
        assert float(nats) == pytest.approx(float(theirs[key][0]), abs=1e-3), key
        assert str(greedy) == str(theirs[key][1]), key
    first, second = (suite.documents(model) for model in models)
    for task, metrics in first.documents.items():
        for metric, values in metrics.items():
            if metric != "perplexity":
                assert values == second.documents[task][metric]
    changes = task_changes(first, second)
    assert all(abs(v) < 1e-3 for name, v in changes.items() if name.endswith(" change"))
