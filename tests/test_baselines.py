"""Known answers of the arithmetic that stands in `benchmarks` alone."""

from __future__ import annotations

import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows, save_chat_llama
from torch import Tensor, nn

from benchmarks.baselines import peer_maps, peers
from benchmarks.lib import judging, task_files, task_results, word_problems
from benchmarks.lib.shared_contexts import SharedContexts
from benchmarks.studies import kept, tasks
from short_gpt import ShortLlama, open_model
from short_gpt.data import check_disjoint
from short_gpt.healing.refit import split_held_out


class LinearLayer(nn.Module):
    """A layer that is x W."""

    def __init__(self, weight: Tensor, layer_id: int) -> None:
        super().__init__()
        self.weight, self.layer_id = nn.Parameter(weight.float(), requires_grad=False), layer_id

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x @ self.weight


class Residual(nn.Module):
    """A layer that is x + x W, W by the name of an MLP's output projection."""

    def __init__(self, weight: Tensor, layer_id: int) -> None:
        super().__init__()
        self.feed_forward, self.layer_id = nn.Module(), layer_id
        self.feed_forward.w2 = nn.Linear(*weight.shape, bias=False).requires_grad_(False)
        self.feed_forward.w2.weight.copy_(weight.T)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x + self.feed_forward.w2(x)


def linear(kind: str, seed: int) -> Tensor:
    """A map that the kind can express: channels of the rotated stream scaled, or any."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "ghosted":
        return torch.eye(32).double() + 0.1 * torch.randn(32, 32, generator=generator).double()
    rotation = peer_maps.hadamard(32)
    return rotation @ (torch.rand(32, generator=generator).double() + 0.5).diag() @ rotation.T


def linear_model(*weights: tuple[int, Tensor], n_layers: int = 5) -> ShortLlama:
    model = make_transformer(n_layers=n_layers)
    for place, weight in weights:
        model.layers[place] = LinearLayer(weight, place)
    return ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))


HELD = torch.tensor(random_windows(2, 20, seed=7))


@pytest.mark.parametrize("kind", [peer_maps.LINEARPATCH, peer_maps.GHOSTED])
def test_gaps_that_a_map_can_express_are_restored_exactly(kind):
    """One of a single layer, and one of two, whose product the map is."""
    places = ((1, 1), (3, 2), (4, 3))
    short = linear_model(*((place, linear(kind, seed)) for place, seed in places), n_layers=7)
    whole = short.decoder.logits(HELD)
    maps = peer_maps.fit(short, kind, [4, 1, 3], random_windows(6, 40))
    assert torch.allclose(maps[2], linear(kind, 2) @ linear(kind, 3), atol=1e-4)
    with short.without_layers([1, 3, 4]):
        raw = short.decoder.logits(HELD)
        undo = peer_maps.apply(short, maps)
        assert torch.allclose(short.decoder.logits(HELD), whole, atol=2e-3)
        undo()
        assert torch.equal(short.decoder.logits(HELD), raw)
    matrix = peer_maps.hadamard(60)
    assert torch.allclose(matrix @ matrix.T, torch.eye(60).double(), atol=1e-12)


def test_replaceme_restores_what_a_map_of_the_mlps_output_can_express():
    """x + x W and then A: with x = m W^-1, the state after it is x + m T for some T."""
    short = linear_model((3, linear("ghosted", 2)))
    short.llama.model.layers[2] = Residual(linear("ghosted", 1), 2)
    before = short.decoder.logits(HELD)
    peer_maps.replaceme(short, [3], random_windows(6, 40))
    assert 3 not in short.kept
    assert torch.allclose(short.decoder.logits(HELD), before, atol=2e-3)


def test_layers_trained_one_by_one_learn_the_original_states():
    """A linear layer before two linear ones learns their product with its own."""
    first, second, third = (linear("ghosted", seed) for seed in (1, 2, 3))
    short = linear_model((2, first), (3, second), (4, third))
    before, ticks = short.decoder.logits(HELD), itertools.count()
    windows = random_windows(3, 40)
    found = peer_maps.layerwise(short, [3, 4], windows, 3000, rate=1e-2, clock=lambda: next(ticks))
    assert short.kept == [0, 1, 2] and [one.layer for one in found] == [2]
    learned = short.decoder.layers[2].weight.double()
    assert torch.allclose(learned, first @ second @ third, atol=0.01)
    assert found[0].after < 1e-6 < 0.01 < found[0].before
    assert torch.allclose(short.decoder.logits(HELD), before, atol=0.1)
    assert next(ticks) == pytest.approx(3000, rel=0.02)


@pytest.mark.parametrize("family", peers.FAMILIES)
def test_removed_layers_of_a_tiny_model_change_nothing(family):
    model = peers.tiny(family, [1, 4])
    expected = peers.predicted(model)
    layers = [layer for i, layer in enumerate(model.model.layers) if i not in (1, 4)]
    model.model.layers = nn.ModuleList(layers)
    if family == "gemma3_text":  # the model tells its masks by the config's kinds
        kinds = model.config.layer_types
        model.config.layer_types = [k for i, k in enumerate(kinds) if i not in (1, 4)]
    model.config.num_hidden_layers = 10
    assert (peers.predicted(model) - expected).abs().max() < peers.EXACT
    model.model.layers, model.config.num_hidden_layers = nn.ModuleList(layers[1:]), 9
    assert (peers.predicted(model) - expected).abs().max() > 0.01


def test_the_share_kept_and_its_interval_are_those_of_draws():
    """The delta method against the spread of many samples of documents."""
    draw = random.Random(0)

    def sample(size: int) -> tuple[list[float], list[float]]:
        right = [float(draw.random() < 0.6) for _ in range(size)]
        return right, [r if draw.random() < 0.7 else float(draw.random() < 0.4) for r in right]

    found = []
    for _ in range(400):
        pairs = {"a": sample(200), "b": sample(50)}
        whole, own = ({t: pair[i] for t, pair in pairs.items()} for i in (0, 1))
        found.append(task_results.kept(whole, own))
    truth = (0.7 * 0.6 + 0.3 * 0.4) / 0.6
    held = [low <= truth <= high for low, high in (one["interval_95"] for one in found)]
    assert 0.92 < sum(held) / len(held) < 0.98
    spread = np.std([one["change"] for one in found], ddof=1)
    assert spread == pytest.approx(np.mean([one["standard_error"] for one in found]), rel=0.12)
    assert task_results.kept(whole, whole)["interval_95"] == [1, 1]


def test_means_leave_boolq_out_and_count_no_guess():
    before = {"local_piqa": [1.0, 1.0, 1.0, 0.0], "local_boolq": [0.0] * 4}
    after = {"local_piqa": [1.0, 1.0, 0.0, 0.0], "local_boolq": [1.0] * 4}
    whole, own = (task_results.above_guesses(judged) for judged in (before, after))
    assert whole == {"local_piqa": [0.5, 0.5, 0.5, -0.5]}
    assert task_results.kept(whole, own)["share"] == 0  # half of two answers is a guess
    change = task_results.change(*map(task_results.unflattered, (before, after)))
    assert change["change"] == -0.25 and task_results.change(before, after)["change"] == 0.375
    documents = {"local_a": {"acc": [0.0], "acc_norm": [1.0]}, "svamp": {"exact_match": [1.0]}}
    assert task_results.judging(documents) == {"local_a": [1.0]}


def test_text_that_holds_a_piece_of_a_question_is_known():
    assert [*kept.pieces(range(7))] == [] and [*kept.pieces(range(8))] == [tuple(range(8))]
    assert [*kept.pieces(range(100))] == [tuple(range(i, i + 32)) for i in (0, 32, 64)]
    halves = [*kept.pieces(range(39))]
    assert halves == [tuple(range(i, i + 20)) for i in range(20)]
    asked = {piece[:8]: {piece} for piece in halves}
    assert kept.holds([99, *range(5, 25)], asked) and not kept.holds([*range(5, 24), 99], asked)


def test_completions_known_answers():
    assert tasks.leading([1, 2, 3], [1, 2, 4]) == 2
    assert tasks.repetition([1, 2, 3, 1, 2, 3, 4], n=3) == 1 / 5
    decoder = linear_model().decoder
    (window,) = random_windows(1, 12)
    (found,) = tasks.turn_losses(decoder, [(window[:8], window[8:])])
    logs = decoder.logits(torch.tensor([window]))[0].log_softmax(-1)
    expected = -sum(float(logs[i - 1, window[i]]) for i in range(8, 12))
    assert found.nats == pytest.approx(expected, rel=1e-5) and found.tokens == 4


def test_many_are_answered_together_as_alone(tmp_path, monkeypatch, one_rank, lm_eval):
    """Word problems in one batch, and the answers of a multiple choice in one sequence."""
    texts = ["It is 5.", "so $1,234.50.", "a -3 b", "none...", "7 eggs, 10-3", "18, or 9"]
    numbers = [word_problems.last_number(text) for text in texts]
    assert numbers == [5, 1234.5, -3, None, 3, 9]
    save_chat_llama(tmp_path, 4, "{% for m in messages %}<s>{{ m.content }}>{% endfor %}")
    monkeypatch.setattr(word_problems, "TOKENS", 12)
    short = open_model(str(tmp_path / "hf"), device="cpu")
    short.tokenizer.pad_token = short.tokenizer.eos_token
    problems = [word_problems.Problem(text, "1") for text in ("Two?", "How many are left?", "1")]
    alone = []
    for problem in problems:
        ids = short.tokenizer(f"<s>{problem.question}>", add_special_tokens=False)["input_ids"]
        alone.append(short.decode(short.greedy(ids, 12)))
    assert word_problems.answers(short, problems) == alone and len({*alone}) == 3
    draw, requests = random.Random(1), []
    for size in (5, 1, 9, 3):
        context = draw.choices(range(2, 90), k=size)
        ends = [draw.choices(range(2, 90), k=k) for k in (1, 4, 7)]
        ends += [short.greedy(context, 3), ends[1][:2]]  # the last begins as another does
        requests += [(("", ""), context, end) for end in ends]
    theirs = short.harness_model(batch_size=3)._loglikelihood_tokens(requests, disable_tqdm=True)
    ours = SharedContexts(short).scores(3, requests, disable_tqdm=True)
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=1e-4)


DOCUMENTS = {
    "piqa": {"query": "Question: A goal: \n\n", "choices": ["this", " that"], "gold": 1},
    "arc_easy": {"query": "Question: Which?", "choices": ["a", "b", "c"], "gold": 2},
    "winogrande": {
        "context_options": ["Sarah met Sam so Sarah", "Sarah met Sam so Sam"],
        "continuation": "left.",
        "gold": 1,
    },
    "lambada_openai": {"context": "He said:\n\n \"I don't", "continuation": "care"},
    "boolq": {
        "query": "Passage: In\nQuestion: one.\nQuestion: is it?",
        "choices": ["no", "yes"],
        "gold": 1,
    },
    "copa": {"query": "He slept, or not, because", "choices": ["it", "a was"], "gold": 1},
    "winograd_wsc": {
        "context_options": ["Sarah met Sam. The Sarah", "Sarah met Sam. The Sad"],
        "continuation": "left.",
        "gold": 1,
    },
}
# contexts and continuations that lm-eval's own templates then ask for
ASKED = {
    "piqa": [("Question: A goal: \n\nAnswer:", f" {c}") for c in ("this", " that")],
    "arc_easy": [("Question: Which?\nAnswer:", f" {c}") for c in "abc"],
    "winogrande": [(f"Sarah met Sam so {c}", " left.") for c in ("Sarah", "Sam")],
    "lambada_openai": [("He said:\n\n \"I don't", " care")],
    "boolq": [("In\nQuestion: one.\nQuestion: is it?\nAnswer:", f" {c}") for c in ("no", "yes")],
    # two spaces, in wsc273 and in copa, as of lm-eval's own documents
    "copa": [("He slept, or not because", f"  {c}") for c in ("it", "a was")],
    "winograd_wsc": [(f"Sarah met Sam. The {c}", "  left.") for c in ("Sarah", "Sad")],
}


@pytest.mark.filterwarnings("default:get_task_dict:DeprecationWarning")
def test_local_documents_are_asked_for_as_lm_eval_asks_for_its_own(lm_eval, tmp_path):
    from lm_eval.tasks import TaskManager, get_task_dict

    for task, row in DOCUMENTS.items():
        tmp_path.joinpath(f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    (folder := tmp_path / "made").mkdir()
    names = task_files.write(tmp_path, folder, [*DOCUMENTS])
    for name, task in get_task_dict(names, TaskManager(include_path=str(folder))).items():
        task.build_all_requests()
        asked, expected = [i.args for i in task.instances], ASKED[name.removeprefix("local_")]
        # piqa: the goal's own end of line stays, the file's goes
        assert asked[: len(expected)] == expected or [c for _, c in asked] == ["", ""]
        assert task_files.passages(tmp_path / "lambada_openai.jsonl") == [
            "He said:\n\n \"I don't care"
        ]


def test_windows_to_learn_from_share_nothing_with_what_judges_and_are_of_both_texts():
    cut = random_windows(judging.windows_to_cut(6), 80)
    judged = [cut[0][:70]]
    free = [*cut[:-1], [*cut[2][:65], *cut[-1][65:]]]  # the last shares text with the third
    learning = judging.without_shared(free, judged, 6)
    assert len(learning.training) == 6 and len(learning.validation) == judging.VALIDATED
    check_disjoint([*learning.training, *learning.validation], judged)
    check_disjoint(learning.training, learning.validation)
    ordered = judging.both_held_out(turns := [[i, i % 2] for i in range(37)])
    assert sorted(ordered) == turns
    assert [text for _, text in split_held_out(ordered)[1]] == [1, 0, 1, 0]
