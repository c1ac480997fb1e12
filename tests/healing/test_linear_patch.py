"""The closed-form patch: known answers, both families, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows, zero_layer
from families import FAMILIES, make

from short_gpt.healing import linear_patch
from short_gpt.healing.linear_patch import fit, fit_many, fold, heal, runs
from short_gpt.healing.moments import Moments
from short_gpt.models.layer_hooks import check_added, mlp_output, replaced_output
from short_gpt.wrappers.short_hf import ShortHFModel
from short_gpt.wrappers.short_llama import ShortLlama

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

WINDOWS = random_windows(12, 16)
TOKENS = torch.tensor(random_windows(2, 16, seed=9))
PATCHED = ["llama", "llama, tied", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt2", "gpt_neox"]
UNPATCHED = ["mixtral", "qwen3_moe", "gemma2", "gemma3", "gemma3, wrapped", "olmo2", "mamba"]
UNPATCHED += ["llama4", "gpt_oss", "qwen3_next"]
PATCHED += ["opt", "falcon", "bloom", "smollm3", "starcoder2", "stablelm", "cohere", "granite"]


def meta(seed: int = 0, **changes: object) -> ShortLlama:
    model = make_transformer(seed, **changes)
    return ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))


def test_runs_of_consecutive_layers():
    assert runs([7, 3, 4, 9], range(12)) == [(3, 4), (7, 7), (9, 9)]
    assert runs([5, 3], [0, 3, 5, 8]) == [(1, 2)]  # what was removed earlier joins its neighbours


def test_a_linear_map_is_recovered():
    mlp, wanted = torch.randn(400, 8).double(), torch.randn(8, 8).double()
    sums = Moments()
    for part in range(4):
        rows = mlp[part * 100 : part * 100 + 100]
        sums.add(rows, rows @ (wanted - torch.eye(8)))
    found, share = sums.solve(1e-12)
    assert torch.allclose(found, wanted, atol=1e-8)
    assert share == pytest.approx(1)


def test_the_solution_is_the_minimum_and_the_share_is_what_it_leaves():
    mlp, rest = torch.randn(60, 5).double(), torch.randn(60, 5).double()
    sums, eye = Moments(), torch.eye(5).double()
    sums.add(mlp, rest)
    found, share = sums.solve(0.3)

    def loss(t):
        penalty = 0.3 * (mlp.T @ mlp).trace() / 5 * (t - eye).pow(2).sum()
        return (mlp @ (t - eye) - rest).pow(2).sum() + penalty

    for _ in range(20):
        assert loss(found) < loss(found + 1e-3 * torch.randn(5, 5))
    left = (mlp @ (found - eye) - rest).pow(2).sum() / rest.pow(2).sum()
    assert share == pytest.approx(1 - float(left))


def test_layers_that_add_nothing_need_no_patch():
    short = meta()
    for layer in (2, 3):
        zero_layer(short.decoder.model, layer)
    before = short.decoder.logits(TOKENS)
    patch = heal(short, [3, 2], WINDOWS, progress=False)
    assert torch.equal(patch.maps[1], torch.eye(32).double())
    assert patch.restored == {1: 1.0} and short.kept == [0, 1, 4]
    assert torch.equal(short.decoder.logits(TOKENS), before)


def linear_in_the_mlp_before(short: ShortLlama, layer: int, matrix: torch.Tensor) -> None:
    """Makes a layer add ``matrix`` times what the MLP of the layer in front of it gave."""
    seen = {}
    front = mlp_output(short.decoder.layers[layer - 1])
    front.register_forward_hook(lambda m, a, out: seen.update(mlp=out))
    short.decoder.layers[layer].register_forward_hook(lambda m, a, out: a[0] + seen["mlp"] @ matrix)


def test_a_layer_linear_in_the_mlp_before_is_restored_exactly():
    short = meta()
    matrix = torch.randn(32, 32) / 6
    linear_in_the_mlp_before(short, 3, matrix)
    before = short.decoder.logits(TOKENS)
    patch = heal(short, [3], WINDOWS, ridge=1e-10, progress=False)
    assert torch.allclose(patch.maps[2], torch.eye(32).double() + matrix, atol=1e-4)
    assert patch.restored[2] == pytest.approx(1, abs=1e-6)
    assert torch.allclose(short.decoder.logits(TOKENS), before, atol=2e-4)


def behind(short: ShortHFModel | ShortLlama, layer: int) -> torch.Tensor:
    """The states behind a layer, given by its original number, of all windows: (N, D) float64."""
    states = []
    module = short.decoder.layers[short.present.index(layer)]

    def keep(_, __, out):
        states.append((out if isinstance(out, torch.Tensor) else out[0]).double().flatten(0, 1))

    handle = module.register_forward_hook(keep)
    short.decoder.run(torch.tensor(WINDOWS))
    handle.remove()
    return torch.cat(states)


@pytest.mark.parametrize("family", ["meta", *FAMILIES])
def test_the_share_is_what_the_folded_model_does(family):
    short = meta() if family == "meta" else ShortHFModel(make(family))
    if family in UNPATCHED:
        with pytest.raises(ValueError, match="does not add its MLP's output|no single linear map"):
            fit(short, [2, 3], WINDOWS, progress=False)
        return
    raw, wanted = behind(short, 1), behind(short, 3)
    patch = fit(short, [2, 3], WINDOWS, progress=False)
    with short.without_layers(patch.layers):
        fold(short, patch)
        folded = behind(short, 1)
    restored = 1 - (wanted - folded).pow(2).sum() / (wanted - raw).pow(2).sum()
    assert patch.restored[1] == pytest.approx(restored.item(), abs=1e-4)


@pytest.mark.parametrize("family", PATCHED)
def test_folded_is_hooked_and_undone(family):
    short = ShortHFModel(make(family))
    with torch.no_grad():  # new models have none but zeros
        for name, weight in short.model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.3)
    patch = fit(short, [4, 2], WINDOWS, progress=False)
    assert list(patch.maps) == [1, 3] and all(s > 0 for s in patch.restored.values())
    dense = short.decoder.logits(TOKENS)
    with short.without_layers(patch.layers):
        layers = short.decoder.layers
        maps = [t.float() for t in patch.maps.values()]
        with (
            replaced_output(mlp_output(layers[1]), lambda out: out @ maps[0]),
            replaced_output(mlp_output(layers[2]), lambda out: out @ maps[1]),
        ):
            hooked = short.decoder.logits(TOKENS)
        raw = short.decoder.logits(TOKENS)
        undo = fold(short, patch)
        folded = short.decoder.logits(TOKENS)
        undo()
        assert torch.equal(short.decoder.logits(TOKENS), raw)
    scale = hooked.abs().max()
    assert (folded - hooked).abs().max() < 1e-4 * scale < (raw - hooked).abs().max()
    assert torch.equal(short.decoder.logits(TOKENS), dense)


def test_the_patch_brings_the_logits_nearer():
    short = meta()
    windows = random_windows(40, 32)
    dense = short.decoder.logits(TOKENS)
    off = {}
    with short.without_layers([2, 3]):
        off["raw"] = (short.decoder.logits(TOKENS) - dense).norm()
    heal(short, [2, 3], windows, progress=False)
    off["patched"] = (short.decoder.logits(TOKENS) - dense).norm()
    assert off["patched"] < off["raw"]


def test_meta_and_hugging_face_give_the_same_patch(tmp_path):
    from conftest import BYTE_VOCAB, save_checkpoint, write_byte_tokenizer

    from llama.formats.convert import meta_to_hf
    from short_gpt.wrappers.opening import open_model

    model = make_transformer(vocab_size=BYTE_VOCAB)
    write_byte_tokenizer(save_checkpoint(tmp_path / "meta", model))
    meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    ours, theirs = (
        open_model(str(tmp_path / d), max_seq_len=64, device="cpu") for d in ("meta", "hf")
    )
    for short in (ours, theirs):
        short.patch = heal(short, [1, 3], WINDOWS, progress=False)
    for front in (0, 2):
        assert torch.allclose(ours.patch.maps[front], theirs.patch.maps[front], atol=1e-3)
    assert ours.patch.restored == pytest.approx(theirs.patch.restored, abs=1e-4)
    logits = [s.decoder.logits(TOKENS) for s in (ours, theirs)]
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


def test_sets_fitted_together_are_those_fitted_alone_and_padding_does_not_count():
    short = meta()
    windows = [*WINDOWS]
    windows.insert(1, random_windows(1, 5, seed=3)[0])  # among longer ones: it is padded
    together = fit_many(short, [[2], [4, 2]], windows, batch_size=4, progress=False)
    for patch, layers in zip(together, ([2], [4, 2]), strict=True):
        alone = fit(short, layers, windows, progress=False)
        assert patch.tokens == alone.tokens == 12 * 16 + 5
        assert patch.layers == layers
        for front in alone.maps:
            assert torch.allclose(patch.maps[front], alone.maps[front], atol=1e-3)
    assert len(short.kept) == 5


def test_an_undone_patch_is_forgotten():
    short = meta()
    patch = fit(short, [2], WINDOWS, progress=False)
    short.remove_layers([2])
    undo = fold(short, patch)
    assert [change.how for change in short.changes] == [patch.to_dict()]
    assert short.changed == {(1, "feed_forward.w2.weight")}
    undo()
    assert not short.changes and not short.changed


def test_after_an_earlier_removal():
    short = meta()
    short.remove_layers([2])
    patch = heal(short, [3], WINDOWS, progress=False)
    assert list(patch.maps) == [1]
    assert short.kept == [0, 1, 4]


def test_half_precision_rounds_once():
    short = ShortHFModel(make("llama").bfloat16())
    patch = heal(short, [2], WINDOWS, progress=False)
    weight = mlp_output(short.decoder.layers[1]).weight
    original = mlp_output(make("llama").bfloat16().model.layers[1]).weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (patch.maps[1].T @ original.double()).bfloat16())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1, 0], r"layers \[0, 1\] cannot be patched: they begin the model"),
        ([3, 9], r"layers \[9\] do not exist; the model has 0..4"),
        ([2, 2], "name a layer twice"),
    ],
)
def test_sets_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        fit(meta(), layers, WINDOWS, progress=False)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "Gemma2DecoderLayer does not add its MLP's output to the stream as it is"),
        ("gemma3", "does not add its MLP's output"),
        ("olmo2", "does not add its MLP's output"),
        ("mixtral", "has no single linear map at the end of its MLP"),
        ("mamba", "has no single linear map"),
    ],
)
def test_families_refused(family, message):
    with pytest.raises(ValueError, match=message):
        fit(ShortHFModel(make(family)), [3], WINDOWS[:1], progress=False)


def test_a_factor_behind_the_mlp_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES["granite"][1], "residual_multiplier", 0.5)
    with pytest.raises(ValueError, match="a norm or a factor comes between"):
        fit(ShortHFModel(make("granite")), [3], WINDOWS[:1], progress=False)


def test_other_refusals(monkeypatch):
    short = meta()
    with pytest.raises(ValueError, match="ridge = 0: expected a number above 0"):
        fit(short, [2], WINDOWS, ridge=0, progress=False)
    with pytest.raises(ValueError, match="at least one window"):
        fit(short, [2], [], progress=False)
    patch = fit(short, [2], WINDOWS, progress=False)
    with pytest.raises(ValueError, match=r"stands for layers \[2\] and changes \[1\]; the model"):
        fold(short, patch)
    short.remove_layers([1, 2])
    with pytest.raises(ValueError, match="keep the latter"):
        fold(short, patch)
    monkeypatch.setattr(linear_patch, "model_parallel_size", lambda: 2)
    with pytest.raises(ValueError, match="got 2 model-parallel ranks"):
        fit(meta(), [2], WINDOWS, progress=False)


def test_weights_that_cannot_be_folded_are_refused():
    model = make("llama")
    eight_bit = torch.nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    model.model.layers[2].mlp.down_proj.weight = eight_bit
    with pytest.raises(ValueError, match="is Linear of torch.int8; expected one plain matrix"):
        fit(ShortHFModel(model), [3], WINDOWS, progress=False)
    with pytest.raises(ValueError, match="not in memory: open the model whole"):
        mlp_output(make("llama").model.layers[0].to("meta"))


def test_states_that_are_not_finite_are_named():
    short = meta()
    with torch.no_grad():
        short.decoder.layers[3].feed_forward.w1.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="between layers 2 and 3 is NaN"):
        fit(short, [3], WINDOWS, progress=False)


def test_the_proof_sees_a_norm_however_small_the_mlp():
    layer = make("gemma2").model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1e-9)
    calls = []
    hook = layer.register_forward_hook(lambda m, a, k, out: calls.append((a, k)), with_kwargs=True)
    model = make("gemma2")
    model.model.layers[1] = layer
    model(TOKENS, use_cache=False)
    hook.remove()
    with pytest.raises(ValueError, match="does not add"):
        check_added(layer, *calls[0])


def called() -> tuple[torch.nn.Module, tuple]:
    """A layer, and what its model calls it with."""
    model, calls = make("llama"), []
    layer = model.model.layers[1]
    hook = layer.register_forward_hook(lambda m, a, k, out: calls.append((a, k)), with_kwargs=True)
    model(TOKENS, use_cache=False)
    hook.remove()
    return layer, calls[0]


@pytest.mark.parametrize("factor", [0.999, 1.0001])
def test_the_proof_sees_a_factor_near_one(factor):
    layer, call = called()
    check_added(layer, *call)
    layer.mlp.register_forward_hook(lambda m, a, out: factor * out)
    with pytest.raises(ValueError, match="does not add its MLP's output to the stream as it is"):
        check_added(layer, *call)


def test_the_proof_refuses_what_is_no_number():
    layer, call = called()
    layer.mlp.register_forward_hook(lambda m, a, out: out * float("nan"))
    with pytest.raises(ValueError, match="off by nan of the stream"):
        check_added(layer, *call)


def test_a_patch_whose_layers_cannot_go_leaves_the_weights_alone(monkeypatch):
    short = meta()
    before = short.decoder.logits(TOKENS)

    def fails(layers):
        raise KeyboardInterrupt

    monkeypatch.setattr(short, "remove_layers", fails)
    with pytest.raises(KeyboardInterrupt):
        heal(short, [2], WINDOWS, progress=False)
    assert torch.equal(short.decoder.logits(TOKENS), before) and not short.changes
