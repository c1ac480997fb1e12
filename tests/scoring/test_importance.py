"""Scores from hooks: the same as from stored states, whatever the batching, in every dtype."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import make_transformer, random_windows, refuses, short_llama
from torch import Tensor

from short_gpt.data.windows import Window
from short_gpt.evaluation.perplexity import Sample, sampling_error
from short_gpt.models.decoder import MetaDecoder, pad
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.hooks import Scores, hooked
from short_gpt.scoring.importance import Importance
from short_gpt.scoring.metrics import angle, block_influence, cosine
from short_gpt.scoring.moments import add_texts
from short_gpt.scoring.run import RunState, ScoringRun, measure


def stored_states(model, window: list[int]) -> list[Tensor]:
    """(S, D) in front of every layer and behind the last, by a plain loop in float64."""
    model = model.double()
    with torch.no_grad():
        h = model.tok_embeddings(torch.tensor([window]))
        states = [h[0]]
        for layer in model.layers:
            h = layer(h, None, model.freqs_cis[: len(window)])
            states.append(h[0])
    return states


def test_scores_equal_those_of_stored_states():
    windows = random_windows(6, 20)
    found = measure(MetaDecoder(make_transformer()), [windows[:2], windows[2:]])
    states = [stored_states(make_transformer(), w) for w in windows]
    expected = torch.stack(
        [torch.cat([block_influence(s[i], s[i + 1]) for s in states]).mean() for i in range(5)]
    )
    assert (found.block_influence - expected).abs().max() < 1e-5
    for start in range(6):
        for end in range(start + 1, 6):
            one_by_one = [angle(cosine(s[start][-1], s[end][-1])) for s in states]
            assert found.angular[start, end] == pytest.approx(
                torch.stack(one_by_one).mean().item(), abs=1e-5
            )
    assert (found.n_windows, found.n_tokens) == (6, 120)


def test_ragged_padded_batches_equal_single_windows():
    windows = [w[:n] for w, n in zip(random_windows(4, 30), (30, 1, 7, 19), strict=True)]
    decoder = MetaDecoder(make_transformer())
    batched = measure(decoder, [windows])
    single = measure(decoder, [[w] for w in windows])
    assert batched.n_tokens == single.n_tokens == 57
    assert (batched.block_influence - single.block_influence).abs().max() < 1e-6
    assert (batched.angular - single.angular).abs().max() < 1e-5


def test_the_mean_is_over_tokens_not_over_windows():
    windows = [w[:n] for w, n in zip(random_windows(2, 30), (30, 3), strict=True)]
    decoder = MetaDecoder(make_transformer())
    long, short = (measure(decoder, [[w]]).block_influence for w in windows)
    both = measure(decoder, [windows]).block_influence
    assert torch.allclose(both, (30 * long + 3 * short) / 33, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_score_alike(dtype):
    windows = [random_windows(4, 30)]
    low = measure(MetaDecoder(make_transformer().to(dtype)), windows)
    full = measure(MetaDecoder(make_transformer()), windows)
    # bfloat16 keeps 8 bits: states are off by 0.4%, the scores by about as much
    assert (low.block_influence - full.block_influence).abs().max() < 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_names_its_layer_and_counts_nothing(bad):
    model = make_transformer()
    good, seen = random_windows(1, 8), Importance.empty([3, 4, 6, 8, 9])
    measure(MetaDecoder(model), [good], into=seen)
    before = seen.to_dict()
    with torch.no_grad():
        model.layers[2].feed_forward.w2.weight[0, 0] = bad
    with pytest.raises(FloatingPointError, match="output of layer 6"):
        measure(MetaDecoder(model), [good], into=seen)
    assert seen.to_dict() == before
    assert not any(layer._forward_hooks for layer in model.layers)


def test_padding_that_is_no_number_is_an_error_and_never_a_score():
    """Attention multiplies what it masks by zero, and zero times NaN is NaN."""
    model, sums = make_transformer(), Importance.empty(range(5))
    with torch.no_grad():
        model.tok_embeddings.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"output of layer 0 \(window 1 of the batch"):
        measure(MetaDecoder(model), [[[5, 6, 7, 8], [9, 10]]], into=sums)
    assert sums.n_windows == 0
    assert measure(MetaDecoder(model), [[[5, 6, 7, 8]], [[9, 10]]]).block_influence.min() > 0.01


def scores_of(tokens: Tensor, influence: Tensor) -> Scores:
    """Windows of so many tokens (B,) with these sums of Block Influences (B, L)."""
    B, L = influence.shape
    return Scores(tokens, influence, torch.zeros(B, L + 1, L + 1))


def test_the_error_of_ragged_windows_is_that_of_a_ratio():
    """Cochran, Sampling Techniques, 3rd ed., eq. 6.13: residuals from the ratio, not the mean."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 90, (30,), generator=generator).double()
    sums = tokens[:, None] * (1 + 0.1 * torch.randn(30, 3, generator=generator).double())
    found = Importance.empty(range(3))
    found.add(scores_of(tokens, sums))
    ratio = sums.sum(0) / tokens.sum()
    residuals = sums - tokens[:, None] * ratio
    expected = residuals.T @ residuals / 29 / (30 * tokens.mean() ** 2)
    assert torch.allclose(found.covariance, expected, rtol=1e-9)
    equal_windows = sums.T.cov() * 30 / tokens.sum() ** 2
    assert (equal_windows.diagonal() > 9 * expected.diagonal()).all()  # the two are far apart


def of_texts(texts: list[int], tokens: list[int]) -> list[Window]:
    """Windows of so many tokens, of these texts."""
    drawn = random_windows(len(texts), max(tokens))
    return [Window(w[:n], t) for w, t, n in zip(drawn, texts, tokens, strict=True)]


def test_texts_are_the_samples_where_there_are_several():
    """The error of a ratio of cluster totals, layer by layer, as perplexities have it."""
    cut = of_texts([4, 0, 4, 9, 0, 4, 9, 9, 9], [10, 12, 5, 9, 9, 10, 3, 12, 8])
    decoder = MetaDecoder(make_transformer())
    found = measure(decoder, [cut[:4], cut[4:]])
    each = [measure(decoder, [[w]]).influence.sum(0) for w in cut]
    for layer in range(5):
        samples = [
            Sample(w.text, float(sums[layer]), len(w)) for w, sums in zip(cut, each, strict=True)
        ]
        expected = sampling_error(samples)
        assert found.standard_error[layer] == pytest.approx(expected.standard_error, rel=1e-5)
        assert found.margin[layer] == pytest.approx(expected.margin(), rel=1e-5)
        assert found.n_texts == expected.texts == 3
        assert found.degrees == pytest.approx(expected.degrees)
    by_windows = measure(decoder, [[list(w) for w in cut]])  # plain lists do not know their text
    effective = sum(map(len, cut)) ** 2 / sum(len(w) ** 2 for w in cut)  # of 9 unequal windows
    assert by_windows.n_texts is None and 7 < effective < 9
    assert by_windows.degrees == pytest.approx(effective - 1)
    by_number = by_windows.covariance.diagonal().sqrt()
    more = math.sqrt(8 / 9 * effective / (effective - 1))
    assert torch.allclose(by_windows.standard_error, by_number * more, rtol=1e-9)
    assert torch.allclose(by_windows.covariance, found.covariance)  # which a stop judges by
    mixed = measure(decoder, [cut, [list(cut[0])]])
    assert mixed.texts is None and (found + by_windows).texts is None
    alone = measure(decoder, [of_texts([7] * 5, [9] * 5)])
    assert alone.n_texts == 1 and alone.degrees == pytest.approx(4)
    by_number = alone.covariance.diagonal().clamp(min=0).sqrt()
    assert torch.allclose(alone.standard_error, by_number, rtol=1e-9)
    few = measure(decoder, [of_texts([0, 1, 1], [9] * 3)])
    assert few.standard_error.min() > 0 and few.margin.isnan().all()  # two texts tell too little


def test_intervals_over_clustered_windows_cover_the_truth():
    """12 texts of 8 windows that are alike: windows as samples would cover under two thirds."""
    generator = torch.Generator().manual_seed(0)
    inside, alone = [], []
    for _ in range(400):
        own = 1 + 0.3 * torch.randn(12, 1, 5, generator=generator)
        drawn = (own + 0.1 * torch.randn(12, 8, 5, generator=generator)).flatten(0, 1)
        sample = Importance.empty(range(5))
        sample.add(scores_of(torch.ones(96), drawn), [i // 8 for i in range(96)])
        off = (sample.block_influence - 1).abs()
        inside.append(off < sample.margin)
        alone.append(off < 1.985 * sample.covariance.diagonal().sqrt())
    assert torch.stack(inside).double().mean().item() == pytest.approx(0.95, abs=0.015)
    assert torch.stack(alone).double().mean() < 0.67


def two_readings() -> tuple[list[Window], list[Window]]:
    """Two texts in each of two calls, whose numbers begin at 0 in both."""
    cut = of_texts([0, 1, 0, 1, 0, 1], [8, 12, 9, 5, 11, 10])
    return cut[:3], cut[3:]


READINGS = {
    "measure into": lambda d, one, two: measure(d, [two], into=measure(d, [one])),
    "sum": lambda d, one, two: measure(d, [one]) + measure(d, [two]),
    "saved scores": lambda d, one, two: (
        Importance.from_dict(measure(d, [one]).to_dict())
        + Importance.from_dict(measure(d, [two]).to_dict())
    ),
    "wrapper": lambda d, one, two: by_wrapper(one, two),
}


def by_wrapper(*readings: list[Window]) -> Importance:
    short = short_llama()
    for windows in readings:
        short.measure(windows, progress=False)
    return short.importance


@pytest.mark.parametrize("way", READINGS)
def test_texts_of_two_calls_are_different_texts(way):
    decoder = MetaDecoder(make_transformer())
    found = READINGS[way](decoder, *two_readings())
    first, second = two_readings()  # as four texts of one call
    expected = measure(decoder, [[*first, *(Window(w, w.text + 2) for w in second)]])
    assert found.n_texts == 4 and found.degrees == pytest.approx(expected.degrees)
    assert torch.allclose(found.standard_error, expected.standard_error, rtol=1e-6)
    assert torch.allclose(found.block_influence, expected.block_influence, rtol=1e-6)


def test_equal_numbers_merged_would_hide_half_of_the_error():
    """Two texts of either call that differ within it as the other call's do the other way round."""
    sums = [Importance.empty(range(1)) for _ in range(2)]
    for own, values in zip(sums, ([[0.1], [0.3]], [[0.32], [0.1]]), strict=True):
        own.add(scores_of(torch.ones(2), torch.tensor(values)), [0, 1])
    apart, as_one = sums[0] + sums[1], sums[0].merge(sums[1])
    means = torch.tensor([0.1, 0.3, 0.32, 0.1])
    assert (apart.n_texts, as_one.n_texts) == (4, 2)
    assert float(apart.standard_error) == pytest.approx(float(means.std() / 2), rel=1e-6)
    assert float(as_one.standard_error) == pytest.approx(0.005, rel=1e-5)  # (0.21 - 0.2) / 2


def test_a_run_that_continues_reads_the_same_texts(tmp_path):
    cut, decoder = of_texts([0, 1, 0, 2, 1, 2], [9] * 6), MetaDecoder(make_transformer())
    state = RunState(StateFile(tmp_path / "state", {}))
    ScoringRun(decoder, Importance.empty(range(5)), state=state).read(state.unread(cut[:3], 0))
    state = RunState(StateFile(tmp_path / "state", {}))
    sums = state.sums(range(5))
    run = ScoringRun(decoder, sums, state=state)
    run.read(state.unread(cut, sums.n_windows))
    assert run.into.n_texts == 3
    expected = measure(decoder, [cut]).standard_error
    assert torch.allclose(run.into.standard_error, expected, rtol=1e-6)


def test_agreement_of_halves():
    windows = random_windows(6, 2)
    decoder = MetaDecoder(make_transformer())
    halves = (measure(decoder, [windows[i::2]]).block_influence for i in (0, 1))
    expected = scipy.stats.spearmanr(*halves).statistic
    assert measure(decoder, [windows]).agreement == pytest.approx(expected)
    assert expected == pytest.approx(0.9)
    same = measure(decoder, [[w, w] for w in windows])
    assert same.agreement == pytest.approx(1.0)
    assert math.isnan(measure(decoder, [windows[:1]]).agreement)


def test_windows_fall_alternately_into_the_halves_whatever_the_batches():
    windows, decoder = random_windows(7, 9), MetaDecoder(make_transformer())
    single = measure(decoder, [[w] for w in windows])
    mixed = measure(decoder, [windows[:3], windows[3:4], windows[4:]])
    assert single.windows.tolist() == mixed.windows.tolist() == [4, 3]
    assert torch.allclose(single.influence, mixed.influence, rtol=1e-5)
    first = measure(decoder, [windows[0::2]]).influence.sum(0)
    assert torch.allclose(single.influence[0], first, rtol=1e-5)


def test_sums_add_up_and_survive_json():
    cut, decoder = of_texts([0, 1, 0, 2, 1], [9] * 5), MetaDecoder(make_transformer())
    whole = measure(decoder, [[w] for w in cut])
    first, second = (measure(decoder, [[w] for w in part]) for part in (cut[:2], cut[2:]))
    assert torch.allclose((first + second).products, whole.products, rtol=1e-12)
    assert torch.allclose((first + second).angles, whole.angles, rtol=1e-12)
    both = first.merge(second)  # of one reading: the same number is the same text
    assert list(both.texts) == [0, 1, 2] and torch.allclose(both.margin, whole.margin, rtol=1e-9)
    for sums in (whole, Importance.empty([0, 1])):
        assert (
            Importance.from_dict(json.loads(json.dumps(sums.to_dict()))).to_dict() == sums.to_dict()
        )


def test_scores_of_different_layers_do_not_add():
    with pytest.raises(ValueError, match="do not add up"):
        Importance.empty([0, 1]) + Importance.empty([0, 2])


@pytest.mark.parametrize("damage", [{"influence": [[0.0, 0.0], [0.0]]}, {"layers": None}])
def test_what_are_no_saved_scores_is_refused(damage):
    whole = Importance.empty([0, 1]).to_dict()
    assert Importance.from_dict(whole).layers == [0, 1]
    refuses("these are not saved scores: score again", Importance.from_dict, whole | damage)
    without = {name: value for name, value in whole.items() if name != "windows"}
    refuses("these are not saved scores", Importance.from_dict, without)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "at least one window"),
        ([[1], []], "have 0 to 1 tokens; this model takes 1 to 64: set `size`"),
        ([[1] * 65], "windows have 65 to 65 tokens"),
        ([[1, 96]], r"token ids 1..96 are outside the vocabulary 0..95"),
        ([[-1, 3]], r"token ids -1..3 are outside"),
    ],
)
def test_windows_that_do_not_fit(windows, message):
    refuses(message, pad, windows, MetaDecoder(make_transformer()))


def test_magnitude_and_norm_equal_those_of_stored_states():
    window = random_windows(1, 30)[0]
    found = measure(MetaDecoder(make_transformer()), [[window]])
    states = torch.stack(stored_states(make_transformer(), window))  # (L + 1, S, D)
    norms = states.norm(dim=-1)
    changed = (states[1:] - states[:-1]).norm(dim=-1)
    assert torch.allclose(found.mean("magnitude"), (changed / norms[1:]).mean(1), atol=1e-5)
    assert torch.allclose(found.mean("norm"), norms[1:].mean(1), rtol=1e-5)


def test_the_covariance_of_blocks_is_that_of_the_windows_distances():
    windows, decoder = random_windows(9, 20), MetaDecoder(make_transformer())
    each = torch.stack([measure(decoder, [[w]]).angular for w in windows])
    found = measure(decoder, [windows])
    for n in (1, 2, 4):
        expected = torch.cov(each.diagonal(n, dim1=1, dim2=2).T) / len(windows)
        assert torch.allclose(found.angular_covariance(n), expected, atol=1e-12)
    assert measure(decoder, [windows[:1]]).angular_covariance(2).isnan().all()


def test_a_run_can_be_ended_after_a_batch():
    decoder, windows = MetaDecoder(make_transformer()), random_windows(6, 10)
    found = measure(decoder, [[w] for w in windows], after=lambda sums: sums.n_windows == 4)
    assert found.n_windows == 4


class Stream(torch.nn.Module):
    """Three layers, between which the model changes the stream: in place, or in a new tensor."""

    def __init__(self, change, *, inference: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Residual() for _ in range(3))
        self.change, self.inference = change, inference

    def forward(self, tokens):
        with torch.inference_mode(self.inference), torch.no_grad():
            h = torch.nn.functional.one_hot(tokens, 32).float() + 0.1
            for layer in self.layers:
                h = self.change(layer(h))


class Residual(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, h):
        return h + self.linear(h)


@pytest.mark.parametrize("inference", [False, True])
def test_a_stream_that_is_changed_in_place_between_layers_scores_as_one_changed_anew(inference):
    tokens = torch.tensor(random_windows(2, 6)) % 32
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = []
    shift = torch.linspace(-1, 1, 32)
    for change in (lambda h: h.add_(shift), lambda h: h + shift):
        model = Stream(change, inference=inference)
        with hooked(model.layers, mask) as hooks:
            model(tokens)
        found.append(hooks.scores())
    for name in vars(found[0]):
        ours, expected = (getattr(scores, name) for scores in found)
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6, equal_nan=True), name


class Writing(torch.nn.Module):
    """A layer that writes its output over its input."""

    def forward(self, x, *rest):
        return x.mul_(2)


def test_a_layer_that_writes_over_its_state_is_refused():
    model = make_transformer()
    model.layers[2] = Writing()
    refuses("Writing writes over its state", measure, MetaDecoder(model), [random_windows(2, 12)])


def test_numbers_of_texts_may_be_numpys():
    texts = add_texts({}, [(np.int64(3), torch.ones(3)), (3, torch.ones(3))])
    assert json.dumps([*texts]) == "[3]" and texts[3].tolist() == [2.0] * 3


def test_scores_turn_into_a_frame_and_show_themselves_shortly(monkeypatch):
    scores = measure(MetaDecoder(make_transformer()), [random_windows(4, 12)])
    assert repr(scores).startswith("Importance(5 layers, 4 windows, 48 tokens; lowest Block Infl")
    order = ", ".join(map(str, scores.least_important(4)))
    assert repr(scores).endswith(f" first: {order}, ...)")
    assert repr(Importance.empty([0, 1])) == "Importance(2 layers, 0 windows, 0 tokens)"
    html = scores._repr_html_()
    assert html.count("<tr>") == 6 and f"<td>{scores.block_influence[2]:.4g}</td>" in html
    frame = pytest.importorskip("pandas").DataFrame(scores.columns).set_index("layer")
    assert scores.to_dataframe().equals(frame)
    assert frame["block_influence"].tolist() == scores.block_influence.tolist()
    assert frame.sort_values("rank").index.tolist()[:4] == scores.least_important(4)
    assert frame["magnitude"].tolist() == scores.mean("magnitude").tolist()
    assert frame["margin"].tolist() == scores.margin.tolist()
    monkeypatch.setitem(sys.modules, "pandas", None)
    refuses("a data frame needs pandas .*: pip install", scores.to_dataframe, error=ImportError)
