"""The compare command, start to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import fails
from conftest import save_byte_llama

from short_gpt.cli.app import main
from short_gpt.data import demo
from short_gpt.healing import HealedChoice
from short_gpt.jobs import TextSource, comparison

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def text(start: int) -> str:
    return " ".join(WORDS[(start + i * i * (start + 3)) % 8] + str(start + i) for i in range(120))


pytestmark = pytest.mark.usefixtures("few_timed_tokens")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_byte_llama(Path("ckpt"))
    for folder, starts in (("books", (1000, 2000)), ("others", (5000,))):
        Path(folder).mkdir()
        for start in starts:
            Path(folder, f"{start}.txt").write_text(text(start))


COMMON = ["compare", "ckpt", "--data", "books", "--size", "48", "--max_windows", "6"]
COMMON += ["--eval_windows", "4", "--counts", "1,3", "--device", "cpu"]


def test_compare_writes_table_picture_and_json(here, capsys):
    methods = ["--methods", "bi,sleb,random", "--eval_data", "others", "--search_windows", "2"]
    main([*COMMON, *methods, "--json", "c.json", "--plots", "pictures"])
    out = capsys.readouterr().out
    record = json.loads(Path("c.json").read_text())
    rows = record["rows"]
    assert record["arguments"]["counts"] == [1, 3]
    default = COMMON[: COMMON.index("--counts")]
    unpatched = ["--methods", "sequential", "--healing", "patched", "--eval_data", "others"]
    main([*default, *unpatched, "--device", "cpu", "--json", "other.json"])  # it has no rows
    assert json.loads(Path("other.json").read_text())["arguments"]["counts"] == [2, 4]
    assert len(rows) >= 1 + 2 * (1 + 1 + 3)
    for row in rows[1:]:
        if row["method"] == "bi":
            assert f"{row['perplexity']:.2f}" in out
    assert "layers in common: bi, angular" in out and "speed / original model's" in out
    assert Path("pictures/quality.png").read_bytes()[:4] == b"\x89PNG"
    assert not Path("c.json.state").exists()


def test_how_auto_chose_is_printed_and_kept(here, capsys):
    main([*COMMON, "--methods", "auto", "--healing", "raw", "--json", "c.json"])
    out, record = capsys.readouterr().out, json.loads(Path("c.json").read_text())
    assert [*record["choices"]] == ["1", "3"]
    for n, content in record["choices"].items():
        choice = HealedChoice.from_dict(content)
        text = f"auto, {n} layers: {choice.layers}\n{choice}"
        assert f"\n{text}\n" in out
        assert choice.layers == next(r["layers"] for r in record["rows"] if r["n"] == int(n))


def test_raw_patched_and_refit_stand_in_one_table_and_picture(here, capsys):
    kinds = ["raw", "patched", "refit"]
    options = ["--methods", "bi", "--healing", ",".join(kinds), "--eval_data", "others"]
    main([*COMMON, *options, "--json", "c.json", "--plots", "pictures"])
    rows = json.loads(Path("c.json").read_text())["rows"][1:]
    assert [r["healing"] for r in rows] == ["raw"] * 2 + ["patched"] * 2 + ["refit"] * 2
    out = capsys.readouterr().out
    assert all(f"{kind}: perplexity" in out for kind in kinds)
    assert len({r["perplexity"] for r in rows if r["n"] == 3}) == 3
    assert Path("pictures/quality.png").is_file() and not [*Path().glob("c.json.*")]


def test_without_eval_data_texts_are_held_out(here, capsys):
    main([*COMMON, "--methods", "bi", "--healing", "raw"])
    assert "raw: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "best"], "no method 'best'; expected one of bi, angular"),
        (["--healing", "glue"], "no healing 'glue'; expected some of raw, patched, refit"),
        (["--counts", "0,2"], "expected whole numbers as in --counts 2,4,8"),
        (
            ["--search_windows", "-7"],
            "--search_windows = -7: expected a whole number of at least 1",
        ),
        (["--methods", "bi,bi"], "--methods = ['bi', 'bi']: expected at least one, and each once"),
        (["--counts", "2,2"], "--counts = [2, 2]: expected at least one, and each once"),
        (["--healing", "raw,raw"], "--healing = ['raw', 'raw']: expected at least one, and each"),
        (["--seeds", "0"], "--seeds = 0: expected a whole number of at least 1"),
        (["--size", "0"], "--size = 0: expected a whole number of at least 2"),
        (["--eval_windows", "0"], "--eval_windows = 0: expected a whole number of at least 1"),
        (["--counts", "2,5"], "--counts = 5; the model has 5 layers"),
        (["--eval_data", "books"], "share text with the windows to evaluate on"),
    ],
)
def test_mistakes_are_one_line(here, capsys, monkeypatch, options, message):
    if "=" in message:  # a value out of range is told before a text is read or a model opened
        monkeypatch.setattr(comparison, "open_model", None)
        monkeypatch.setattr(TextSource, "kinds", None)
    with pytest.raises(SystemExit):
        main([*COMMON, *options])
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("short-gpt: ") and message in errors[-1]


@pytest.mark.parametrize("flag", ["--data", "--eval_data"])
def test_the_demos_model_reads_its_own_book(here, capsys, flag):
    line = fails(capsys, "compare", "--counts", "2", flag, "books")
    assert "without a MODEL, the demo's model reads its own book: name a MODEL, or leave" in line


def test_the_record_of_the_demo_names_its_book(here, monkeypatch):
    monkeypatch.setattr(demo, "checkpoint", lambda: Path("ckpt"))
    monkeypatch.setattr(demo, "bible", lambda part="learn": [text({"learn": 0}.get(part, 5000))])
    main([*COMMON[:1], *COMMON[4:], "--methods", "bi", "--healing", "raw", "--json", "r.json"])
    arguments = json.loads(Path("r.json").read_text())["arguments"]
    assert arguments["data"] == arguments["eval_data"] == "demo" and arguments["model"] is None
