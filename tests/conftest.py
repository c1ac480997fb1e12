"""Tiny models that the tests share; nothing here needs a network."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from llama.args import ModelArgs
from llama.errors import InputError
from llama.model import Transformer
from llama.parallel import initialize
from llama.tokenizer import tokenizer_json, with_bos
from short_gpt.wrappers import scored_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
settings.register_profile("any machine", deadline=None)  # a busy one is not a wrong program
settings.load_profile("any machine")

TINY = {"dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96}
TINY |= {"multiple_of": 16, "norm_eps": 1e-5, "rope_theta": 10000.0}


def pytest_collection_finish() -> None:
    """Garbage collection skips what was imported and collected, which no test frees."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_rank() -> None:
    initialize(device=torch.device("cpu"))


@pytest.fixture(autouse=True, scope="session")
def slow_bfloat16() -> Iterator[None]:
    """Precision auto is float32 whatever processor this is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_model, "multiplies_faster", lambda device: False)
        yield


@pytest.fixture(scope="module")
def few_timed_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Few tokens are timed, which no test checks, and of 40 questions two are asked."""
    from short_gpt.costs.speeds import WORK, Speed, speeds
    from short_gpt.evaluation import answers
    from short_gpt.jobs import shrink_curve, shrink_run, shrink_steps

    few_questions = tmp_path_factory.mktemp("asked") / "questions.jsonl"
    few_questions.write_text('{"prompt": "Say a", "right": "a"}\n{"prompt": "Say b"}\n')

    def no_llama_cpp(paths: dict[str, Path], *_: object, **how: object) -> dict[str, object]:
        return {name: dict.fromkeys(WORK, Speed(2.0, 1.0, 1.0, 1.0, 4)) for name in paths}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speeds, "__kwdefaults__", {"seconds": 0.01, "turns": 6})
        patch.setattr(answers, "BUILT_IN", few_questions)
        for module in (shrink_steps, shrink_curve):
            patch.setattr(module, "of_files", no_llama_cpp)
        patch.setattr(shrink_run, "TIMING", 0.0)
        yield


def make_transformer(seed: int = 0, **changes: object) -> Transformer:
    """A random Transformer whose layers do something: weights of std 0.2."""
    torch.manual_seed(seed)
    limits = {"max_seq_len": 64, "max_batch_size": 4}
    model = Transformer(ModelArgs.from_params({**TINY, **changes}, **limits)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else weight * 10)
    return model


@pytest.fixture
def transformer() -> Transformer:
    return make_transformer()


def save_checkpoint(
    directory: Path, model: Transformer, *, shards: int = 1, vocab_parallel: bool = False
) -> Path:
    """Writes a model in Meta's format with torch.save, cut for ``shards`` ranks."""
    directory.mkdir(parents=True, exist_ok=True)
    params = {k: v for k, v in vars(model.params).items() if k in TINY and v is not None}
    (directory / "params.json").write_text(json.dumps(params))
    for rank in range(shards):
        state = {
            name: cut(name, weight, rank, shards, vocab_parallel)
            for name, weight in model.state_dict().items()
        }
        torch.save(state, directory / f"consolidated.{rank:02d}.pth")
    return directory


def cut(name: str, weight: Tensor, rank: int, shards: int, vocab_parallel: bool) -> Tensor:
    """One rank's part, by the table of Meta's format."""
    if "norm" in name:
        return weight
    if name.startswith("tok_embeddings"):
        dim = 0 if vocab_parallel else 1
    else:
        dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    return weight.chunk(shards, dim)[rank].clone()


@pytest.fixture
def checkpoint_dir(tmp_path: Path, transformer: Transformer) -> Path:
    return save_checkpoint(tmp_path / "checkpoint", transformer)


def zero_layer(model: nn.Module, index: int) -> None:
    """Makes a layer of a Transformer the identity: its output projections become zero."""
    with torch.no_grad():
        layer = model.layers[index]  # type: ignore[index, union-attr]
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()


def random_windows(count: int, size: int, *, vocab: int = 96, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (count, size), generator=generator).tolist()


class CharTokenizer:
    """Stands in for a tokenizer where the text does not matter."""

    n_words, bos_id, eos_id, pad_id = 96, 1, 2, -1
    add_bos = True
    stop_tokens = frozenset({2})

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        ids = [3 + (ord(c) - 32) % 93 for c in s]
        return [1] * bos + ids + [2] * eos

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(32 + i - 3) for i in ids if i >= 3)


BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]
BYTE_VOCAB = 258


def write_byte_tokenizer(directory: Path) -> Path:
    """A tokenizer.json of the 256 bytes with bos 0 and eos 1, and its configuration."""
    tokens, types = ["<s>", "</s>", *BYTES], [3, 3] + [1] * 256
    path = directory / "tokenizer.json"
    path.write_text(tokenizer_json(tokens, types, [], "gpt-2"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def save_byte_llama(directory: Path, model: Transformer | None = None, **cuts: Any) -> Path:
    """Writes a Llama, a random one if none is given, with a tokenizer of bytes in Meta's format."""
    model = make_transformer(vocab_size=BYTE_VOCAB) if model is None else model
    write_byte_tokenizer(save_checkpoint(directory, model, **cuts))
    return directory


def save_meta(
    directory: Path,
    *,
    shards: int = 1,
    vocab_parallel: bool = False,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: object,
) -> Transformer:
    """Writes a random Llama with a tokenizer of bytes in Meta's format; returns the model."""
    model = make_transformer(seed, vocab_size=BYTE_VOCAB, **changes)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    save_byte_llama(directory, model.to(dtype), shards=shards, vocab_parallel=vocab_parallel)
    params = json.loads((directory / "params.json").read_text()) | changes
    (directory / "params.json").write_text(json.dumps(params))
    return model


def save_chat_llama(path: Path, n_layers: int, template: str) -> None:
    """Writes a random Llama with a chat template as "meta", as "hf" and as "model.gguf"."""
    from llama.formats.gguf import llama_to_gguf
    from llama.formats.hf import meta_to_hf

    save_byte_llama(path / "meta", make_transformer(vocab_size=BYTE_VOCAB, n_layers=n_layers))
    words = path / "meta/tokenizer.json"
    words.write_text(with_bos(words.read_text(), "<s>", 0))
    meta_to_hf(path / "meta", path / "hf")
    config = json.loads((path / "hf/tokenizer_config.json").read_text())
    config["chat_template"] = template
    (path / "hf/tokenizer_config.json").write_text(json.dumps(config))
    llama_to_gguf(path / "hf", path / "model.gguf")


@pytest.fixture(scope="module")
def llama_folders(tmp_path_factory, one_rank) -> Path:
    """A folder with a random Llama as "meta", as "hf" and as "model.gguf"."""
    from gguf_files import write_gguf

    from llama.formats.hf import meta_to_hf

    path, model = tmp_path_factory.mktemp("llama"), make_transformer(vocab_size=BYTE_VOCAB)
    meta_to_hf(save_byte_llama(path / "meta", model), path / "hf")
    write_gguf(path / "model.gguf", model)
    return path


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A fresh working directory with what a module's fixture ``made`` holds."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def ckpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model of 5 layers over bytes and a text; the working directory is a fresh folder."""
    from commands import TEXT

    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    return save_byte_llama(tmp_path / "ckpt")


@pytest.fixture(scope="session")
def lm_eval() -> Iterator[Any]:
    """The package, without what takes it seconds: its own tasks' files, a report on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("DISABLE_MULTIPROC", "1")  # a pool of processes for each standard error
        package = pytest.importorskip("lm_eval")
        from lm_eval import evaluator, tasks

        patch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield package


DOCS = [
    ("Ice is", ["cold", "hot"], 0),
    ("Fire is", ["A", "B"], 1),
    ("Two and two", [" make four", " make five, or so they say"], 0),
    ("", ["Once upon", "Never"], 0),
    ("A long one. " * 8, ["end", "ends here"], 1),
    ("Trailing ", ["space", "tab"], 1),
]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of each kind of request over local documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "label": n} for q, c, n in DOCS]
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}
test_split: test
"""
    texts = {
        "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
        "tiny_generate": """
output_type: generate_until
doc_to_text: "Q: {{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match}]
""",
        "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} and {{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return folder


def short_llama(
    seed: int = 0, *, identities: Sequence[int] = (), n: int | None = None, **changes: object
) -> Any:
    """A `ShortLlama` of `make_transformer`; layers ``identities`` do nothing, ``n`` are to go."""
    from short_gpt import ShortLlama

    model = make_transformer(seed, **changes)
    for layer in identities:
        zero_layer(model, layer)
    llama = SimpleNamespace(model=model, tokenizer=CharTokenizer())
    return ShortLlama(llama, n_prune_layers=n)


def weights_of(short: Any) -> list[Tensor]:
    return [p.detach().clone() for p in short.decoder.module.parameters()]


def states_of(short: Any, windows: list[list[int]]) -> list[Tensor]:
    """The states (B, S, D) entering every layer and leaving the last."""
    from short_gpt.models.layer_calls import LayerCalls

    calls = LayerCalls(short.decoder)
    states = [calls.embed(torch.tensor(windows))]
    for index in range(len(short.decoder.layers)):
        states.append(calls.run(index, states[-1]))
    return states


def share_model(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """So many model-parallel ranks seem to share each model."""
    groups = "fairscale.nn.model_parallel.initialize"
    monkeypatch.setattr("short_gpt.runtime.replicas._several", lambda: True)
    monkeypatch.setattr(f"{groups}.model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(f"{groups}.get_model_parallel_world_size", lambda: ranks)


def refuses(
    words: str,
    call: Callable[..., object],
    /,
    *args: Any,
    error: type[Exception] = InputError,
    **options: Any,
) -> str:
    """A call raises this error, in whose one line a regular expression finds these words."""
    with pytest.raises(error, match=words) as caught:
        call(*args, **options)
    said = str(caught.value)
    del caught  # with the frames of the call, which may hold a lock
    assert "\n" not in said
    return said


@contextmanager
def interrupted(owner: type, name: str, after: int) -> Iterator[None]:
    """Has a method raise KeyboardInterrupt after so many calls, which must end the block."""
    plain, left = getattr(owner, name), [after]

    def fails(*args: object, **options: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return plain(*args, **options)

    setattr(owner, name, fails)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        setattr(owner, name, plain)
