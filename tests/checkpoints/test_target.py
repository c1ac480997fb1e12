"""Where and how a model is written: one value."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import BYTE_VOCAB, make_transformer
from gguf_files import write_gguf as write_model

from llama.sources import find_source
from short_gpt.checkpoints import Provenance, Target, format_of, prune_checkpoint
from short_gpt.checkpoints.prune import kept_tensors
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.wrappers.opening import open_model


def test_what_verify_raises_leaves_the_earlier_model(tmp_path):
    model = write_model(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB))

    def refuse(path: Path) -> None:
        raise RuntimeError(f"not the same: {path.name}")

    for out in (tmp_path / "out.gguf", tmp_path / "out"):
        form = None if out.suffix else "meta"
        prune_checkpoint(model, Target(out, form), [1])
        with pytest.raises(RuntimeError, match="not the same"):
            prune_checkpoint(model, Target(out, form, overwrite=True, verify=refuse), [2])
        assert Provenance.of_checkpoint(out).removed_layers == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out", "out.gguf"]


def test_the_format_follows_the_name_then_the_source(tmp_path):
    model = write_model(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB))
    assert format_of(model, "out.gguf") == "gguf"
    assert format_of(model, "out") == "hf" and format_of("owner/name", "out") == "hf"
    (tmp_path / "params.json").touch()
    assert format_of(tmp_path, "out") == "meta" and format_of(tmp_path, "out", "hf") == "hf"
    with pytest.raises(ShortGPTError, match=r"a name that ends with \.gguf for gguf"):
        format_of(model, "out", "gguf")
    with pytest.raises(ShortGPTError, match="'pth': expected one of meta, hf, gguf"):
        format_of(model, "out", "pth")


@pytest.mark.parametrize("kind", ["gguf", "meta", "hf"])
def test_how_many_tensors_are_written_is_known_before(tmp_path, kind):
    source = write_model(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB))
    for step in {"gguf": (), "meta": ("meta",), "hf": ("meta", "hf")}[kind]:
        source = prune_checkpoint(source, Target(tmp_path / step, step), [1])
    seen: list[str] = []
    out = tmp_path / ("x.gguf" if kind == "gguf" else "x")
    prune_checkpoint(source, Target(out, kind), [1, 2], progress=seen.append)
    names = kept_tensors(find_source(source), [1, 2])
    assert len(seen) == len(names) > 10
    seen.clear()
    to = "hf" if kind == "meta" else "meta"
    prune_checkpoint(source, Target(tmp_path / "other", to), [1, 2], progress=seen.append)
    assert len(seen) == len(names) + len({*names}) > 20


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_a_directory_is_not_written_by_the_name_of_a_gguf_file(tmp_path, kind):
    model = write_model(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB))
    meta = prune_checkpoint(model, Target(tmp_path / "meta", "meta"), [1])
    source = prune_checkpoint(meta, Target(tmp_path / "hf", "hf"), [1]) if kind == "hf" else meta
    short = open_model(str(source))
    short.remove_layers([1])
    with pytest.raises(ShortGPTError, match="short-gpt convert"):
        short.save(tmp_path / "out.gguf")
    streamed = open_model(str(source), stream=True)
    streamed.remove_layers([1])
    with pytest.raises(ShortGPTError, match="expected the name of a directory, which short-gpt"):
        streamed.save(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
