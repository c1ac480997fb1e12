"""The paper's protocol on tiny models of every kind of source: rank with the paper's settings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import TEXT, run
from conftest import BYTE_VOCAB, interrupted, make_transformer, refuses, save_byte_llama, zero_layer
from huggingface_hub import constants

from llama.formats.hf import meta_to_hf
from short_gpt import rank
from short_gpt.jobs import reproduce
from short_gpt.jobs import reproduction as module
from short_gpt.jobs.inputs import WindowSettings
from short_gpt.jobs.reproduction import _changed
from short_gpt.runtime import memory
from short_gpt.wrappers.opening import open_model
from short_gpt.wrappers.streamed_llama import StreamedLlama

CUT = {"size": 32, "max_windows": 20, "stride": 32}
CPU = {"device": "cpu"}
SHAPE = {"dim": 32, "n_layers": 5, "vocab_size": BYTE_VOCAB, "removed": [3, 2, 1]}
LINE = ("--data", "books", "--size", 32, "--stride", 32, "--max_windows", 20, "--device", "cpu")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A random model whose layers 2 and 3 do nothing, in both formats and as one of the hub's."""
    model = make_transformer(vocab_size=BYTE_VOCAB, n_kv_heads=4)
    zero_layer(model, 2)
    zero_layer(model, 3)
    save_byte_llama(tmp_path / "ckpt", model)
    meta_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    (tmp_path / "books").mkdir()
    for number in (1, 2):
        (tmp_path / "books" / f"validation-{number}.txt").write_text(TEXT[number:])
    monkeypatch.chdir(tmp_path)
    known = module.published()
    known["paper"]["models"]["tiny"] = SHAPE
    monkeypatch.setattr(module, "published", lambda: known)
    return tmp_path


@pytest.fixture
def hub(here, monkeypatch) -> str:
    """The name of the same model in a cache of the hub's, which is not asked."""
    cache = here / "cache" / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    (here / "hf").rename(cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    return "some/model"


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
@pytest.mark.parametrize("source", ["ckpt", "hf", "hub"])
def test_every_kind_of_source_gives_the_scores_of_rank(here, source, stream, request):
    expected = rank("ckpt", "books", n=3, **CUT, **CPU).importance
    model = request.getfixturevalue("hub") if source == "hub" else source
    told: list[str] = []
    result = reproduce(model, "books", **CUT, **CPU, stream=stream, notify=told.append)
    assert result.comparison.model == "tiny" and result.comparison.paper == [3, 2, 1]
    assert result.comparison.ours[:2] == [2, 3] and len(result.comparison.ours) == 3
    assert torch.allclose(
        result.importance.block_influence, expected.block_influence, rtol=1e-4, atol=1e-6
    )
    assert [line.startswith("one layer at a time, ") for line in told] == [True] * stream


def test_the_papers_list_is_set_against_the_scores(here):
    content = json.loads(json.dumps(reproduce("ckpt", "books", **CUT, **CPU).to_dict()))
    assert content["result"]["kendall_tau"] is not None
    assert content["changed"] == ["size 32, not 1,024", "stride 32, not 256", "at most 20 windows"]
    assert content["taken_for_pg19"] == ["books"]


def test_it_ends_when_the_papers_number_of_layers_is_settled(here):
    how = {"size": 16, "stride": 8, **CPU}
    found = reproduce("ckpt", "books", **how, confidence=0.5)
    verdict = found.ranking.verdict
    assert verdict.settled and verdict.stop.n == 3 and verdict.windows < verdict.population
    whole = reproduce("ckpt", "books", confidence=None, **how)
    assert whole.ranking.verdict is None
    assert whole.importance.n_windows == verdict.population
    assert whole.comparison.ours == found.comparison.ours


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_stopped_and_continued_the_file_has_the_same_bytes(here, monkeypatch, stream):
    monkeypatch.setattr(memory, "MOST_WINDOWS", 4)
    command = ["reproduce", "ckpt", *LINE, *stream, "--json", "r.json"]
    run(*command)
    whole = Path("r.json").read_bytes()
    Path("r.json").unlink()
    owner = StreamedLlama if stream else type(open_model("ckpt", device="cpu"))
    with pytest.raises(SystemExit) as stop, interrupted(owner, "score_batch", 3):
        run(*command)
    assert stop.value.code == 130 and not Path("r.json").exists()
    saved = json.loads(Path("r.json.state").read_text())
    assert sum(saved["importance"]["windows"]) == (12 if stream else 3)
    run(*command)
    assert Path("r.json").read_bytes() == whole and not Path("r.json.state").exists()


def test_pictures_and_the_paper_beside(here, capsys):
    run("reproduce", "ckpt", *LINE, "--plots", "p")
    out = capsys.readouterr().out
    assert out.startswith("not the paper's protocol: size 32, not 1,024; stride 32, not 256; at")
    assert "\ntaken for PG-19: books\n" in out
    assert "same places: " in out
    assert {p.name for p in Path("p").iterdir()} == {"block_influence.png", "angular.png"}


REFUSED = [
    ({"dim": 64}, "the paper has no list for a model of dim 64, 5 layers"),
    ({"n_layers": 6}, "of dim 32, 6 layers and a vocabulary of 258; it covers Llama-2-7B (409"),
    ({"n_kv_heads": 2}, "ckpt has the size of tiny but groups its keys and values"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda part: str(part)[:30])
@pytest.mark.parametrize("kind", ["ckpt", "hf"])
def test_other_models_are_refused_by_name_before_they_are_loaded(
    here, changes, message, kind, monkeypatch, tmp_path
):
    other = make_transformer(**{"vocab_size": BYTE_VOCAB, "n_kv_heads": 4, **changes})
    folder = save_byte_llama(tmp_path / "other" / "ckpt", other)
    if kind == "hf":
        meta_to_hf(folder, folder.parent / "hf")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("short_gpt.jobs.reproduction.rank", lambda *_, **__: pytest.fail("it ran"))
    refuses(re.escape(message.replace("ckpt", kind)), reproduce, kind, "books")


def test_what_was_changed_of_the_protocol_is_named(here):
    def changed(data: object = "pg19", bos: str = "first", **how: int) -> tuple[str, ...]:
        return _changed(WindowSettings(data, **{"stride": 256, **how}), bos)

    assert changed() == changed("emozilla/pg19") == changed("books") == ()
    assert changed("pg19:test", bos="every") == (
        "the text pg19:test, not PG-19",
        "bos at the start of every window",
    )
    assert changed("self,books", max_windows=3) == ("at most 3 windows", "the text self, not PG-19")
    assert changed(["a text"])[0].startswith("the text list")
