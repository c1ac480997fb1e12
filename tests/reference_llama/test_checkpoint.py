"""Meta checkpoint directories: read, refused, pruned."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    BYTE_VOCAB,
    CharTokenizer,
    make_transformer,
    refuses,
    save_byte_llama,
    save_checkpoint,
    write_byte_tokenizer,
)

from llama.checkpoint.meta import Checkpoint, shapes_of_rank
from llama.checkpoint.pth import Shard, TensorInfo, write_shard
from llama.generation import load_model
from short_gpt import ShortLlama
from short_gpt.checkpoints import Provenance, Target
from short_gpt.checkpoints import prune_checkpoint as prune
from short_gpt.checkpoints.meta import write_meta
from short_gpt.runtime.state import versions

CPU, F32 = torch.device("cpu"), torch.float32
TOKENS = torch.arange(3, 15)[None]


@pytest.fixture
def transformer():
    return make_transformer(vocab_size=BYTE_VOCAB)


@pytest.fixture(autouse=True)
def tokenizer_file(checkpoint_dir):
    write_byte_tokenizer(checkpoint_dir)


def load(directory, **limits):
    return load_model(Checkpoint(directory, max_seq_len=64, **limits), device=CPU, dtype=F32)


def edit(directory, change) -> None:
    """Applies a function to the state dict in the directory's only file."""
    path = directory / "consolidated.00.pth"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


def test_a_loaded_model_gives_the_logits_of_the_saved_one(checkpoint_dir, transformer):
    assert torch.equal(load(checkpoint_dir)(TOKENS), transformer(TOKENS))


def test_rope_freqs_is_the_only_name_ignored(checkpoint_dir, transformer):
    edit(checkpoint_dir, lambda s: s.update({"rope.freqs": torch.ones(4)}))
    assert torch.equal(load(checkpoint_dir)(TOKENS), transformer(TOKENS))


def test_shards_may_lack_what_is_ignored(tmp_path, transformer):
    save_checkpoint(tmp_path / "two", transformer, shards=2)
    path = tmp_path / "two/consolidated.00.pth"
    state = torch.load(path)
    torch.save({**state, "rope.freqs": torch.ones(4)}, path)
    assert "rope.freqs" not in Checkpoint(tmp_path / "two").infos


def test_tied_weights_stay_tied(checkpoint_dir):
    edit(checkpoint_dir, lambda s: s.update({"output.weight": s["tok_embeddings.weight"]}))
    model = load_model(Checkpoint(checkpoint_dir), device=CPU, dtype=torch.bfloat16)
    assert model.output.weight is model.tok_embeddings.weight
    assert model.output.weight.dtype == torch.bfloat16


def test_vocab_size_minus_one_comes_from_the_weights(checkpoint_dir):
    path = checkpoint_dir / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": -1}))
    assert Checkpoint(checkpoint_dir).args.vocab_size == BYTE_VOCAB


def test_a_rank_joins_its_own_part_of_a_tensor_alone(tmp_path, monkeypatch):
    model, joined, cat = make_transformer(n_heads=8, n_kv_heads=4), list[int](), torch.cat
    with monkeypatch.context() as patch:  # which stands for reading, as mapped files are read late
        for shards, ranks in ((4, 2), (2, 4), (4, 8), (1, 4)):
            save_checkpoint(tmp_path / f"{shards}", model, shards=shards)
            checkpoint = Checkpoint(tmp_path / f"{shards}")
            patch.setattr(torch, "cat", lambda *a: joined.append(cat(*a).numel()) or cat(*a))
            for name, shape in shapes_of_rank(checkpoint.args, ranks).items():
                for rank in range(ranks):
                    joined.clear()
                    assert checkpoint.read(name, rank=rank, ranks=ranks).shape == shape
                    assert sum(joined) in (0, math.prod(shape)), (shards, ranks, name)
            patch.setattr(torch, "cat", cat)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran code')",)


def edit_params(directory: Path, text: str = "", **changes: object) -> None:
    path = directory / "params.json"
    path.write_text(text or json.dumps({**json.loads(path.read_text()), **changes}))


def without_layer_2(state):
    for name in [name for name in state if name.startswith("layers.2.")]:
        del state[name]


PTH = "consolidated.00.pth"
DAMAGES = {
    "no name of a tensor": (
        lambda d: edit(d, lambda s: s.update({3: torch.ones(1)})),
        "has 3, unk",
    ),
    "a text": (lambda d: edit(d, lambda s: s.update(note="text")), "its note is no dense tensor"),
    "no values": (
        lambda d: edit(d, lambda s: s.update(x=torch.ones(1, device="meta"))),
        "its x is no dense tensor with values",
    ),
    "integers": (
        lambda d: edit(d, lambda s: s.update({"norm.weight": torch.ones(32, dtype=torch.int8)})),
        "its norm.weight is torch.int8; expected one of torch.float32",
    ),
    "one missing": (
        lambda d: edit(d, lambda s: s.pop("layers.1.attention.wq.weight")),
        "lacks layers.1.attention.wq.weight",
    ),
    "one too many": (lambda d: edit(d, lambda s: s.update(x=torch.ones(1))), "has x, unknown to p"),
    "another shape": (
        lambda d: edit(d, lambda s: s.update({"norm.weight": torch.ones(31)})),
        r"norm.weight has shape \[31\]; params.json and 1 shard\(s\) give \[32\]",
    ),
    # layers 0, 1, 3, 4 must not load as a model with a random layer 2
    "misnumbered": (
        lambda d: (edit_params(d, n_layers=4), edit(d, without_layer_2)),
        "lacks layers.2",
    ),
    "a list": (lambda d: torch.save([torch.ones(1)], d / PTH), "holds a list, not tensors by name"),
    "code": (lambda d: torch.save({"norm.weight": Bomb()}, d / PTH), "holds more than tensors"),
    "a bare pickle": (
        lambda d: (d / PTH).write_bytes(pickle.dumps({"norm.weight": Bomb()})),
        "expected a complete zip file of torch.save",
    ),
    "cut off": (
        lambda d: (d / PTH).write_bytes((d / PTH).read_bytes()[:-1000]),
        "expected a complete zip file of torch.save",
    ),
    "no JSON": (lambda d: edit_params(d, "{"), "is not JSON"),
    "no object": (lambda d: edit_params(d, "[1]"), "expected one JSON object, got a list"),
    "a wrong number": (lambda d: edit_params(d, n_layers=0), "n_layers = 0: expected a positive"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_error(checkpoint_dir, name):
    damage, message = DAMAGES[name]
    damage(checkpoint_dir)
    refuses(rf"{checkpoint_dir}.* is damaged \(.*{message}", Checkpoint, checkpoint_dir)


def test_sizes_that_do_not_divide_among_the_shards_are_refused(tmp_path):
    """Rounded down, 97 rows of two shards are the 96 that are there."""
    directory = save_checkpoint(tmp_path / "two", make_transformer(), shards=2)
    edit_params(directory, vocab_size=97)
    refuses("vocab_size = 97: expected a multiple of the 2", Checkpoint, directory)


# ------------------------------------------------------------------------------ writing


def test_write_shard_writes_what_torch_save_writes(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2, 2).half(),
        "d": torch.randn(1).double(),
    }
    infos = {n: TensorInfo(tuple(t.shape), t.dtype, n) for n, t in tensors.items()}
    infos["tied"] = infos["a"]
    path, calls = tmp_path / "x.pth", []
    write_shard(path, infos, lambda name: calls.append(name) or tensors[name])
    assert calls == ["a", "b", "c", "d"]  # shared bytes are asked for once
    for mmap in (True, False):
        found = torch.load(path, mmap=mmap, weights_only=True)
        assert list(found) == [*tensors, "tied"]
        assert all(
            torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items()
        )
        assert found["tied"].data_ptr() == found["a"].data_ptr()
        assert all(t.data_ptr() % 64 == 0 for t in found.values()) or not mmap
    assert zipfile.ZipFile(path).testzip() is None  # checksums are right
    assert Shard(path).infos["tied"].storage == Shard(path).infos["a"].storage


def test_the_same_tensors_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    info = {"x": TensorInfo((2,), torch.float32, 0)}
    for year, name in ((2001, "a"), (2011, "b")):
        monkeypatch.setattr("time.localtime", lambda *_, y=year: (y, 1, 2, 3, 4, 5, 0, 0, 0))
        write_shard(tmp_path / name, info, lambda _: torch.ones(2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_pruned_checkpoint_equals_the_model_pruned_in_memory(tmp_path, checkpoint_dir):
    llama = type("Llama", (), {"model": load(checkpoint_dir), "tokenizer": CharTokenizer()})
    short = ShortLlama(llama)
    short.remove_layers([3, 1])
    prune(checkpoint_dir, tmp_path / "out", [3, 1], provenance=Provenance(facts={"why": "test"}))
    assert torch.equal(load(tmp_path / "out")(TOKENS), llama.model(TOKENS))
    assert json.loads((tmp_path / "out/params.json").read_text())["n_layers"] == 3
    record = json.loads((tmp_path / "out/pruning.json").read_text())
    files = record.pop("files")
    assert record == {
        "removed_layers": [3, 1],
        "kept_layers": [0, 2, 4],
        "original_layers": [0, 2, 4],
        "source": checkpoint_dir.name,
        "why": "test",
        "versions": versions(),
    }
    assert files == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert (tmp_path / "out/tokenizer_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_pruning_keeps_dtype_sharding_and_ties(tmp_path, checkpoint_dir):
    model = make_transformer(vocab_size=BYTE_VOCAB).bfloat16()
    save_byte_llama(tmp_path / "two", model, shards=2, vocab_parallel=True)
    prune(tmp_path / "two", tmp_path / "out", [0, 2])
    out = Checkpoint(tmp_path / "out")
    assert out.vocab_parallel and len(out.shards) == 2
    for before, after in zip(Checkpoint(tmp_path / "two").shards, out.shards, strict=True):
        assert torch.equal(
            before.read("layers.3.attention.wo.weight"), after.read("layers.1.attention.wo.weight")
        )
        assert after.infos["norm.weight"].dtype == torch.bfloat16


def test_the_tokenizer_goes_along_under_its_usual_name(tmp_path, checkpoint_dir):
    def write(path: Path | str) -> None:
        target = Target(tmp_path / "out")
        write_meta(Checkpoint(checkpoint_dir), target, [0], Provenance(), tokenizer_path=path)

    refuses(r"file typo\.model does not exist", write, "typo.model", error=FileNotFoundError)
    (tmp_path / "mine.py").write_text("print('no tokenizer')")
    refuses(r"mine\.py", write, tmp_path / "mine.py")
    (checkpoint_dir / "tokenizer.json").rename(checkpoint_dir / "mine.bin")
    write(checkpoint_dir / "mine.bin")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} < names and "mine.bin" not in names


def test_other_files_beside_the_shards_are_left_alone(checkpoint_dir):
    torch.save({"a": torch.ones(1)}, checkpoint_dir / "lora.pth")
    assert len(Checkpoint(checkpoint_dir).shards) == 1


def test_too_little_memory_is_no_damage(checkpoint_dir, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory")

    monkeypatch.setattr(torch, "load", load)
    refuses("does not fit the free memory", Checkpoint, checkpoint_dir)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("params.json", r"has no params\.json"), (PTH, r"no consolidated\.\*\.pth")],
)
def test_missing_files(tmp_path, checkpoint_dir, missing, message):
    with pytest.raises(FileNotFoundError, match="checkpoint directory .* does not exist"):
        Checkpoint(tmp_path / "nowhere")
    (checkpoint_dir / missing).unlink()
    refuses(message, Checkpoint, checkpoint_dir, error=FileNotFoundError)
