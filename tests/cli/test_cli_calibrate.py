"""The calibrate command, start to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fails, run
from conftest import save_byte_llama

from short_gpt import open_model
from short_gpt.data import overlapping
from short_gpt.healing import choosing
from short_gpt.jobs import Readings, calibration
from short_gpt.jobs.calibration import windows_apart

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def text(start: int) -> str:
    return " ".join(WORDS[(start + i * i * (start + 3)) % 8] + str(start + i) for i in range(120))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_byte_llama(Path("ckpt"))
    Path("books").mkdir()
    for start in (1000, 2000, 3000):
        Path("books", f"{start}.txt").write_text(text(start))
    Path("code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(90)))


COMMON = ["calibrate", "ckpt", "--data", "books,code.txt", "--sizes", "32", "--device", "cpu"]
COMMON += ["--max_windows", "4", "--eval_windows", "3"]


def test_it_prints_agreement_and_cross_table(here, capsys):
    run(
        *COMMON,
        "--n",
        2,
        "--sizes",
        "32,16",
        "--bos",
        "first,every",
        "--out",
        "c.json",
        "--plots",
        "p",
    )
    out = capsys.readouterr().out
    record = json.loads(Path("c.json").read_text())
    assert record["command"] == "calibrate" and record["arguments"]["sizes"] == [32, 16]
    assert [*record["choices"]] == ["books", "code", "mix"]
    cells = {(c["choice"], c["text"], c["healing"]): c for c in record["cells"]}
    assert len(cells) == 3 * 2 * 2
    for cell in cells.values():
        assert f"{cell['perplexity']:.2f}" in out
        if cell["choice"] != cell["text"]:
            assert f"{cell['excess']:+.3f} ({cell['excess_error']:.3f})" in out
    assert "trust" not in out and "trusted" not in record  # no verdict: the reader judges the table
    ways = ["16 tokens, bos first", "32 tokens, bos every", "16 tokens, bos every"]
    assert [*record["ways"]] == ways
    assert all(f"with windows of {way}" in out for way in ways)
    assert "books, its halves" in out and "rank correlation (95%)" in out
    assert Path("p/calibration.png").read_bytes()[:4] == b"\x89PNG"
    assert not Path("c.json.state").exists()


def test_windows_to_rank_on_and_to_judge_by_share_nothing(here):
    short = open_model("ckpt", device="cpu", max_seq_len=32)
    found = {"books": [text(1000), text(2000), text(3000)], "one": [text(5000)]}
    texts, _ = windows_apart(short, found, Readings((32,), None, 4, 3))
    for parts in texts.values():
        assert (len(parts.ranking), len(parts.judged)) == (4, 3)
    every = [[w for parts in texts.values() for w in parts[i]] for i in (0, 1)]
    assert not overlapping(*every)
    # whole documents are kept apart where there are several
    documents = [short.encode(t) for t in found["books"]]

    def of(window):
        return {
            i
            for i, tokens in enumerate(documents)
            for at in range(len(tokens))
            if tokens[at : at + 32] == [*window]
        }

    ranked, judged = (set().union(*map(of, parts)) for parts in texts["books"])
    assert ranked and judged and not ranked & judged


def test_in_one_text_what_ranks_is_left_out_of_what_judges(here):
    short = open_model("ckpt", device="cpu", max_seq_len=32)
    found = {"one": [text(5000)], "copy": [text(5000)]}
    texts, _ = windows_apart(short, found, Readings((32,), None, 4, 3))
    assert [[*w] for w in texts["one"].ranking] == [[*w] for w in texts["copy"].ranking]
    assert not overlapping(texts["copy"].judged, texts["one"].ranking)


def test_interrupted_the_same_command_continues(here, monkeypatch, capsys):
    plain, calls = choosing.losses, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(choosing, "losses", counted)
    with pytest.raises(SystemExit):
        run(*COMMON, "--n", 2, "--out", "c.json")
    assert Path("c.json.state").is_file()
    monkeypatch.setattr(calibration, "score_windows", None)
    run(*COMMON, "--n", 2, "--out", "c.json")
    assert not Path("c.json.state").exists()


def test_without_texts_it_says_what_to_name(here, capsys):
    said = fails(capsys, "calibrate", "ckpt", "--n", "1")
    assert "--data is missing: expected two texts or more with commas between" in said
    run("calibrate", "--help")
    texts = capsys.readouterr().out.partition("--data TEXTS")[2].partition("--split")[0]
    assert (
        "data sets of the hub, pg19, or self" in " ".join(texts.split()) and "default" not in texts
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say how many layers to remove: --n"),
        (["--n", "5"], "n = 5; the model has 5 layers: expected 1 to 4"),
        (["--n", "1", "--data", "books"], "--data books: expected two texts or more with commas"),
        (["--n", "1", "--data", "code.txt,code.txt"], "of different names"),
        (["--n", "1", "--data", "books,no.txt"], "no such file or folder: 'no.txt'"),
        (["--n", "1", "--sizes", "a"], "expected whole numbers as in --sizes 512,1024, got 'a'"),
        (["--n", "1", "--sizes", "1"], "--sizes = 1: expected a whole number of at least 2"),
        (["--n", "1", "--sizes", "32,5000"], "use longer texts or a smaller --sizes"),
        (["--n", "1", "--bos", "last"], "bos = 'last': expected first or every"),
        (["--n", "1", "--eval_windows", "1"], "--eval_windows = 1: expected a whole number of"),
        (["--n", "1", "--method", "sleb"], "no calibration by 'sleb'; expected one of bi"),
        (["--n", "1", "--healing", "lora"], "no healing 'lora'; expected some of raw, refit"),
        (
            ["--n", "1", "--healing", "raw,lora", "--dry_run"],
            "no healing 'lora'; expected some of raw",
        ),
        (
            ["--n", "1", "--max_windows", "400"],
            "code: every other window shares text with those that rank",
        ),
    ],
)
def test_mistakes_are_one_line(here, capsys, options, message):
    assert message in fails(capsys, *COMMON, *options)


def test_a_window_longer_than_the_model_takes_is_told_by_its_setting(here, capsys):
    run("convert", "ckpt", "hf", "--verify", "no")
    capsys.readouterr()
    line = fails(capsys, "calibrate", "hf", *COMMON[2:], "--n", "1", "--sizes", "32,5000")
    assert "--sizes 5000: this model takes 4096 tokens, give no more" in line
