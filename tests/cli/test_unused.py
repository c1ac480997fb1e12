"""Flags that would be passed over in silence are refused by the flag that makes them count."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import fails

from short_gpt.cli import COMMANDS
from short_gpt.cli.flags import flags_of, refuse_unused
from short_gpt.data import demo

TWO = ("model", "out")
UNUSED = [
    (("prune", *TWO, "--layers", "1", "--device", "cpu"), "a GGUF file written as a directory"),
    (("prune", *TWO, "--layers", "1", "--dtype", "float32"), "a GGUF file written as a directory"),
    (("prune", "a.gguf", "b.gguf", "--layers", "1", "--device", "cpu"), "a GGUF file written as"),
    (("prune", "a.gguf", "b", "--to", "meta", "--layers", "1", "--dtype", "float32"), "a GGUF"),
    (("rank", "model", "--n", 2, "--candidates", 3), "--method sleb"),
    (("rank", "model", "--n", 2, "--method", "sleb", "--budget", 3), "--method auto"),
    (("rank", "model", "--confidence", 0.9), "--n, a --seed"),
    (("rank", "model", "--rare", 0.1), "--n, a --seed"),
    (("rank", "model", "--n", 2, "--confidence", "none", "--rare", 0.1), "a --confidence"),
    (("rank", "model", "--n", 2, "--seed", "none", "--confidence", 0.9), "--n, a --seed"),
    (("rank", "model", "--n", 2, "--method", "norm", "--confidence", 0.9), "--method bi or"),
    (("rank", "model", "--n", 2, "--method", "sleb", "--plots", "p"), "a --method that scores"),
    (("rank", "model", "--n", 2, "--method", "sleb", "--sublayers"), "a --method that scores"),
    (("rank", "model", "--save_every", 5), "--state or --json"),
    (("rank", "model", "--overwrite"), "a file to write, such as --json FILE"),
    (("reproduce", "model", "--seed", "none", "--rare", 0.1), "a --seed"),
    (("reproduce", "model", "--confidence", "none", "--rare", 0.1), "a --confidence"),
    (("compare", "model", "--limit", 5), "--tasks"),
    (("evaluate", "model", "--num_fewshot", 5), "--tasks"),
    (("evaluate", "model", "--data", "none", "--tasks", "piqa", "--size", 5), "--data"),
    (("evaluate", "model", "--data", "none", "--tasks", "piqa", "--bos", "first"), "--data"),
    (("generate", "model", "text", "--temperature", 0, "--top_p", 0.5), "--temperature above 0"),
]


@pytest.mark.parametrize(("argv", "needs"), UNUSED, ids=lambda part: str(part)[:60])
def test_what_has_no_effect_is_refused_by_what_it_needs(argv, needs, capsys):
    line = fails(capsys, *argv)
    assert " has no effect without " in line and needs in line


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Texts of all kinds, a directory in either format, and a GGUF file."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.jsonl", "train/a.txt", "plain/a.txt", "rows/b.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text('{"text": "a", "n": "b"}')
    for folder, file in (("meta", "params.json"), ("hf", "config.json")):
        Path(folder).mkdir()
        Path(folder, file).write_text("{}")
    Path("m.gguf").write_bytes(b"GGUF")
    return tmp_path


SPLITS, COLUMNS, META = "data with splits", "data with columns", "a model in Meta's format"


@pytest.mark.parametrize(
    ("argv", "needs"),
    [
        (("rank", "hf", "--tokenizer_path", "t"), META),
        (("generate", "m.gguf", "text", "--tokenizer_path", "t"), META),
        (("prune", "hf", "out", "--layers", "1", "--tokenizer_path", "t"), META),
        (("convert", "owner/name", "out", "--tokenizer_path", "t"), META),
        (("evaluate", "hf", "m.gguf", "--tokenizer_path", "t"), META),
        (("rank", "hf", "--data", "a.txt", "--split", "test"), SPLITS),
        (("rank", "meta", "--data", "plain", "--split", "train"), SPLITS),
        (("rank", "meta", "--data", ".", "--split", "validation"), SPLITS),
        (("evaluate", "hf", "--data", "a.txt", "--column", "n"), COLUMNS),
        (("rank", "meta", "--data", "plain", "--column", "n"), COLUMNS),
        (("rank", "meta", "--column", "n"), COLUMNS),
        (
            ("heal", "hf", "out", "--data", "a.txt", "--eval_data", "a.txt", "--column", "n"),
            COLUMNS,
        ),
    ],
)
def test_what_a_source_has_no_use_for_is_refused(here, capsys, argv, needs):
    line = fails(capsys, *argv)
    assert f"{argv[-2]} has no effect without {needs}" in line and "`" not in line


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("rank", {"model": "meta", "tokenizer_path": "t"}),
        ("rank", {"model": "hf", "tokenizer_path": "t", "stream": True}),
        ("rank", {"model": "missing", "tokenizer_path": "t"}),
        ("evaluate", {"model": "hf", "pruned": "meta", "tokenizer_path": "t"}),
        ("heal", {"model": "hf", "teacher": "meta", "tokenizer_path": "t"}),
        ("rank", {"split": "train"}),
        ("prune", {"model": "m.gguf", "out": "b", "dtype": "float32", "device": "cpu"}),
        ("prune", {"model": "demo", "out": "b", "dtype": "float32", "device": "cpu"}),
        ("rank", {"split": "train", "data": "allenai/c4:en"}),
        ("rank", {"split": "train", "data": "."}),
        ("rank", {"split": "train", "data": "missing.txt"}),
        ("heal", {"split": "train", "data": "a.txt,pg19"}),
        ("rank", {"column": "n", "data": "b.jsonl"}),
        ("rank", {"column": "n", "data": "rows"}),
        ("rank", {"column": "n", "data": "allenai/c4:en"}),
        ("heal", {"column": "n", "data": "a.txt", "eval_data": "b.jsonl"}),
    ],
)
def test_what_a_source_reads_passes(here, command, given, monkeypatch):
    monkeypatch.setattr(demo, "gguf_file", lambda: here / "m.gguf")
    refuse_unused(flags_of(COMMANDS[command]), given)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_need_can_be_looked_at_in_every_command_that_has_the_flag(command):
    flags = flags_of(COMMANDS[command])
    values = {name: flag.default for name, flag in flags.items()}
    for flag in flags.values():
        assert all(need.met(values) in (True, False) for need in flag.needs), flag.name


def test_a_command_that_loads_the_model_in_any_case_takes_a_device():
    values = {"device": "cpu", "dtype": "float32", "precision": "auto"}
    for command in {*COMMANDS} - {"prune"}:
        flags = flags_of(COMMANDS[command])
        refuse_unused(flags, {name: value for name, value in values.items() if name in flags})


def test_what_counts_or_asks_for_nothing_passes():
    for given in (
        {"n": 2, "confidence": 0.9},
        {"confidence": None},
        {"sublayers": False, "method": "sleb", "n": 2},
        {"candidates": 3, "method": "sleb", "n": 2},
    ):
        refuse_unused(flags_of(COMMANDS["rank"]), given)
