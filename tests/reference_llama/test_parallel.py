"""Devices, dtypes and sizes of ranks are checked, and setting up changes nothing else."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import children
import pytest
import torch
from conftest import refuses
from processes import alone

from llama.parallel import choose_device, choose_dtype, initialize

TOKENS = torch.arange(3, 23).reshape(2, 10)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda", "mps")
    for name in ("gpu", "meta", "xla", "xpu:99", "cuda:99", "privateuseone", "", 1.5):
        refuses(rf"device = {name!r}: expected one of cpu", choose_device, name)


def allocate(_: int, *, device: torch.device) -> None:
    """Stands in for `torch.empty` where there are cards."""
    if device.index >= getattr(torch, device.type).device_count():
        raise RuntimeError("invalid device ordinal")


def test_any_device_that_has_memory_is_taken(monkeypatch):
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", allocate)
    assert choose_device("xpu:1") == torch.device("xpu", 1)
    refuses("'xpu:2': expected one of cpu", choose_device, "xpu:2")


def test_dtypes():
    cpu = torch.device("cpu")
    assert choose_dtype(None, cpu) == torch.float32
    assert choose_dtype(None, torch.device("mps")) == torch.float16
    assert choose_dtype("bfloat16", cpu) == choose_dtype(torch.bfloat16, cpu) == torch.bfloat16
    refuses("dtype = 'int8': expected one of float32, bfloat16", choose_dtype, "int8", cpu)
    refuses("dtype = 'float64': .* where mps has it", choose_dtype, "float64", torch.device("mps"))


def test_the_groups_are_silent_and_keep_their_size(capfd):
    initialize(device=torch.device("cpu"))
    initialize(1, device=torch.device("cpu"))
    refuses("model_parallel_size = 2: expected 1", initialize, 2, device=torch.device("cpu"))
    assert capfd.readouterr() == ("", "")


def test_a_model_can_be_made_without_any_setting_up(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")):  # no launcher's without MASTER_ADDR
        monkeypatch.setenv(name, value)
    done = alone(tmp_path / "printed", children.without_setting_up).end()
    assert done == ([0], "", "")


def test_a_fresh_process_prints_nothing_and_leaves_no_defaults(tmp_path):
    done = alone(tmp_path / "printed", children.set_up).end()
    assert done.codes == [0] and done.out == "", done.err


def test_a_traceback_of_a_single_process_names_no_rank():
    lines = "import torch; from llama.parallel import initialize; "
    lines += "initialize(device=torch.device('cpu')); raise ValueError('of a user')"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ValueError: of a user"
    assert "rank0" not in done.stderr


def test_a_card_is_chosen_by_rank_and_bfloat16_by_its_own_products(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda card: asked.append(card) or nullcontext())
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="device = 'cuda': expected one of"):  # two on one card
        choose_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # some launchers show each process one card
    assert choose_device("cuda") == torch.device("cuda", 0)
    card = torch.device("cuda", 1)
    assert choose_dtype(None, card) == torch.float16 and asked == [card]
