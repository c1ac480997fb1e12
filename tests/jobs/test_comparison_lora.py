"""The LoRA healing of a comparison: what it learns from, what it continues from, what it leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import BYTE_VOCAB, make_transformer, save_checkpoint, write_byte_tokenizer

from llama.formats.gguf import llama_to_gguf
from short_gpt import heal_refit
from short_gpt.data.windows import windows
from short_gpt.evaluation import losses
from short_gpt.healing import lora, refit
from short_gpt.healing.refit_state import RefitState
from short_gpt.jobs import DistillHealing, LoraHealing, LoraOptions
from short_gpt.wrappers.opening import OpenOptions, open_model

pytestmark = [
    pytest.mark.filterwarnings("default"),  # peft's and transformers' own
    pytest.mark.usefixtures("few_timed_tokens"),
]
pytest.importorskip("peft")
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
SETTINGS = LoraOptions(steps=2, rank=2, learning_rate=0.01, batch=2, size=48)


def text(start: int) -> str:
    return " ".join(WORDS[(start + i * i * (start + 3)) % 8] + str(start + i) for i in range(120))


@pytest.fixture(scope="module")
def healing(tmp_path_factory) -> LoraHealing:
    source = save_checkpoint(
        tmp_path_factory.mktemp("model"), make_transformer(vocab_size=BYTE_VOCAB)
    )
    write_byte_tokenizer(source)
    encode = open_model(str(source), device="cpu").encode
    held = [*windows([text(5000)], encode, size=48, stride=48, seed=0, limit=4)]
    texts = [text(1000), text(2000)]
    return LoraHealing(str(source), texts, encode, held, SETTINGS, OpenOptions(device="cpu"))


def test_what_is_healed_is_the_cut_model_and_it_learns_nothing_that_is_evaluated(
    healing, monkeypatch
):
    seen, plain = [], lora.heal

    def watched(short, training, validation, evaluation, **options):
        raw = losses(short.decoder, evaluation, progress=False)
        seen.append((len(short.present), training, validation, raw, options))
        return plain(short, training, validation, evaluation, **options)

    monkeypatch.setattr(lora, "heal", watched)
    copied = replace(healing, texts=[*healing.texts, text(5000)])  # the evaluation's text too
    healed = copied([3, 1])
    ((layers, training, validation, raw, options),) = seen
    assert layers == 3 and options["recipe"].steps == 2 and options["recipe"].warmup_steps == 0
    assert options["recipe"].alpha == options["recipe"].rank == 2
    clean = healing._learning(48)
    held = [tuple(w) for w in healing.evaluation]
    assert not {tuple(w) for w in training + validation} & set(held)
    assert len(training) + len(validation) >= len(clean[0]) + len(clean[1])
    model = open_model(healing.source, device="cpu")
    model.remove_layers([1, 3])
    expected = losses(model.decoder, healing.evaluation, progress=False)
    assert [p.nats for p in raw] == pytest.approx([p.nats for p in expected], rel=1e-4)
    assert [p.tokens for p in healed] == [p.tokens for p in expected]


def test_an_interrupted_training_continues_from_its_folder_which_then_goes(
    healing, monkeypatch, tmp_path
):
    resumed, plain, folder = [], lora.heal, tmp_path / "state.lora-1"

    def interrupted(*args, work_dir, resume, **options):
        resumed.append(resume)
        plain(*args, work_dir=work_dir, resume=resume, **options)
        if not resume:
            raise KeyboardInterrupt

    whole = healing([1])
    monkeypatch.setattr(lora, "heal", interrupted)
    with pytest.raises(KeyboardInterrupt):
        healing([1], folder)
    assert any(folder.glob("checkpoint-*"))
    continued = healing([1], folder)
    assert resumed == [False, True] and not folder.exists()
    assert [p.nats for p in continued] == pytest.approx([p.nats for p in whole], rel=1e-6)


def test_the_identity_is_that_of_texts_and_settings(healing):
    first = healing.identity()
    assert first == replace(healing).identity()
    for other in (
        replace(healing, seed=1),
        replace(healing, settings=replace(SETTINGS, steps=3)),
        replace(healing, texts=healing.texts[::-1]),
        replace(healing, encode=lambda text: healing.encode(text)[::-1]),  # another tokenizer
    ):
        assert other.identity() != first


def test_too_little_text_is_refused_before_anything_is_measured(healing):
    long = replace(SETTINGS, size=1000)
    with pytest.raises(ValueError, match="needs two windows of 1000 tokens or more"):
        replace(healing, texts=[text(1000)], settings=long)
    with pytest.raises(ValueError, match="a window needs 2048"):
        replace(healing, texts=["short"], settings=LoraOptions())


def test_the_dtype_asked_for_is_the_healed_models(healing, monkeypatch):
    kinds = []
    monkeypatch.setattr(lora, "heal", lambda short, *_, **__: kinds.append(short.model.dtype))
    replace(healing, options=OpenOptions(device="cpu", dtype="bfloat16"))([2])
    assert kinds == [torch.bfloat16]


def test_distillation_learns_what_the_whole_model_predicts(healing, monkeypatch):
    whole = open_model(healing.source, device="cpu")
    seen, plain = [], lora.heal

    def watched(short, training, *rest, distillation, **options):
        (targets,) = distillation.teacher.targets([0], [training[0]])
        (expected,) = whole.window_logits([training[0]])
        seen.append((len(short.present), targets, expected[:-1].log_softmax(-1)))
        return plain(short, training, *rest, distillation=distillation, **options)

    monkeypatch.setattr(lora, "heal", watched)
    distilled = DistillHealing(**{**vars(healing), "teacher": whole})([3, 1])
    ((layers, targets, expected),) = seen
    assert layers == 3 and whole.kept == [0, 1, 2, 3, 4]
    assert torch.allclose(targets.logs, expected.gather(1, targets.ids), atol=1e-4)
    monkeypatch.setattr(lora, "heal", plain)
    assert [p.nats for p in distilled] != [p.nats for p in healing([3, 1])]


def refitted(healing, whole, **changes) -> DistillHealing:
    """Distillation behind a refit, on windows that are neither learned from nor evaluated."""
    fitted_on = [*windows([text(7000)], healing.encode, size=48, stride=48, seed=0, limit=6)]
    both = {"teacher": whole, "fitted_on": fitted_on}
    return replace(DistillHealing(**{**vars(healing), **both}), **changes)


def test_distillation_starts_from_the_refit(healing, monkeypatch):
    whole = open_model(healing.source, device="cpu")
    distill = refitted(healing, whole)
    heal_refit(whole, [3, 1], distill.fitted_on, progress=False)
    expected = losses(whole.decoder, healing.evaluation, progress=False)
    monkeypatch.setattr(lora, "heal", lambda *_, **__: None)
    found = [p.nats for p in distill([3, 1])]
    assert found == pytest.approx([p.nats for p in expected], rel=1e-5)
    raw = [p.nats for p in replace(distill, fitted_on=None)([3, 1])]
    assert max(abs(a / b - 1) for a, b in zip(raw, found, strict=True)) > 1e-3
    others = [replace(distill, fitted_on=fitted) for fitted in (None, distill.fitted_on[::-1])]
    assert len({str(each.identity()) for each in (distill, *others)}) == 3


def test_a_refit_is_not_done_again_where_training_was_interrupted(healing, monkeypatch, tmp_path):
    distill = refitted(healing, open_model(healing.source, device="cpu"))
    folder, plain, solved = tmp_path / "state.distill-1", lora.heal, []
    whole, run = distill([1, 3]), refit._solve

    def interrupted(*args, resume, **options):
        plain(*args, resume=resume, **options)
        if not resume:
            raise KeyboardInterrupt

    def watched(*given):
        state = next(each for each in given if isinstance(each, RefitState))
        before = len(state.fits)
        refused = run(*given)
        solved.append((before, len(state.fits)))
        return refused

    monkeypatch.setattr(lora, "heal", interrupted)
    monkeypatch.setattr(refit, "_solve", watched)
    with pytest.raises(KeyboardInterrupt):
        distill([1, 3], folder)
    continued = distill([3, 1], folder)  # the same set, of another method
    (none, every), again = solved
    assert none == 0 < every and again == (every, every)
    assert [p.nats for p in continued] == pytest.approx([p.nats for p in whole], rel=1e-6)
    assert not [*tmp_path.iterdir()]


def test_validation_windows_are_of_text_that_nothing_was_fitted_on(healing):
    whole = open_model(healing.source, device="cpu")
    cut = {"size": 48, "stride": 48, "seed": 3}
    parts = [[*windows([text], healing.encode, **cut)] for text in healing.texts]
    for number, fitted_on in enumerate(parts):
        training, validation = refitted(healing, whole, fitted_on=fitted_on)._learning(48)
        assert {w.text for w in validation} == {1 - number}
        assert {w.text for w in training} == {0, 1}
    every = parts[0] + parts[1]  # then by some of it all the same
    assert len(refitted(healing, whole, fitted_on=every)._learning(48)[1]) == len(validation)
    with pytest.raises(ValueError, match="share text with the windows to evaluate on"):
        refitted(healing, whole, fitted_on=healing.evaluation)


def test_a_gguf_file_is_healed_as_the_checkpoint_it_was_made_of(healing, tmp_path):
    file = tmp_path / "model.gguf"
    llama_to_gguf(healing.source, file)
    expected = [p.nats for p in healing([1])]
    found = [p.nats for p in replace(healing, source=str(file))([1])]
    assert found == pytest.approx(expected, rel=1e-4)


def test_distillation_without_a_teacher_or_with_a_short_one_is_refused(healing):
    with pytest.raises(ValueError, match="learns from the original model: pass teacher=short"):
        DistillHealing(**vars(healing))
    whole = open_model(healing.source, device="cpu", max_seq_len=40)
    with pytest.raises(ValueError, match="takes 40 tokens, windows to learn from have 48"):
        DistillHealing(**{**vars(healing), "teacher": whole})
