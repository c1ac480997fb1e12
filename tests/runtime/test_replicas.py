"""Ranks and replicas: every division of the work gives one process's numbers; failures end all.

Two runs, of 2 and of 4 ranks, each check many things; the tests compare what they saved.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import children
import pytest
import torch
from conftest import (
    CharTokenizer,
    cut,
    make_transformer,
    random_windows,
    save_checkpoint,
    write_byte_tokenizer,
)
from processes import ranks

from llama import Llama
from llama.checkpoint.meta import Checkpoint
from llama.formats.gguf import to_meta
from llama.generation import load_model
from short_gpt import ShortLlama
from short_gpt.data.windows import Window
from short_gpt.runtime.replicas import Replicas, lost
from short_gpt.scoring.importance import Importance

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo")
SHAPE = {"n_heads": 8, "n_kv_heads": 2, "n_layers": 3}
TOKENS = torch.arange(3, 23).reshape(2, 10)
WINDOWS = random_windows(11, 12)
DIRECTORIES = ("one", "two", "eight", "tied")


def model_of(**changes):
    return make_transformer(**{**SHAPE, **changes})


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def found(tmp_path_factory, model):
    """What every rank saved: by world size and rank."""
    folder = tmp_path_factory.mktemp("replicas")
    save_checkpoint(folder / "one", model)
    save_checkpoint(folder / "two", model, shards=2)
    save_tied(folder / "tied", tied_model())
    save_eight(folder / "eight", model)
    given = {"tokens": TOKENS, "windows": WINDOWS, "directories": DIRECTORIES}
    given["many"] = random_windows(120, 12)
    torch.save(given, folder / "given.pt")
    results = {}
    for world in (2, 4):
        done = ranks(world, folder / f"world{world}", children.divisions, folder, world).end()
        assert not any(done.codes), done.err
        results |= {
            (world, r): torch.load(folder / f"world{world}-rank{r}.pt") for r in range(world)
        }
    return results


def tied_model(**changes):
    model = model_of(**changes)
    model.output.weight = model.tok_embeddings.weight
    return model


def save_tied(directory: Path, model) -> Path:
    save_checkpoint(directory, model)
    state = torch.load(directory / "consolidated.00.pth")
    state["output.weight"] = state["tok_embeddings.weight"]
    torch.save(state, directory / "consolidated.00.pth")
    return directory


def save_eight(directory: Path, model) -> Path:
    """Eight shards by vocabulary of a model of two key/value heads: each holds one of them."""
    save_checkpoint(directory, model, shards=8, vocab_parallel=True)
    for rank in range(8):
        path = directory / f"consolidated.{rank:02d}.pth"
        state = torch.load(path)
        for name, weight in model.state_dict().items():
            if name.endswith(("wk.weight", "wv.weight")):
                state[name] = cut(name, weight, rank // 4, 2, True)
        torch.save(state, path)
    return directory


DIVISIONS = [(1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]  # ranks of a model x replicas


def of_ranks(found, mp: int, replicas: int):
    return [found[mp * replicas, rank][mp] for rank in range(mp * replicas)]


@pytest.mark.parametrize(("mp", "replicas"), DIVISIONS)
def test_any_shards_on_any_ranks_give_the_same_logits(found, model, mp, replicas):
    with torch.no_grad():
        expected = model(TOKENS)
    for result in of_ranks(found, mp, replicas):
        for name in ("one", "two", "eight"):
            assert (result[name] - expected).abs().max() < 1e-5, name
        assert result["tied", "tied"] and not result["one", "tied"]


@pytest.mark.parametrize("kind", ["shared", "measured"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("mp", "replicas"), DIVISIONS)
def test_any_division_gives_the_sums_of_one_process(found, mp, replicas, size, kind):
    """11 windows: replicas have unequal shares."""
    short = ShortLlama(Llama(tied_model(), CharTokenizer()))
    short.measure(WINDOWS, batch_size=size, progress=False)
    results = of_ranks(found, mp, replicas)
    assert all(r[kind, size] == results[0][kind, size] for r in results)
    same(Importance.from_dict(results[0][kind, size]), short.importance)


@pytest.mark.parametrize(("mp", "replicas"), DIVISIONS)
def test_texts_are_the_same_ones_on_all_replicas(found, mp, replicas):
    short = ShortLlama(Llama(tied_model(), CharTokenizer()))
    for part in (WINDOWS[:5], WINDOWS * 4):  # other texts than the first call's
        short.measure([Window(w, i % 3) for i, w in enumerate(part)], progress=False)
    for result in of_ranks(found, mp, replicas):
        ours = Importance.from_dict(result["texts"])
        assert ours.n_texts == short.importance.n_texts == 6
        assert torch.allclose(ours.standard_error, short.importance.standard_error, rtol=1e-3)


def same(one: Importance, other: Importance) -> None:
    assert one.layers == other.layers
    assert torch.equal(one.windows, other.windows) and torch.equal(one.tokens, other.tokens)
    for name in ("influence", "products", "angles"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max())), name


@pytest.mark.parametrize(("mp", "replicas"), DIVISIONS)
def test_all_ranks_know_a_model_by_the_same_digest_and_perplexity(found, mp, replicas):
    digests = {result["digest"] for result in of_ranks(found, mp, replicas)}
    alone = ShortLlama(Llama(tied_model(), CharTokenizer()))
    assert len(digests) == 1 and (digests == {alone.weights_digest()}) == (mp == 1)
    expected = pytest.approx(alone.perplexity(WINDOWS, progress=False).value, rel=1e-5)
    assert all(result["perplexity"] == expected for result in of_ranks(found, mp, replicas))


@pytest.mark.parametrize(("mp", "replicas"), DIVISIONS)
def test_replicas_without_windows_and_agreement(found, mp, replicas):
    for result in of_ranks(found, mp, replicas):
        assert sum(result["few"]["windows"]) == 1
        assert result["any"] == [True, False]
        assert result["sampled"] == of_ranks(found, 1, 2)[0]["sampled"]


@pytest.mark.parametrize(("mp", "replicas"), DIVISIONS)
def test_the_first_rank_saves_what_all_continue(found, mp, replicas):
    """It alone holds the lock; another one could write after the state was cleared."""
    first, *others = (result["saves"] for result in of_ranks(found, mp, replicas))
    assert "saved" in first and [x for x in first if x != "saved"] == [4, 11]
    assert all(saves == [4, 11] for saves in others)


def test_replicas_interrupted_and_continued_give_the_same_bit_for_bit(found):
    for result in of_ranks(found, 1, 2):
        sums = result["resumed"]
        assert sum(sums["whole"]["windows"]) == 120
        assert sums["continued"] == sums["whole"]


def test_ranks_that_do_not_divide_are_refused(found):
    expected = "model_parallel_size = 3: expected a divisor of the 2 running rank(s)"
    assert found[2, 0]["error"].startswith(expected)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("windows", [0, 1, 7, 25])
def test_shares_are_disjoint_whole_and_in_step(count, size, windows):
    seen, steps, halves = [], [], []
    for rank in range(count):
        team, mine = Replicas(rank, count), []
        for start in range(0, windows, team.step(size)):
            step = list(range(windows))[start : start + team.step(size)]
            mine.append(team.share(step, size))
        steps.append([len(batches) for batches in mine])
        own = [number for batches in mine for batch in batches for number in batch]
        assert all(len(batch) <= size for batches in mine for batch in batches)
        seen += own
        halves += [number % 2 == place % 2 for place, number in enumerate(own)]
    assert sorted(seen) == list(range(windows)) and all(halves)
    assert all(s == steps[0] for s in steps)


FAILURES = {
    "alike": "short-gpt: nothing here",
    "alone": "short-gpt: rank 1 alone",
    "defect": "AssertionError: rank 1 alone",
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_rank_ends_all_with_one_message(tmp_path, case):
    done = ranks(2, tmp_path / "printed", children.failing, case).end()
    assert all(done.codes) and 1 in (done.codes if case == "alike" else done.codes[1:])
    assert done.out == "" and done.err.count(FAILURES[case]) == 1, done.err
    assert done.err.count("short-gpt: ") == (case != "defect"), done.err
    assert done.err.count("Traceback") == (case == "defect"), done.err


@pytest.mark.parametrize("launcher", [True, False])
def test_who_waits_for_a_killed_rank_ends_and_says_so(tmp_path, launcher):
    done = ranks(2, tmp_path / "printed", children.failing, "killed").end(launcher=launcher)
    said = done.err.count("short-gpt: a rank was lost")
    if launcher:  # it may end the other rank before that one notices
        assert done.codes in ([1, -9], [-15, -9]) and said <= 1
    else:
        assert done.codes == [1, -9] and said == 1
    assert done.out == "" and done.err.count("short-gpt: ") == said and "Traceback" not in done.err


def test_a_lost_connection_is_told_from_a_defect():
    assert lost(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert lost(torch.distributed.DistNetworkError("timed out"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


SPLITS = [(2, {}), (8, {}), (2, {"n_heads": 6, "n_kv_heads": 3, "dim": 48})]


@pytest.mark.parametrize(("shards", "changes"), SPLITS)
@pytest.mark.parametrize("source", ["by width", "by vocabulary", "tied"])
def test_there_and_back_gives_the_same_bits(tmp_path, shards, changes, source, monkeypatch):
    if source == "by vocabulary":
        monkeypatch.setattr("llama.checkpoint.meta.LLAMA_3_VOCABULARY", 96)
    model = (tied_model if source == "tied" else model_of)(**changes).bfloat16()
    folder = (save_tied if source == "tied" else save_checkpoint)(tmp_path / "one", model)
    write_byte_tokenizer(folder)
    (folder / "pruning.json").write_text('{"removed_layers": [3]}')
    to_meta(folder, tmp_path / "many", shards=shards, also=["pruning.json"])
    many = Checkpoint(tmp_path / "many")
    assert len(many.shards) == shards and many.vocab_parallel == (source != "by width")
    for shard in many.shards:
        storages = {shard.infos[f"{n}.weight"].storage for n in ("output", "tok_embeddings")}
        assert len(storages) == (1 if source == "tied" else 2)
    loaded = load_model(many, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    to_meta(tmp_path / "many", tmp_path / "back", shards=1, also=["pruning.json"])
    one, back = (torch.load(tmp_path / n / "consolidated.00.pth") for n in ("one", "back"))
    assert list(one) == list(back) and all(torch.equal(one[name], back[name]) for name in one)
    for name in ("params.json", "pruning.json", "tokenizer.json"):
        first, last = (json.loads((tmp_path / n / name).read_text()) for n in ("one", "back"))
        assert first == last


@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_rank_reads_its_part_whatever_the_shards(tmp_path, model, shards, ranks):
    (save_eight if shards == 8 else partial(save_checkpoint, shards=shards))(tmp_path / "x", model)
    checkpoint = Checkpoint(tmp_path / "x")
    with checkpoint.mapped():
        for name, whole in model.state_dict().items():
            for rank in range(ranks):
                kv = name.endswith(("wk.weight", "wv.weight"))
                heads = min(ranks, 2) if kv else ranks
                expected = cut(name, whole, rank * heads // ranks, heads, shards == 8)
                assert torch.equal(checkpoint.read(name, rank=rank, ranks=ranks), expected)
