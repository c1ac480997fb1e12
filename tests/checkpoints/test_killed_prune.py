"""A whole ``prune --overwrite`` that is killed: the earlier checkpoint or the new one."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from commands import run
from conftest import BYTE_VOCAB, make_transformer, save_checkpoint, write_byte_tokenizer
from tqdm import tqdm

from llama.checkpoint.meta import Checkpoint
from llama.files import read_json

KILLS = 3


def prune(layer: int) -> None:
    run("prune", "ckpt", "out", "--layers", layer, "--verify", "--overwrite")


def layer_gone(out: Path) -> int:
    """The layer that a whole checkpoint lacks."""
    record = read_json(out / "pruning.json")
    assert record["files"] == sorted(p.name for p in out.iterdir())
    weights = Checkpoint(out)
    assert weights.args.n_layers == 4 and weights.read("norm.weight").isfinite().all()
    (layer,) = record["removed_layers"]
    return layer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_prune_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_byte_tokenizer(
        save_checkpoint(tmp_path / "ckpt", make_transformer(vocab_size=BYTE_VOCAB))
    )
    prune(1)
    begun = time.monotonic()
    prune(1)
    whole, moments = time.monotonic() - begun, random.Random(0)
    ends = []
    for _ in range(KILLS):
        child = os.fork()
        if not child:
            # a lock of its own for its bars: one shared with this process would stay locked
            tqdm.set_lock(threading.RLock())
            try:
                while True:
                    prune(3)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0, 2) * whole)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        ends.append(layer_gone(tmp_path / "out"))
        prune(1)
        assert layer_gone(tmp_path / "out") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "out"]
    assert {*ends} <= {1, 3}
