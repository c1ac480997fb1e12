"""The refit: its normal equations in what it leaves, every family, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    interrupted,
    random_windows,
    refuses,
    share_model,
    short_llama,
    states_of,
    weights_of,
    zero_layer,
)
from families import FAMILIES, make

from short_gpt.healing import solver
from short_gpt.healing.job import unchanged
from short_gpt.healing.refit import (
    PatchSettings,
    Refit,
    RefitSettings,
    apply_refit,
    fit,
    heal,
    heal_patch,
    split_held_out,
)
from short_gpt.healing.refit_layer import LayerRefit
from short_gpt.healing.settings import RIDGES
from short_gpt.models.layer_calls import LayerCalls, attention_output, mlp_output, transposed
from short_gpt.models.numbering import runs
from short_gpt.models.sublayers import Sublayers, after_attention
from short_gpt.runtime import replicas
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

WINDOWS, HELD = random_windows(8, 16), random_windows(4, 16, seed=5)
TOKENS = torch.tensor(random_windows(2, 16, seed=9))
NORMS_BEHIND = ["gemma2", "gemma3", "gemma3, wrapped", "olmo2"]
NO_HALVES = ["mamba"]
REFITTED = [name for name in FAMILIES if name not in NO_HALVES]
ALL = {"held": HELD, "progress": False}


def lack(short, place: int, part: str, windows, target: torch.Tensor) -> list[torch.Tensor]:
    """X (N, F), what lacks behind a matrix, and w (N,), in a model as it is."""
    calls, layer = LayerCalls(short.decoder), short.decoder.layers[place]
    state = states_of(short, windows)[place]
    end = (mlp_output if part == "mlp" else attention_output)(layer)
    inputs = calls.until(place, state, end).reshape(
        -1, end.weight.shape[0 if transposed(end) else 1]
    )
    mlp = Sublayers.of(calls, place, state, short.decoder.family).mlp
    between, behind = after_attention(lambda: calls.run(place, state), mlp)
    rest = target - (behind if part == "mlp" else between)
    square = target.flatten(0, 1).double().pow(2).sum(1)
    return [inputs.double(), rest.flatten(0, 1).double(), 1 / square]


@pytest.mark.parametrize(
    ("family", "step"),
    [("meta", 0.7), *((name, 0.5) for name in ("meta", "llama", "gpt2", "granite", "mixtral"))],
)
def test_in_the_model_that_is_left_every_matrix_solves_its_normal_equations(family, step):
    whole, short = [
        short_llama() if family == "meta" else ShortHFModel(make(family)) for _ in range(2)
    ]
    factor = 0.22 if family == "granite" else 1.0
    if family == "granite":
        for model in (whole, short):
            for layer in model.decoder.layers:
                layer.residual_multiplier = factor
    options = {"step_size": step, "ridge": 0.1, "progress": False}
    refit = heal(short, [2, 3], WINDOWS, held=WINDOWS, **options)
    targets = states_of(whole, WINDOWS)
    calls = LayerCalls(whole.decoder)
    seen = weighed_more = 0
    for found in refit.fits:
        if found.ridge is None:
            continue
        place = short.present.index(found.layer)
        after = [*short.present, len(whole.present)][place + 1]
        target = targets[after]
        if found.part == "attention":
            mlp = Sublayers.of(calls, found.layer, targets[found.layer], whole.decoder.family).mlp
            run = lambda: calls.run(found.layer, targets[found.layer])  # noqa: B023, E731
            between, behind = after_attention(run, mlp)
            target = between if family != "mixtral" else between + target - behind
        x, rest, w = lack(short, place, found.part, WINDOWS, target)
        end = mlp_output if found.part == "mlp" else attention_output
        new, old = (end(m.decoder.layers[i]) for m, i in ((short, place), (whole, found.layer)))
        change = (new.weight - old.weight).double()
        change = change if transposed(new) else change.T  # (F, D)
        if getattr(new, "bias", None) is not None:
            x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
            change = torch.cat([change, (new.bias - old.bias).double()[None]])
        # by the state that was there
        target = target.flatten(0, 1).double()
        there = target - (rest + factor * x @ change)
        w = torch.maximum(w, 1 / (2 * there.norm(dim=1)) ** 2)
        weighed_more += int((w * target.pow(2).sum(1) > 1.001).sum())
        penalty = 0.1 * (w[:, None] * x * x).sum() / x.shape[1]
        whole_change, w = change / step, w[:, None]  # that would aim at the target itself
        left = x.T @ (w * rest) / factor - x.T @ (w * (x @ (whole_change - change)))
        left -= penalty * whole_change
        before = rest + factor * x @ change
        share = 1 - (w * rest * rest).sum() / (w * before * before).sum()
        assert found.restored == pytest.approx(share.item(), rel=1e-3)
        assert left.abs().max() < 2e-4 * (penalty * change).abs().max() + 1e-6, found
        seen += 1
    assert seen >= (2 if family == "mixtral" else 3)
    assert weighed_more or family == "gpt2"


# the first token is of one kind, and the others are not
SINKING = [[9, *window[1:]] for window in random_windows(24, 16, vocab=8, seed=3)]


def with_sink(layer: int, times: float = 100) -> ShortLlama:
    """The MLP of a layer gives the first token of `SINKING` a state so many times as long."""
    short = short_llama(n_layers=6)
    calls, state = LayerCalls(short.decoder), states_of(short, SINKING)[layer]
    matrix = mlp_output(short.decoder.layers[layer])
    inputs = calls.until(layer, state, matrix).flatten(0, 1)  # (N, F)
    first = torch.zeros(len(SINKING), len(SINKING[0]))  # (B, S)
    first[:, 0] = 1.0
    only_first = torch.linalg.lstsq(inputs, first.flatten()[:, None]).solution  # (F, 1)
    length = times * state.norm(dim=-1).mean()
    with torch.no_grad():
        matrix.weight[3] += length * only_first[:, 0]
    return short


@pytest.mark.parametrize("healed", [heal, heal_patch])
def test_the_layer_before_a_gap_makes_the_attention_sink_that_went_with_the_gap(healed):
    target = states_of(with_sink(2), SINKING)[3][:, 0]  # (B, D), of first tokens

    def missing(**settings: object) -> float:
        short = with_sink(2)
        healed(short, [2], SINKING, progress=False, **settings)
        made = states_of(short, SINKING)[2][:, 0]
        return float((made - target).norm() / target.norm())

    assert missing(step_size=1.0, lost=None) > 0.9
    assert missing(step_size=1.0) < 0.3


@pytest.mark.parametrize("times", [100, 10_000])
def test_both_sublayers_of_the_layer_that_makes_an_attention_sink_are_solved(times):
    # the long state rounds the stream between them, which is what it is less the MLP's output
    found = fit(with_sink(3, times), [1], SINKING, progress=False)
    assert {one.part for one in found.fits if one.layer == 3} == {"attention", "mlp"}


def test_an_attention_sink_whose_layer_is_kept_weighs_as_other_tokens():
    short = with_sink(3)
    ours, theirs = (fit(short, [1], SINKING, lost=lost, progress=False) for lost in (20.0, None))
    assert {key[0] for key in ours.values} >= {3}
    assert all(torch.equal(ours.values[key], theirs.values[key]) for key in theirs.values)


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("family", NORMS_BEHIND)
def test_before_a_norm_no_token_weighs_more(family):
    short = ShortHFModel(make(family))
    ours, theirs = (fit(short, [3], WINDOWS, lost=lost, **ALL) for lost in (1.0, None))
    assert theirs.values
    assert same([*ours.values.values()], [*theirs.values.values()])


@pytest.mark.parametrize("family", REFITTED)
def test_every_family_is_read_only_refitted_and_put_back_bit_for_bit(family):
    short = ShortHFModel(make(family))
    gone = [4, 5] if family == "qwen2, sliding" else [3]
    before, named = weights_of(short), dict(short.decoder.module.named_parameters())
    refit = fit(short, gone, WINDOWS, held=WINDOWS, progress=False)
    assert same(before, weights_of(short)) and refit.values
    for found in refit.fits:
        assert found.ridge is None or 0 < found.restored <= 1, found
    old = {name: p.detach().clone() for name, p in named.items()}
    with short.without_layers(gone):
        raw = short.decoder.logits(TOKENS)
        undo = apply_refit(short, refit)
        differ = {name for name, p in named.items() if not torch.equal(p, old[name])}
        path = short.decoder.layers_path
        assert differ == {f"{path}.{number}.{name}" for number, name in short.changed}
        assert differ and not torch.equal(short.decoder.logits(TOKENS), raw)
        undo()
        assert torch.equal(short.decoder.logits(TOKENS), raw) and not short.changes
    assert same(before, weights_of(short))


def test_what_cannot_be_solved_is_recorded_with_the_reason(tmp_path):
    short = ShortHFModel(make("mixtral"))
    with interrupted(LayerRefit, "solve", 2):
        fit(short, [3], WINDOWS, work_dir=tmp_path / "work", **ALL)
    refit = fit(short, [3], WINDOWS, work_dir=tmp_path / "work", **ALL)
    assert [(one.part, one.layer) for one in refit.unsolved] == [("mlp", n) for n in (2, 4, 5)]
    assert all("experts are not supported" in one.why for one in refit.unsolved)
    why = refit.unsolved[0].why
    assert refit.to_dict()["unsolved"] == [{"part": "mlp", "layers": [2, 4, 5], "why": why}]
    assert unchanged(refit.to_dict())[-1] == f"mlp of 2, 4, 5 not solved: {why}"
    assert not fit(short, [3], WINDOWS, parts=("attention",), **ALL).unsolved
    mamba = fit(ShortHFModel(make("mamba")), [3], WINDOWS, **ALL)
    assert mamba.fits and not mamba.unsolved  # it has no attention
    patch = fit(short, [3], WINDOWS, settings=PatchSettings(), progress=False)
    assert [(one.part, one.layer) for one in patch.unsolved] == [("mlp", 2)]
    assert not fit(short_llama(), [3], WINDOWS, settings=PatchSettings(), progress=False).unsolved


@pytest.mark.parametrize("family", NO_HALVES)
def test_layers_that_do_not_add_what_a_matrix_gives_are_refused_with_the_reason(family):
    short = ShortHFModel(make(family))
    short.model.config.model_type = "llama"  # whose row names none of its parts
    before = weights_of(short)
    refuses(r"cannot be refitted|nothing of this model", heal, short, [3], WINDOWS, progress=False)
    assert same(before, weights_of(short)) and short.kept == [*range(6)]


def test_what_a_layer_that_does_nothing_leaves_needs_no_change():
    short = short_llama()
    zero_layer(short.decoder.module, 3)
    before, logits = weights_of(short), short.decoder.logits(TOKENS)
    refit = heal(short, [3], WINDOWS, **ALL)
    assert all(found.ridge is None for found in refit.fits)
    assert torch.equal(short.decoder.logits(TOKENS), logits)
    assert len(weights_of(short)) < len(before)


def test_in_bfloat16_as_many_matrices_are_solved():
    """A layer that changes a state by a few per cent leaves more than what rounding misses."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make("llama")
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(40)
        short = ShortHFModel(model.to(dtype))
        found[dtype] = fit(short, [1], random_windows(24, 48), progress=False).fits
    solved = [[f.ridge is not None for f in fits] for fits in found.values()]
    assert solved[0] == solved[1] and sum(solved[0]) > len(solved[0]) / 2
    for full, half in zip(*found.values(), strict=True):
        assert half.restored_held == pytest.approx(full.restored_held, abs=0.01)


def test_the_first_layers_may_go_and_sublayers_may_be_left_alone():
    short = short_llama()
    refit = heal(short, [0, 1], WINDOWS, held=WINDOWS, parts=("mlp",), progress=False)
    assert short.kept == [2, 3, 4]
    assert {found.part for found in refit.fits} == {"mlp"}
    assert [found.layer for found in refit.fits] == [2, 3, 4]
    assert all("feed_forward.w2" in name for _, name in refit.values)
    assert short.changed == set(refit.values)
    # the first that is left reads the embeddings, and is to give what the whole model has behind it
    whole, raw = states_of(short_llama(), WINDOWS)[3], short_llama()
    raw.remove_layers([0, 1])
    there = states_of(raw, WINDOWS)[1].norm(dim=-1, keepdim=True)
    weights = 1 / torch.minimum(whole.norm(dim=-1, keepdim=True), 2 * there) ** 2
    off = [(weights * (states_of(s, WINDOWS)[1] - whole).pow(2)).sum().item() for s in (raw, short)]
    assert 1 - off[1] / off[0] == pytest.approx(refit.fits[0].restored_held, abs=1e-4)


def test_sublayers_are_solved_in_their_order_whichever_is_named_first():
    ours, theirs = (
        fit(short_llama(), [3], WINDOWS, held=HELD, parts=parts, progress=False)
        for parts in (("attention", "mlp"), ("mlp", "attention"))
    )
    assert ours.fits == theirs.fits
    assert all(torch.equal(value, theirs.values[key]) for key, value in ours.values.items())


def test_the_refit_applies_half_of_a_solution_and_the_patch_all_of_it():
    old = dict(short_llama().decoder.layers[2].named_parameters())["feed_forward.w2.weight"]
    ways = (RefitSettings(), RefitSettings(step_size=1.0), PatchSettings())
    options = {"parts": ("mlp",), "ridge": 0.1, "held": WINDOWS, "progress": False}
    half, once, patch = (
        fit(short_llama(), [3], WINDOWS, settings=way, **options).values[
            2, "feed_forward.w2.weight"
        ]
        - old
        for way in ways
    )
    assert once.abs().max() > 0.01 * old.abs().max()
    torch.testing.assert_close(half, once / 2, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(patch, once, rtol=1e-4, atol=1e-7)


def test_the_ridge_is_twice_inputs_by_tokens_where_none_is_named():
    short = short_llama()
    layer = dict(short.decoder.layers[2].named_modules())
    inputs = {
        "attention": layer["attention.wo"].weight.shape[1],
        "mlp": layer["feed_forward.w2"].weight.shape[1],
    }
    assert len({*inputs.values()}) == 2
    for count in (4, 8):
        refit = fit(short, [2, 3], WINDOWS[:count], held=WINDOWS, progress=False)
        tokens = sum(map(len, WINDOWS[:count]))
        changed = [found for found in refit.fits if found.changed]
        assert {found.part for found in changed} == {*inputs}
        assert all(found.ridge == 2 * inputs[found.part] / tokens for found in changed)


def test_every_eighth_window_is_held_out():
    short = short_llama()
    apart = fit(short, [3], random_windows(16, 16), progress=False)
    assert (apart.windows, apart.held) == (14, 2)
    assert split_held_out([*range(16)])[1] == [7, 15]
    few = fit(short, [3], WINDOWS[:2], progress=False)
    assert (few.windows, few.held) == (1, 1)
    counts = vars(heal(short_llama(), [3], WINDOWS[:3], **ALL))
    assert (counts["windows"], counts["held"]) == (3, 4)  # those held out are others
    for windows, options, message in (
        (WINDOWS[:1], {}, "windows to fit on = 0"),
        ([], {}, "windows to fit on = 0"),
        (WINDOWS, {"held": []}, "held-out windows = 0"),
    ):
        with pytest.raises(ValueError, match=f"{message}: expected 1 or more"):
            fit(short, [3], windows, **options, progress=False)


def test_several_replicas_do_not_write_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "current", lambda device=None: replicas.Replicas(0, 2))
    with pytest.raises(ValueError, match="work_dir = .*: expected none with 2 replicas"):
        fit(short_llama(), [3], WINDOWS, work_dir=tmp_path / "work", progress=False)
    assert not (tmp_path / "work").exists()


def test_an_error_or_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    short = short_llama()
    before = weights_of(short)
    for calls in (0, 1, 3):
        with interrupted(solver, "_add", calls):
            heal(short, [3], WINDOWS, held=WINDOWS, ridge=solver.RIDGES, progress=False)
        assert same(before, weights_of(short)) and short.kept == [*range(5)] and not short.changes

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(short, "remove_layers", full)
    with pytest.raises(MemoryError):
        heal(short, [3], WINDOWS, **ALL)
    assert same(before, weights_of(short)) and not short.changes


def test_what_cannot_be_is_refused_in_one_line():
    short = short_llama()
    refuses(r"layers \[9\] do not exist", fit, short, [9], WINDOWS, progress=False)
    refit = fit(short, [3], WINDOWS, progress=False)
    refuses(r"without layers \[3\]; this one has", apply_refit, short, refit)
    with torch.no_grad():
        short.decoder.layers[2].feed_forward.w1.weight.fill_(float("nan"))
    refuses("output of layer 2", fit, short, [3], WINDOWS, progress=False, error=FloatingPointError)


def test_layers_that_need_the_tokens_are_refused():
    short = ShortHFModel(make("llama"))
    run, read = short.decoder.run, []
    short.decoder.layers[2].register_forward_pre_hook(
        lambda m, args, kwargs: (args, {**kwargs, "text": read[-1]}), with_kwargs=True
    )
    short.decoder.run = lambda tokens: (read.append(tokens), run(tokens))
    refuses("take more than the hidden state entering", fit, short, [3], WINDOWS, progress=False)


def test_the_ridge_is_chosen_by_the_windows_kept_apart():
    ridges, only = (1e-3, 1e-1, 10.0), {**ALL, "parts": ("mlp",)}
    alone = {r: fit(short_llama(), [3], WINDOWS, ridge=r, **only).fits[0] for r in ridges}
    best = max(alone.values(), key=lambda found: found.restored_held)
    chosen = fit(short_llama(), [3], WINDOWS, ridge=ridges, **only).fits[0]
    assert (chosen.ridge, chosen.restored_held) == (best.ridge, best.restored_held)
    assert 0 < chosen.restored_held < chosen.restored and chosen.ridge != 1e-3


# the patch

TWELVE = random_windows(12, 16)
EXPERTS = ["mixtral", "qwen3_moe", "llama4", "gpt_oss", "qwen3_next"]  # no single down_proj
PATCHED = [name for name in FAMILIES if name != "mamba"]


def fit_patch(short, layers) -> Refit:
    return fit(short, layers, TWELVE, settings=PatchSettings(), **ALL)


def test_runs_of_consecutive_layers():
    assert runs([7, 3, 4, 9], range(12)) == [(3, 4), (7, 7), (9, 9)]
    assert runs([5, 3], [0, 3, 5, 8]) == [(1, 2)]  # what was removed earlier joins its neighbours


def test_layers_that_add_nothing_need_no_patch():
    short = short_llama()
    for layer in (2, 3):
        zero_layer(short.decoder.model, layer)
    before = short.decoder.logits(TOKENS)
    patch = heal_patch(short, [3, 2], TWELVE, progress=False)
    assert [(found.layer, found.changed) for found in patch.fits] == [(1, False)]
    assert short.kept == [0, 1, 4] and not patch.values
    assert torch.equal(short.decoder.logits(TOKENS), before)


@pytest.mark.parametrize("family", ["meta", *PATCHED])
def test_the_share_is_what_the_folded_model_does(family):
    """On held-out windows, of the state after the gap, weighted by the target or what is there."""
    short = short_llama() if family == "meta" else ShortHFModel(make(family))
    target = states_of(short, HELD)[4].double()  # leaving layer 3
    patch = fit_patch(short, [2, 3])
    (found,) = patch.fits
    assert (found.layer, found.part) == (1, "attention" if family in EXPERTS else "mlp")
    off, scale = [], target.norm(dim=-1)
    with short.without_layers(patch.layers):
        if not short.decoder.family.mlp_norm_after:
            scale = torch.minimum(scale, 2 * states_of(short, HELD)[2].double().norm(dim=-1))
        for _ in range(2):
            left = (states_of(short, HELD)[2].double() - target).norm(dim=-1)
            off.append((left / scale).pow(2).sum())
            undo = apply_refit(short, patch)
        undo()
    if family in EXPERTS:  # what the MLP makes of another attention is not counted
        assert found.changed
        return
    assert found.changed == (found.restored_held > 0)
    assert found.restored_held == pytest.approx(float(1 - off[1] / off[0]), abs=1e-3)


def test_of_every_gap_the_layer_before_is_solved_on_the_original_models_states():
    """What one gap changes does not change what the next is solved on: each is as if alone."""
    both = fit_patch(short_llama(), [4, 2])
    assert [found.layer for found in both.fits] == [1, 3]
    for gap, layer in ((2, 1), (4, 3)):
        alone = fit_patch(short_llama(), [gap])
        assert [found.layer for found in alone.fits] == [layer]
        for key, value in alone.values.items():
            assert torch.equal(value, both.values[key])
    assert len(both.values) == 2


def test_before_the_first_gap_it_is_the_refit():
    ours = fit_patch(short_llama(), [2])
    options = {"parts": ("mlp",), "ridge": RIDGES, "step_size": 1.0}
    theirs = fit(short_llama(), [2], TWELVE, held=HELD, **options, progress=False)
    assert ours.fits == theirs.fits[:1]
    assert all(torch.equal(value, theirs.values[key]) for key, value in ours.values.items())


def test_after_an_earlier_removal():
    short = short_llama()
    short.remove_layers([2])
    patch = heal_patch(short, [3], TWELVE, progress=False)
    assert [found.layer for found in patch.fits] == [1]
    assert short.kept == [0, 1, 4]


def test_other_refusals(monkeypatch):
    refuses("layer 0 cannot be patched: it begins the model", fit_patch, short_llama(), [1, 0])
    share_model(monkeypatch, 2)
    refuses("a refit needs the whole model on every rank, got 2", fit_patch, short_llama(), [2])


def test_an_output_projection_that_cannot_be_read_is_refused():
    layer = make("llama").model.layers[0]
    refuses("not in memory: open the model without stream", mlp_output, layer.to("meta"))
    eight_bit = torch.nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    layer.mlp.down_proj.weight = eight_bit
    refuses("Linear of torch.int8: load the model", mlp_output, layer)
