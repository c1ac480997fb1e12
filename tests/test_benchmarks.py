"""Every script of `benchmarks` runs on a tiny model; `test_baselines.py` has known answers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import save_chat_llama

from benchmarks.lib import adversarial, judging, real_models, served
from benchmarks.studies import front, own_samples, reasoning, servers, stopping, streaming
from benchmarks.tables import rows
from llama.args import ModelArgs
from short_gpt.checkpoints import prune_checkpoint
from short_gpt.data import demo
from short_gpt.evaluation.answers import Question
from short_gpt.plots import is_picture

pytestmark = pytest.mark.usefixtures("one_rank", "few_timed_tokens")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEXTS = {"also": "wiki.txt", "others": "novels.txt"}
SMALL = {"size": 32, "judged": 2}


def words(seed: int, count: int) -> str:
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    return " ".join(draw.choices(known, k=count))


def documents(seed: int) -> dict[str, dict[str, object]]:
    """One of every task's file."""
    text, gold = words(seed, 12), seed % 2
    names = {"context_options": ["Sarah met Sam so Sarah", "Sarah met Sam so Sam"]}
    return {
        "piqa": {"query": f"Question: {text}\n", "choices": ["so", "thus"], "gold": gold},
        "arc_easy": {"query": f"Question: {text}", "choices": ["a", "b", "c"], "gold": gold},
        "winogrande": {**names, "continuation": "left.", "gold": gold},
        "lambada_openai": {"context": text, "continuation": "cake"},
        "svamp": {"context": text, "answer": "3"},
        "gsm8k": {"context": text, "answer": "3"},
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_rank) -> Path:
    """A random Llama of 8 layers with a chat template: "meta", "hf" and "model.gguf"."""
    path = tmp_path_factory.mktemp("model")
    save_chat_llama(path, 8, TEMPLATE)
    config = path / "hf/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": "</s>"}))
    return path


@pytest.fixture
def here(model, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with tiny texts and tasks; the demo's model is the random one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "checkpoint", lambda: model / "meta")
    monkeypatch.setattr(demo, "gguf_file", lambda: model / "model.gguf")
    parts = {"calibration": range(1, 5), "held_out": range(5, 8)}
    book = {part: [words(seed, 2000) for seed in seeds] for part, seeds in parts.items()}
    monkeypatch.setattr(demo, "bible", lambda part="calibration": book[part])
    for name in ("0.5b", "1.5b"):
        monkeypatch.setitem(real_models.MODELS, name, lambda: model / "model.gguf")
    monkeypatch.setitem(real_models.MODELS, "smollm2", lambda: model / "hf")
    for seed, name in enumerate(("wiki.txt", "novels.txt"), start=8):
        Path(name).write_text(words(seed, 6000).replace(" a", "\n a"))
    rows = [documents(seed) for seed in range(120)]
    for name in rows[0]:
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps(row[name]) for row in rows))
    turns = [[{"role": "user", "content": words(seed, 40)}] for seed in range(200, 212)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    return tmp_path


WIKI = {"wikitext": "wiki.txt"}
PRUNED = {**WIKI, "layers": (2, 4)}
KEPT = {**TEXTS, **SMALL, "source": ".", "sets": "bi", "bi": (2, 4), "documents": (2, 3)}
KEPT |= {"problems": 2, "count": 8, "own": 8, "steps": 4}
TASKS = {**WIKI, **SMALL, "source": ".", "counts": (2,), "documents": 2, "learned": 8, "steps": 2}
FEW = {"size": 24, "max_windows": 12, "eval_windows": 8, "counts": (1,), "time": "3s"}
RUNS = {
    "answers": {**PRUNED, "source": ".", "tokens": (0, 64), "own": 4, "problems": 2},
    "choices": {**TEXTS, **SMALL, "counts": (1,), "draws": 1, "learned": 8, "budget": 40},
    "coverage": {"runs": 200},
    "front": {**WIKI, "model": "0.5b", "counts": (0, 2), "types": ("q8_0", "q4_k")},
    "healing": {**TEXTS, "layers": (2, 4), "count": 8, "judged": 2, "methods": "patch,refit:0.3"},
    "own_samples": {**PRUNED, "novels": "lambada_openai.jsonl", "rows": "own-12,book-24"},
    "kept": KEPT,
    "scoring": {"repeats": 1, "mixed": True},
    "stopping": {"windows": 24, "orders": 3},
    "tasks": TASKS,
    "larger": {**FEW, "chats": "chats.jsonl"},
    "architectures": {"only": "llama"},
    "streaming": {"layers": 2, "windows": 1, "repeats": 1},
    "servers": {"only": ("lm-eval",)},
}


FRONT = {"COUNTS": (0, 2), "OWN": 8, "SIZE": 32, "SEARCHED": 2}
FRONT |= {"JUDGED": 3, "ASKED": 3, "WRITTEN": 4}
CONSTANTS = {  # of a script, as small as the model
    "answers": {"SIZE": 32, "JUDGED": 2, "WRITTEN": 4, "EVALUATIONS": 2},
    "front": FRONT,
    "healing": {"cut": partial(judging.cut, size=64)},
    "own_samples": {"GREEDY": (2, 3), "SIZE": 64},
    "kept": {"TASKS": ("piqa", "lambada_openai")},
    "scoring": {"peak_memory": lambda _: 1.0},
    "servers": {"LAYERS": (2, 4), "SIZE": 16, "FITTED": 4, "FIT_SIZE": 16},
    "stopping": {"COUNTS": (2,)},
    "streaming": {"ModelArgs": partial(ModelArgs, dim=64, n_heads=4, multiple_of=16)},
}


def printed(run: Callable[..., object], **arguments: object) -> str:
    """What a script's command prints, which runs in this process instead of one of its own."""
    with redirect_stdout(StringIO()) as out:
        run(**arguments)
    return out.getvalue()


def read_here(_: object, *, input: str, **__: object) -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", StringIO(input))
        return SimpleNamespace(returncode=0, stdout=printed(served.main))


@pytest.mark.parametrize("script", RUNS)
def test_a_script_runs_and_looks_first_where_its_result_goes(script, here, lm_eval, monkeypatch):
    module = import_module(f"benchmarks.studies.{script}")
    for name, value in CONSTANTS.get(script, {}).items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("benchmarks.lib.agreement.RESAMPLES", 50)
    run = SimpleNamespace(run=read_here, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(servers, "subprocess", run)
    child = lambda name, **how: json.loads(printed(getattr(streaming, name), **how))  # noqa: E731
    monkeypatch.setattr(streaming, "child", child)
    with pytest.raises(SystemExit):
        module.main(**RUNS[script], out="out.json")
    content = json.loads(Path("out.json").read_text())
    assert f"benchmarks/studies/{script}.py" in content["command"] and content["machine"]
    monkeypatch.setattr(module, "finish", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(FileExistsError):
        module.main(**RUNS[script], out="out.json")


def test_files_of_fewer_layers_and_bits_are_measured_once_timed_and_drawn(here, monkeypatch):
    pytest.importorskip("xllamacpp")
    for name, value in {**CONSTANTS["front"], "SECONDS": 0.1}.items():
        monkeypatch.setattr(front, name, value)
    measured = []
    plain = front.judged
    monkeypatch.setattr(front, "judged", lambda *args: measured.append(args[0]) or plain(*args))
    for speeds, out in ((False, "first.json"), (True, "out.json")):
        with pytest.raises(SystemExit):
            front.main(**RUNS["front"], speeds=speeds, out=out)
    before, rows = (json.loads(Path(p).read_text())["rows"] for p in ("first.json", "out.json"))
    names = ["model", "0-q8_0", "0-q4_k", "2-source", "2-q8_0", "2-q4_k"]
    assert [path.stem for path in measured] == names
    assert [row | {"speeds": None} for row in rows] == before
    assert all(row["speeds"]["prompt"]["ratio"] > 0 for row in rows)
    original, whole, few, _, pruned, _ = rows
    klds = [row["wikitext"]["kld"] for row in (original, whole, few, pruned)]
    assert klds == sorted({*klds})
    assert few["bytes"] < whole["bytes"] > pruned["bytes"]
    front.main(out="out.json", plot=".")
    assert is_picture(Path("out.png")) and is_picture(Path("out_dark.png"))


def test_refits_on_own_text_and_dialogs_are_judged_by_distance(here, monkeypatch):
    for name, value in {"COUNT": 10, "SHORTER": 48, "SIZE": 64}.items():
        monkeypatch.setattr(own_samples, name, value)
    monkeypatch.setattr(own_samples, "questions", lambda: [Question("a", ("b",)), Question("c")])
    with pytest.raises(SystemExit):
        own_samples.main(distance=True, layers=(2, 4), wikitext="wiki.txt", out="out.json")
    found = json.loads(Path("out.json").read_text())
    kinds = ("none", "book", "text", "half of each", "dialogs")
    assert [*found["rows"]] == [f"2 layers, {kind}, seed 0" for kind in kinds]
    klds = {row["answers"]["kld"] for row in found["rows"].values()}
    assert len(klds) == 5 and all(kld > 0 for kld in klds)


def test_populations_made_to_mislead_are_attacked(here):
    with pytest.raises(SystemExit):
        stopping.main(adversarial=True, populations=20, out="out.json")
    kinds = json.loads(Path("out.json").read_text())["kinds"]
    assert [*kinds] == [*adversarial.KINDS, *adversarial.BEYOND]


def test_word_problems_are_asked_of_the_original_the_pruned_and_the_healed_file(here, model):
    pytest.importorskip("xllamacpp")
    Path("files").mkdir()
    prune_checkpoint(model / "model.gguf", Path("files/a.gguf"), [2])
    with pytest.raises(SystemExit):
        reasoning.main(".", "0.5b", "files", problems=2, tokens=4, out="out.json")
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert [row["layers"] for row in rows.values()] == [[], [2], [2]]
    # it solves none of the hard ones, of which pruned models are therefore asked none
    assert [*rows["a, healed"]["from pruned"]] == ["svamp exact_match", "svamp well_formed"]


def test_programs_are_compared_by_every_log_probability(monkeypatch):
    expected = {"logprobs": [[-1.0, -2.0], [-3.0]], "top": [[5, 6], [7]]}
    found = servers.compared({"logprobs": [[-1.0, -2.5], [-2.0]], "top": [[5, -1], [8]]}, expected)
    assert found == {"largest": 1.0, "mean": 0.5, "same_top": 0.5}  # -1 is not told
    row = {"form": "hf", "versions": {"a": "1.0"}, "pruned": found, "healed": found}
    assert not servers.near(row) and not servers.near({"failed": "why"})
    near = {**found, "largest": 1e-3}
    assert servers.near({**row, "pruned": near, "healed": near})
    failed = {"form": "f16", "failed": "why"}
    monkeypatch.setattr(rows, "result", lambda _: {"rows": {"one": row, "other": failed}})
    lines = ["| one (a 1.0) | 0.50, 0.50 on average | 50% |", "| other | failed |  |"]
    assert rows.servers() == lines


def test_logits_are_read_as_log_probabilities_of_the_next_token():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))  # (S, V)
    found = served.predicted([[3, 1, 4, 2]], [logits])
    expected = logits.log_softmax(-1)[[0, 1, 2], [1, 4, 2]]
    torch.testing.assert_close(torch.tensor(found["logprobs"][0]), expected)
    assert found["top"] == [logits[:3].argmax(-1).tolist()]


def test_a_program_that_fails_is_a_row_with_the_reason(tmp_path):
    missing = servers.Program("lm_eval", told=("no-such-package",))
    paths = {(state, "hf"): tmp_path for state in servers.STATES}
    found = servers.row(missing, tmp_path, paths, [[1, 2]], {})
    assert "no-such-package" in found["failed"]
