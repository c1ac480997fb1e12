"""Runs that are killed and continued give what an uninterrupted run gives, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import random_windows, refuses, save_byte_llama, short_llama
from processes import alone

from short_gpt import ShortGPTError
from short_gpt.cli.app import main
from short_gpt.runtime.state import StateFile, read_record
from short_gpt.scoring.run import RunState
from short_gpt.scoring.stopping import Stop

IDENTITY = {"model": "tiny", "data": "random", "seed": 0}


def run(path: Path | None, count: int = 150, *, every: float = 0.0, batch_size: int = 2):
    short = short_llama()
    state = None if path is None else RunState(StateFile(path, IDENTITY, every=every))
    windows = random_windows(count, 40)
    short.measure(windows, batch_size=batch_size, progress=False, state=state)
    return short.importance.to_dict()


def saved(state: Path) -> int:
    return state.stat().st_mtime_ns if state.exists() else 0


def test_killed_at_any_moment_and_continued_it_is_the_same_bit_for_bit(tmp_path):
    expected, kills = run(None), 0
    context = multiprocessing.get_context("fork")
    moments = random.Random(0)
    state = tmp_path / "state"
    while kills < 6:
        before = saved(state)
        child = context.Process(target=run, args=(state,))
        child.start()
        while child.exitcode is None and saved(state) == before:  # a busy machine starts slowly
            time.sleep(0.001)
        child.join(moments.uniform(0, 0.05))
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert kills >= 2
    assert StateFile(tmp_path / "state", IDENTITY).content is not None
    assert run(tmp_path / "state") == expected


def test_a_run_continues_a_finished_and_a_shorter_one(tmp_path):
    run(tmp_path / "state", 60)
    assert run(tmp_path / "state") == run(tmp_path / "state") == run(None)


def test_an_interruption_saves_even_between_two_saves(tmp_path, monkeypatch):
    short = short_llama()
    state = RunState(StateFile(tmp_path / "state", IDENTITY, every=1e9))
    plain, left = short.decoder.run, [5]

    def interrupted(tokens):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        plain(tokens)

    short.decoder.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        short.measure(random_windows(20, 40), batch_size=2, progress=False, state=state)
    assert short.n_windows == 10
    content = StateFile(tmp_path / "state", IDENTITY).content
    assert sum(content["importance"]["windows"]) == 10
    # the same state goes on, as in a cell of a notebook that runs again
    read, windows = [], random_windows(20, 40)
    short.decoder.run = lambda tokens: read.append(len(tokens)) or plain(tokens)
    short.measure(windows, batch_size=2, progress=False, state=state)
    assert sum(read) == 10
    assert short.importance.to_dict() == run(None, 20)
    again = short_llama().measure(windows, batch_size=2, progress=False, state=state)
    assert again.to_dict() == run(tmp_path / "state", 20) == run(None, 20)


def test_every_replica_continues_what_the_first_one_saved(tmp_path):
    run(tmp_path / "state", 20)
    first = StateFile(tmp_path / "state", IDENTITY).content
    other = RunState(StateFile(tmp_path / "other", IDENTITY))  # as of a rank that saves nothing
    other.agree(SimpleNamespace(gather=lambda own: [first, own]))
    sums = other.sums(range(len(first["importance"]["layers"])))
    assert sums.n_windows == 20
    assert not [*other.unread(random_windows(20, 40), 20)]
    refuses("state of a run on 20 other windows", other.unread, random_windows(20, 40, seed=1), 20)


def test_nothing_to_read_is_refused_with_a_state_too(tmp_path):
    short = short_llama()
    short.measure(random_windows(3, 40), progress=False)
    state = RunState(StateFile(tmp_path / "state", IDENTITY))
    for more in ({}, {"state": state}):
        refuses("at least one window of tokens", short.measure, iter([]), progress=False, **more)


def test_a_state_of_another_run_is_refused_by_name(tmp_path):
    run(tmp_path / "state", 10)
    refuses(
        "run with another seed: 0, now 1", StateFile, tmp_path / "state", {**IDENTITY, "seed": 1}
    )
    refuses("scores the layers", RunState(StateFile(tmp_path / "state", IDENTITY)).sums, [0, 1])
    (tmp_path / "notes.json").write_text('{"a": 1}')
    refuses("is not the state of a run", StateFile, tmp_path / "notes.json", IDENTITY)


@pytest.mark.parametrize(("count", "seed"), [(20, 1), (12, 0)])
def test_a_refused_state_is_left_as_it_is_and_refused_again(tmp_path, count, seed):
    state = tmp_path / "state"
    run(state, 20)
    before, time_before = state.read_bytes(), state.stat().st_mtime_ns
    for _ in range(3):
        short = short_llama()
        again = RunState(StateFile(state, IDENTITY, every=0))
        with pytest.raises(ShortGPTError, match="state of a run on 20 other windows"):
            short.measure(random_windows(count, 40, seed=seed), progress=False, state=again)
        assert short.n_windows == 0  # nor are the sums of others taken for this model's
        assert (state.read_bytes(), state.stat().st_mtime_ns) == (before, time_before)
    assert run(state, 30) == run(None, 30)


def saving_at_once(command: list[str]) -> None:
    with patch.object(StateFile, "due", lambda self: True):
        main(command)


def test_the_command_saves_when_asked_to_end_and_continues(tmp_path, capsys):
    directory = save_byte_llama(tmp_path / "model")
    letters = random.Random(0)
    text = "".join(chr(letters.randrange(97, 123)) for _ in range(8_000))
    (tmp_path / "book.txt").write_text(text)
    arguments = ["rank", str(directory), "--data", str(tmp_path / "book.txt"), "--size", "32"]
    arguments += ["--stride", "32", "--device", "cpu", "--seed", "3"]
    out = ["--json", str(tmp_path / "scores.json")]
    state = tmp_path / "scores.json.state"
    running = alone(tmp_path / "printed", saving_at_once, [*arguments, *out])
    (process,) = running.processes
    while not state.exists() and process.exitcode is None:
        time.sleep(0.01)
    process.terminate()
    done = running.end()
    assert done.codes == [130] and done.err.endswith("short-gpt: interrupted\n"), done.err
    assert state.exists() and not (tmp_path / "scores.json").exists()

    with pytest.raises(SystemExit):
        main([*arguments[:-1], "4", *out])
    assert "is the state of a run with another seed: 3, now 4" in capsys.readouterr().err
    main([*arguments, *out])
    main([*arguments, "--json", str(tmp_path / "whole.json")])
    found = read_record(tmp_path / "scores.json")["importance"]
    assert found == read_record(tmp_path / "whole.json")["importance"]
    assert sum(found["windows"]) > 230 and not state.exists()


def test_what_was_settled_when_it_was_killed_reads_no_further(tmp_path):
    """The state may be saved in front of a look, or behind the one that ended the run."""

    def ended(path: Path | None) -> tuple[str, dict]:
        short = short_llama()
        state = None if path is None else RunState(StateFile(path, IDENTITY))
        rule = Stop(1, min_windows=16, rare=0.4)
        windows = random_windows(100, 40)
        scores = short.measure(
            windows, batch_size=2, progress=False, stop=rule, state=state, random_order=True
        )
        return str(short.verdict), scores.to_dict()

    expected = ended(None)
    assert "settled at 0.99 after 16 windows" in expected[0]
    for _ in range(3):
        assert ended(tmp_path / "state") == expected


def test_other_batches_go_on(tmp_path):
    run(tmp_path / "state", 11)
    found, expected = run(tmp_path / "state", 20, batch_size=4), run(None, 20, batch_size=4)
    assert found["windows"] == expected["windows"] == [10, 10]
    assert torch.allclose(*(torch.tensor(r["influence"]) for r in (found, expected)), rtol=1e-6)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_a_state_of_a_changed_model_in_the_same_place_is_refused_by_name(
    tmp_path, capsys, monkeypatch, stream
):
    folder = save_byte_llama(tmp_path / "model")
    (tmp_path / "book.txt").write_text("abcdefgh" * 20)
    command = ["rank", str(folder), "--data", str(tmp_path / "book.txt"), "--size", "32", *stream]
    command += ["--stride", "32", "--device", "cpu", "--overwrite", "--json", f"{tmp_path}/s.json"]
    monkeypatch.setattr(StateFile, "clear", lambda self: None)  # killed before it was cleared
    main(command)
    main(command)
    file, weights = folder / "params.json", folder / "consolidated.00.pth"
    before, content = file.read_text(), torch.load(weights)
    file.write_text(before.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    embedding = {"tok_embeddings.weight": content["tok_embeddings.weight"] * 2}
    for name in ("configuration", "weights"):
        with pytest.raises(SystemExit):
            main(command)
        assert f"is the state of a run with another {name}: " in capsys.readouterr().err
        file.write_text(before)
        torch.save(content | embedding, weights)
