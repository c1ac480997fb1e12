"""The demo's model and book: what the name ``demo`` stands for, and where two processes meet."""

from __future__ import annotations

from pathlib import Path

from conftest import refuses

import short_gpt
from llama.sources import NAMED, BuiltinName, find_source
from short_gpt.data import demo
from short_gpt.data.texts import read_texts, source_names, texts


def test_demo_is_a_model_unless_a_directory_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.gguf").touch()
    assert "demo" in NAMED and short_gpt.texts is texts  # the package registers it
    monkeypatch.setattr(demo, "gguf_file", lambda: Path("small.gguf"))
    assert (find_source("demo").name, find_source("demo").kind) == ("small.gguf", "gguf")
    Path("demo").mkdir()
    refuses(r"demo has no params.json", find_source, "demo", error=FileNotFoundError)
    assert find_source(BuiltinName("demo")).name == "small.gguf"
    Path("demo/params.json").touch()
    assert find_source("demo").kind == "meta"


def test_demo_judges_by_the_held_out_chapters_and_learns_from_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "bible", lambda part: [part, part])
    assert list(read_texts("demo[:1]")) == ["calibration"]
    assert list(texts("demo")) == list(texts("demo", split="test")) == ["held_out"] * 2
    Path("demo").mkdir()
    Path("demo/a.txt").write_text("own")
    assert list(texts("demo")) == ["own"]
    book = BuiltinName("demo")
    assert source_names(book) == [book] and list(texts(book)) == ["held_out"] * 2
    assert list(read_texts(book)) == ["calibration"] * 2


def test_two_processes_may_convert_the_demo_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(demo, "gguf_file", lambda: tmp_path / "small.gguf")

    def other_was_first(source: Path, target: Path, **_: object) -> None:
        target.mkdir()
        raise FileExistsError(f"{target} exists")

    def other_path_exists(source: Path, target: Path, **_: object) -> None:
        raise FileExistsError("another path exists")

    monkeypatch.setattr(demo, "to_meta", other_path_exists)
    refuses("another path", demo.checkpoint, error=FileExistsError)
    monkeypatch.setattr(demo, "to_meta", other_was_first)
    assert demo.checkpoint().parent == tmp_path and demo.checkpoint().is_dir()
