"""What every wrapper offers: the abstract classes' methods, and no more of them than it can do."""

from __future__ import annotations

import hashlib
import inspect
import json

import pytest
import torch
from conftest import CharTokenizer, make_transformer, random_windows, refuses, save_byte_llama
from families import make
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama
from short_gpt import ShortHFModel, ShortLlama, ShortModel
from short_gpt.wrappers.scored_model import ScoredModel
from short_gpt.wrappers.streamed_llama import StreamedLlama

WINDOWS = random_windows(3, 12)


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory) -> dict[str, ScoredModel]:
    folder = tmp_path_factory.mktemp("meta")
    save_byte_llama(folder)
    return {
        "llama": ShortLlama(Llama(make_transformer(), CharTokenizer())),
        "hf": ShortHFModel(make("llama")),
        "streamed": StreamedLlama(folder, max_seq_len=64, device="cpu"),
    }


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_the_contract_is_written_down_once():
    assert ScoredModel.__abstractmethods__ == {"encode", "save", "configuration"}
    added = {"greedy", "_continuations", "harness_model", "continued", "opening", "decode"}
    added |= {"dialog", "answer_ends"}
    assert ShortModel.__abstractmethods__ == ScoredModel.__abstractmethods__ | added
    refuses("abstract", ShortModel, None, error=TypeError)


def test_a_streamed_model_offers_only_what_it_can_do(wrappers):
    streamed = wrappers["streamed"]
    assert isinstance(streamed, ScoredModel) and not isinstance(streamed, ShortModel)
    assert streamed.tokenizer.encode("ab", bos=True, eos=False) == streamed.encode("ab")
    more = public(StreamedLlama) - public(ScoredModel)
    assert more == {"plan"}
    for name in ("generate", "greedy", "search", "harness_model", "llama"):
        assert not hasattr(streamed, name)


@pytest.mark.parametrize("name", ["llama", "hf", "streamed"])
def test_methods_take_what_the_contract_names(name, wrappers):
    kind = type(wrappers[name])
    base = ShortModel if issubclass(kind, ShortModel) else ScoredModel
    for method in public(base) - {"plan_text"}:
        promised = inspect.getattr_static(base, method)
        if not inspect.isfunction(promised):
            continue
        offered = inspect.signature(inspect.getattr_static(kind, method)).parameters
        for parameter, wanted in inspect.signature(promised).parameters.items():
            assert offered[parameter].kind == wanted.kind, (kind, method)
            assert offered[parameter].default == wanted.default, (kind, method)


@pytest.mark.parametrize("name", ["llama", "hf", "streamed"])
def test_every_wrapper_is_scored_tried_and_cut_by_the_same_calls(name, wrappers):
    short = wrappers[name]
    short.measure(WINDOWS, progress=False)
    assert short.importances.shape == (short.n_layers,) and short.n_windows == 3
    whole = short.perplexity(WINDOWS, progress=False)
    with short.without_layers([1]):
        assert short.present == [i for i in range(short.n_layers) if i != 1]
        tried = short.perplexity(WINDOWS, progress=False)
    assert short.quality == {
        tuple(range(short.n_layers)): whole,
        tuple(short.kept[:1] + short.kept[2:]): tried,
    }
    assert short.layers_to_remove(n=2) == short.importances.argsort(stable=True)[:2].tolist()
    assert (short.plan_text() is None) == (not short.streamed)


def test_a_state_belongs_to_weights_configuration_and_place(wrappers):
    """These names and values stand in the states of earlier runs, which are to be continued."""
    for name, settings in (
        ("llama", lambda s: vars(s.decoder.model.params)),
        ("hf", lambda s: json.loads(s.model.config.to_json_string())),
        ("streamed", lambda s: vars(s.stream.params)),
    ):
        short = wrappers[name]
        harmless = {"max_batch_size", "max_seq_len", "transformers_version", "use_cache"}
        harmless |= {"architectures", "bos_token_id", "eos_token_id", "initializer_range", "dtype"}
        harmless |= {"vocab_size"} if name != "hf" else set()
        entries = {k: v for k, v in sorted(settings(short).items()) if k not in harmless}
        text = json.dumps(entries).encode()
        assert short.identity() == {
            "dtype": "torch.float32",
            "device": "cpu",
            "stream": name == "streamed",
            "model_parallel_size": 1,
            "configuration": hashlib.sha256(text).hexdigest()[:16],
            "weights": short.weights_digest(),
        }


def test_another_model_has_another_identity():
    def identity(seed: int, **changes) -> dict[str, object]:
        return ShortLlama(Llama(make_transformer(seed, **changes), CharTokenizer())).identity()

    first = identity(0)
    assert first == identity(0)
    assert {k for k, v in identity(1).items() if v != first[k]} == {"weights"}
    shaped = identity(0, norm_eps=1e-6)
    assert {k for k, v in shaped.items() if v != first[k]} == {"configuration"}


def test_entries_that_compute_nothing_belong_to_no_identity():
    def identity(**entries: object) -> dict[str, object]:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"vocab_size": 32, "intermediate_size": 48}
        torch.manual_seed(0)
        return ShortHFModel(LlamaForCausalLM(LlamaConfig(**sizes, **entries))).identity()

    first = identity()
    assert identity(use_cache=False, name_or_path="/moved", eos_token_id=7) == first
    assert identity(rope_parameters={"rope_type": "default", "rope_theta": 5e5}) != first
    llama = ShortLlama(Llama(make_transformer(), CharTokenizer()))
    before = llama.identity()
    llama.decoder.model.params.max_batch_size = 7  # a limit of the run
    assert llama.identity() == before
