"""One comparison: every cell as measured by hand, nothing twice, and it continues."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from conftest import interrupted, random_windows, refuses, short_llama

from short_gpt import ShortLlama, choose_healed, heal_patch, heal_refit
from short_gpt.cli.tables import compared
from short_gpt.costs.sizes import size_without
from short_gpt.evaluation.perplexity import difference, perplexity, window_perplexities
from short_gpt.healing import choosing
from short_gpt.healing.job import CLOSED, STEPS
from short_gpt.healing.sets import LayerSets
from short_gpt.jobs import compare
from short_gpt.jobs.comparing import Row
from short_gpt.models.layer_calls import PartialRun
from short_gpt.runtime.state import StateFile
from short_gpt.selection.methods import METHODS

CALIBRATION, EVALUATION = random_windows(6, 40), random_windows(5, 30, seed=9)


def short(layers: int = 6) -> ShortLlama:
    return short_llama(n_layers=layers)


def rows_of(model: ShortLlama, **how: object) -> list[Row]:
    return compare(model, CALIBRATION, EVALUATION, progress=False, **how).rows


@pytest.fixture(scope="module")
def rows():
    return rows_of(short(), method=list(METHODS), n=[1, 3], heal_by=["raw", "patch"])


def test_a_refitted_row_is_the_refitted_model_and_leaves_it_as_it_was():
    model, by_hand = short(), short()
    before = [p.clone() for p in model.decoder.module.parameters()]
    rows = rows_of(model, method="bi", n=2, heal_by="raw,refit")
    refitted = rows[-1]
    heal_refit(by_hand, refitted.layers, CALIBRATION, progress=False)
    found = perplexity(by_hand.decoder, [[w] for w in EVALUATION])
    assert (refitted.healing, refitted.n) == ("refit", 2)
    assert refitted.perplexity == pytest.approx(found.value, rel=1e-6) != rows[1].perplexity
    assert refitted.gain is not None and refitted.layers == rows[1].layers
    assert all(map(torch.equal, before, model.decoder.module.parameters())) and not model.removed


def test_there_is_a_row_for_every_method_number_and_healing(rows):
    raw = [(r.method, r.seed, r.n) for r in rows if r.healing == "raw"]
    seeds = [(m, s) for m in METHODS for s in (range(3) if m == "random" else [None])]
    assert raw == [("dense", None, 0), *((m, s, n) for m, s in seeds for n in (1, 3))]
    patched = [r for r in rows if r.healing == "patch"]
    assert patched and all(0 not in r.layers for r in patched)
    assert len(patched) == len([r for r in rows[1:] if r.healing == "raw" and 0 not in r.layers])


def test_every_row_is_what_is_measured_by_hand(rows):
    dense = window_perplexities(short().decoder, EVALUATION, progress=False)
    for row in rows[::3]:
        model = short()
        if row.healing == "patch":
            heal_patch(model, row.layers, CALIBRATION, progress=False)
        elif row.n:
            model.remove_layers(row.layers)
        found = perplexity(model.decoder, [[w] for w in EVALUATION])
        assert row.perplexity == pytest.approx(found.value, rel=1e-4)
        own = window_perplexities(model.decoder, EVALUATION, progress=False)
        change = difference(dense, own)
        assert row.nats == pytest.approx(change.nats, abs=1e-5)
        assert row.standard_error == pytest.approx(change.standard_error, rel=1e-3, abs=1e-6)
        weights = list(model.llama.model.parameters())
        assert row.parameters == sum(w.numel() for w in weights)
        assert row.megabytes == pytest.approx(4e-6 * row.parameters)
        assert row.n == len(row.layers)


def test_nothing_is_computed_twice_and_it_continues(tmp_path, monkeypatch):
    calls, plain = [], choosing.window_perplexities

    def counted(decoder, windows, **options):
        calls.append(len(decoder.layers))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(decoder, windows, **options)

    monkeypatch.setattr(choosing, "window_perplexities", counted)

    def run():
        methods = ["bi", "angular", "deepest", "sequential"]
        return rows_of(short(), method=methods, n=[1, 2, 4], state=tmp_path / "state")

    with pytest.raises(KeyboardInterrupt):
        run()
    found = run()
    distinct = {tuple(sorted(r.layers)) for r in found}
    assert len(calls) == len(distinct) + 1  # and the interrupted one
    assert [r.perplexity for r in found] == [r.perplexity for r in run()]


@pytest.mark.parametrize(
    ("method", "part"),  # of auto the greedy search, a run inside a run inside
    [("sleb", "sleb-2"), ("auto", "auto-2-by-refit.greedy_kld")],
)
def test_a_search_is_made_once_by_the_calibration_windows_and_continues(tmp_path, method, part):
    def layers():
        state = StateFile(tmp_path / "state", {"model": "tiny"})
        return LayerSets(short(), CALIBRATION, EVALUATION, state=state).layers(method, 2)

    with interrupted(PartialRun, "logits", 9):
        layers()
    assert (tmp_path / f"state.{part}").is_file()
    found = layers()
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    with interrupted(PartialRun, "logits", 0):
        assert layers() == found
        raise KeyboardInterrupt  # nothing else did
    if method == "auto":
        assert found == choose_healed(short(), CALIBRATION, 2, progress=False).layers
    else:
        assert found == LayerSets(short(), CALIBRATION, EVALUATION).layers(method, 2)


def test_each_closed_form_has_its_own_choice_in_a_state(tmp_path):
    def choice(heal_by: str, name: str):
        state = StateFile(tmp_path / name, {}, every=0.0)
        sets = LayerSets(short(), CALIBRATION, EVALUATION, heal_by=heal_by, state=state)
        return sets.choice(1)

    first = choice("refit", "shared")
    assert choice("patch", "shared") == choice("patch", "alone") != first
    assert choice("refit", "shared") == first


def test_what_healing_brings_is_paired_with_the_same_layers_raw():
    rows = rows_of(short(), method="bi", n=2, heal_by="patch")
    model = short()
    model.remove_layers(rows[1].layers)
    raw = window_perplexities(model.decoder, EVALUATION, progress=False)
    model = short()
    heal_patch(model, rows[1].layers, CALIBRATION, progress=False)
    expected = difference(raw, window_perplexities(model.decoder, EVALUATION, progress=False))
    assert rows[1].gain == pytest.approx(expected.nats, abs=1e-6)
    assert rows[1].gain_error == pytest.approx(expected.standard_error, rel=1e-3)
    assert rows[0].gain is None
    assert f"{expected.nats:+.3f} ({expected.standard_error:.3f})" in compared(rows)


def test_texts_that_overlap_are_refused():
    long = random_windows(1, 200)
    refuses("share text with the windows to", LayerSets, short(), [long[0][:100]], [long[0][20:]])


def test_what_a_cut_model_costs_counts_its_own_layers():
    model = short()
    model.remove_layers([0])
    weights = {id(p): p.numel() for p in model.decoder.module.parameters()}
    layer = sum(p.numel() for p in model.decoder.layers[-1].parameters())
    assert size_without(model, []) == (sum(weights.values()), 4 * sum(weights.values()))
    assert size_without(model, [5])[0] == sum(weights.values()) - layer


CASES = dict(method="bi,sleb", n=[1, 2], heal_by="raw,patch", search_windows=2)


def test_one_call_gives_rows_and_keeps_a_state(tmp_path, monkeypatch):
    seen = dict(**CASES, state=tmp_path / "state")
    result = compare(short(), CALIBRATION, EVALUATION, **seen)
    by_hand = LayerSets(short(), CALIBRATION, EVALUATION, search_windows=2)
    searched = [row.layers for row in result.rows if row.method == "sleb" and row.healing == "raw"]
    assert searched == [by_hand.layers("sleb", n) for n in (1, 2)]
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["method"] == "dense"

    monkeypatch.setattr(
        choosing, "window_perplexities", lambda *_, **__: 1 / 0
    )  # all is in the file
    repeated = compare(short(), CALIBRATION, EVALUATION, **seen)
    assert repeated.rows == result.rows
    for found in (result, repeated):  # both hold it
        found.state.clear()
    assert [*tmp_path.iterdir()] == []


def test_a_state_is_told_by_what_it_was_computed_from(tmp_path, monkeypatch):
    state = tmp_path / "state"
    cases, other = ({"method": "bi", "n": 1, "search_windows": n} for n in (2, 3))
    compare(short(), CALIBRATION, EVALUATION, **cases, state=state)
    kept = state.read_bytes()
    changed = short()
    with torch.no_grad():
        changed.llama.model.output.weight[0, 0] += 1
    for what, model, windows, chosen in (
        ("weights", changed, EVALUATION, cases),
        ("evaluation", short(), EVALUATION[:4], cases),
        ("search_windows", short(), EVALUATION, other),
    ):
        with pytest.raises(ValueError, match=f"the state of a run with another {what}: "):
            compare(model, CALIBRATION, windows, **chosen, state=state)
        assert state.read_bytes() == kept
    for healing in CLOSED:
        with monkeypatch.context() as other:
            step = STEPS[healing]
            other.setitem(STEPS, healing, step._replace(settings=partial(step.settings, lost=None)))
            with pytest.raises(ValueError, match=f"a run with another {healing}: .*'lost': 2.0"):
                compare(short(), CALIBRATION, EVALUATION, **cases, state=state)
