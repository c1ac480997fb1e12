"""Where and how a model is written: one value."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import BYTE_VOCAB, make_transformer, refuses
from gguf_files import write_gguf as write_model

from llama.formats.gguf import to_meta
from llama.formats.hf import meta_to_hf
from llama.sources import find_source
from short_gpt.checkpoints import Provenance, Target, format_of, prune_checkpoint
from short_gpt.checkpoints.prune import kept_tensors
from short_gpt.wrappers.opening import open_model


@pytest.fixture(params=["gguf", "meta", "hf"])
def source(request, tmp_path):
    """A model in each format, which `pruned` is the name of a pruned one of."""
    model = write_model(tmp_path / "m.gguf", make_transformer(vocab_size=BYTE_VOCAB))
    if request.param == "gguf":
        return model
    meta = to_meta(model, tmp_path / "meta")
    return meta if request.param == "meta" else meta_to_hf(meta, tmp_path / "hf")


def pruned(source: Path) -> Path:
    return source.with_name(f"out{source.suffix}")


def test_what_verify_raises_leaves_the_earlier_model(tmp_path, source):
    before = {*tmp_path.iterdir()}

    def refuse(path: Path) -> None:
        raise RuntimeError(f"not the same: {path.name}")

    out = prune_checkpoint(source, pruned(source), [1])
    with pytest.raises(RuntimeError, match="not the same"):
        prune_checkpoint(source, Target(out, overwrite=True, verify=refuse), [2])
    assert Provenance.of_checkpoint(out).removed_layers == [1]
    assert {*tmp_path.iterdir()} == before | {out}


def test_the_format_follows_the_name_then_the_source(tmp_path, source):
    assert format_of(source, "out.gguf") == "gguf"
    assert format_of(source, "out") == ("meta" if source.name == "meta" else "hf")
    assert format_of("owner/name", "out") == "hf"
    other = tmp_path / ("out" if source.suffix else "out.gguf")
    refuses(r"is of another format .*: convert .* first", prune_checkpoint, source, other, [1])
    assert not other.exists()


def test_how_many_tensors_are_written_is_known_before(source):
    seen: list[str] = []
    prune_checkpoint(source, pruned(source), [1, 2], progress=seen.append)
    names = kept_tensors(find_source(source), [1, 2])
    assert len(seen) == len(names) > 10


@pytest.mark.parametrize("source", ["meta", "hf"], indirect=True)
def test_a_directory_is_not_written_by_the_name_of_a_gguf_file(tmp_path, source):
    short = open_model(str(source))
    short.remove_layers([1])
    refuses("short-gpt convert", short.save, tmp_path / "out.gguf")
    streamed = open_model(str(source), stream=True)
    streamed.remove_layers([1])
    refuses("expected the name of a directory, which", streamed.save, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
