"""One comparison: every cell as measured by hand, nothing twice, and it continues."""

from __future__ import annotations

import pytest
from conftest import CharTokenizer, make_transformer, random_windows, zero_layer

from short_gpt import ShortLlama
from short_gpt.evaluation.paired import difference, losses
from short_gpt.evaluation.perplexity import perplexity
from short_gpt.experiments import comparison as module
from short_gpt.experiments.comparison import Comparison
from short_gpt.healing.linear_patch import heal
from short_gpt.report.tables import compared
from short_gpt.runtime.state import StateFile
from short_gpt.selection.methods import METHODS
from short_gpt.selection.perplexity_budget import most_layers
from short_gpt.selection.stack import Stack

CALIBRATION, EVALUATION = random_windows(6, 40), random_windows(5, 30, seed=9)


class Tiny:
    def __init__(self, layers: int = 6) -> None:
        self.model, self.tokenizer = make_transformer(n_layers=layers), CharTokenizer()


def short(layers: int = 6) -> ShortLlama:
    return ShortLlama(Tiny(layers))


@pytest.fixture(scope="module")
def rows():
    comparison = Comparison(short(), CALIBRATION, EVALUATION)
    return comparison.rows(list(METHODS), [1, 3], healings=["raw", "patched"])


def test_there_is_a_row_for_every_method_number_and_healing(rows):
    raw = [(r.method, r.seed, r.n) for r in rows if r.healing == "raw"]
    seeds = [(m, s) for m in METHODS for s in (range(3) if m == "random" else [None])]
    assert raw == [("dense", None, 0), *((m, s, n) for m, s in seeds for n in (1, 3))]
    patched = [r for r in rows if r.healing == "patched"]
    assert patched and all(0 not in r.layers for r in patched)
    assert len(patched) == len([r for r in rows[1:] if r.healing == "raw" and 0 not in r.layers])


def test_every_row_is_what_is_measured_by_hand(rows):
    for row in rows[::3]:
        model = short()
        if row.healing == "patched":
            heal(model, row.layers, CALIBRATION, progress=False)
        elif row.n:
            model.remove_layers(row.layers)
        found = perplexity(model.decoder, [[w] for w in EVALUATION])
        assert row.perplexity == pytest.approx(found.value, rel=1e-4)
        weights = list(model.llama.model.parameters())
        assert row.parameters == sum(w.numel() for w in weights)
        assert row.megabytes == pytest.approx(4e-6 * row.parameters)
        assert row.n == len(row.layers)


def test_the_difference_from_the_whole_model_has_its_error(rows):
    dense, first = rows[0], rows[1]
    assert dense.nats == dense.standard_error == 0
    one = [perplexity(short().decoder, [[w]]) for w in EVALUATION]
    model = short()
    model.remove_layers(first.layers)
    other = [perplexity(model.decoder, [[w]]) for w in EVALUATION]
    changes = [(b.nats - a.nats) / a.tokens for a, b in zip(one, other, strict=True)]
    mean = sum(changes) / 5
    variance = sum((c - mean) ** 2 for c in changes) / 4
    assert first.nats == pytest.approx(mean, abs=1e-5)
    assert first.standard_error == pytest.approx((variance / 5) ** 0.5, rel=1e-3)


def test_nothing_is_computed_twice_and_it_continues(tmp_path, monkeypatch):
    calls, plain = [], module.losses

    def counted(decoder, windows, **options):
        calls.append(len(decoder.layers))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(decoder, windows, **options)

    monkeypatch.setattr(module, "losses", counted)

    def run():
        state = StateFile(tmp_path / "state", {"model": "tiny"})
        comparison = Comparison(short(), CALIBRATION, EVALUATION, state=state)
        return comparison.rows(["bi", "angular", "deepest", "sequential"], [1, 2, 4])

    with pytest.raises(KeyboardInterrupt):
        run()
    found = run()
    distinct = {tuple(sorted(r.layers)) for r in found}
    assert len(calls) == len(distinct) + 1  # and the interrupted one
    assert [r.perplexity for r in found] == [r.perplexity for r in run()]


def test_an_interrupted_search_continues_in_the_middle(tmp_path, monkeypatch):
    calls, plain = [], Stack.nats

    def counted(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(Stack, "nats", counted)

    def layers():
        state = StateFile(tmp_path / "state", {"model": "tiny"})
        return Comparison(short(), CALIBRATION, EVALUATION, state=state).layers("sleb", 2)

    with pytest.raises(KeyboardInterrupt):
        layers()
    assert (tmp_path / "state.sleb-2").is_file()
    found, needed = layers(), len(calls)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    calls[:] = range(100)
    assert Comparison(short(), CALIBRATION, EVALUATION).layers("sleb", 2) == found
    assert needed == len(calls) - 100 + 1  # and the interrupted window


def test_the_model_is_left_as_it_was():
    model = short()
    before = perplexity(model.decoder, [EVALUATION])
    Comparison(model, CALIBRATION, EVALUATION).rows(["bi"], [2], healings=["raw", "patched"])
    assert perplexity(model.decoder, [EVALUATION]) == before
    assert model.removed == []


def test_what_healing_brings_is_paired_with_the_same_layers_raw():
    rows = Comparison(short(), CALIBRATION, EVALUATION).rows(["bi"], [2], healings=["patched"])
    model = short()
    model.remove_layers(rows[1].layers)
    raw = losses(model.decoder, EVALUATION, progress=False)
    model = short()
    heal(model, rows[1].layers, CALIBRATION, progress=False)
    expected = difference(raw, losses(model.decoder, EVALUATION, progress=False))
    assert rows[1].gain == pytest.approx(expected.nats, abs=1e-6)
    assert rows[1].gain_error == pytest.approx(expected.standard_error, rel=1e-3)
    assert rows[0].gain is None
    assert f"{expected.nats:+.3f} ({expected.standard_error:.3f})" in compared(rows)


def test_lora_is_called_once_for_every_set():
    asked = []

    def lora(layers):
        asked.append(layers)
        return [perplexity(short().decoder, [[w]]) for w in EVALUATION]

    comparison = Comparison(short(), CALIBRATION, EVALUATION)
    rows = comparison.rows(["bi", "deepest"], [1, 2], healings=["lora"], lora=lora)
    assert len(asked) == len({tuple(sorted(a)) for a in asked})
    assert [r.healing for r in rows] == ["raw"] + ["lora"] * 4
    assert rows[1].perplexity == pytest.approx(rows[0].perplexity)


def test_lora_may_be_for_some_sets_only():
    def lora(layers):
        return [perplexity(short().decoder, [[w]]) for w in EVALUATION]

    options = {"healings": ["raw", "lora"], "lora": lora, "lora_only": [("bi", 2)]}
    rows = Comparison(short(), CALIBRATION, EVALUATION).rows(["bi", "deepest"], [1, 2], **options)
    assert [(r.method, r.n) for r in rows if r.healing == "lora"] == [("bi", 2)]
    assert len(rows) == 1 + 4 + 1


def test_agreement_of_the_methods():
    model = Tiny()
    for i in (2, 3):
        zero_layer(model.model, i)
    comparison = Comparison(ShortLlama(model), CALIBRATION, EVALUATION)
    found = comparison.agreement(2, 2)
    assert found["overlap"]["bi, angular"] == 1.0
    assert -1 <= found["rank_correlation_of_bi_with_loss"] <= 1


def test_texts_that_overlap_are_refused():
    long = random_windows(1, 200)
    with pytest.raises(ValueError, match="share text with the windows to evaluate on"):
        Comparison(short(), [long[0][:100]], [long[0][20:]])


@pytest.mark.parametrize(
    ("methods", "counts", "message"),
    [(["best"], [1], "no method 'best'"), (["bi"], [6], "expected 1 to 5")],
)
def test_cases_are_checked_first(methods, counts, message):
    with pytest.raises(ValueError, match=message):
        Comparison(short(), CALIBRATION, EVALUATION).rows(methods, counts)


def test_identity_layers_pass_every_gate():
    model = Tiny()
    for i in (2, 3):
        zero_layer(model.model, i)
    wrapped = ShortLlama(model)
    wrapped.measure(CALIBRATION, progress=False)

    def perplexity_without(layers):
        with wrapped.without_layers(layers):
            return wrapped.perplexity(EVALUATION, progress=False)

    gate = most_layers(
        perplexity_without, lambda n: wrapped.layers_to_remove(n=n), ratio=1.0001, most=4
    )
    assert set(gate.layers[:2]) == {2, 3}
