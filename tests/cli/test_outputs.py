"""Where commands write, and where they refuse to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import DATA, fails, run

from short_gpt.runtime import progress
from short_gpt.runtime.errors import ShortGPTError

RANK = ("rank", "ckpt", *DATA, "--max_windows", 2)


def contents() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file()}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_result_has_a_file_of_its_own(ckpt, capsys, overwrite):
    """A model takes the place of what has its name."""
    for name in ("r.json", "r.json/inside"):
        heal = ("heal", "ckpt", "r.json", "--data", "book.txt", "--layers", 2, "--json", name)
        assert "lies in OUT, which holds the model alone" in fails(capsys, *heal, *overwrite)
    assert not Path("r.json").exists()


def test_somebodys_picture_is_not_replaced(ckpt, capsys):
    Path("plots").mkdir()
    Path("plots/angular.png").write_bytes(b"\x89PNG of a holiday")
    line = fails(capsys, *RANK, "--plots", "plots", "--overwrite")
    assert "plots/angular.png exists and is not what this would write there" in line
    Path("plots/angular.png").unlink()
    for _ in range(2):
        run(*RANK, "--plots", "plots", "--overwrite")
    assert sorted(os.listdir("plots")) == ["angular.png", "block_influence.png"]


def test_a_tilde_is_the_home_folder_but_in_a_prompt(ckpt, monkeypatch, capsys):
    home = ckpt.parent
    monkeypatch.setenv("HOME", str(home))
    run("rank", "~/ckpt", "--data=~/book.txt", *DATA[2:], "--max_windows", 2,
        "--json=~/a.json", "--plots=~/plots")  # fmt: skip
    assert (home / "a.json").is_file() and (home / "plots/angular.png").is_file()
    run("prune", "~/ckpt", "~/x", "--scores=~/a.json", "--n", 1)
    assert (home / "x/params.json").is_file() and not Path("~").exists()
    capsys.readouterr()
    run("generate", "~/ckpt", "~ is", "--max_new_tokens", 2)
    assert capsys.readouterr().out.startswith("~ is")


def test_a_result_on_stdout_is_alone_there(ckpt, capfd):
    run(*RANK, "--n", 1, "--json", "-", "--plots", "p")
    out, err = capfd.readouterr()
    assert json.loads(out)["importance"]["layers"] == [0, 1, 2, 3, 4]
    assert "Block Influence" in err and "written: p/angular.png" in err
    run("rank", "ckpt", *DATA, "--max_windows", 2, "--json=-", "--quiet")
    out, err = capfd.readouterr()
    assert json.loads(out)["sha256"] and "Block Influence" in err
    assert not {p.name for p in Path().iterdir()} & {"-", "-.state"}
    run(*RANK)
    assert "Block Influence" in capfd.readouterr().out  # only that run's was moved


def test_a_quiet_run_says_its_result_alone(ckpt, monkeypatch, capsys):
    bars = "HF_HUB_DISABLE_PROGRESS_BARS"
    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", bars):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv(bars)  # and again without it afterwards
    monkeypatch.setattr(progress, "_quiet", False)
    Path("docs").mkdir()
    for n in range(8):
        words = (f"{(n + 3) * (i + 7) * (i + n) % 997} docs" for i in range(60))
        Path(f"docs/{n}.txt").write_text(" ".join(words))
    heal = ("heal", "ckpt", "OUT", "--layers", 1, "--data", "docs", "--size", 16,
            "--eval_windows", 2, "--max_windows", 4, "--device", "cpu")  # fmt: skip
    run(*heal)
    loud = capsys.readouterr()
    assert os.environ[bars] == "1"  # of other libraries, in a file
    run(*heal, "--overwrite", "--quiet")
    out, err = capsys.readouterr()
    assert err == "" and loud.err
    assert "written: OUT" in loud.out and "written" not in out
    assert "healing changes the loss by" in out
    assert "--quiet has no" not in fails(capsys, "rank", "nowhere", "--quiet")
    assert os.environ["TQDM_DISABLE"] == "1"
    run(*RANK)
    assert not progress.is_quiet() and progress.bar("x", total=1, unit="y").disable is False


@pytest.mark.parametrize(
    ("words", "failing"),
    [
        ((*RANK, "--json", "new/inside/r.json"), "short_gpt.scoring.run.ScoringRun.read"),
        (("evaluate", "ckpt", *DATA[:4], "--json", "new/inside/r.json"), "follow_umask"),
        (("prune", "ckpt", "new/inside/out", "--layers", 1), "follow_umask"),
        (("convert", "ckpt", "new/inside/out.gguf"), "follow_umask"),
    ],
)
def test_a_run_that_fails_leaves_no_folder_of_its_result(ckpt, capsys, monkeypatch, words, failing):
    def fail(*_: object, **__: object) -> None:
        raise ShortGPTError("it fails")

    before = [*Path().rglob("*")]
    monkeypatch.setattr(failing if "." in failing else f"llama.files.{failing}", fail)
    with pytest.raises(SystemExit):
        run(*words)
    assert "it fails" in capsys.readouterr().err
    assert [*Path().rglob("*")] == before
