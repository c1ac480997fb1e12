"""The rehearsals of a 7B model, on a tiny one: dress rehearsals of the benchmarks themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.studies import refit_streamed, reproduce_7b
from benchmarks.studies.reproduce_7b import Case, rehearse, table, timed
from llama.args import ModelArgs
from short_gpt.jobs import reproduction

ARGS = ModelArgs(dim=32, n_layers=8, n_heads=4, multiple_of=16, vocab_size=258)
TINY = Case(ARGS, known=(5, 2, 6), shard_bytes=60_000)


def inside(argv: Sequence[str], facts: Path) -> dict[str, object]:
    """Runs the command in this process."""
    timed(facts, argv)
    return json.loads(facts.read_text())


def test_the_known_layers_come_out_stopped_and_continued_in_both_formats(
    tmp_path, capsys, monkeypatch
):
    known = reproduction.published()
    shape = {"dim": 32, "n_layers": 8, "vocab_size": 258}
    known["paper"]["models"]["tiny"] = {**shape, "removed": [5, 6, 2]}
    monkeypatch.setattr(reproduction, "published", lambda: known)
    monkeypatch.setattr(reproduce_7b, "measure_products", lambda *_: 1.0)
    content = rehearse(TINY, tmp_path, ["meta", "hf"], ["meta", "hf"], inside)
    del content["limits"]["peak memory at most 3 GB"]  # of what ran in this process before
    assert all(content["limits"].values()), content["limits"]
    meta, hf = content["formats"].values()
    assert meta["files"] == 1 and hf["files"] > 1
    for made in (meta, hf):
        assert made["stopped"]["windows_saved"] == 32
        rounds = [len(made[kind]["rounds"]) for kind in ("whole", "stopped", "continued")]
        assert rounds == [2, 1, 1] and made["continued"]["windows"] == 64
        result = made["continued"]["result"]
        assert (result["same_places"], result["same_set"]) == (1, True)
        assert result["kendall_tau"] == pytest.approx(1 / 3)
    assert not [*tmp_path.glob("*/*.pth"), *tmp_path.glob("*/*.safetensors")]
    assert "hf: " in table(content)
    assert "set of the 3 lowest settled at 0.99 after 64 of 200 windows" in capsys.readouterr().out


def test_a_streamed_refit_is_planned_and_measured_and_its_checkpoint_used_again(tmp_path):
    def inside(argv: Sequence[str], facts: Path) -> dict[str, object]:
        refit_streamed.timed(facts, argv)
        return json.loads(facts.read_text())

    case = refit_streamed.Case(ARGS, layers=(4, 5), size=16, max_memory="20GB")
    content = refit_streamed.refitted(case, tmp_path, inside)
    assert content["matrices"] == 6 and len(content["evaluation_seconds"]) == 3
    assert content["planned_bytes"] > 10**6
    assert "6 matrices in" in refit_streamed.table(content)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    before = (tmp_path / "checkpoint" / "config.json").stat().st_mtime_ns
    refit_streamed.refitted(case, tmp_path, inside)
    assert (tmp_path / "checkpoint" / "config.json").stat().st_mtime_ns == before
