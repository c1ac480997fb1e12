"""What distillation minimises, against torch's own divergence over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from short_gpt.healing import distillation as module
from short_gpt.healing.distillation import Targets, divergence

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
