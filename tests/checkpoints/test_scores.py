"""Saved scores belong to the model that was scored; what no model can give is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import DATA, TEXT, fails, run
from conftest import BYTE_VOCAB, make_transformer, save_byte_llama, write_byte_tokenizer
from gguf_files import stack_file

from llama.files import new_directory
from llama.formats.hf import meta_to_hf
from short_gpt import ShortLlama, prune, rank
from short_gpt.checkpoints.scores import configuration_of, tokenizer_of, weights_of
from short_gpt.jobs import SavedScores, ranking
from short_gpt.runtime import write_record

LEARNED = ("--data", "book.txt", "--eval_data", "held.txt", "--size", 32, "--max_windows", 4)


def checkpoint(folder: Path, seed: int = 0, layers: int = 5) -> Path:
    model = make_transformer(seed, vocab_size=BYTE_VOCAB, n_layers=layers)
    save_byte_llama(folder, model)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    Path("held.txt").write_text("".join(chr(97 + i * i % 26) for i in range(400)))
    checkpoint(Path("ckpt"))
    return tmp_path


def ranked(model: str, file: str, *options: object) -> dict:
    run("rank", model, *DATA, "--max_windows", 6, "--json", file, *options)
    return json.loads(Path(file).read_text())


def scored(model: str) -> dict:
    files = (weights_of, tokenizer_of, configuration_of)
    return dict(
        zip(("weights", "tokenizer", "configuration"), (f(model) for f in files), strict=True)
    )


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
    with pytest.raises(FileNotFoundError, match="m-00002-of-00003.gguf, one of 3 of its model"):
        weights_of(str(parts[0]))


@pytest.mark.parametrize("options", [(), ("--method", "sleb", "--n", 2)])
def test_scores_of_other_weights_are_refused_and_told(here, capsys, options):
    checkpoint(Path("other"), seed=1)
    record = ranked("ckpt", "r.json", *options)
    ours, theirs = weights_of("ckpt"), weights_of("other")
    assert record["scored"] == scored("ckpt")
    assert ours != theirs
    capsys.readouterr()
    for command in (
        ("prune", "other", "out", "--scores", "r.json", "--n", 1),
        ("heal", "other", "out", "--scores", "r.json", "--n", 1, *LEARNED),
    ):
        line = fails(capsys, *command)
        assert f"r.json holds scores of the weights {ours}, other has {theirs}: score" in line
        assert not Path("out").exists()
    shutil.copytree("ckpt", "moved")  # a path is no identity
    run("prune", "moved", "out", "--scores", "r.json", "--n", 1)
    assert "not checked" not in capsys.readouterr().out


def test_the_scores_of_a_whole_model_are_not_those_of_its_pruned_one(here, capsys):
    checkpoint(Path("small"), layers=4)
    ranked("small", "r.json", "--method", "sleb", "--n", 2)
    prune("ckpt", "cut", layers=[2])  # as many layers as the scored one
    capsys.readouterr()
    assert "holds scores of the weights" in fails(
        capsys, "prune", "cut", "out", "--scores", "r.json", "--n", 1
    )


def test_older_scores_are_read_and_said_not_to_be_checked(here, capsys):
    record = ranked("ckpt", "r.json")
    record.pop("scored")
    rewritten(record, "r.json")
    capsys.readouterr()
    run("prune", "ckpt", "out", "--scores", "r.json", "--n", 1)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("not checked: r.json does not say of which model its scores are")
    run("heal", "ckpt", "healed", "--scores", "r.json", "--n", 1, *LEARNED)
    assert "not checked: r.json" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["ckpt", "hf"])
def test_scores_of_another_tokenizer_are_refused_and_told(here, capsys, model):
    meta_to_hf("ckpt", "hf")
    record = ranked(model, "r.json")
    config = Path(model, "tokenizer_config.json")
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"chat_template": "{{ messages }}"}))  # of other use
    run("prune", model, "same", "--scores", "r.json", "--n", 1, "--verify", "no")
    config.write_text(json.dumps(said | {"add_bos_token": False}))
    capsys.readouterr()
    ours, theirs = record["scored"]["tokenizer"], tokenizer_of(model)
    for command in ("prune", "heal"):
        more = LEARNED if command == "heal" else ()
        line = fails(capsys, command, model, "out", "--scores", "r.json", "--n", 1, *more)
        assert f"scores of the tokenizer {ours}, {model} has {theirs}: score it by" in line
    record["scored"].pop("tokenizer")  # of an earlier version
    rewritten(record, "r.json")
    run("prune", model, "out", "--scores", "r.json", "--n", 1)


def test_a_tokenizer_elsewhere_is_looked_for_there(here, capsys):
    Path("words").mkdir()
    for path in Path("ckpt").glob("tokenizer*"):
        path.rename(Path("words") / path.name)
    place = ("--tokenizer_path", "words/tokenizer.json")
    found = ranked("ckpt", "r.json", *place)["scored"]["tokenizer"]
    assert found == tokenizer_of("ckpt", "words/tokenizer.json") != tokenizer_of("ckpt") is None
    write_byte_tokenizer(Path("ckpt"))  # another one beside the weights is not what was read with
    Path("ckpt/tokenizer_config.json").unlink()
    run("prune", "ckpt", "out", "--scores", "r.json", "--n", 1)


def test_weights_are_those_of_the_files_in_every_format(here):
    whole = weights_of("ckpt")
    meta_to_hf("ckpt", "hf")
    found = weights_of("hf")
    assert found is not None and found != whole == weights_of("ckpt")
    result = rank("hf", "book.txt", n=1, size=32, max_windows=6, stride=16)
    assert result.to_dict()["scored"] == scored("hf")
    Path("hf/model.safetensors").unlink()
    assert weights_of("hf") is None


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
        assert result.to_dict()["scored"] == scored("ckpt")
    assert order == ["files", "scores", "scores", "files"]


def changed(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("model", "entry"),
    [
        ("ckpt", {"norm_eps": 0.5}),
        ("hf", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ],
)
def test_scores_of_another_configuration_are_refused_and_told(here, capsys, model, entry):
    meta_to_hf("ckpt", "hf")
    record = ranked(model, "r.json", "--n", 1)
    searched = ranked(model, "s.json", "--method", "sleb", "--n", 1)
    assert record["scored"] == searched["scored"] == scored(model)
    config = Path(model, "params.json" if model == "ckpt" else "config.json")
    before = config.read_text()
    changed(config, **entry)
    ours, theirs = record["scored"]["configuration"], configuration_of(model)
    capsys.readouterr()
    for file in ("r.json", "s.json"):
        line = fails(capsys, "prune", model, "out", "--scores", file, "--n", 1)
        assert f"{file} holds scores of the configuration {ours}, {model} has {theirs}" in line
    line = fails(capsys, "heal", model, "out", "--scores", "r.json", "--n", 1, *LEARNED)
    assert f"short-gpt rank {model}, or name the model that was scored" in line
    assert not Path("out").exists()
    config.write_text(before)
    run("prune", model, "out", "--scores", "r.json", "--n", 1)
    assert "not checked" not in capsys.readouterr().out


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
def test_scores_that_are_not_those_written_are_refused(here, capsys, spoil):
    record = ranked("ckpt", "r.json")
    assert SavedScores.read("r.json").layers(1)
    spoil(record)
    Path("r.json").write_text(json.dumps(record))
    capsys.readouterr()
    for command in (
        ("prune", "ckpt", "out", "--scores", "r.json", "--n", 1),
        ("heal", "ckpt", "out", "--scores", "r.json", "--n", 1, *LEARNED),
    ):
        line = fails(capsys, *command)
        assert "r.json is no file of scores, or damaged" in line
    rewritten(record, "r.json")
    assert SavedScores.read("r.json").layers(1)


@pytest.mark.parametrize("damage", [{"importance": {"layers": [0, 1]}}, {"importance": None}])
def test_what_holds_no_scores_is_refused_in_one_line(here, capsys, damage):
    rewritten(ranked("ckpt", "r.json") | damage, "bad.json")
    capsys.readouterr()
    line = fails(capsys, "prune", "ckpt", "out", "--scores", "bad.json", "--n", 1)
    assert "these are not saved scores: score again" in line
    Path("bad.json").write_text(json.dumps({"versions": {}, "machine": {}}))
    line = fails(capsys, "prune", "ckpt", "out", "--scores", "bad.json", "--n", 1)
    assert "bad.json is no file of scores, or damaged" in line


def test_prune_says_what_the_scores_do_not_settle(here, capsys):
    """A stop settles one answer; the file is edited as if it had settled the two lowest."""
    record = ranked("ckpt", "r.json", "--n", 2)
    stop = {**record["settled"]["stop"], "n": 2, "angular": False}
    verdict = {**record["settled"], "settled": True, "windows": 6, "population": 60, "stop": stop}

    def said(n: int, method: str, **changes: object) -> str:
        content = {**record, "settled": {**verdict, **changes}}
        rewritten(content, "r.json")
        capsys.readouterr()
        choice = ("--scores", "r.json", "--n", n, "--method", method)
        run("prune", "ckpt", "out", *choice, "--overwrite")
        return capsys.readouterr().out

    assert "not settled" not in said(2, "bi")
    assert "not settled: r.json was read until another answer was settled" in said(1, "bi")
    assert "ranking for 2 by angular settles these" in said(2, "angular")
    assert "not settled" in said(2, "bi", settled=False)
    assert "not settled" not in said(1, "bi", population=6)  # all were read
    assert "not settled" not in said(2, "random", settled=False)  # by no window
