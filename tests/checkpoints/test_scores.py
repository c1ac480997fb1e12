"""Saved scores belong to the model that was scored; what no model can give is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import DATA, fails, run
from conftest import BYTE_VOCAB, make_transformer, refuses, save_byte_llama
from gguf_files import stack_file

from llama.files import new_directory
from llama.formats.hf import meta_to_hf
from short_gpt import ShortGPTError, ShortLlama, rank
from short_gpt.checkpoints.scores import (
    chosen,
    configuration_of,
    digests_of,
    tokenizer_of,
    weights_of,
)
from short_gpt.jobs import SavedScores, ranking
from short_gpt.runtime.state import write_record

LEARNED = ("--data", "book.txt", "--eval_data", "held.txt", "--size", 32, "--max_windows", 4)


@pytest.fixture
def here(ckpt) -> Path:
    (ckpt.parent / "held.txt").write_text("".join(chr(97 + i * i % 26) for i in range(400)))
    return ckpt.parent


def ranked(model: str, file: str, *options: object) -> dict:
    run("rank", model, *DATA, "--max_windows", 6, "--json", file, *options)
    return json.loads(Path(file).read_text())


def rewritten(record: dict, file: str) -> None:
    """Writes other scores as the library writes them, with their own digest."""
    known = ("sha256", "versions", "machine")
    write_record(file, {k: v for k, v in record.items() if k not in known}, overwrite=True)


def test_a_model_in_parts_is_told_by_all_of_them(tmp_path):
    """Any part stands for the model; one byte of any other makes it another model."""
    stack_file(tmp_path / "m.gguf", split=6)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    first = weights_of(str(parts[0]))
    assert len(parts) == 3 and first is not None
    for changed in parts:
        whole = changed.read_bytes()
        changed.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        found = {weights_of(str(part)) for part in parts}
        assert len(found) == 1 and first not in found
        changed.write_bytes(whole)
    assert {weights_of(str(part)) for part in parts} == {first}
    parts[1].unlink()
    refuses("m-00002-of-00003.gguf, one of 3", weights_of, str(parts[0]), error=FileNotFoundError)


def refused(model: str, file: str = "r.json") -> str:
    with pytest.raises(ShortGPTError) as error:
        chosen(model, scores=file, n=1)
    return str(error.value)


@pytest.mark.parametrize("options", [(), ("--method", "sleb", "--n", 2)])
def test_scores_of_other_weights_are_refused_and_told(here, capsys, options):
    save_byte_llama(Path("other"), make_transformer(1, vocab_size=BYTE_VOCAB))
    record = ranked("ckpt", "r.json", *options)
    ours, theirs = weights_of("ckpt"), weights_of("other")
    assert record["scored"] == digests_of("ckpt") and ours != theirs
    assert f"r.json holds scores of the weights {ours}, other has {theirs}: score" in refused(
        "other"
    )
    capsys.readouterr()
    for command, more in (("prune", ()), ("heal", LEARNED)):
        line = fails(capsys, command, "other", "out", "--scores", "r.json", "--n", 1, *more)
        assert "r.json holds scores of the weights" in line and not Path("out").exists()
    shutil.copytree("ckpt", "moved")  # a path is no identity
    assert chosen("moved", scores="r.json", n=1).unchecked is None


def test_scores_that_name_no_weights_are_read_and_said_not_to_be_checked(here, capsys):
    """As those of a model in memory."""
    record = ranked("ckpt", "r.json")
    record.pop("scored")
    rewritten(record, "r.json")
    capsys.readouterr()
    for command, more in (("prune", ()), ("heal", LEARNED)):
        run(command, "ckpt", command, "--scores", "r.json", "--n", 1, *more)
        said = capsys.readouterr().out
        assert "not checked: r.json does not say of which model its scores are" in said


@pytest.mark.parametrize("model", ["ckpt", "hf"])
def test_scores_of_another_tokenizer_are_refused_and_told(here, model):
    meta_to_hf("ckpt", "hf")
    record = ranked(model, "r.json")
    config = Path(model, "tokenizer_config.json")
    changed(config, chat_template="{{ messages }}")  # of other use
    chosen(model, scores="r.json", n=1)
    changed(config, add_bos_token=False)
    ours, theirs = record["scored"]["tokenizer"], tokenizer_of(model)
    assert f"scores of the tokenizer {ours}, {model} has {theirs}: score it by" in refused(model)


def test_ranks_do_not_wait_while_the_first_one_reads_all_files(here, monkeypatch):
    """They would give up after ten minutes."""
    order, files, measure = [], ranking.digests_of, ShortLlama.measure

    def told(name, work):
        return lambda *args, **options: (order.append(name), work(*args, **options))[1]

    monkeypatch.setattr(ranking, "digests_of", told("files", files))
    monkeypatch.setattr(ShortLlama, "measure", told("scores", measure))
    for several in (False, True):
        monkeypatch.setattr(ranking, "is_distributed", lambda several=several: several)
        result = rank("ckpt", "book.txt", n=1, size=32, max_windows=6, stride=16)
        assert result.to_dict()["scored"] == digests_of("ckpt")
    assert order == ["files", "scores", "scores", "files"]


def changed(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("model", "entry"),
    [("ckpt", {"norm_eps": 0.5}), ("hf", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}})],
)
def test_scores_of_another_configuration_are_refused_and_told(here, model, entry):
    meta_to_hf("ckpt", "hf")
    record = ranked(model, "r.json", "--n", 1)
    ranked(model, "s.json", "--method", "sleb", "--n", 1)
    changed(Path(model, "params.json" if model == "ckpt" else "config.json"), **entry)
    ours, theirs = record["scored"]["configuration"], configuration_of(model)
    for file in ("r.json", "s.json"):
        said = f"{file} holds scores of the configuration {ours}, {model} has {theirs}"
        assert said in refused(model, file)


@pytest.mark.parametrize(
    ("model", "entry"),
    [
        ("ckpt", {"rope_theta": 20000.0}),
        ("hf", {"rms_norm_eps": 0.5}),
        ("hf", {"rope_theta": 20000.0}),
        ("hf", {"hidden_act": "gelu"}),
    ],
)
def test_what_computes_something_makes_another_configuration(here, model, entry):
    meta_to_hf("ckpt", "hf")
    before = configuration_of(model)
    changed(Path(model, "params.json" if model == "ckpt" else "config.json"), **entry)
    assert configuration_of(model) != before


def test_entries_that_compute_nothing_are_no_other_configuration(here):
    meta_to_hf("ckpt", "hf")
    first = {model: configuration_of(model) for model in ("ckpt", "hf")}
    changed(Path("ckpt/params.json"), vocab_size=-1, norm_eps=1e-5)
    own = json.loads(Path("hf/config.json").read_text())
    changed(
        Path("hf/config.json"),
        _name_or_path="/elsewhere",
        transformers_version="4.1.0",
        torch_dtype="float16",
        use_cache=not own.get("use_cache", True),
        architectures=None,
        eos_token_id=[1, 2],
    )
    text = json.dumps(dict(reversed(json.loads(Path("hf/config.json").read_text()).items())))
    Path("hf/config.json").write_text(text)  # the order of the entries is none of theirs
    assert {model: configuration_of(model) for model in ("ckpt", "hf")} == first


def swapped(record: dict) -> None:
    sums = record["importance"]
    sums["angles"][0], sums["angles"][3] = sums["angles"][3], sums["angles"][0]


def another_seed(record: dict) -> None:
    record["arguments"]["seed"] = 7


def test_scores_in_a_folder_whose_marker_lists_its_files_are_read(here):
    """As the demo writes them: the list comes after the digest of the scores."""
    ranked("ckpt", "r.json")
    with new_directory(here / "demo", marker="layers.json") as partial:
        shutil.copy("r.json", partial / "layers.json")
    assert "files" in json.loads(Path("demo/layers.json").read_text())
    assert SavedScores.read("demo/layers.json").layers(2) == SavedScores.read("r.json").layers(2)


@pytest.mark.parametrize("spoil", [swapped, another_seed])
def test_scores_that_are_not_those_written_are_refused(here, spoil):
    record = ranked("ckpt", "r.json")
    spoil(record)
    Path("r.json").write_text(json.dumps(record))
    assert "r.json is no file of scores, or damaged" in refused("ckpt")
    rewritten(record, "r.json")
    assert SavedScores.read("r.json").layers(1)


@pytest.mark.parametrize("damage", [{"importance": {"layers": [0, 1]}}, {"importance": None}])
def test_what_holds_no_scores_is_refused_in_one_line(here, damage):
    rewritten(ranked("ckpt", "r.json") | damage, "bad.json")
    assert "these are not saved scores: score again" in refused("ckpt", "bad.json")


def test_what_the_scores_do_not_settle_is_said(here):
    """A stop settles one answer; the file is edited as if it had settled the two lowest."""
    record = ranked("ckpt", "r.json", "--n", 2)
    stop = {**record["settled"]["stop"], "n": 2, "angular": False}
    verdict = {**record["settled"], "settled": True, "windows": 6, "population": 60, "stop": stop}

    def said(n: int, method: str, **changes: object) -> str:
        rewritten({**record, "settled": {**verdict, **changes}}, "r.json")
        return chosen("ckpt", scores="r.json", n=n, method=method).unchecked or ""

    assert "not settled" not in said(2, "bi")
    assert "not settled: r.json was read until another answer was settled" in said(1, "bi")
    assert "ranking for 2 by angular settles these" in said(2, "angular")
    assert "not settled" in said(2, "bi", settled=False)
    assert "not settled" not in said(1, "bi", population=6)  # all were read
    assert "not settled" not in said(2, "random", settled=False)  # by no window
