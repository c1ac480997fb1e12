"""What benchmarks check before they measure."""

from __future__ import annotations

from importlib import import_module

import pytest
import serving
from gguf_files import stack_file

from short_gpt.checkpoints import prune_gguf


@pytest.mark.parametrize(
    ("script", "first", "arguments"),
    [
        ("greedy", "build", {}),
        ("scoring", "load", {}),
        ("second_family", "road", {}),
        ("serving", "book", {}),
        ("stopping", "read_scores", {}),
        ("stopping", "attack", {"adversarial": True}),
        ("streaming", "make_checkpoint", {}),
    ],
)
def test_a_result_that_could_not_be_written_is_told_before_the_work(
    script, first, arguments, tmp_path, monkeypatch
):
    module, out = import_module(script), tmp_path / "result.json"
    monkeypatch.setattr(module, first, lambda *_: pytest.fail("it began"))
    out.write_text("{}")
    with pytest.raises(FileExistsError, match="exists; choose another name or pass `overwrite`"):
        module.main(out=str(out), **arguments)
    with pytest.raises(FileExistsError, match="is not what this would write there"):
        module.main(out=str(out), overwrite=True, **arguments)
    assert out.read_text() == "{}"


def test_what_is_expected_of_fewer_layers_follows_from_the_bytes(tmp_path):
    """A prompt by the layers alone, writing by all bytes; ratios are to the same repeat's whole."""
    whole = stack_file(tmp_path / "whole.gguf")
    prune_gguf(whole, tmp_path / "cut.gguf", [1, 4])
    paths = {("Q4_1", 0): whole, ("Q4_1", 2): tmp_path / "cut.gguf"}
    layers, rest = serving.weights(whole)
    assert (layers, rest) == (8 * (3 * 18 + 7 * 4), 64 * 4)  # Q4_0 has 18 bytes for 32 values
    speeds = {0: (100.0, 200.0, 50.0), 2: (150.0, 220.0, 60.0)}
    runs = {
        ("Q4_1", n): [{"prompt": s, "generation": s, "peak_mb": 1.0} for s in values]
        for n, values in speeds.items()
    }
    row = serving.row(("Q4_1", 2), runs, paths)
    assert row["prompt_expected"] == 8 / 6
    assert row["generation_expected"] == (layers + rest) / (layers * 6 / 8 + rest)
    assert row["prompt_ratio"] == {"median": 1.2, "min": 1.1, "max": 1.5}
    assert len(serving.limits([row])) == 0
    row["prompt_ratio"] = {"median": 1.1}
    assert serving.limits([row]) == ["Q4_1 without 2 layers: prompt at 1.10, expected 1.33"]
