"""What benchmarks check before they measure."""

from __future__ import annotations

from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("script", "first", "arguments"),
    [
        ("greedy", "build", {}),
        ("optimality", "build", {}),
        ("scoring", "load", {}),
        ("stopping", "read_scores", {}),
        ("stopping", "attack", {"adversarial": True}),
        ("streaming", "make_checkpoint", {}),
        ("reproduce_7b", "rehearse", {}),
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
