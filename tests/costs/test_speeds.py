"""Speeds in turns: what the interval covers, and what is measured again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count

import numpy as np
import pytest
from gguf_families import make, write_model

from short_gpt import ShortHFModel
from short_gpt.costs import speeds as module
from short_gpt.costs.speeds import beyond, interval, llama_cpp, pytorch, speeds

WINDOW = [i % 50 for i in range(48)]


def machine(rates: Sequence[float]):
    """A model whose prompt is read at these rates, one after the other, and written at 10."""
    each = iter(rates)
    return lambda prompt, count: (next(each), 10.0)


def test_ratios_are_paired_by_turn():
    """A machine that becomes ten times slower: the ratio of each turn is 2."""
    slower = [1000 / (1 + i) for i in range(11)]  # two turns to warm up, then nine
    timers = {"original": machine(slower), "pruned": machine([2 * rate for rate in slower])}
    measured = speeds(timers, WINDOW, most={"pruned": 3})
    assert measured["pruned"]["prompt"][1:4] == (2, 2, 2)
    assert measured["original"]["generation"][:4] == (10, 1, 1, 1)
    assert measured["pruned"]["prompt"].per_second == pytest.approx(2 * np.median(slower[2:]))


def test_models_take_turns_at_being_the_first():
    order = []
    timers = {n: lambda *_, n=n: (order.append(n), (1.0, 1.0))[1] for n in "abc"}
    speeds(timers, WINDOW, most={}, turns=6)
    assert "".join(order[6:]) == "abccba" * 3


def test_tokens_of_a_turn_follow_from_the_seconds():
    asked = []

    def timer(prompt, count):
        asked.append((len(prompt), count))
        return 100.0, 50.0

    (measured,) = speeds({"original": timer}, range(2048), most={}, seconds=36).values()
    assert asked[-1] == (200, 32) and asked[0] == (32, 4)  # 2 s of each kind of work in a turn
    assert [own.tokens for own in measured.values()] == [200, 32]
    speeds({"original": timer}, range(64), most={}, seconds=1e-3)
    assert asked[-1] == (32, 4)
    speeds({"original": timer}, range(64), most={}, seconds=1e3)
    assert asked[-1] == (64, 32)


def test_what_the_layers_cannot_give_is_measured_once_more_and_then_said():
    calls = count()

    def disturbed(prompt, tokens):
        return (300.0 if next(calls) < 11 else 130.0), 10.0

    timers = {"original": lambda *_: (100.0, 10.0), "pruned": disturbed}
    measured = speeds(timers, WINDOW, most={"pruned": 30 / 22})
    assert measured["pruned"]["prompt"].ratio == 1.3 and next(calls) == 20
    assert beyond(measured, {"pruned": 30 / 22}) == []
    timers["pruned"] = lambda *_: (300.0, 10.0)
    (sentence,) = beyond(speeds(timers, WINDOW, most={"pruned": 1.36}), {"pruned": 1.36})
    assert sentence.startswith("pruned, prompt: 3.00 times as fast (3.00 to 3.00), while its layer")


def test_the_interval_leaves_out_one_disturbed_turn_of_nine():
    low, high = interval(np.array([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 90.0]))
    assert (low, high) == (1.1, 1.7)
    assert interval(np.arange(7.0)) == (0, 6)


@pytest.mark.parametrize("kind", ["normal", "bursts", "wander", "slower"])
def test_the_interval_covers_the_truth(kind):
    """Other programs that run in bursts, a speed that wanders, a machine that becomes slower."""
    random, runs, turns, models = np.random.default_rng(0), 4000, module.TURNS, 3
    noise = random.normal(0, 0.03, (turns * models, runs))  # of logarithms, in the order of time
    if kind != "normal":
        noise -= (random.random(noise.shape) < 0.15) * random.exponential(0.5, noise.shape)
    if kind == "wander":
        steps = random.normal(0, 0.1, noise.shape)
        for step in range(1, len(steps)):
            steps[step] += 0.9 * steps[step - 1]
        noise += steps
    if kind == "slower":
        noise -= np.linspace(0, 0.5, len(noise))[:, None]
    noise = noise.reshape(turns, models, runs)
    noise[1::2] = noise[1::2, ::-1]  # every second turn is in reverse
    low, high = interval(noise[:, -1] - noise[:, 0])
    assert np.mean((low <= 0) & (high >= 0)) > 0.95


def test_in_pytorch_fewer_layers_are_faster():
    model = make("llama", num_hidden_layers=8, hidden_size=128, intermediate_size=256)
    # which would end every text at once: as many tokens are timed all the same
    model.generation_config.eos_token_id = [*range(model.config.vocab_size)]
    short = ShortHFModel(model)
    read = set()
    short.decoder.layers[0].register_forward_pre_hook(
        lambda module, args: read.add(tuple(args[0].shape[:2]))
    )
    timers = {
        "original": pytorch(short, nullcontext),
        "pruned": pytorch(short, lambda: short.without_layers([1, 2, 3, 4, 5, 6])),
    }
    measured = speeds(timers, WINDOW, most={"pruned": 4}, seconds=50)
    assert all(own.ratio > 1.2 for own in measured["pruned"].values())
    assert short.present == [*range(8)]
    assert read == {(1, 32), (1, 48), (1, 1)}  # prompts, and one token after the other


def test_llama_cpp_reads_each_prompt_anew(tmp_path, monkeypatch):
    client, asked = pytest.importorskip("xllamacpp"), []
    path = write_model(tmp_path / "m.gguf", "llama", make("llama"))

    class Server(client.Server):
        def handle_completions(self, content):
            asked.append(super().handle_completions(content)["timings"])
            return {"timings": asked[-1]}

    monkeypatch.setattr(client, "Server", Server)
    timer = llama_cpp(path, 48)
    read = [timer(WINDOW, 4), timer(WINDOW, 4), timer([*WINDOW[:40], 7], 4)]
    assert [(own["cache_n"], own["prompt_n"]) for own in asked] == [(0, 48), (0, 48), (0, 41)]
    assert [own["predicted_n"] for own in asked] == [4, 4, 4]
    assert all(rate > 0 for pair in read for rate in pair)
