"""Whatever goes wrong in the middle of an operation, the model is as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import make_transformer, random_windows, short_llama
from families import make
from torch.utils._python_dispatch import TorchDispatchMode

from short_gpt.healing import heal_patch
from short_gpt.models.decoder import MetaDecoder
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_model import ShortModel

WINDOWS = random_windows(3, 12)
PROMPT = list(range(3, 9))


def opened(kind: str) -> ShortModel:
    if kind == "meta":
        return short_llama()
    return ShortHFModel(make(kind))


OPERATIONS: dict[str, Callable[[ShortModel], object]] = {
    "remove_layers": lambda short: short.remove_layers([1, 3]),
    "measure": lambda short: short.measure(WINDOWS, progress=False),
    "search": lambda short: short.search(WINDOWS, 2, progress=False),
    "patch": lambda short: heal_patch(short, [2, 3], WINDOWS, progress=False),
}


class Interrupted(KeyboardInterrupt):
    """What no library catches by its kind."""


class Failing(TorchDispatchMode):
    """Counts torch's operations and fails at one of them, once."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.count, self.at = 0, at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise Interrupted
        return func(*args, **(kwargs or {}))


def state_of(short: ShortModel) -> dict[str, object]:
    """All that an operation could leave behind, ready to be compared."""
    module = short.decoder.module
    config = getattr(module, "config", None)
    plain = int | float | str | bool | list | None
    cache = {"cache_ends"}  # it may be that of another text, as its tensors may
    return {
        "layers": [id(layer) for layer in short.decoder.layers],
        "config": vars(module.params).copy() if config is None else config.to_dict(),
        "numbers": (list(short.kept), list(short.removed), list(short.present)),
        "changes": list(short.changes),
        "modules": {
            name: (
                {k: v for k, v in vars(m).items() if isinstance(v, plain) and k not in cache},
                "forward" in vars(m),
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
            )
            for name, m in module.named_modules()
        },
        "parameters": {n: (id(p), p.requires_grad) for n, p in module.named_parameters()},
    }


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["meta", "llama", "falcon"])
def test_the_model_is_as_it_was(kind, operation):
    run = OPERATIONS[operation]
    short, trial = opened(kind), opened(kind)
    with Failing() as whole:
        run(trial)
    short.greedy(PROMPT, 3)  # caches are there before
    weights = {k: v.clone() for k, v in short.decoder.module.state_dict().items()}
    before = state_of(short)
    failed = 0
    for point in sorted({1 + whole.count * i // 6 for i in range(6)}):
        with Failing(point) as failing:
            try:
                run(short)
            except Interrupted:
                failed += 1
        if failing.count < point:  # what is looked at once, such as the weights, was
            break
        assert state_of(short) == before, f"operation {point} of {whole.count}"
        now = short.decoder.module.state_dict()
        assert all(torch.equal(weights[k], now[k]) for k in weights), point
    assert failed > 2 or not whole.count  # Meta's layers are taken out without a computation


def test_metas_layers_have_their_numbers_again_where_one_takes_none():
    class Stubborn(torch.nn.Module):
        layer_id = property(lambda self: 2, lambda self, number: self.take(number))

        def take(self, number):
            if number != 2:
                raise Interrupted

    decoder = MetaDecoder(make_transformer())
    decoder.layers[2] = Stubborn()
    layers = list(decoder.layers)
    with pytest.raises(Interrupted):
        decoder.keep_layers([0, 2, 3])
    assert list(decoder.layers) == layers
    assert [layer.layer_id for layer in layers] == [0, 1, 2, 3, 4]
    assert decoder.model.n_layers == decoder.model.params.n_layers == 5
