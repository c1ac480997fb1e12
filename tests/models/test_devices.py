"""Switches of precision that a user may have on, devices that end later, and without float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import random_windows, refuses
from families import make
from torch.backends import cuda, cudnn, mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

from llama.parallel import choose_dtype, has_float64
from short_gpt.checkpoints.verify import fingerprint
from short_gpt.costs import speeds
from short_gpt.healing.refit import fit
from short_gpt.healing.solver import NormalEquations
from short_gpt.models.decoder import full_float32, wait
from short_gpt.scoring.metrics import angular_distances
from short_gpt.wrappers.short_hf import ShortHFModel

CPU, META = torch.device("cpu"), torch.device("meta")
HIGHEST = "highest"


KINDS = (cuda.matmul, mkldnn.matmul, mkldnn.conv, cudnn.conv)
HALF = [f"allow_{name}_reduced_precision_reduction" for name in ("fp16", "bf16")]


def read() -> list[object]:
    own: list[object] = [kind.fp32_precision for kind in KINDS]
    own += [getattr(cuda.matmul, name) for name in HALF]
    with suppress(RuntimeError):  # which torch raises where the common one is not that of a backend
        own.append(torch.get_float32_matmul_precision())
    return own


SWITCHES = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32": lambda: setattr(cuda.matmul, "allow_tf32", True),
    # from torch 2.9 on every backend has a switch
    "tf32 anew": lambda: setattr(cuda.matmul, "fp32_precision", "tf32"),
    "bf16 on the CPU": lambda: setattr(mkldnn.matmul, "fp32_precision", "bf16"),
    "convolutions": lambda: setattr(cudnn.conv, "fp32_precision", "tf32"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "both kinds": lambda: [
        torch.set_float32_matmul_precision("high"),
        setattr(cuda.matmul, "fp32_precision", "ieee"),
    ],
}


@pytest.fixture
def defaults():
    yield
    torch.set_float32_matmul_precision(HIGHEST)
    torch.backends.fp32_precision = "none"
    for kind in KINDS:
        kind.fp32_precision = "none"


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_are_off_in_the_block_and_back_after_it(switch, defaults):
    off = [*["ieee"] * len(KINDS), False, False, HIGHEST]
    SWITCHES[switch]()
    before = read()
    assert before != off and all(before[len(KINDS) : len(KINDS) + 2])
    for error in (None, KeyError):
        with suppress(KeyError), full_float32():
            assert read() == off and not cuda.matmul.allow_tf32
            if error:
                raise error
        assert read() == before


def test_scores_a_refit_and_a_proof_multiply_in_float32(monkeypatch, defaults):
    short, seen = ShortHFModel(make("llama")), {}

    def watch(place: object, name: str) -> None:
        own = getattr(place, name)

        def noted(*args: object, **options: object) -> object:
            seen[name] = torch.get_float32_matmul_precision()
            return own(*args, **options)

        monkeypatch.setattr(place, name, noted)

    for place, name in ((torch.linalg, "vecdot"), (NormalEquations, "add"), (short, "greedy")):
        watch(place, name)
    torch.set_float32_matmul_precision("medium")
    short.measure(random_windows(2, 12), progress=False)
    fit(short, [3], random_windows(4, 12), progress=False)
    fingerprint(short)
    assert seen == dict.fromkeys(("vecdot", "add", "greedy"), HIGHEST)
    assert torch.get_float32_matmul_precision() == "medium"


def test_every_device_of_a_model_is_waited_for(monkeypatch):
    cards = [torch.device("cuda", i) for i in (0, 1)]
    weights = [SimpleNamespace(device=d, is_meta=d == META) for d in (*cards, *cards, META)]
    done = []

    def zeros(_: object, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(item=lambda: done.append(device))

    monkeypatch.setattr(torch, "zeros", zeros)
    wait(SimpleNamespace(parameters=lambda: weights))
    assert sorted(done, key=str) == cards


class Log(TorchDispatchMode):
    """Notes products of matrices, and values that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.noted = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.noted += "p" * (function is torch.ops.aten.mm.default)
        self.noted += "r" * (function is torch.ops.aten._local_scalar_dense.default)
        return function(*args, **kwargs or {})


def test_a_token_is_timed_until_it_is_there(monkeypatch):
    def continued(_: object, count: int, choose: Callable[[torch.Tensor], object]) -> None:
        for _ in range(count):
            choose(torch.ones(1, 2))

    with Log() as log:
        clock = SimpleNamespace(perf_counter=lambda: log.noted.count("r"))
        monkeypatch.setattr(speeds, "time", clock)
        # a value is read in each
        assert speeds.seconds_a_token(SimpleNamespace(continued=continued), [[0]]) == 1


def test_float64_is_taken_where_a_device_has_it():
    """The meta device stands in for one without."""
    assert has_float64(CPU) and not has_float64(META)
    assert choose_dtype("float64", CPU) is torch.float64
    refuses("dtype = 'float64': .* where meta has it", choose_dtype, "float64", META)
    with pytest.raises(NotImplementedError, match="copy out of meta"):  # to the CPU
        angular_distances(torch.ones(1, 2, 3, device=META))
