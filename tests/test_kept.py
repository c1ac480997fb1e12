"""What pruned models keep of tasks: known answers, and the benchmark on a tiny model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import BYTE_VOCAB, write_byte_tokenizer

from benchmarks.lib import shares
from benchmarks.lib.shared_contexts import SharedContexts
from benchmarks.studies import kept
from short_gpt import ShortHFModel
from short_gpt.data import demo
from short_gpt.evaluation.cells import Cells
from short_gpt.runtime.errors import ShortGPTError

NUMBERS = {
    "count": 8,
    "own": 8,
    "steps": 10,
    "judged": 2,
    "size": 96,
    "problems": 2,
    "documents": 3,
}


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
        found.append(shares.kept(whole, own))
    truth = (0.7 * 0.6 + 0.3 * 0.4) / 0.6
    held = [low <= truth <= high for low, high in (one["interval_95"] for one in found)]
    assert 0.92 < sum(held) / len(held) < 0.98
    for key, error in (("change", "standard_error"), ("share", None)):
        values = torch.tensor([one[key] for one in found]).double()
        low, high = zip(*[one["interval_95"] for one in found], strict=True)
        reach = (torch.tensor(high) - torch.tensor(low)).mean() / 3.92
        foretold = reach if error is None else torch.tensor([one[error] for one in found]).mean()
        assert float(values.std()) == pytest.approx(float(foretold), rel=0.12)
    same = shares.kept(whole, whole)
    assert same["share"] == 1 and same["interval_95"] == [1, 1] and same["standard_error"] == 0


def test_the_documents_needed_are_the_fewest():
    assert shares.variance([0.0, 1.0, 1.0, 0.0]) == pytest.approx(1 / 3)
    # sqrt(2 x 0.25 / n) / 2 = 0.05 at n = 50
    assert shares.needed([0.25, 0.25], [1000, 1000], error=0.05) == 50
    # of 20 documents of the second: 0.25 / n + 0.25 / 20 = 0.0225 at n = 25
    assert shares.needed([0.25, 0.25], [1000, 20], error=0.075) == 25
    assert shares.needed([0.25, 0.25], [300, 10], error=0.001) == 300


def test_what_judges_is_the_length_normed_answer_where_there_is_one():
    documents = {"local_a": {"acc": [0.0], "acc_norm": [1.0]}, "local_b": {"acc": [0.0]}}
    assert shares.judging({**documents, "svamp": {"exact_match": [1.0]}}) == {
        "local_a": [1.0],
        "local_b": [0.0],
    }


def test_boolq_is_left_out_of_the_means_that_it_flatters():
    before = {"local_boolq": [0.0, 0.0], "local_a": [1.0, 1.0], "local_b": [0.0, 1.0]}
    after = {"local_boolq": [1.0, 1.0], "local_a": [1.0, 0.0], "local_b": [0.0, 1.0]}
    assert shares.change(before, after)["change"] == pytest.approx((1 - 0.5) / 3)
    change = shares.change(shares.unflattered(before), shares.unflattered(after))
    # one of two documents of one of two tasks: the error of its mean is 0.5, half of it in both
    assert change == {"change": -0.25, "standard_error": pytest.approx(0.25)}


def test_a_share_of_what_is_above_guessing_counts_no_guess():
    before = {"local_piqa": [1.0, 1.0, 1.0, 0.0], "local_boolq": [0.0] * 4}
    after = {"local_piqa": [1.0, 1.0, 0.0, 0.0], "local_boolq": [1.0] * 4}
    whole, own = (shares.above_guesses(judged) for judged in (before, after))
    assert whole == {"local_piqa": [0.5, 0.5, 0.5, -0.5]}
    assert shares.kept(whole, own)["share"] == 0  # half of two answers is what guessing gives
    assert shares.GUESSED.keys() == {*kept.TASKS} - {"boolq"}


def test_ranks_are_those_of_pruned_and_of_healed_models():
    def row(loss: float, mean: float) -> dict:
        means = {"mean": {"value": mean}, "without boolq": {"value": -mean}}
        return {"texts": {"a": {"nats": loss}, "b": {"nats": 1.0}}, **means}

    rows = {"original": row(0, 9), "bi pruned": row(3, 1), "auto pruned": row(2, 2)}
    rows |= {f"bi {i}": row(i, mean) for i, mean in enumerate([1, 3, 2, 4])}
    found = shares.ranks(rows)
    without = "tau without boolq"
    assert found["pruned"] == {"models": 2, "tau": pytest.approx(-1), without: pytest.approx(1)}
    healed = {"models": 4, "tau": pytest.approx(4 / 6), without: pytest.approx(-4 / 6)}
    assert found["healed"] == healed


def test_what_a_refit_gains_is_compared_between_sets(monkeypatch):
    means = {"a pruned": 0.2, "a refit": 0.5, "b pruned": 0.3, "b refit": 0.4}
    sets = {"a": [1], "b": [2]}
    named = {(row, (*sets[s],)): s for s in sets for row in kept.ROWS}
    run = kept.Run.__new__(kept.Run)
    run.measure = run.summary = lambda row, layers: {}
    run.missing = lambda row, layers: row not in ("pruned", "refit")
    monkeypatch.setattr(kept, "ranks", lambda rows: {})

    def found(row: str, layers: list[int]) -> tuple[dict, dict]:
        mean = means[f"{named[row, (*layers,)]} {row}"]
        return {"local_piqa": {"acc": [mean - 0.1, mean + 0.1]}}, {}

    run.found = found
    pairs = kept.rows_of(run, sets, [])[2]
    assert pairs["gain of a refit less that of b refit"]["change"] == pytest.approx(0.3 - 0.1)
    assert pairs["b refit less a refit"]["change"] == pytest.approx(-0.1)


def text(seed: int, count: int) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    return " ".join(draw.choices(words, k=count))


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> dict[str, object]:
    """A random model of 8 layers, and few documents of few tasks."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    file = write_byte_tokenizer(tmp_path)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **tokens)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(
        kept, "open_model", lambda *_, **__: ShortHFModel(model, tokenizer=tokenizer)
    )
    monkeypatch.setitem(kept.MODELS, "smollm2", lambda: tmp_path)
    books = {"calibration": 1, "held_out": 2}
    monkeypatch.setattr(demo, "bible", lambda part: [text(books[part], 9000)])
    monkeypatch.setattr(kept, "TASKS", ("piqa", "lambada_openai"))
    monkeypatch.setattr(kept.word_problems, "NAMES", ("svamp", "gsm8k"))
    monkeypatch.setattr(kept.word_problems, "TOKENS", 4)
    rows = {
        "piqa": {"query": "Question: Why?\n", "choices": ["so", "thus"], "gold": 0},
        "lambada_openai": {"context": "He ate a", "continuation": "cake"},
        "svamp": {"context": "How many?", "answer": "3"},
        "gsm8k": {"context": "How few?", "answer": "3"},
    }
    for name, row in rows.items():
        lines = [json.dumps(row | ({"gold": i % 2} if "gold" in row else {})) for i in range(3)]
        tmp_path.joinpath(f"{name}.jsonl").write_text("\n".join(lines))
    for name, seed in (("wiki", 3), ("novels", 4)):
        tmp_path.joinpath(f"{name}.txt").write_text(text(seed, 9000).replace(" a", "\n a"))
    paths = {"also": str(tmp_path / "wiki.txt"), "others": str(tmp_path / "novels.txt")}
    return {"source": str(tmp_path), **paths, **NUMBERS, "out": str(tmp_path / "kept.json")}


def test_a_context_is_read_once_and_scores_are_those_of_lm_eval(lm_eval, arguments):
    short = run_of(arguments, "s").short
    draw, requests = random.Random(1), []
    for size in (5, 1, 9, 3):
        context = draw.choices(range(2, 90), k=size)
        greedy = [*short.greedy(context, 3)]
        ends = [draw.choices(range(2, 90), k=k) for k in (1, 4, 7)]
        ends += [greedy, greedy[:1], [*greedy[:2], 5], ends[1][:2]]  # some begin as others do
        requests += [(("", ""), context, end) for end in ends]
    draw.shuffle(requests)
    theirs = short.harness_model(batch_size=3)._loglikelihood_tokens(requests, disable_tqdm=True)
    shapes = []
    hook = short.model.base_model.register_forward_pre_hook(
        lambda _, __, how: shapes.append(tuple(how["input_ids"].shape)), with_kwargs=True
    )
    ours = SharedContexts(short).scores(3, requests, disable_tqdm=True)
    hook.remove()
    read = 1 + 4 + 7 + 3 + 1 + 3 + 2 - 7  # of each context's answers, all but the last tokens
    assert shapes == [(3, 9 + read), (1, 1 + read)]
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert 8 <= sum(flag for _, flag in ours) < len(ours)
    for context, end in (([], [5]), ([5], []), ([5] * 500, [5] * 14)):
        with pytest.raises(ValueError, match="expected 1 to 512 tokens"):
            SharedContexts(short).scores(3, [(("", ""), context, end)])
    assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=1e-4)


def ended(**arguments: object) -> dict:
    with pytest.raises(SystemExit) as end:
        kept.main(**arguments)
    assert end.value.code == 0
    return json.loads(Path(str(arguments["out"])).read_text())


def run_of(arguments: dict[str, object], state: str) -> kept.Run:
    paths = {name: str(arguments[name]) for name in ("source", "also", "others")}
    counts = {n: v for n, v in NUMBERS.items() if n not in ("documents", "problems")}
    return kept.Run("smollm2", **paths, state=Path(paths["source"], state), **counts)


def learned(run: kept.Run) -> list[list[int]]:
    read = run.learning
    windows = [*run.texts["mix"], *run.texts["text"], *read.training, *read.validation]
    return [list(window) for window in windows]


def test_text_to_learn_from_is_none_of_a_tasks(lm_eval, arguments):
    """Half of the book is a document of lambada's, and no window of that half is left."""
    folder, book = Path(str(arguments["source"])), text(1, 9000)
    row = {"context": book[: len(book) // 2], "continuation": "end"}
    folder.joinpath("lambada_openai.jsonl").write_text(json.dumps(row))
    run = run_of(arguments, "state")
    ids = run.short.encode(row["context"])
    asked = {tuple(ids[i : i + 63]) for i in range(len(ids) - 62)}
    for window in learned(run):
        assert not asked & {tuple(window[i : i + 63]) for i in range(len(window) - 62)}
    every = kept.cut(run.short, [book], 42, 96)  # of which Run has those that are left
    assert 10 < sum(bool(asked & {tuple(w[:63])}) for w in every) < 32


def test_text_to_learn_from_holds_no_short_question_or_answer(lm_eval, arguments, monkeypatch):
    """Each kind of a task's texts is taken out of a window that was learned from before."""
    folder = Path(str(arguments["source"]))
    monkeypatch.setattr(kept, "TASKS", ("piqa", "lambada_openai", "winogrande"))
    row = {"context_options": ["A man saw her and A", "A man saw her and B"], "gold": 0}
    folder.joinpath("winogrande.jsonl").write_text(json.dumps(row | {"continuation": "left."}))
    first = run_of(arguments, "first")
    taken, book = learned(first), kept.cut(first.short, [text(1, 9000)], 42, 96)
    chosen = [list(window) for window in book if list(window) in taken][:5]
    question, answer, problem, option, end = (first.short.decode(w[30:56]) for w in chosen)
    rows = {
        "piqa": [
            {"query": f"Question: {question}\n", "choices": [answer, "thus"], "gold": 0},
            {"query": "Question: Why?\n", "choices": ["so", "thus"], "gold": 1},
        ],
        "svamp": [{"context": problem, "answer": "3"}] * 2,
        "winogrande": [
            {"context_options": [f"{option} A", f"{option} B"], "continuation": end, "gold": 0}
        ],
    }
    for name, own in rows.items():
        folder.joinpath(f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    run = run_of(arguments, "second")
    left, asked = learned(run), run._asked()
    assert [window in left for window in chosen] == [False] * 5
    assert sum(kept.holds(window, asked) for window in book) < 10 < len(book) / 4
    beside = run.short.encode("te a cak")  # of a context and its continuation, "He ate a" "cake"
    assert kept.holds(beside, asked) and not kept.holds(beside[:-1], asked)


def test_pieces_are_those_of_the_rule():
    assert [*kept.pieces(range(7))] == []
    assert [*kept.pieces(range(8))] == [tuple(range(8))]
    halves = [tuple(range(i, i + 20)) for i in range(20)]
    assert [*kept.pieces(range(39))] == halves
    assert [*kept.pieces(range(100))] == [tuple(range(i, i + 32)) for i in (0, 32, 64)]
    asked = {piece[:8]: {piece} for piece in halves}
    assert kept.holds([99, *range(5, 25)], asked) and not kept.holds([*range(5, 24), 99], asked)


@pytest.mark.filterwarnings("default")
def test_rows_are_measured_once_and_an_interrupted_one_goes_on(lm_eval, arguments, monkeypatch):
    begun = {**arguments, "sets": "bi", "rows": "pruned,bi refit", "bi": [2, 5]}
    first = ended(**begun)
    assert [*first["rows"]] == ["original", "bi pruned", "bi refit"] and first["documents"] == 3
    asked_of = {n: [t for t in row["tasks"] if "exact" in t] for n, row in first["rows"].items()}
    assert asked_of.pop("original") == ["svamp exact_match", "gsm8k exact_match"]  # solves none
    assert [*asked_of.values()] == [["svamp exact_match"]] * len(asked_of)
    assert first["hf"]["answers_equal"] and 0 <= first["hf"]["nats"] < kept.CLOSE
    own = first["rows"]["bi refit"]
    assert own["healing"]["processor_seconds"] > 0
    for kind, cell in own["texts"].items():
        assert math.exp(cell["nats"]) == pytest.approx(
            cell["perplexity"] / first["rows"]["original"]["texts"][kind]["perplexity"]
        )
    # a row that is interrupted after its training goes on with the same weights
    real, asked = kept.word_problems.asked, []

    def stopped(short, problems):
        asked.append(short)
        raise KeyboardInterrupt

    more = {**begun, "rows": "layerwise", "overwrite": True}
    monkeypatch.setattr(kept.word_problems, "asked", stopped)
    with pytest.raises(KeyboardInterrupt):
        kept.main(**more)
    folder = Path(str(arguments["source"]))
    (file,) = folder.glob("*.pt")
    trained = {name: value.clone() for name, value in asked[0].model.state_dict().items()}
    again = []
    monkeypatch.setattr(
        kept.word_problems, "asked", lambda s, problems: again.append(s) or real(s, problems)
    )
    monkeypatch.setattr(kept.layerwise, "heal", lambda *_: pytest.fail("it was trained"))
    second = ended(**more)
    assert not file.exists() and asked[0].kept == again[0].kept
    state = again[0].model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.items())
    assert second["rows"].keys() == {*first["rows"], "bi layerwise"}
    assert {n: row for n, row in second["rows"].items() if n in first["rows"]} == first["rows"]
    # nothing is left to measure
    monkeypatch.setattr(kept.Run, "healed", lambda *_: pytest.fail("it was measured"))
    assert ended(**more)["rows"] == second["rows"]
    with pytest.raises(ShortGPTError, match="another read"):
        kept.main(**{**more, "steps": 12})


@pytest.mark.filterwarnings("default")
def test_a_result_that_grows_by_documents_is_that_of_all_at_once(lm_eval, arguments, monkeypatch):
    folder, taken = Path(str(arguments["source"])), []
    words = ("cake", "an egg", "it", "two", "a rather long loaf")
    rows = [{"context": f"He ate {word} and a", "continuation": "cake"} for word in words]
    folder.joinpath("lambada_openai.jsonl").write_text("\n".join(map(json.dumps, rows)))
    begun = {**arguments, "sets": "bi", "rows": "pruned", "bi": [2, 5], "overwrite": True}
    ended(**begun)  # 3 documents, which are all of piqa's
    real = kept.documents_of
    monkeypatch.setattr(kept, "documents_of", lambda *a: taken.append(own := real(*a)) or own)
    grown = ended(**{**begun, "documents": (3, 4, 9)})
    asked = [[len(v) for v in own["local_lambada_openai"].values()] for own in taken]
    assert asked == [[1, 1]] * 2 + [[1, 1]] * 2  # of the original and of the pruned model
    healed = kept.Run.healed
    changed = {**begun, "documents": (3, 4, 9), "rows": "refit"}
    ended(**{**changed, "documents": 3})
    monkeypatch.setattr(  # which is another model
        kept.Run, "healed", lambda run, row, layers: healed(run, "pruned", layers)
    )
    with pytest.raises(ValueError, match="healed again, it has"):
        kept.main(**changed)
    monkeypatch.setattr(kept.Run, "healed", healed)
    once = ended(**{**begun, "documents": 9, "out": str(folder / "once.json")})
    assert grown["documents"] == once["documents"] == 9
    for name, row in once["rows"].items():
        mean = grown["rows"][name]["mean"]
        assert row["mean"].pop("interval_95") == pytest.approx(mean.pop("interval_95"))
        assert row["mean"] == pytest.approx(mean)
        for task, cell in row["tasks"].items():
            assert cell == pytest.approx(grown["rows"][name]["tasks"][task], abs=1e-6), task


@pytest.mark.parametrize(("solved", "asked"), [(0, False), (1, True)])
def test_hard_problems_are_asked_where_the_original_solves_one_in_twenty(solved, asked):
    values = {"gsm8k": {"exact_match": [1.0] * solved + [0.0] * (20 - solved)}}
    run = kept.Run.__new__(kept.Run)
    run.problems, run.cells = 20, Cells(None)
    run.cells.value("original []: 20 of gsm8k", lambda: values)
    assert ("gsm8k" in run._kinds_of_problems("refit")) == asked
    assert run._kinds_of_problems("original") == ["svamp", "gsm8k"]


@pytest.mark.filterwarnings("default")
def test_every_row_is_measured_and_a_set_chosen_twice_once(lm_eval, arguments, monkeypatch):
    class Chosen(NamedTuple):
        layers: list[int]

    def as_greedy(short, windows, n, *, state):
        assert state is not None and n == 2
        return Chosen(short.search(windows[: kept.FEW], n, progress=False).removed)

    monkeypatch.setattr(kept, "choose_healed", as_greedy)
    found = ended(**{**arguments, "sets": ["greedy", "auto"], "documents": None, "bi": [1, 4]})
    assert found["documents"] == kept.PILOT and found["layers"]["auto"] == found["layers"]["greedy"]
    assert len(found["layers"]["greedy"]) == 2
    rows = {name.split()[-1]: row for name, row in found["rows"].items() if "auto" not in name}
    assert [*rows] == ["original", *kept.ROWS, *kept.MIXED]  # auto's, of the same layers
    assert all(row == rows[n.split()[-1]] for n, row in found["rows"].items() if "auto" in n)
    values = [row["texts"]["novels"]["perplexity"] for row in rows.values()]
    assert len({*values}) == len(rows), dict(zip(rows, values, strict=True))
    assert rows["distilled"]["healing"]["how"]["method"] == "distillation"
    same = found["pairs"]["auto refit less greedy refit"]
    assert same["change"] == same["without boolq"]["change"] == 0
    gained = found["pairs"]["greedy distilled less greedy pruned"]["change"]
    means = [rows[name]["mean"]["value"] for name in ("distilled", "pruned")]
    assert gained == pytest.approx(means[0] - means[1])
    assert found["pairs"]["gain of greedy refit less that of auto refit"]["change"] == 0
    assert found["kendall"]["pruned"] == dict.fromkeys(("tau", "tau without boolq")) | {"models": 1}
    assert found["kendall"]["healed"]["models"] == len(kept.ROWS) - 1


def test_a_mixed_row_heals_in_bfloat16_and_is_no_other_model_to_rank(
    lm_eval, arguments, monkeypatch
):
    heal, reads = kept.heal_refit, []
    monkeypatch.setattr(
        kept, "heal_refit", lambda short, *a: reads.append(short.decoder.mixed) or heal(short, *a)
    )
    rows = {"sets": "bi", "rows": "refit,refit-mixed", "bi": [1, 4]}
    found = ended(**{**arguments, **rows})
    assert reads == [False, True] and [*found["rows"]] == ["original", "bi refit", "bi refit-mixed"]
    values = [row["texts"]["novels"]["nats"] for row in found["rows"].values()]
    assert 0 < abs(values[2] - values[1]) < 0.01
    assert found["kendall"]["healed"]["models"] == 1
    assert [*found["pairs"]] == ["bi refit-mixed less bi refit"]
    run = run_of(arguments, "s")
    assert not run.healed("refit-mixed", [1, 4]).decoder.mixed  # it is judged in float32
