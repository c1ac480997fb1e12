"""What a source is, JSON files, and the package's own borders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import refuses

import llama
from llama.files import read_json
from llama.sources import find_source, is_gguf


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("meta/params.json", "hf/config.json", "both/params.json", "both/config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    Path("empty").mkdir()
    Path("folder.gguf").mkdir()
    Path("folder.gguf/config.json").write_text("{}")
    Path("both/consolidated.00.pth").touch()
    Path("mistral").mkdir()
    for name in ("params.json", "config.json", "consolidated.safetensors"):
        Path("mistral", name).write_text("{}")
    Path("a.gguf").write_bytes(b"GGUF")
    Path("a.txt").write_text("text")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("meta", "meta"),
        ("both", "meta"),
        ("mistral", "hf"),
        ("./hf/", "hf"),
        ("folder.gguf", "hf"),
        ("a.gguf", "gguf"),
        ("owner/name", "hub"),
    ],
)
def test_what_a_source_is(places, source, kind):
    assert find_source(source).kind == find_source(Path(source)).kind == kind
    assert is_gguf(source) == (kind == "gguf")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", r"empty has no params\.json .* and no config\.json"),
        ("a.txt", r"a\.txt is a file; expected a checkpoint directory or \.gguf"),
        ("no.gguf", r"GGUF file no\.gguf does not exist"),
        ("owner/no.gguf", r"GGUF file owner/no\.gguf does not exist"),
        ("typo", "checkpoint directory typo does not exist"),
        ("./owner/name", "does not exist"),
        ("/owner/name", "does not exist"),
        ("~/name", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_what_is_no_source(places, source, message):
    refuses(message, find_source, source, error=FileNotFoundError)


def test_json_is_one_object_or_refused(tmp_path):
    path = tmp_path / "x.json"
    refuses(r"has no x\.json", read_json, path, error=FileNotFoundError)
    for text, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[[1, 2]]", "expected one JSON object, got a list"),
    ):
        path.write_text(text)
        refuses(message, read_json, path)
    path.write_bytes(b"\xff\xfe\x00")
    refuses("is not JSON", read_json, path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # as editors of Windows write it
    assert read_json(path) == {"a": 1}


def test_no_module_uses_a_private_name_of_another():
    for path in Path(llama.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llama"):
                assert not [a.name for a in node.names if a.name.startswith("_")], path
