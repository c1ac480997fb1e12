"""What the commands do, called from Python: results come back, nothing is printed."""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import shutil
import signal
import string
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DATA, TEXT, run
from conftest import BYTE_VOCAB, interrupted, make_transformer, refuses, save_byte_llama, zero_layer

import short_gpt
from short_gpt import ShortGPTError, convert, jobs, open_model, prune, rank, shrink, windows
from short_gpt.evaluation.distance import Reference
from short_gpt.evaluation.perplexity import Perplexity
from short_gpt.evaluation.tasks import TaskRun, TaskSuite
from short_gpt.healing import RefitSettings, lora
from short_gpt.healing.settings import Cases
from short_gpt.jobs import SavedScores, evaluate, heal, ranking, reproduce
from short_gpt.jobs.inputs import Tasks
from short_gpt.models.layer_calls import PartialRun
from short_gpt.selection.settings import Answer, Choice
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

LEARNING = {"eval_data": "other.txt", "size": 32, "max_windows": 8, "eval_windows": 4}
CUT: dict[str, Any] = {"size": 32, "max_windows": 6, "stride": 16}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A random model whose layer 2 does nothing, and a text."""
    model = make_transformer(vocab_size=BYTE_VOCAB)
    zero_layer(model, 2)
    save_byte_llama(tmp_path / "ckpt", model)
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_layer_that_does_nothing_is_ranked_first_and_pruned(here, capsys):
    result = rank("ckpt", "book.txt", n=1, **CUT)
    assert result.layers == [2] and result.importance.block_influence[2] < 1e-6
    # six windows of 38: too few for the rule's first look
    assert (result.verdict.windows, result.verdict.population) == (6, 38)
    assert not result.verdict.settled and result.to_dict()["settled"]["settled"] is False
    done = prune("ckpt", "small", layers=result.layers)
    assert done.layers == [2] and done.out == Path("small") and done.proof is None
    assert repr(done) == "PruneResult(small, layers removed [2])"
    rows = evaluate(["ckpt", "small"], data="book.txt", size=32)
    assert rows["small"]["book.txt perplexity"] == rows["ckpt"]["book.txt perplexity"]
    assert capsys.readouterr().out == ""


def test_what_a_job_finds_is_what_the_command_writes(here, capsys):
    run("rank", "ckpt", "--data", "book.txt", "--size", 32, "--stride", 16, "--max_windows", 6,
        "--n", 2, "--method", "reverse", "--json", "r.json")  # fmt: skip
    result = rank("ckpt", "book.txt", n=2, method="reverse", **CUT)
    written = json.loads(Path("r.json").read_text())
    assert written["importance"] == json.loads(json.dumps(result.to_dict()["importance"]))
    scores = SavedScores.read("r.json")
    assert scores.layers(2) == result.layers == [4, 3] and scores.method == "reverse"
    done = prune("ckpt", "small", scores="r.json", n=2)
    assert done.layers == [4, 3]
    assert json.loads(Path("small/pruning.json").read_text())["data"] == "book.txt"


def test_states_of_searches_that_differ_are_told_apart(here):
    how = {**CUT, "max_windows": 8, "state": "state", "n": 2}
    with interrupted(PartialRun, "logits", 3):
        rank("ckpt", "book.txt", method="perplexity", **how)
    refuses("method: 'perplexity', now 'sleb'", rank, "ckpt", "book.txt", method="sleb", **how)


def test_notify_is_told_what_a_streamed_run_takes(here, capsys):
    told: list[str] = []
    given = {**CUT, "device": "cpu", "notify": told.append}
    result = rank("ckpt", "book.txt", stream="900GB", **given)
    assert len(told) == 1 and told[0].startswith("one layer at a time, ")
    again = rank("ckpt", "book.txt", **given)
    assert len(told) == 1
    ours, theirs = result.importance.block_influence, again.importance.block_influence
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    out = capsys.readouterr()
    assert out.out == "" and "one layer" not in out.err


def test_heal_gives_the_evidence_and_prints_nothing(here, capsys):
    Path("other.txt").write_text("".join(chr(97 + i * i % 26) for i in range(400)))
    told: list[str] = []
    given = {"data": "book.txt", **LEARNING, "notify": told.append}
    done = heal("ckpt", "out", heal_by="patch", layers=[1], **given)
    values = r"original, 5 layers \d+\.\d{3}; pruned, 4 layers \S+; healed \S+"
    assert re.fullmatch(rf"HealingResult\(out, perplexity: {values}\)", repr(done))
    assert told[0].startswith("original, 5 layers: perplexity ")  # the table's word
    names = ["original, 5 layers", "pruned, 4 layers", "healed"]
    assert list(done.evidence.perplexity) == names and done.evidence.how["method"] == "patch"
    _, pruned, healed = (found.value for found in done.evidence.perplexity.values())
    assert done.evidence.change.nats == pytest.approx(math.log(healed / pruned), abs=1e-5)
    assert done.to_dict()["data"] == "book.txt" and done.to_dict()["size"] == 32
    assert capsys.readouterr().out == ""


def test_a_healed_model_keeps_the_scores_that_chose_its_layers(here):
    Path("other.txt").write_text("".join(chr(97 + i * i % 26) for i in range(400)))
    run("rank", "ckpt", *DATA, "--max_windows", 6, "--json", "r.json")
    heal("ckpt", "out", scores="r.json", n=1, data="book.txt", **LEARNING)
    found = json.loads(Path("out/pruning.json").read_text())
    scores = SavedScores.read("r.json").importance
    assert found["block_influence"] == scores.block_influence.tolist()
    assert found["scored"] == {"windows": scores.n_windows, "tokens": scores.n_tokens}


def test_lora_that_was_interrupted_continues_by_the_same_call(here, monkeypatch):
    letters = random.Random(0).choices(string.ascii_lowercase, k=1800)  # no run of them comes twice
    Path("book.txt").write_text("".join(letters[:900]))
    Path("other.txt").write_text("".join(letters[900:]))
    calls, plain = [], lora.heal_run
    windows = {**LEARNING, "eval_data": "book.txt", "eval_windows": 2}
    settings = {"steps": 2, "warmup": 0, "eval_every": 1, "rank": 2, "micro_batch": 2}
    settings["batch_size"] = 2

    def interrupted(short, run, evaluation):
        calls.append([*Path("out.training").rglob("checkpoint-*")])
        done = plain(short, run, evaluation)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return done

    def healed(settings):
        how = {"data": "other.txt", **windows, "recipe": settings}
        return heal("ckpt", "out/", heal_by="lora", layers=[1], **how)

    monkeypatch.setattr(lora, "heal_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        healed(settings)
    refuses("another rank: 2, now 1; go on with", healed, {**settings, "rank": 1})
    assert healed(settings).evidence.how["steps"] == 2
    assert [bool(begun) for begun in calls] == [False, True, True] and Path("out").is_dir()
    assert not Path("out.training").exists()


def test_other_shards_hold_the_same_history(here):
    prune("ckpt", "small", layers=[2])
    convert("small", "two", shards=2)
    one, two = (json.loads(Path(f"{name}/pruning.json").read_text()) for name in ("small", "two"))
    one.pop("files")  # true of its own directory alone
    assert one == two


def test_evaluate_and_convert(here, monkeypatch):
    assert convert("ckpt", "hf") == Path("hf") and Path("hf/model.safetensors").is_file()
    prune("ckpt", "small", layers=[2])
    told = []
    monkeypatch.setattr(Reference, "read", lambda *_, **__: 1 / 0)  # one pass gives both
    found = evaluate(["ckpt", "small"], data="book.txt", size=32, notify=told.append)
    short = open_model("ckpt")
    value = short.perplexity(windows([TEXT], short.encode, size=32, stride=32))
    low, high = value.interval()
    expected = {"book.txt perplexity": value.value}
    expected |= {"book.txt perplexity_low": low, "book.txt perplexity_high": high}
    assert found["ckpt"] == {"layers": 5, **expected}
    assert found["small"] == {  # layer 2 did nothing
        "layers": 4,
        **expected,
        "book.txt KLD, nats a token": 0.0,
        "book.txt KLD, nats a token_stderr": 0.0,
        "book.txt same top token": 1.0,
        "book.txt same top token_stderr": 0.0,
        "book.txt nats change": 0.0,
        "book.txt nats change_stderr": 0.0,
    }
    assert told == [f"book.txt: 95% intervals of perplexities over {value.error.over}"]


def test_heads_of_other_sizes_have_no_divergence(here):
    """Such as two sizes of one family, whose vocabularies are padded differently."""
    convert("ckpt", "hf")
    model = ShortHFModel("hf").model
    model.resize_token_embeddings(model.config.vocab_size + 8)
    shutil.copytree("hf", "padded")
    model.save_pretrained("padded")
    found = evaluate(["hf", "padded"], data="book.txt", size=32)["padded"]
    assert "book.txt nats change" in found
    assert not any("KLD" in measure for measure in found)


@pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
def test_what_was_measured_before_an_error_is_told(here, monkeypatch, error):
    """Also of a model whose own tasks did not fail."""
    prune("ckpt", "small", layers=[2])
    runs, told = [TaskRun({})], []

    def next_run(*_: object, **__: object) -> TaskRun:
        if not runs:
            raise error
        return runs.pop()

    monkeypatch.setattr(Tasks, "run", next_run)
    models = (Path(name) for name in ("ckpt", "small"))
    with pytest.raises(error):
        evaluate(models, data=Path("book.txt"), size=32, notify=told.append)
    named = [line.split(", ")[0] for line in told if "measured" in line]
    assert named == [
        "measured of ckpt before this ended: layers 5",
        "measured of small before this ended: layers 4",
    ]


def test_evaluate_judges_each_of_several_files_and_reads_a_column(here):
    prune("ckpt", "small", layers=[1])
    book = Path("book.txt").read_text()
    Path("rows.jsonl").write_text(json.dumps({"prose": book[::-1]}))
    reading = {"data": "book.txt,rows.jsonl", "column": "prose", "size": 32, "max_windows": 5}
    found = evaluate(["ckpt", "small"], **reading)
    for name, text in (("book.txt", book), ("rows.jsonl", book[::-1])):
        losses = []
        for model in ("ckpt", "small"):
            short = open_model(model)
            own = [*islice(windows([text], short.encode, size=32, stride=32), 2)]
            measured = short.perplexity(own, progress=False)
            assert found[model][f"{name} perplexity"] == pytest.approx(measured.value)
            losses.append(measured.nats / measured.tokens)
        change = found["small"][f"{name} nats change"]
        assert change == pytest.approx(losses[1] - losses[0], abs=1e-6) and change
    with pytest.raises(ShortGPTError, match="`max_windows` = 1: expected at least one for each of"):
        evaluate("ckpt", **{**reading, "max_windows": 1})
    refuses("max_windows = 0: expected", evaluate, "ckpt", data="book.txt", size=32, max_windows=0)


def test_evaluate_reads_so_many_windows_at_once(here, monkeypatch):
    asked = []

    def perplexity(short, windows, *, batch_size=1, reference=None):
        asked.append((batch_size, short.decoder.model.params.max_batch_size))
        return Perplexity(1.0, 1, 1)

    def suite(self):
        asked.append(self.batch_size)
        return TaskRun({})

    monkeypatch.setattr(ShortLlama, "perplexity", perplexity)
    monkeypatch.setattr(TaskSuite, "documents", lambda self, short: suite(self))
    monkeypatch.setattr(Tasks, "check", lambda self: None)
    evaluate("ckpt", data="book.txt", size=32, batch_size=4, tasks="piqa")
    assert asked == [(4, 4), 4]


def test_a_choice_names_layers_or_scores(here):
    refuses("expected either `layers`, as in 21,22,23, or `scor", Choice([1], "r.json").checked)
    refuses("no method 'best'", Choice(scores="r", method="best").checked)
    refuses("`n` chooses from `scores`", prune, "ckpt", "x", layers=[1], n=1)


def test_names_are_read_with_or_without_spaces():
    assert Tasks("piqa, arc_easy ,boolq").names == ["piqa", "arc_easy", "boolq"]
    cases = Cases("bi, sleb", 2, "raw, refit")
    assert (cases.methods, cases.counts, cases.healings) == (["bi", "sleb"], [2], ["raw", "refit"])


def test_settings_are_refused_before_a_model_is_loaded(here):
    refuses("n = 5; the model has 5 layers: expected 1 to 4", rank, "ckpt", "no such text", n=5)
    refuses("`method` sleb needs `n`", Answer, method="sleb")
    with pytest.raises(ShortGPTError, match="n, or use choose"):
        _ = rank("ckpt", "book.txt", **CUT).layers


# The names of the package


def test_every_public_name_is_described_with_an_example():
    assert sorted(short_gpt.__all__, key=str.lower) == sorted(set(short_gpt.__all__), key=str.lower)
    for name in short_gpt.__all__:
        text = getattr(short_gpt, name).__doc__ or ""
        assert len(text.split("\n")[0]) > 10 and ">>> " in text, name


@pytest.mark.parametrize("method", ["sleb", "perplexity"])
@pytest.mark.parametrize("change", ["book.txt", "ckpt/tokenizer.json"])
def test_a_search_on_text_that_changed_in_its_place_is_refused(here, method, change):
    """Also by another tokenizer: what counts is the token ids that were read."""

    def search():
        return rank("ckpt", "book.txt", n=2, method=method, **CUT, state="state")

    with interrupted(PartialRun, "logits", 3):
        search()
    if change == "book.txt":
        Path(change).write_text(TEXT.replace("e", "o"))
    else:
        tokenizer = json.loads(Path(change).read_text())
        words = tokenizer["model"]["vocab"]
        words["e"], words["t"] = words["t"], words["e"]
        Path(change).write_text(json.dumps(tokenizer))
    before = Path("state").read_bytes()
    for _ in range(2):
        refuses("state is the state of a run with another text: ", search)
        assert Path("state").read_bytes() == before


def test_an_automatic_choice_does_not_go_on_with_another_refit(here, monkeypatch):
    def search():
        rank("ckpt", TEXTS, n=2, method="auto", size=16, max_windows=16, state="state")

    with interrupted(PartialRun, "logits", 3):
        search()
    monkeypatch.setattr(ranking, "RefitSettings", partial(RefitSettings, lost=None))
    refuses("a run with another refit: .*'lost': 2.0", search)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rank("ckpt", max_window=3), "no setting 'max_window': did you mean max_w"),
        (lambda: rank("ckpt", nothing_at_all=3), r"no setting 'nothing_at_all'; see help\(rank\)"),
        (lambda: heal("ckpt", "o", stride=3), "heal has no setting 'stride'"),
        (lambda: reproduce("ckpt", siz=3), "reproduce has no setting 'siz': did you mean size"),
        (lambda: rank("ckpt", {"a", "b"}), "expected a list of texts or a datasets.Dataset, got a"),
        (lambda: evaluate(["ckpt"], sise=3), "evaluate has no setting 'sise': did you mean size"),
    ],
)  # fmt: skip
def test_an_unknown_setting_is_named_with_the_nearest(call, said):
    refuses(said, call)


@pytest.mark.parametrize("value", ["3", [0.5], {}])
def test_a_setting_that_is_a_number_takes_no_text(value):
    for name, call in (
        ("ratio", lambda **own: shrink("ckpt", "o", **own)),
        ("max_kld", lambda **own: shrink("ckpt", "o", **own)),
        ("ridge", lambda **own: heal("ckpt", "o", layers=[1], **own)),
    ):
        refuses(rf"`{name}` = {re.escape(repr(value))}: expected", call, **{name: value})


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), 5, None])
def test_a_job_that_reads_files_says_where_a_loaded_model_goes(model):
    for call in (
        lambda: prune(model, "out", layers=[1]),
        lambda: heal(model, "out", layers=[1]),
        lambda: evaluate([model]),
        lambda: evaluate(model),
        lambda: convert(model, "out"),
    ):
        said = f"source = {type(model).__name__!r}: expected the name of a directory"
        refuses(said, call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jobs.generate("ckpt", "The", temperature="hot"), "temperature` = 'hot': expected"),
        (lambda: heal("ckpt", "o", layers=[1], data="book.txt", seed=None), "seed = None"),
        (lambda: rank("ckpt", "book.txt:train", n=1), "'book.txt' is one file, which has no sp"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(here, call, message):
    refuses(message, call)
    assert sorted(path.name for path in here.iterdir()) == ["book.txt", "ckpt"]


def test_a_dry_run_leaves_the_folder_of_a_running_shrink_as_it_is(here):
    folder = Path("out.shrinking")
    folder.mkdir()
    for name in ("plan.json", "self-0.json"):
        (folder / name).write_text("{}")
    letters = random.Random(0).choices(string.ascii_letters, k=4000)
    how = {"n": 1, "size": 32, "max_windows": 8, "eval_windows": 4, "method": "bi"}
    data = ["".join(letters[:2000]), "".join(letters[2000:])]
    shrink("ckpt", "out", data=data, **how, dry_run=True)
    assert (folder / "self-0.json").is_file()


def test_compare_leaves_out_windows_that_it_evaluates_on(here):
    Path("more.txt").write_text(TEXT + "".join(reversed(TEXT)))
    how = {"size": 32, "max_windows": 24, "eval_windows": 3, "method": "bi", "n": 1}
    result = jobs.compare_checkpoint("ckpt", "more.txt", eval_data="book.txt", heal_by="raw", **how)
    assert [row.n for row in result.rows] == [0, 1]


def test_a_job_shows_its_signature_in_help():
    shown, parameters = str(inspect.signature(rank)), inspect.signature(rank).parameters
    assert "size: int | None = 1024" in shown and "**" not in shown
    assert [*parameters][:2] == ["model", "data"] and "stride: int | None = 256" in shown
    assert "\n    size: Tokens in a window.\n" in inspect.getdoc(rank)
    assert "\n    stride: Tokens between the starts of windows.\n" in inspect.getdoc(rank)
    assert "\n    max_windows: Windows to read, the first ones. " in inspect.getdoc(evaluate)
    assert inspect.getdoc(evaluate).count("\n    data: ") == 1
    assert "eval_data" not in parameters


TEXTS = [" ".join(f"{(n + 3) * (i + 7) % 997} {n}" for i in range(40)) for n in range(8)]


@pytest.fixture
def dataset():
    return pytest.importorskip("datasets").Dataset.from_dict({"body": TEXTS, "n": [*range(8)]})


def test_texts_in_memory_are_read_as_those_of_files(here, dataset):
    Path("docs").mkdir()
    for number, text in enumerate(TEXTS):
        Path("docs", f"{number}.txt").write_text(text)
    how = {"n": 2, "size": 16, "stride": 16, "max_windows": 9}
    rows = [{"body": text} for text in TEXTS]
    scores = [
        rank("ckpt", "docs", **how),
        rank("ckpt", TEXTS, **how),
        rank("ckpt", dataset, column="body", **how),
        rank("ckpt", rows, column="body", **how),
        rank("ckpt", (text for text in TEXTS), **how),
    ]
    assert all(one.importance.to_dict() == scores[0].importance.to_dict() for one in scores)
    refuses("`data` names docs twice: name it once", rank, "ckpt", "docs,docs", size=16)
    refuses("`data` names docs twice: name it once", evaluate, ["ckpt"], data="docs,docs", size=16)
    rows = [evaluate(["ckpt"], data=data, size=16) for data in ("docs", TEXTS)]
    assert [*rows[0]["ckpt"].values()] == [*rows[1]["ckpt"].values()]


def test_a_saved_run_on_other_texts_in_memory_is_another(here, dataset):
    how = {"size": 16, "column": "body", "state": "state"}
    rank("ckpt", dataset, **how)
    assert rank("ckpt", dataset, **how).importance.n_texts == 8  # continued
    refuses("data", rank, "ckpt", dataset.select(range(3)), **how)
    refuses("data", rank, "ckpt", TEXTS, **how)


def test_jobs_that_heal_and_compare_take_texts_in_memory(here, dataset):
    how = {"layers": [1], "size": 16, "max_windows": 4, "eval_windows": 2, "device": "cpu"}
    done = heal("ckpt", "out", data=dataset, column="body", eval_data=[{"body": TEXT}], **how)
    assert done.evidence.perplexity["healed"].windows == 2
    name = json.loads(Path("out/pruning.json").read_text())["data"]
    assert name.startswith("Dataset ") and done.texts["eval_data"].startswith("list ")
    few = {"method": "bi", "n": 1, "heal_by": "raw", "size": 16, "device": "cpu"}
    result = jobs.compare_checkpoint("ckpt", TEXTS, **few)
    assert [row.n for row in result.rows] == [0, 1]
    del few["n"]  # by default, as many of 2, 4, 8 and 12 as the 5 layers allow
    result = jobs.compare_checkpoint("ckpt", TEXTS, **few)
    assert [row.n for row in result.rows] == [0, 2, 4]
    few |= {"method": "sleb"}  # which keeps the first and the last layer
    assert [row.n for row in jobs.compare_checkpoint("ckpt", TEXTS, **few).rows] == [0, 2]
    refuses("4; .* 5 layers: expected 1 to 3", jobs.compare_checkpoint, "ckpt", TEXTS, n=4, **few)


def test_a_ranking_shows_what_goes(here):
    result = rank("ckpt", "book.txt", n=2, size=32, max_windows=6, stride=16)
    assert repr(result).startswith(f"Ranking(bi: {result.layers}, Importance(5 layers, 6 windows")
    assert repr(result).endswith(", NOT settled)")
    assert [i for i, gone in zip(result.columns["layer"], result.columns["remove"], strict=True)
            if gone] == sorted(result.layers)  # fmt: skip
    assert result._repr_html_().count("<td>True</td>") == 2
    frame = pytest.importorskip("pandas").DataFrame(result.columns).set_index("layer")
    assert result.to_dataframe().equals(frame) and frame.query("remove").index.size == 2
    plain = rank("ckpt", "book.txt", size=32, max_windows=6)
    assert repr(plain).startswith("Ranking(bi, ") and "remove" not in plain.columns
    searched = rank("ckpt", "book.txt", n=2, method="sleb", size=32, max_windows=2)
    assert repr(searched) == f"Ranking(sleb: {searched.layers})"
    assert searched.columns["layer"] == searched.layers
    losses = [searched.search.losses[i][layer] for i, layer in enumerate(searched.layers)]
    assert searched.columns["loss"] == losses
    nearest = rank("ckpt", "book.txt", n=1, method="greedy_kld", size=32, max_windows=2)
    assert nearest.columns["kld"] == [loss for _, loss in nearest.search.steps]
    refitted = rank("ckpt", TEXTS, n=2, method="auto", size=16)
    assert repr(refitted) == f"Ranking(auto: {refitted.layers})"
    assert refitted.columns["layers"] == [one.layers for one in refitted.choice.candidates]
    assert f"<td>{refitted.columns['kld'][0]:.4g}</td>" in refitted._repr_html_()


def test_the_package_says_its_version_and_shows_what_is_public():
    assert short_gpt.__version__ == version("short-gpt")
    assert dir(short_gpt) == sorted([*short_gpt.__all__, "__version__"])


CHATS = [
    [
        {"role": "user", "content": f"What is {n}?", "more": n},
        {"role": "assistant", "content": f"It is {n} and {n * n}. " * 3},
    ]
    for n in range(8)
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def chatty(here):
    """The model in Hugging Face's format with a chat template, and conversations."""
    convert("ckpt", "hf", to="hf")
    config = json.loads(Path("hf/tokenizer_config.json").read_text())
    Path("hf/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    lines = (json.dumps({"messages": turns}) for turns in CHATS)
    Path("chats.jsonl").write_text("\n".join(lines))


def test_conversations_are_read_as_the_template_renders_them(chatty):
    rendered = ["".join(f"<{m['role']}>{m['content']}" for m in turns) for turns in CHATS]
    how = {"size": 16, "stride": 16, "device": "cpu"}  # the tokenizer writes bos, as the template
    read = rank("hf", rendered, **how).importance
    expected = read.to_dict()
    for data in ("chats.jsonl", [{"messages": turns} for turns in CHATS]):
        assert rank("hf", data, column="messages", **how).importance.to_dict() == expected
    convert("hf", "model.gguf")
    for data, how in (("chats.jsonl", {"column": "messages"}), (rendered, {})):
        gguf = rank("model.gguf", data, size=16, stride=16, device="cpu", **how)
        assert torch.allclose(gguf.importance.influence, read.influence, rtol=1e-4)
    ours = evaluate(["hf"], data="chats.jsonl", column="messages", size=16)["hf"]
    plain = evaluate(["hf"], data=rendered, size=16)["hf"]
    assert [*ours.values()] == [*plain.values()]
    chats = ("--data", "chats.jsonl", "--column", "messages", "--size", 16, "--stride", 16)
    run("rank", "hf", *chats, "--json", "r.json", "--device", "cpu")
    assert SavedScores.read("r.json").importance.to_dict() == expected


def test_conversations_are_refused_without_a_template(chatty, capsys):
    needs = "a conversation needs a model with a chat template"
    for model, more in (("ckpt", {}), ("ckpt", {"stream": True}), ("hf", {"stream": True})):
        refuses(needs, rank, model, "chats.jsonl", column="messages", size=16, **more)
    with pytest.raises(ShortGPTError, match="chat template of hf refuses .*: no tools"):
        rank("hf", [{"messages": [{"role": "tool", "content": "x"}]}], column="messages")
    config = json.loads(Path("hf/tokenizer_config.json").read_text())
    del config["chat_template"]
    Path("hf/tokenizer_config.json").write_text(json.dumps(config))
    refuses(needs, rank, "hf", "chats.jsonl", column="messages", size=16)
    with pytest.raises(ShortGPTError, match="column 'messages' holds .*, expected text"):
        rank("hf", [{"messages": [{"role": "user"}]}], column="messages")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_before_the_model_is_opened_its_state_is_checked_and_a_request_to_end_counts(
    here, monkeypatch, name
):
    number = getattr(signal, name)

    def opened(*_, **__):
        signal.raise_signal(number)

    monkeypatch.setattr(ranking, "open_model", opened)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        rank("ckpt", Path("book.txt"), size=32)
    assert signal.getsignal(number) is before
    signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(AttributeError):  # what `opened` returns is no model
            rank("ckpt", "book.txt", size=32)
    finally:
        signal.signal(number, before)
    with pytest.raises(PermissionError, match="book.txt is not a writable directory"):
        rank("ckpt", "book.txt", size=32, state="book.txt/state")


def test_a_job_in_a_thread_raises_its_own_error_alone(here):
    with ThreadPoolExecutor(1) as threads:
        error = threads.submit(rank, "none", "book.txt").exception()
    assert isinstance(error, FileNotFoundError) and error.__context__ is None
