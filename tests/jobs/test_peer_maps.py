"""Others' maps at a gap: exact where the gap is what they can express, and never left behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows
from torch import Tensor, nn

from short_gpt.evaluation import perplexity
from short_gpt.jobs import Comparison, peer_maps
from short_gpt.jobs.hadamard import hadamard
from short_gpt.models.layer_hooks import States
from short_gpt.wrappers.short_llama import ShortLlama

WINDOWS = [w[: 40 - 3 * i] for i, w in enumerate(random_windows(6, 40))]
HELD = torch.tensor(random_windows(2, 20, seed=7))
ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 60, 64, 576, 896, 960]


class LinearLayer(nn.Module):
    """A layer that is x W."""

    def __init__(self, weight: Tensor, layer_id: int) -> None:
        super().__init__()
        self.weight, self.layer_id = nn.Parameter(weight.float(), requires_grad=False), layer_id

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x @ self.weight


def scaling(seed: int) -> Tensor:
    """Scales the channels of the rotated stream."""
    rotation = hadamard(32)
    scale = torch.rand(32, generator=torch.Generator().manual_seed(seed)).double() + 0.5
    return rotation @ scale.diag() @ rotation.T


def any_map(seed: int) -> Tensor:
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).double()
    return torch.eye(32).double() + 0.1 * noise


def short(maps: dict[int, Tensor] | None = None) -> ShortLlama:
    model = make_transformer(n_layers=7)
    for place, weight in (maps or {}).items():
        model.layers[place] = LinearLayer(weight, place)
    return ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard_matrices_are_orthogonal_and_of_one_size(order):
    matrix = hadamard(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order).double(), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))


@pytest.mark.parametrize("order", [3, 6, 10, 92])
def test_other_orders_are_refused(order):
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is known here"):
        hadamard(order)


@pytest.mark.parametrize(("kind", "made"), [("linearpatch", scaling), ("ghosted", any_map)])
def test_gaps_that_a_map_can_express_are_restored_exactly(kind, made):
    """One of a single layer, and one of two, whose product the map is."""
    model = short({1: made(1), 3: made(2), 4: made(3)})
    if kind == "linearpatch":  # such maps scale the same channels one after the other
        product = made(2) @ made(3)
        assert torch.allclose(product, made(3) @ made(2))
    whole = model.decoder.logits(HELD)
    (maps,) = peer_maps.fit_many(model, kind, [[4, 1, 3]], WINDOWS, progress=False)
    assert torch.allclose(maps.maps[2], made(2) @ made(3), atol=1e-4)
    assert torch.allclose(maps.maps[0], made(1), atol=1e-4)
    with model.without_layers([1, 3, 4]):
        raw = model.decoder.logits(HELD)
        undo = peer_maps.apply(model, maps)
        assert torch.allclose(model.decoder.logits(HELD), whole, atol=2e-3)
        assert not torch.allclose(raw, whole, atol=0.1)
        undo()
        assert torch.equal(model.decoder.logits(HELD), raw)


def test_the_scale_is_the_mean_of_the_ratios_of_windows():
    model, rotation = short(), hadamard(32)
    (maps,) = peer_maps.fit_many(model, "linearpatch", [[3, 4]], WINDOWS, progress=False)
    ratios = []
    for window in WINDOWS:
        seen = States(model.decoder.layers, set(), {2, 4})
        with seen, torch.no_grad():
            model.decoder.run(torch.tensor([window]))
        before, behind = ((seen.behind[i][0].double() @ rotation).abs() for i in (2, 4))
        ratios.append(behind.mean(0) / before.mean(0))
    expected = rotation @ torch.stack(ratios).mean(0).diag() @ rotation.T
    assert torch.allclose(maps.maps[2], expected, atol=1e-6)


def test_least_squares_leave_nothing_that_the_stream_could_restore():
    model = short()
    (maps,) = peer_maps.fit_many(model, "ghosted", [[3, 4]], WINDOWS, progress=False)
    gradient, scale = torch.zeros(32, 32).double(), 0.0
    for window in WINDOWS:
        seen = States(model.decoder.layers, set(), {2, 4})
        with seen, torch.no_grad():
            model.decoder.run(torch.tensor([window]))
        before, behind = (seen.behind[i][0].double() for i in (2, 4))
        gradient += before.T @ (before @ maps.maps[2] - behind)
        scale += float((before.T @ behind).abs().max())
    assert gradient.abs().max() < 1e-4 * scale


def test_rows_are_the_models_with_maps_and_the_model_stays_as_it_was():
    calibration, evaluation = random_windows(6, 40), random_windows(4, 30, seed=9)
    model = short()
    before = model.decoder.logits(HELD)
    kinds = ["raw", "linearpatch", "ghosted"]
    rows = Comparison(model, calibration, evaluation).rows(
        ["bi", "sequential"], [2], healings=kinds
    )
    assert [(r.method, r.healing) for r in rows[1:]] == [
        ("bi", "raw"), ("sequential", "raw"), ("bi", "linearpatch"), ("bi", "ghosted")
    ]  # fmt: skip
    assert torch.equal(model.decoder.logits(HELD), before)
    for row in rows[3:]:
        (maps,) = peer_maps.fit_many(model, row.healing, [row.layers], calibration, progress=False)
        with model.without_layers(row.layers):
            undo = peer_maps.apply(model, maps)
            found = perplexity(model.decoder, [[w] for w in evaluation])
            undo()
        assert row.perplexity == pytest.approx(found.value, rel=1e-6) != rows[1].perplexity
        assert row.gain == pytest.approx(row.nats - rows[1].nats)


def test_messages():
    model = short()
    for sets, windows in (([[0, 1]], WINDOWS), ([[1]], [])):
        with pytest.raises(ValueError, match="expected windows, and sets without the first layer"):
            peer_maps.fit_many(model, "ghosted", sets, windows, progress=False)
    with torch.no_grad():
        model.decoder.layers[1].feed_forward.w2.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="a state around layers 2 to 3 is NaN"):
        peer_maps.fit_many(model, "ghosted", [[2, 3]], WINDOWS, progress=False)
