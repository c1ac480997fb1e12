"""Distillation: a teacher's predictions on disk, the loss of a training, what it brings.

The divergence is compared with torch's own over the whole vocabulary.
"""

from __future__ import annotations

import json
import weakref
from copy import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import interrupted, random_windows, refuses, share_model, short_llama, weights_of
from families import make
from transformers import Trainer

from short_gpt.data.windows import Window, learned
from short_gpt.healing import Distillation
from short_gpt.healing import distillation as module
from short_gpt.healing.distillation import Targets, collate, divergence, examples
from short_gpt.healing.lora import heal
from short_gpt.healing.settings import Recipe
from short_gpt.wrappers.short_hf import ShortHFModel

TRAINING = [w[: 16 - i] for i, w in enumerate(random_windows(6, 16, vocab=8, seed=1))]
VALIDATION = random_windows(3, 16, vocab=8, seed=5)
EVERY = [*TRAINING, *VALIDATION]
QUICK = Recipe(
    rank=4, steps=6, warmup=1, batch_size=2, eval_every=2, learning_rate=2e-2, dropout=0.0
)
K = 8
SOFT = Recipe(top_k=K, temperature=1.5)


def whole() -> ShortHFModel:
    return ShortHFModel(make("llama"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Distillation:
    found = Distillation(tmp_path_factory.mktemp("teacher"), whole(), EVERY, SOFT)
    found.fill(progress=False)
    return found


def shared(teacher: Distillation, share: float) -> Distillation:
    """The same predictions with another share in the loss."""
    other = copy(teacher)
    other.kl_share = share
    return other


def cut() -> ShortHFModel:
    short = whole()
    short.remove_layers([2, 4])
    return short


def by_hand(short: ShortHFModel, places: list[int], share: float) -> torch.Tensor:
    """The mean over the predicted tokens of these windows, from one window at a time."""
    sums, dense = [], whole()
    for place in places:
        tokens = torch.tensor([EVERY[place]])
        with torch.no_grad():
            logits = [m.model(tokens).logits[0, :-1] for m in (short, dense)]
        apart = divergence(logits[0], Targets.of(logits[1], K, 1.5), temperature=1.5).sum()
        text = F.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")
        sums.append((share * 1.5**2 * apart + (1 - share) * text, len(logits[0])))
    return sum(loss for loss, _ in sums) / sum(count for _, count in sums)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_batchs_loss_is_the_mean_over_its_tokens_and_padding_does_not_count(teacher, share):
    short, distillation = cut(), shared(teacher, share)
    batch = distillation.collate(examples(EVERY)[2:6])
    assert batch["input_ids"].tolist() == collate(examples(EVERY)[2:6])["input_ids"].tolist()
    logits = short.model(batch["input_ids"]).logits
    count = batch["labels"].ne(-100).sum()
    assert count == sum(len(w) - 1 for w in EVERY[2:6])
    found = distillation.loss(logits, batch)
    expected = by_hand(short, [2, 3, 4, 5], share)
    assert (found / count).item() == pytest.approx(expected.item(), rel=1e-3)  # float16 on disk
    padded = batch["labels"].roll(-1, 1).eq(-100)  # and the last token, which predicts nothing
    (gradient,) = torch.autograd.grad(found, logits)
    assert not gradient[padded].any() and gradient[~padded].abs().sum(-1).min() > 0


# of four windows which tokens count: none of a prompt, one alone, all, and two answers
MASKS = [b"\0" * 6 + b"\1" * 10, b"\0" * 14 + b"\1", None, b"\0\0\1\1\1\0\0\0\1\1\1\1\0"]
DIALOGS = [Window(w, i, counted=m) for i, (w, m) in enumerate(zip(TRAINING, MASKS, strict=False))]


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_of_a_dialog_the_answers_alone_are_learned(tmp_path, share):
    """The gradient elsewhere is zero, and the text's loss is transformers' own with labels -100."""
    short, dense = cut(), whole()
    recipe = Recipe(top_k=96, temperature=1.5, kl_share=share)
    distillation = Distillation(tmp_path, whole(), DIALOGS, recipe)
    distillation.fill(progress=False)
    batch = distillation.collate(examples(DIALOGS))
    with torch.no_grad():
        teacher = dense.model(batch["input_ids"]).logits
    logits = short.model(batch["input_ids"]).logits
    found = distillation.loss(logits, batch)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    apart = text = 0.0
    labels = torch.full_like(batch["input_ids"], -100)
    for row, (window, mask) in enumerate(zip(DIALOGS, MASKS, strict=True)):
        counted = [i for i in range(1, len(window)) if mask is None or mask[i]]
        labels[row, counted] = torch.tensor(window)[counted]
        before = [i - 1 for i in counted]
        assert gradient[row].abs().sum(-1).nonzero().flatten().tolist() == before
        ours, theirs = (each[row, before].div(1.5).log_softmax(-1) for each in (logits, teacher))
        apart += F.kl_div(ours, theirs, reduction="sum", log_target=True)
    assert batch["labels"].tolist() == labels.tolist()
    count = int(labels.ne(-100).sum())
    assert count == sum(sum(learned(window)) for window in DIALOGS) == 10 + 1 + 13 + 7
    assert (tmp_path / "predictions.bin").stat().st_size == count * (6 * distillation.k + 2)
    text = short.model(batch["input_ids"], labels=labels).loss * count
    expected = share * 1.5**2 * apart + (1 - share) * text
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)  # float16 on disk
    measured = distillation.measure(short.decoder, DIALOGS, first=0, batch_size=2)
    assert measured["eval_loss"] == pytest.approx(expected.item() / count, rel=2e-3)
    assert measured["eval_perplexity"] == pytest.approx((text / count).exp().item(), rel=1e-4)
    with pytest.raises(ValueError, match="is the state of a run with another windows"):
        Distillation(tmp_path, whole(), [[*w] for w in DIALOGS], recipe)


def test_lora_learns_and_is_judged_by_the_answers_alone():
    text = {"recipe": Recipe(**{**vars(QUICK), "steps": 1, "batch_size": 4}), "progress": False}
    healed = heal(cut(), DIALOGS, [Window(VALIDATION[0], 0, counted=MASKS[0])], **text)
    batch, short = collate(examples(DIALOGS)), cut()
    with torch.no_grad():
        loss = short.model(**batch).loss.item()
    assert healed.losses[1] == pytest.approx(loss, rel=1e-5)
    logs = short.decoder.logits(torch.tensor(VALIDATION[:1]))[0].log_softmax(-1)
    nats = -logs[range(5, 15), VALIDATION[0][6:]].mean()
    assert healed.validation[0] == pytest.approx(nats.exp().item(), rel=1e-5)
    assert (healed.tokens, healed.counted_tokens) == (16 + 15 + 14 + 13, 31)
    nothing = [Window(VALIDATION[0], 0, counted=bytes(16))]
    refuses("validation windows = 1: expected .* one that", heal, cut(), DIALOGS, nothing, **text)


def test_a_step_divides_by_the_tokens_of_all_its_parts(tmp_path):
    """Windows of 5 and 14 predicted tokens, read one by one: the first loss of a step of both."""
    few = [TRAINING[0][:6], TRAINING[1]]
    beside = Distillation(tmp_path, whole(), [*few, *VALIDATION], SOFT)
    beside.fill(progress=False)
    recipe = Recipe(**{**vars(QUICK), "steps": 1})
    healed = heal(cut(), few, VALIDATION, recipe=recipe, progress=False, distillation=beside)
    short, dense, total = cut(), whole(), 0.0
    for window in few:
        tokens = torch.tensor([window])
        logits = [m.decoder.logits(tokens)[0, :-1] for m in (short, dense)]
        total += divergence(logits[0], Targets.of(logits[1], K, 1.5), temperature=1.5).sum()
    assert healed.losses[1] == pytest.approx(1.5**2 * total.item() / (5 + 14), rel=1e-3)


def test_the_student_comes_nearer_and_the_best_step_is_known_by_it(teacher):
    short, distillation = cut(), teacher
    options = {"first": len(TRAINING), "batch_size": 2}
    before = distillation.measure(short.decoder, VALIDATION, **options)
    assert before["eval_perplexity"] == pytest.approx(short.perplexity(VALIDATION).value)
    expected = by_hand(short, [6, 7, 8], 1.0).item()
    assert before["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert before["eval_divergence"] == pytest.approx(expected / 1.5**2, rel=1e-3)
    mixed = shared(teacher, 0.25).measure(short.decoder, VALIDATION, **options)
    assert mixed["eval_loss"] == pytest.approx(by_hand(short, [6, 7, 8], 0.25).item(), rel=1e-3)
    healed = heal(
        short, TRAINING, VALIDATION, recipe=QUICK, progress=False, distillation=distillation
    )
    after = distillation.measure(short.decoder, VALIDATION, **options)
    assert healed.divergence[0] == pytest.approx(before["eval_divergence"], rel=1e-5)
    assert min(healed.divergence.values()) == healed.divergence[healed.kept_step]
    nearest = pytest.approx(healed.divergence[healed.kept_step], rel=1e-4)
    assert after["eval_divergence"] == nearest
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert set(healed.validation) == set(healed.divergence) == {0, 2, 4, 6}
    how = json.loads(json.dumps(healed.to_dict()))
    assert how["method"] == "distillation" and how["distillation"]["top_k"] == K
    assert how["distillation"]["kl_share"] == 1.0 and how["distillation"]["temperature"] == 1.5


def test_predictions_of_other_windows_are_not_learned(teacher):
    swapped = [*VALIDATION[1:], VALIDATION[0]]
    how = {"recipe": QUICK, "progress": False, "distillation": teacher}
    refuses("window 6 is not that of .*: expected the", heal, cut(), TRAINING, swapped, **how)


def test_the_step_kept_is_that_of_least_loss(teacher, monkeypatch):
    """Where text counts, too, the divergence may rise while the loss falls."""
    losses = iter([4.0, 3.0, 2.0, 1.0])

    def measure(self: Distillation, *_: object, **__: object) -> dict[str, float]:
        loss = next(losses)
        return {"eval_loss": loss, "eval_divergence": 1 / loss, "eval_perplexity": 2.0}

    monkeypatch.setattr(Distillation, "measure", measure)
    how = {"recipe": QUICK, "progress": False, "distillation": shared(teacher, 0.25)}
    healed = heal(cut(), TRAINING, VALIDATION, **how)
    assert healed.kept_step == 6 and healed.divergence == {0: 0.25, 2: 1 / 3, 4: 0.5, 6: 1.0}


def test_resuming_gives_what_one_run_gives(teacher, tmp_path):
    options = {"recipe": Recipe(**{**vars(QUICK), "dropout": 0.1}), "progress": False}
    options["distillation"] = shared(teacher, 0.5)
    one, broken, resumed = cut(), cut(), cut()
    first = heal(one, TRAINING, VALIDATION, **options)
    untouched = weights_of(broken)

    # in step 4 of 6; the last checkpoint is that of step 2
    with interrupted(Trainer, "training_step", 7):
        heal(broken, TRAINING, VALIDATION, work_dir=tmp_path / "t", **options)
    assert all(map(torch.equal, weights_of(broken), untouched))
    again = {**options, "work_dir": tmp_path / "t"}
    for other, message in (
        (shared(teacher, 1.0), "another kl_share: 0.5, now 1.0; go on with"),
        (None, "another (teacher|top_k|temperature|kl_share): .*, now None"),
    ):
        with pytest.raises(ValueError, match=f"is the state of a run with {message}"):
            heal(resumed, TRAINING, VALIDATION, **{**again, "distillation": other})
    second = heal(resumed, TRAINING, VALIDATION, **again)
    assert all(map(torch.equal, weights_of(one), weights_of(resumed)))
    assert second == first


# a teacher's predictions

WINDOWS = [w[: 16 - 3 * i] for i, w in enumerate(random_windows(4, 16))]


@pytest.fixture(scope="module")
def short() -> ShortHFModel:
    return whole()


def filled(folder, short, windows=WINDOWS, **options) -> Distillation:
    teacher = Distillation(folder, short, windows, Recipe(**options))
    teacher.fill(progress=False)
    return teacher


@pytest.mark.parametrize("made", [whole, short_llama])
def test_what_is_read_is_what_the_model_predicts(made, tmp_path):
    short = made()
    teacher = filled(tmp_path, short, top_k=5, temperature=2.0)
    found = teacher.targets([2, 0], [WINDOWS[2], WINDOWS[0]])
    for number, ours in zip((2, 0), found, strict=True):
        logits = short.decoder.logits(torch.tensor([WINDOWS[number]]))[0, :-1]
        expected = Targets.of(logits, 5, 2.0)
        assert torch.equal(ours.ids, expected.ids) and ours.ids.shape == (len(logits), 5)
        assert torch.allclose(ours.logs, expected.logs, atol=5e-3)  # float16 on disk
        assert torch.allclose(ours.rest, expected.rest, atol=5e-3)
        assert divergence(logits, ours, temperature=2.0).max() < 1e-5
    tokens = sum(len(window) - 1 for window in WINDOWS)
    assert (tmp_path / "predictions.bin").stat().st_size == tokens * (6 * 5 + 2)


def test_a_vocabulary_below_k_is_kept_whole(short, tmp_path):
    most = short.decoder.vocab_size
    teacher = filled(tmp_path, short, top_k=most + 10)
    (found,) = teacher.targets([1], [WINDOWS[1]])
    assert teacher.k == found.ids.shape[-1] == most
    assert (found.rest == -torch.inf).all() and found.logs.isfinite().all()


def test_padding_changes_no_target(short, tmp_path):
    one_by_one = filled(tmp_path / "a", short)
    at_once = Distillation(tmp_path / "b", short, WINDOWS)
    at_once.fill(batch_size=4, progress=False)
    for number, window in enumerate(WINDOWS):
        (ours,), (theirs,) = (t.targets([number], [window]) for t in (at_once, one_by_one))
        assert torch.allclose(ours.logs.exp().sum(-1), theirs.logs.exp().sum(-1), atol=1e-4)
        assert ours.ids.shape == theirs.ids.shape == (len(window) - 1, ours.ids.shape[-1])


def test_an_interrupted_cache_goes_on_where_it_was(short, tmp_path, monkeypatch):
    whole = filled(tmp_path / "whole", short)
    broken = Distillation(tmp_path / "broken", short, WINDOWS)
    asked = []

    def logits(windows, *, batch_size):
        for window in windows:
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(window)
            yield from ShortHFModel.window_logits(short, [window])

    with monkeypatch.context() as patched:
        patched.setattr(short, "window_logits", logits)
        with pytest.raises(KeyboardInterrupt):
            broken.fill(progress=False)
    refuses("lacks predictions: call fill", broken.targets, [0], WINDOWS[:1], error=RuntimeError)
    with open(tmp_path / "broken/predictions.bin", "ab") as file:
        file.write(b"half of a window, then a kill")
    asked.clear()
    monkeypatch.setattr(short, "window_logits", logits)
    filled(tmp_path / "broken", short)
    assert asked == WINDOWS[2:]
    bytes_of = [(tmp_path / name / "predictions.bin").read_bytes() for name in ("whole", "broken")]
    assert bytes_of[0] == bytes_of[1] and whole.identity() == broken.identity()
    filled(tmp_path / "broken", short)  # and is not asked again
    assert asked == WINDOWS[2:]


def test_the_logits_of_one_window_are_gone_before_the_next(short, tmp_path, monkeypatch):
    plain = short.window_logits

    def logits(windows, *, batch_size):
        for window in windows:
            held = [*plain([window])]
            before = weakref.ref(held[0])
            yield held.pop()
            assert before() is None

    monkeypatch.setattr(short, "window_logits", logits)
    filled(tmp_path, short)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short": ShortHFModel(make("llama", seed=1))}, "another weights"),
        ({"windows": WINDOWS[1:]}, "another windows"),
        (
            {"top_k": 3},
            "another top_k: 4, now 3; go on with the former top_k, or delete .* to start",
        ),
        ({"temperature": 2.0}, "another temperature: 1.0, now 2.0"),
    ],
)
def test_predictions_of_something_else_are_refused(short, tmp_path, change, message):
    filled(tmp_path, short, top_k=4)
    before = (tmp_path / "predictions.bin").read_bytes()
    refuses(f"run with {message}", filled, tmp_path, **{"short": short, "top_k": 4, **change})
    assert (tmp_path / "predictions.bin").read_bytes() == before


def test_a_teacher_is_told_by_all_that_its_predictions_depend_on(short, tmp_path):
    """A training that is continued takes no other: see `TrainingRun.identity`."""
    other = ShortHFModel(make("llama", seed=1))
    cases = [(short, 4, 1.0), (short, 4, 2.0), (short, 3, 1.0), (other, 4, 1.0), (short, 4, 1.0)]
    said = [
        Distillation(tmp_path / str(i), model, WINDOWS, Recipe(top_k=k, temperature=t)).identity()
        for i, (model, k, t) in enumerate(cases)
    ]
    assert said[0] == said[-1] and said[1]["temperature"] == 2.0
    assert len({json.dumps(one, sort_keys=True) for one in said}) == 4


def test_ranks_that_share_a_model_do_not_write_one_file(short, tmp_path, monkeypatch):
    teacher = Distillation(tmp_path, short, WINDOWS)
    share_model(monkeypatch, 2)
    refuses("the whole model on every rank, got 2 model-parallel", teacher.fill, progress=False)
    assert not [*tmp_path.iterdir()]


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    short = ShortHFModel(make("llama"))
    with torch.no_grad():
        short.model.lm_head.weight[0, 0] = torch.nan
    refuses("the teacher gave a NaN or infinite logit", filled, tmp_path, short)


# the divergence

N, V = 7, 20


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_equal_predictions_have_no_divergence_and_no_gradient(k):
    student = logits(0).requires_grad_()
    found = divergence(student, Targets.of(logits(0), k))
    assert found.shape == (N,) and found.abs().max() < 1e-6
    found.sum().backward()
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_it_is_torchs(temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)
    logs = [(x / temperature).log_softmax(-1) for x in (student, teacher)]
    expected = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    targets = Targets.of(teacher, V, temperature)
    found = divergence(student, targets, temperature=temperature)
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [
        torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected)
    ]
    assert torch.allclose(*gradients, atol=1e-6)


def bucketed(logs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of the kept tokens, and of all others together: (N, K + 1)."""
    p = logs.exp()
    rest = p.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([p.gather(-1, ids), rest], -1)


def test_what_is_not_kept_is_one_event_more():
    student, teacher = logits(0).double().requires_grad_(), logits(1).double()
    targets = Targets.of(teacher, 4)
    assert targets.ids.tolist() == teacher.topk(4).indices.tolist()
    q, p = (bucketed(x.log_softmax(-1), targets.ids) for x in (student, teacher))
    expected = (p * (p.log() - q.log())).sum(-1)
    found = divergence(student, targets)
    assert torch.allclose(found, expected, atol=1e-12)
    whole = divergence(student, Targets.of(teacher, V))
    assert (found <= whole + 1e-12).all() and (found < whole).any()
    assert torch.autograd.gradcheck(lambda x: divergence(x, targets), student)
    # the teacher's distribution, its rest spread as the student's is
    own = student.detach().softmax(-1)
    ratio = (p[:, -1] / q[:, -1]).detach()[:, None]
    spread = (own * ratio).scatter(-1, targets.ids, p[:, :-1])
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.allclose(gradient, own - spread, atol=1e-12)


def test_a_few_rows_at_a_time_are_all_rows(monkeypatch):
    targets, found = Targets.of(logits(1), 4), []
    for at_once in (2**21, 3 * V, 1):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        student = logits(0).requires_grad_()
        value = divergence(student, targets)
        found.append((value, torch.autograd.grad((value * torch.arange(N)).sum(), student)[0]))
    for value, gradient in found[1:]:
        assert torch.allclose(value, found[0][0], atol=1e-6)
        assert torch.allclose(gradient, found[0][1], atol=1e-6)


def test_a_teacher_that_is_certain_and_words_that_cannot_be_give_no_nan():
    teacher = torch.full((1, V), -torch.inf)
    teacher[0, 3] = 0.0
    student = logits(0)[:1].requires_grad_()
    found = divergence(student, Targets.of(teacher, 5))
    assert found.item() == pytest.approx(-student.log_softmax(-1)[0, 3].item(), rel=1e-6)
    found.sum().backward()
    assert student.grad.isfinite().all()


def test_rounded_probabilities_sum_to_one_again():
    targets = Targets.of(logits(0, scale=1.0), 4)
    rough = Targets(targets.ids, targets.logs.half().float(), targets.rest.half().float())
    for found in (rough.normalized(), Targets.of(logits(0), V).normalized()):
        total = found.logs.exp().sum(-1) + found.rest.exp()
        assert torch.allclose(total, torch.ones(N), atol=1e-6)
    assert (rough.logs.exp().sum(-1) + rough.rest.exp() - 1).abs().max() > 1e-5


def test_half_precision_is_widened_first():
    student = logits(0).bfloat16()
    found = divergence(student, Targets.of(student, 5))
    assert found.dtype == torch.float32 and found.abs().max() < 1e-6
