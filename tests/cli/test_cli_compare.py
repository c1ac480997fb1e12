"""The compare command, start to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import save_byte_llama

from short_gpt.cli.app import main
from short_gpt.healing import HealedChoice
from short_gpt.jobs import comparing
from short_gpt.jobs.inputs import WindowSettings

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")


def text(start: int) -> str:
    return " ".join(WORDS[(start + i * i * (start + 3)) % 8] + str(start + i) for i in range(120))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_byte_llama(Path("ckpt"))
    for folder, starts in (("books", (1000, 2000)), ("others", (5000,))):
        Path(folder).mkdir()
        for start in starts:
            Path(folder, f"{start}.txt").write_text(text(start))


COMMON = ["compare", "ckpt", "--data", "books", "--size", "48", "--max_windows", "6"]
COMMON += ["--eval_windows", "4", "--n", "1,3", "--device", "cpu"]


def test_compare_writes_table_picture_and_json(here, capsys):
    methods = ["--method", "bi,sleb,random", "--eval_data", "others"]
    main([*COMMON, *methods, "--json", "c.json", "--plots", "pictures"])
    out = capsys.readouterr().out
    record = json.loads(Path("c.json").read_text())
    rows = record["rows"]
    assert record["arguments"]["n"] == [1, 3]
    default = COMMON[: COMMON.index("--n")]
    unpatched = ["--method", "sequential", "--heal_by", "patch", "--eval_data", "others"]
    main([*default, *unpatched, "--device", "cpu", "--json", "other.json"])  # it has no rows
    assert json.loads(Path("other.json").read_text())["arguments"]["n"] == [2, 4]
    assert len(rows) >= 1 + 2 * (1 + 1 + 3)
    for row in rows[1:]:
        if row["method"] == "bi":
            assert f"{row['perplexity']:.2f}" in out
    assert "weights, MB" in out and "kld" in rows[1]
    assert Path("pictures/quality.png").read_bytes()[:4] == b"\x89PNG"
    assert not Path("c.json.state").exists()


def test_how_auto_chose_is_printed_and_kept(here, capsys):
    main([*COMMON, "--method", "auto", "--heal_by", "raw", "--json", "c.json"])
    out, record = capsys.readouterr().out, json.loads(Path("c.json").read_text())
    assert [*record["choices"]] == ["1", "3"]
    for n, content in record["choices"].items():
        choice = HealedChoice.from_dict(content)
        text = f"auto, {n} layers: {choice.layers}\n{choice}"
        assert f"\n{text}\n" in out
        assert choice.layers == next(r["layers"] for r in record["rows"] if r["n"] == int(n))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "best"], "no method 'best'; expected one of bi, angular"),
        (["--heal_by", "glue"], "--heal_by = 'glue': expected some of raw, refit, patch"),
        (["--n", "0,2"], "--n = 0: expected a whole number of at least 1"),
        (["--size", "0"], "--size = 0: expected a whole number of at least 2"),
        (["--eval_windows", "0"], "--eval_windows = 0: expected a whole number of at least 1"),
        (["--n", "2,5"], "--n = 5; the model has 5 layers"),
    ],
)
def test_mistakes_are_one_line(here, capsys, monkeypatch, options, message):
    if "=" in message:  # a value out of range is told before a text is read or a model opened
        monkeypatch.setattr(comparing, "open_model", None)
        monkeypatch.setattr(WindowSettings, "kinds", None)
    with pytest.raises(SystemExit):
        main([*COMMON, *options])
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("short-gpt: ") and message in errors[-1]
