"""Where commands write, and where they refuse to."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from commands import DATA, TEXT, fails, run
from conftest import BYTE_VOCAB, make_transformer, save_checkpoint, write_byte_tokenizer

from short_gpt.jobs import Saving

RANK = ("rank", "ckpt", *DATA, "--max_windows", 2)


@pytest.fixture
def ckpt(tmp_path, monkeypatch) -> Path:
    """A tiny checkpoint in Meta's format and a text, in a working directory of their own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = save_checkpoint(Path("ckpt"), make_transformer(vocab_size=BYTE_VOCAB))
    write_byte_tokenizer(path)
    Path("book.txt").write_text(TEXT)
    return path


def contents() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["params.json", "tokenizer.json"])
def test_a_models_own_files_are_not_written_over(ckpt, capsys, name):
    before = contents()
    line = fails(capsys, *RANK, "--out", f"ckpt/{name}", "--overwrite")
    assert f"ckpt/{name} exists and is not what this would write there" in line
    assert contents() == before


def test_what_a_command_reads_is_not_written_over(ckpt, capsys):
    run(*RANK, "--out", "a.json")
    capsys.readouterr()
    before = contents()
    line = fails(capsys, "heal", "ckpt", "x", "--scores", "a.json", "--n", 1, "--json", "a.json",
                 "--overwrite")  # fmt: skip
    assert "a.json is what --scores reads, so it is not written over" in line
    assert contents() == before


def test_somebodys_picture_is_not_replaced(ckpt, capsys):
    Path("plots").mkdir()
    Path("plots/angular.png").write_bytes(b"\x89PNG of a holiday")
    line = fails(capsys, *RANK, "--plots", "plots", "--overwrite")
    assert "plots/angular.png exists and is not what this would write there" in line
    Path("plots/angular.png").unlink()
    for _ in range(2):
        run(*RANK, "--plots", "plots", "--overwrite")
    assert sorted(os.listdir("plots")) == ["angular.png", "block_influence.png"]


def test_a_recipe_takes_the_place_of_recipes_only(ckpt, capsys):
    pytest.importorskip("transformers")
    run("convert", "ckpt", "hf")
    capsys.readouterr()
    before = contents()
    cut = ("prune", "hf", "x", "--layers", 1, "--verify", "no")
    line = fails(capsys, *cut, "--recipe", "hf/config.json", "--overwrite")
    assert "hf/config.json exists and is not what this would write there" in line
    assert contents() == before
    for _ in range(2):
        run(*cut, "--recipe", "r.yaml", "--overwrite")
    assert Path("r.yaml").read_text().startswith("slices:")


def test_results_go_into_a_pipe(ckpt):
    os.mkfifo("pipe")
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(Path("pipe").read_text()), daemon=True)
    thread.start()
    run(*RANK, "--out", "pipe", "--overwrite")
    thread.join(10)
    assert json.loads(found[0])["command"] == "rank" and Path("pipe").is_fifo()
    # the state of a run that writes beside a device would be a file in the devices' folder
    assert Saving().beside("pipe").state is None
    assert Saving().beside("file").state == "file.state"


def test_a_tilde_is_the_home_folder_but_in_a_prompt(ckpt, monkeypatch, capsys):
    home = Path.cwd().parent
    monkeypatch.setenv("HOME", str(home))
    run("rank", "~/work/ckpt", "--data=~/work/book.txt", *DATA[2:], "--max_windows", 2,
        "--json=~/a.json", "--plots=~/plots")  # fmt: skip
    assert (home / "a.json").is_file() and (home / "plots/angular.png").is_file()
    run("prune", "~/work/ckpt", "~/x", "--scores=~/a.json", "--n", 1)
    assert (home / "x/params.json").is_file() and not Path("~").exists()
    capsys.readouterr()
    run("generate", "~/work/ckpt", "~ is", "--max_gen_len", 2)
    assert capsys.readouterr().out.startswith("~ is")
