"""The refit on an accelerator: a second device without hardware, which counts what crosses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import random_windows
from families import make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llama.parallel import has_float64
from short_gpt.healing import refit_state, solver
from short_gpt.healing.refit import fit
from short_gpt.healing.refit_layer import Batches
from short_gpt.healing.solver import ALONE, NormalEquations
from short_gpt.runtime import memory
from short_gpt.wrappers.short_hf import ShortHFModel

AWAY, CPU = torch.device("xla", 0), torch.device("cpu")
aten = torch.ops.aten
WINDOWS = [w[: 16 - (i > 7)] for i, w in enumerate(random_windows(12, 16, vocab=8))]
HELD = random_windows(3, 16, vocab=8, seed=5)


class Away(Tensor):
    """A tensor of the second device, whose numbers ``held`` has."""

    # inside PyTorch "meta", which every build knows
    device, is_meta = AWAY, False

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        how = {"dtype": held.dtype, "device": "meta", "requires_grad": False}
        how |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, held.shape, **how)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of the second device, outside of `SecondDevice`")


class SecondDevice(TorchDispatchMode):
    """Computes for tensors of `AWAY`; notes the bytes of each tensor that goes to or from it.

    As on hardware, an operation has all its tensors on one device, except single numbers.
    """

    def __init__(self, *, float64: bool = True) -> None:
        super().__init__()
        self._float64, self.crossed = float64, list[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = [t for t in tensors if isinstance(t, Away)]
        if (
            len(away) < len([t for t in tensors if t.dim()])
            and away
            and function != aten.copy_.default
        ):
            raise RuntimeError(f"{function} of tensors on two devices")
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        lands = bool(away) if target is None else target == AWAY
        if target is not None:
            kwargs["device"] = CPU
        if lands and not self._float64 and kwargs.get("dtype") == torch.float64:
            raise TypeError("no float64 on this device")
        plain = {id(t.held): t for t in away}
        outputs = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        single = function in (aten._local_scalar_dense.default, aten.equal.default)
        if single and away:
            self.crossed.append(8)
        if function == aten.copy_.default and isinstance(args[0], Away) != isinstance(
            args[1], Away
        ):
            self.crossed.append(args[1].nbytes)
        if function == aten._to_copy.default and lands != bool(away):
            self.crossed.append(outputs.nbytes)
        if not lands:
            return outputs

        def wrapped(leaf: object) -> object:  # what was changed in place stays the same tensor
            if type(leaf) is not Tensor:
                return leaf
            return plain[id(leaf)] if id(leaf) in plain else Away(leaf)

        return tree_map(wrapped, outputs)


def _held(leaf: object) -> object:
    return leaf.held if isinstance(leaf, Away) else leaf


def moved(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            module._parameters[name] = nn.Parameter(Away(weight.detach()), requires_grad=False)
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module._buffers[name] = Away(buffer)
    return model


@pytest.fixture
def room(monkeypatch):
    """Sets the free memory of the second device; a function of the size that is asked for."""
    has_float64.cache_clear()

    def set_room(free):
        for module in (solver, refit_state):
            plain = module.free_memory
            monkeypatch.setattr(
                module, "free_memory", lambda d=CPU, plain=plain: free if d == AWAY else plain(d)
            )

    yield set_room
    has_float64.cache_clear()


F, D, N, STEPS = 12, 7, 40, 3
SUMS, FACTOR = 8 * F * (F + D), 8 * F * (F + 3 * 3)
# float32 products of five rows of both sums, of the last two rows in the end
PRODUCTS = [4 * 5 * 12, 4 * 5 * 7, 4 * 5 * 7, 4 * 5 * 7, 4 * 2 * 2, 4 * 2 * 7]


def tokens(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, r = (torch.randn(N, width, generator=generator) for width in (F, D))
    return x, r, torch.rand(N, generator=generator)


def changes(sums: NormalEquations) -> list[Tensor]:
    """What three ridges give, each before and after another one."""
    solved: list[Tensor] = []
    for ridge in (0.1, 1.0, 0.1):
        parts: list[Tensor] = []
        share = sums.solve(ridge, lambda _, change, parts=parts: parts.append(change.cpu()))
        solved += [torch.cat(parts, 1), torch.tensor(share)]
    return solved


@pytest.mark.parametrize(
    "fits", ["all", "the sums", "another rank lacks room", "nothing", "no float64"]
)
def test_sums_cross_once_a_matrix_or_not_at_all(fits, room, monkeypatch):
    monkeypatch.setattr(solver, "ROWS", 5)
    monkeypatch.setattr(solver, "COLUMNS", 3)
    alone = NormalEquations()
    for step in range(STEPS):
        alone.add(*tokens(step))
    alone.add_up(ALONE)
    team = SimpleNamespace(count=1, summed=lambda values: values, any_rank=bool)
    with SecondDevice(float64=fits != "no float64") as device:
        room(SUMS + solver.working_memory(N, F, D) + memory.UNUSED - (fits == "nothing"))
        sums = NormalEquations(N)
        for step in range(STEPS):
            sums.add(*map(Away, tokens(step)))
        room(FACTOR + memory.UNUSED - (fits == "the sums"))
        if fits == "another rank lacks room":
            team.any_rank = lambda _: True
        sums.add_up(team)
        crossed = [size for size in device.crossed if size > 8]  # without single numbers
        ours = changes(sums)
    expected = {"all": [], "nothing": PRODUCTS * STEPS, "no float64": PRODUCTS * STEPS}
    assert crossed == expected.get(fits, [8 * F * F, 8 * F * D])
    for a, b in zip(ours, changes(alone), strict=True):
        assert torch.allclose(a, b, rtol=1e-9) if fits == "all" else torch.equal(a, b)


def test_a_singular_matrix_is_noticed_on_the_device(room):
    with SecondDevice():
        room(10**9)
        sums = NormalEquations()
        sums.add(Away(torch.ones(4, 2)), Away(torch.ones(4, 3)), Away(torch.ones(4)))
        sums.add_up(ALONE)
        assert not sums._gram.is_cpu
        assert sums.solve(1e-30, lambda *_: pytest.fail("nothing is solved")) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("free", "sizes"), [(10**9, {8, 4, 3}), (0, {1})])
def test_a_refit_on_a_second_device_gives_the_matrices_of_the_cpu(
    family, free, sizes, room, monkeypatch
):
    layers, options, model = [2], {"held": HELD, "progress": False}, make(family)
    model.set_attn_implementation("eager")  # which kernel computes sdpa is chosen by the device
    one = fit(ShortHFModel(model), layers, WINDOWS, **options)
    seen, plain = set(), Batches.run

    def run(batches: Batches, index: int, state: Tensor) -> Tensor:
        seen.add(len(state))
        return plain(batches, index, state)

    monkeypatch.setattr(Batches, "run", run)
    with SecondDevice():
        room(free)
        other = fit(ShortHFModel(moved(model)), layers, WINDOWS, **options)
    assert seen == sizes
    assert [f.changed for f in other.fits] == [f.changed for f in one.fits]
    assert any(f.changed for f in one.fits) and other.values.keys() == one.values.keys()
    for key, expected in one.values.items():
        ours = other.values[key]
        assert type(ours) is Tensor
        if not free:  # every operation is the same, on the CPU where they do not fit
            assert torch.equal(ours, expected)
        scale = expected.abs().max() + ("norm" in key[1])  # Gemma's norms multiply by 1 + weight
        assert (ours - expected).abs().max() <= 1e-6 * scale, key


@pytest.mark.parametrize(("card", "at_once"), [(24, 4096), (20, 512), (18, 0)])
def test_tokens_that_pass_a_layer_of_an_8b_together(card, at_once, room):
    """Beside 16.1 GB of weights, and 0.6 GB that the driver takes."""
    room(int((card - 16.7) * 1e9))
    calls = SimpleNamespace(count=32, widths=lambda: (4096, 14336, 2), memory=dict)
    layers = nn.Linear(1, 1, device="meta")  # as of a streamed model, whose layers have no weights
    decoder = SimpleNamespace(layers=layers, device=AWAY)
    short = SimpleNamespace(layer_calls=lambda: calls, decoder=decoder, max_memory="20GB")
    plan = refit_state.plan_of(short, [[0] * 1024] * 8)
    assert plan.at_once == at_once
    tokens = max(at_once // 2, 1024)
    summed = 8 * 14336 * (14336 + 4096) + solver.working_memory(tokens, 14336, 4096)
    assert sum(plan.host.values()) >= plan.host["the process itself"] + summed
    decoder.device = CPU
    assert refit_state.plan_of(short, [[0] * 1024] * 8).at_once == 0


def test_a_device_counts_what_torch_holds_unused_as_free(monkeypatch):
    card = {"memory_reserved": 50, "memory_allocated": 20, "mem_get_info": (100, 1000)}
    told = SimpleNamespace(**{name: lambda _, value=value: value for name, value in card.items()})
    for module, free in ((told, 130), (SimpleNamespace(), 0)):
        monkeypatch.setattr(torch, "get_device_module", lambda _, module=module: module)
        assert memory.free_memory(AWAY) == free
