"""One layer at a time: the same scores and perplexity as in memory, within the memory planned."""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
from pathlib import Path
from string import ascii_lowercase
from types import SimpleNamespace

import children
import pytest
import torch
from commands import fails, run
from conftest import (
    make_transformer,
    random_windows,
    refuses,
    save_byte_llama,
    save_checkpoint,
    save_meta,
    write_byte_tokenizer,
)
from processes import alone

from llama import Llama
from llama.args import ModelArgs
from llama.checkpoint.meta import full_shapes
from llama.checkpoint.pth import TensorInfo, write_shard
from llama.formats.hf import meta_to_hf, params_json
from short_gpt import ShortLlama, open_model
from short_gpt.models.decoder import pad
from short_gpt.runtime import memory as memory_plan
from short_gpt.runtime.memory import bytes_of, pinned
from short_gpt.scoring.importance import SUMS, Importance
from short_gpt.scoring.stopping import Stop
from short_gpt.wrappers import streamed_transformer
from short_gpt.wrappers.streamed_llama import StreamedCalls, StreamedLlama
from short_gpt.wrappers.streamed_transformer import Batch, StreamedTransformer

VOCAB = 258
WINDOWS = [w[: 20 - i % 3] for i, w in enumerate(random_windows(7, 20, vocab=VOCAB))]
SCALED = {"use_scaled_rope": True, "rope_scaling_factor": 4.0, "rope_theta": 500000.0}
META = {
    "one file": {},
    "two files, cut by width": {"shards": 2},
    "two files, cut by vocabulary": {"shards": 2, "vocab_parallel": True},
    "as many key heads": {"n_kv_heads": 4},
    "tied": {"tied": True},
    "llama 3.1": SCALED,
    "bfloat16": {"dtype": torch.bfloat16},
}


def meta(directory, **how):
    return ShortLlama(Llama(save_meta(directory, **how).float(), None))


def same(streamed, memory, *, scores: bool = True, **options) -> None:
    found = streamed.perplexity(WINDOWS, progress=False, **options)
    expected = memory.perplexity(WINDOWS, progress=False, **options)
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert (found.tokens, found.windows) == (expected.tokens, expected.windows)
    if not scores:
        return
    for short in (streamed, memory):
        short.measure(WINDOWS, progress=False, **options)
    assert streamed.importances[streamed.kept].isfinite().all()
    for name in SUMS:
        found, expected = (getattr(model.importance, name) for model in (streamed, memory))
        # every window's scores are bit-equal; their sums are in another order
        assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13, equal_nan=True), name


@pytest.mark.parametrize("case", META)
def test_a_meta_directory_gives_the_scores_of_the_model_in_memory_bit_for_bit(
    case, tmp_path, monkeypatch
):
    memory = meta(tmp_path / "meta", **META[case])
    monkeypatch.setattr(memory_plan, "BLOCK_BYTES", 10_000)  # some rows of one file, some of two
    streamed = open_model(tmp_path / "meta", stream=True, max_seq_len=64, device="cpu")
    same(streamed, memory, batch_size=3)


@pytest.mark.parametrize(
    ("case", "max_shard_bytes"),
    [("one file", 10**9), ("tied", 20_000), ("llama 3.1", 10**9), ("bfloat16", 20_000)],
)
def test_a_hugging_face_directory_too(case, max_shard_bytes, tmp_path, monkeypatch):
    memory = meta(tmp_path / "meta", **META[case])
    meta_to_hf(tmp_path / "meta", tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    monkeypatch.setattr(memory_plan, "BLOCK_BYTES", 10_000)
    same(StreamedLlama(tmp_path / "hf", max_seq_len=64, device="cpu"), memory, batch_size=2)


@pytest.fixture
def streamed(tmp_path, monkeypatch) -> StreamedLlama:
    monkeypatch.setattr(streamed_transformer, "resident", lambda: 0)
    meta(tmp_path / "meta")
    return StreamedLlama(tmp_path / "meta", 2, max_seq_len=20, device="cpu")


def test_several_rounds_are_one_round(streamed, monkeypatch):
    rounds = []
    run = streamed.stream.run
    monkeypatch.setattr(streamed.stream, "run", lambda g, **k: (rounds.append(len(g)), run(g, **k)))
    streamed.measure(WINDOWS, batch_size=2, progress=False)
    whole, found = streamed.importance, streamed.perplexity(WINDOWS, progress=False)
    assert rounds == [4, 7]
    streamed.importance, least = type(whole).empty(range(5)), streamed.plan(2)
    fixed = sum(least.host.values())
    streamed.max_memory = fixed + 15 * least.window  # seven batches of two: a power of two is four
    assert streamed.plan(2).windows == 8
    streamed.max_memory = fixed + 5 * least.window  # two batches of two windows, not five windows
    assert streamed.plan(2).windows == 4 and streamed.plan(2).total <= streamed.max_memory
    streamed.measure(WINDOWS, batch_size=2, progress=False)
    assert rounds == [4, 7, 2, 2]
    for name in SUMS:
        sums, expected = getattr(streamed.importance, name), getattr(whole, name)
        assert torch.allclose(sums, expected, rtol=1e-13, equal_nan=True)
    again = streamed.perplexity(WINDOWS, batch_size=2, progress=False)
    assert again.value == pytest.approx(found.value, rel=1e-6)


def test_a_round_on_the_cpu_has_no_more_tokens_than_hide_the_reading():
    """So that a run of long windows is saved, and looked at, more than once an hour."""
    for size, windows in ((64, 32), (256, 32), (1024, 8), (3000, 2), (20_000, 1)):
        args = ModelArgs(dim=256, n_layers=4, n_heads=4, vocab_size=VOCAB, max_seq_len=size)
        given = {"dtype": torch.float32, "stored": torch.bfloat16, "process": 10**8}
        assert memory_plan.plan(args, max_memory="900GB", **given).windows == windows, size
        on_device = memory_plan.plan(args, max_memory="900GB", on_host=False, **given)
        assert on_device.windows == 256


def test_pinned_memory_counts_as_torch_takes_it():
    assert [pinned(size) for size in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]
    args = ModelArgs(dim=96, n_layers=4, n_heads=4, vocab_size=VOCAB, max_seq_len=20)
    given = {"dtype": torch.float32, "stored": torch.bfloat16, "process": 0, "batch_size": 3}
    pageable, ours = (memory_plan.plan(args, on_host=on, **given) for on in (True, False))
    sizes = [2 * math.prod(s) for n, s in full_shapes(args).items() if n.startswith("layers.0.")]
    more = ours.host["next layer as stored"] - pageable.host["next layer as stored"]
    assert more == sum(pinned(size) - size for size in sizes) > 0
    state = 3 * 20 * 96 * 4
    assert ours.window - pageable.window == math.ceil((pinned(state) - state) / 3) > 0


def test_pinned_states_are_those_of_rounds_and_written_into(streamed, monkeypatch):
    stream, tokens, made, empty = streamed.stream, torch.tensor(WINDOWS[:1]), [], torch.empty
    batches = [Batch(tokens, torch.ones_like(tokens, dtype=torch.bool)) for _ in range(2)]
    stream.run(batches)
    (expected,) = stream.losses(batches[:1])
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    place, head = batches[1].state.data_ptr(), stream._head
    monkeypatch.setattr(stream, "_head", lambda: (made.append(batches[1].state), head())[1])
    assert torch.equal(*stream.losses(batches[1:]), expected)
    assert made.pop().data_ptr() == place

    def told(*shape, pin_memory=None, **options):
        made.extend([] if pin_memory is None else [pin_memory])
        return empty(*shape, **options)

    # as if a GPU were there
    monkeypatch.setattr(StreamedTransformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", told)
    stream.embed(batches)
    assert made == [True, True]
    StreamedCalls(stream).embed(tokens)
    assert made == [True, True, False]


def few_rounds(streamed, windows: int) -> None:
    """Bounds the memory so that a round takes so many windows."""
    plan = streamed.plan()
    streamed.max_memory = plan.total - (plan.windows - windows) * plan.window
    assert streamed.plan().windows == windows


def test_logits_are_those_in_memory_in_the_order_of_the_windows(streamed, tmp_path):
    memory = ShortLlama.from_checkpoint(tmp_path / "meta", max_seq_len=20, device="cpu")
    few_rounds(streamed, 4)
    pairs = zip(
        streamed.window_logits(WINDOWS), memory.window_logits(WINDOWS, batch_size=3), strict=True
    )
    for window, (ours, theirs) in zip(WINDOWS, pairs, strict=True):
        assert ours.shape == (len(window), memory.decoder.vocab_size)
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_logits_are_in_memory_once_and_counted(streamed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", lambda *_, **__: pytest.fail("a copy of them"))
        rows = [*streamed.window_logits(WINDOWS[:6], batch_size=3)]
    assert [row.untyped_storage().nbytes() for row in rows] == [3 * 20 * VOCAB * 4] * 6
    assert not rows[0].requires_grad
    monkeypatch.setattr(memory_plan, "BLOCK_BYTES", 10_000)
    least = streamed.plan()
    known = least.host["working memory"]
    needed = streamed.plan(logits=True).host["working memory"]
    assert needed == (1 + 3) * 20 * VOCAB * 4 > known  # and what a teacher makes of them
    streamed.max_memory = least.total - (least.windows - 1) * least.window
    assert streamed.plan().windows == 1
    refuses("are too little: one layer at a time, this", next, streamed.window_logits(WINDOWS))
    streamed.max_memory += needed - known
    assert len([*streamed.window_logits(WINDOWS)]) == len(WINDOWS)


def test_a_rule_stops_after_a_round(streamed):
    few_rounds(streamed, 4)
    many = random_windows(90, 12)
    rule = Stop(3, min_windows=16, rare=0.3)
    streamed.measure(many, progress=False, stop=rule, random_order=True)
    verdict = streamed.verdict
    assert verdict.settled and verdict.windows == streamed.n_windows < 90
    assert streamed.n_windows % 4 == 0 and streamed.n_windows >= 16


def test_too_little_memory_is_refused_and_the_least_is_enough(streamed, tmp_path):
    with pytest.raises(ValueError, match="100kB of memory are too little: .* at least ") as caught:
        StreamedLlama(tmp_path / "meta", max_seq_len=20, device="cpu", max_memory="100kB")
    least = str(caught.value).split("at least ")[1].split(" (")[0]
    short = StreamedLlama(tmp_path / "meta", max_seq_len=20, device="cpu", max_memory=least)
    assert short.plan().windows == 1
    refuses("states of a batch", short.measure, WINDOWS, batch_size=9, progress=False)
    assert short.plan().describe().startswith("one layer at a time, 1 windows a round: ")


def group(folder: Path, files: dict[str, str], *, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "memory.stat": stat}.items():
        (folder / name).write_text(f"{content}\n")


def test_free_memory_is_within_the_limits_of_the_control_groups(tmp_path, monkeypatch):
    two = tmp_path / "two"
    stat = "anon 5\ninactive_file 100"
    group(two / "job/step", {"memory.max": "max", "memory.current": "900"}, stat=stat)
    group(two / "job", {"memory.max": "2000", "memory.current": "1500"}, stat=stat)
    group(two / "jobs", {"memory.max": "1", "memory.current": "1"}, stat=stat)  # another's
    (tmp_path / "own").write_text("0::/job/step\n")
    assert memory_plan.left_in_groups(tmp_path / "own", two) == [600]
    group(two / "job", {}, stat="anon 5")  # a kernel that does not count files
    assert memory_plan.left_in_groups(tmp_path / "own", two) == [500]
    assert not memory_plan.left_in_groups(tmp_path / "none", two)
    assert not memory_plan.left_in_groups(tmp_path / "own", tmp_path / "none")
    for left, free in (([2**63 - 3800], 700), ([600, 650], 600), ([-5], 0), ([], 700)):
        monkeypatch.setattr(memory_plan, "left_in_groups", lambda left=left: left)
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=700))
        assert memory_plan.free_memory() == free


def test_sizes():
    sizes = {"3GB": 3 * 10**9, "2.5 GiB": 5 * 2**29, "800mb": 8 * 10**8, 17: 17, 4096: 4096}
    for text, size in sizes.items():
        assert bytes_of(text) == size
    for text in ("3 apples", "-1GB", "", "GB", "1e9", "17", None, True, 0):
        refuses("expected a size with its unit", bytes_of, text)


def test_the_widest_dtype_of_a_layers_tensors_counts(tmp_path):
    model = make_transformer(vocab_size=VOCAB).bfloat16()
    model.layers[0].attention_norm.float()
    save_byte_llama(tmp_path, model)
    assert StreamedLlama(tmp_path, device="cpu").stream.stored is torch.float32


def test_layers_are_removed_tried_and_saved_without_being_read(streamed, tmp_path):
    memory = meta(tmp_path / "again")
    for short in (streamed, memory):
        short.measure(WINDOWS[:4], progress=False)
    with streamed.without_layers([1, 3]), memory.without_layers([1, 3]):
        same(streamed, memory, scores=False)
    assert streamed.remove_layers() == memory.remove_layers(memory.layers_to_remove(n=2))
    same(streamed, memory)
    tokens = torch.tensor([WINDOWS[0]])
    assert torch.allclose(
        streamed.decoder.logits(tokens), memory.decoder.logits(tokens), rtol=1e-5, atol=1e-5
    )
    streamed.save(tmp_path / "cut")
    assert ShortLlama.from_checkpoint(tmp_path / "cut", max_seq_len=20, device="cpu").n_layers == 3


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("layers.2.attention.wq.weight", r"layer 2 has NaN .* weights in attention\.wq\.weight"),
        ("tok_embeddings.weight", "layer 0 gave a NaN or infinite state"),
        ("output.weight", "NaN or infinite loss"),
    ],
)
def test_nan_is_found_where_it_begins(place, message, tmp_path):
    model = make_transformer(vocab_size=VOCAB)
    with torch.no_grad():
        weight = model.get_parameter(place)
        weight[WINDOWS[5][3] % len(weight)] = math.nan  # the row of a token of window 5
    save_byte_llama(tmp_path, model)
    short = StreamedLlama(tmp_path, max_seq_len=20, device="cpu")
    if place != "output.weight":  # which no score reads
        refuses(message, short.measure, WINDOWS, progress=False, error=FloatingPointError)
        assert short.n_windows == 0
    refuses(message, short.perplexity, WINDOWS, progress=False, error=FloatingPointError)


def test_a_state_of_padding_may_be_infinite(streamed):
    batch = Batch(*pad([WINDOWS[0], WINDOWS[2]], streamed.decoder))
    padding = ~batch.mask[..., None]  # (B, S, 1)

    def overflow(_: object, __: object, state: torch.Tensor) -> torch.Tensor:
        return state.masked_fill(padding, math.inf)

    streamed.stream.layers[-1].register_forward_hook(overflow)
    streamed.stream.run([batch])
    assert batch.state.isinf().any()


def test_what_cannot_be_is_said(streamed, tmp_path):
    refuses("nothing was removed yet", streamed.save, tmp_path / "out")
    refuses("expected at least one window", streamed.measure, [], progress=False)
    refuses("expected windows of at least 2 tokens", streamed.perplexity, [[5]], progress=False)
    refuses("1 to 20", streamed.measure, [WINDOWS[0] * 2], progress=False)
    with pytest.raises(ValueError, match=r"stream = True: expected open_model\(..., stream=True\)"):
        ShortLlama.from_checkpoint(tmp_path / "meta", stream=True)
    refuses("has no params.json", StreamedLlama, tmp_path, error=FileNotFoundError)
    write_byte_tokenizer(tmp_path)
    small = make_transformer()
    save_checkpoint(tmp_path, small)
    refuses("has 258 tokens, .* has 96 ids: it belongs", StreamedLlama, tmp_path, max_seq_len=20)
    save_checkpoint(tmp_path, make_transformer(vocab_size=300))
    refuses("has 258 tokens, .* has 300 ids: .*; give", StreamedLlama, tmp_path, max_seq_len=20)


def test_another_checkpoint_has_another_digest(streamed, tmp_path):
    meta(tmp_path / "again")
    meta(tmp_path / "other", seed=1)
    found = [StreamedLlama(tmp_path / n, device="cpu").weights_digest() for n in ("again", "other")]
    assert streamed.weights_digest() == found[0] != found[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_stays_within_the_plan(tmp_path):
    args = ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=VOCAB)
    shapes = full_shapes(args)
    infos = {name: TensorInfo(shape, torch.bfloat16, name) for name, shape in shapes.items()}
    path = tmp_path / "consolidated.00.pth"
    write_shard(path, infos, lambda n: torch.full(shapes[n], 0.01, dtype=torch.bfloat16))
    (tmp_path / "params.json").write_text(json.dumps(params_json(args)))
    write_byte_tokenizer(tmp_path)
    weights = sum(info.numel for info in infos.values())
    windows = random_windows(4, 64, vocab=VOCAB)
    folder = str(tmp_path)
    done = alone(tmp_path / "printed", children.streaming, folder, "2GB", windows).end()
    assert done.codes == [0], done.err
    total, before, windows, peak = json.loads(done.out)
    assert windows == 32 and 4 * weights > 300e6
    planned = total - 28 * 64 * (768 * 4 + 16)  # only four windows come
    print(planned, before, peak, weights)
    assert peak < planned + 32e6 and planned - before < 4 * weights / 4


def scores(name: str) -> Importance:
    return Importance.from_dict(json.loads(Path(f"{name}.json").read_text())["importance"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint in both formats and a text; the working directory."""
    meta(tmp_path / "meta")
    meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    letters = random.Random(0)
    (tmp_path / "book.txt").write_text("".join(letters.choices(ascii_lowercase, k=1600)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


DATA = ("--data", "book.txt", "--size", 16, "--device", "cpu")
STREAM = ("--stream", "900GB")


def test_commands_stream_and_say_first_what_it_takes(folder, capsys):
    options = ("rank", "hf", *DATA, "--stride", 16, "--n", 2, "--batch_size", 3)
    options += ("--max_windows", 40)
    for name, more in (("streamed", STREAM), ("memory", ())):
        run(*options, "--json", f"{name}.json", *more)
        said = capsys.readouterr()
        assert said.err.count("one layer at a time, ") == (name == "streamed")
        assert "the process itself" not in said.out and "settled" in said.out
    run(*options[:-2], *STREAM, "--max_windows", 30, "--plots", "pictures", "--json", "all.json")
    run(*options[:-2], "--max_windows", 30, "--json", "all-memory.json")
    found, expected = scores("all"), scores("all-memory")
    assert found.n_windows == expected.n_windows == 30
    for name in ("block_influence", "standard_error", "angular", "metrics"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7), name
    assert len(list(Path("pictures").iterdir())) == 2


def test_a_streamed_command_continues_whatever_its_rounds(folder, capsys, monkeypatch):
    """States are of the streamed model alone, and told apart by their name."""
    options = ("rank", "meta", *DATA, "--stride", 16, "--json", "r.json", *STREAM)
    read, rounds = StreamedLlama.score_batch, []

    def fails(self, part, **more):
        rounds.append(len(part))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return read(self, part, **more)

    monkeypatch.setattr(memory_plan, "MOST_WINDOWS", 8)
    monkeypatch.setattr(StreamedLlama, "score_batch", fails)
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 130 and Path("r.json.state").exists()
    with pytest.raises(SystemExit):
        run(*options[:-2])
    assert "is the state of a run with another stream: True, now False" in capsys.readouterr().err
    monkeypatch.setattr(memory_plan, "MOST_WINDOWS", 32)
    run(*options)
    Path("r.json").rename("continued.json")
    assert rounds == [8, 8, 8, 32, 32, 20] and not Path("r.json.state").exists()
    run(*options, "--json", "whole.json")
    assert torch.allclose(scores("continued").influence, scores("whole").influence, rtol=1e-13)


REFUSED = [
    (("rank", "hf", "--method", "sleb", "--n", 1), "--method sleb needs the model in memory"),
    (("rank", "hf", "--method", "auto", "--n", 1), "--method auto needs the model in memory"),
    (("rank", "hf", "--stream", "1MB"), "1MB of memory are too little: .* at least"),
    (("rank", "hf", "--stream=much"), "--stream = 'much': expected a size"),
    (("rank", "hf", "--stream", "much"), "--stream takes yes or no, or a size, got 'much'"),
    (("rank", "model.gguf"), "model to be streamed = 'model.gguf': expected a Llama in Meta"),
    (("rank", "some/model"), "some/model is not a directory here, and the hub cannot"),
    (("rank", "other"), "other/config.json: model_type = 'gpt2': expected 'llama'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_commands_refuse_what_cannot_be_streamed(arguments, message, folder, capsys):
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    stream = () if "--stream" in " ".join(map(str, arguments)) else ("--stream",)
    assert re.match(f"short-gpt: {message}", fails(capsys, *arguments, *DATA, *stream))


def test_of_several_ranks_none_streams(folder, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    refuses("model runs on one rank; start it alone", StreamedLlama, "meta", device="cpu")


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_changed_weights_are_saved_without_a_removal(kind, tmp_path):
    memory = meta(tmp_path / "meta")
    if kind == "hf":
        meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    short = StreamedLlama(tmp_path / kind, device="cpu", max_seq_len=20)
    name = "attention.wo.weight"
    new = 2 * memory.decoder.layers[1].attention.wo.weight.detach()
    for method, values in (("zeroed", torch.zeros_like(new)), ("doubled", new)):
        short.change_weights({"method": method}, {(1, name): values})  # the last one counts
    short.save(tmp_path / "out")
    memory.decoder.layers[1].attention.wo.weight.data.copy_(new)
    tokens = torch.tensor([WINDOWS[0]])
    saved = StreamedLlama(tmp_path / "out", device="cpu", max_seq_len=20).decoder.logits(tokens)
    torch.testing.assert_close(saved, memory.decoder.logits(tokens), rtol=1e-4, atol=1e-5)


def test_a_model_of_the_hub_keeps_its_name(tmp_path, monkeypatch):
    meta(tmp_path / "meta")
    meta_to_hf(tmp_path / "meta", tmp_path / "0123abcd")
    place = tmp_path / "0123abcd"
    monkeypatch.setattr("short_gpt.wrappers.streamed_llama.resolve", lambda name: place)
    short = StreamedLlama("me/llama", device="cpu", max_seq_len=20)
    short.remove_layers([2])
    short.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/pruning.json").read_text())["source"] == "me/llama"
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: me/llama" in card and "0123abcd" not in card


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_files_that_change_are_not_read_on(tmp_path, kind):
    meta(tmp_path / "meta")
    meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    short = StreamedLlama(tmp_path / kind, device="cpu")
    stream, file = short.stream, short.stream.source.files[0]
    batch = Batch(*pad(WINDOWS[:1], short.decoder))
    short.remove_layers([3])
    for call in (
        lambda: stream.run([batch], step=lambda _: os.utime(file, ns=(0, 0))),  # between layers
        lambda: stream.embed([batch]),
        lambda: stream.logits(batch),
        lambda: stream.load(stream.layers[0]),
        lambda: short.save(tmp_path / "out"),
    ):
        refuses(f"{file.name} has changed since the model was", call)
