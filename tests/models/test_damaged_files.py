"""Valid small files, damaged at random: a reader reads them or says in one line what is wrong."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from commands import TEXT
from conftest import BYTE_VOCAB, CharTokenizer, make_transformer, random_windows, save_byte_llama
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_files import sentencepiece_model

from llama.checkpoint.meta import Checkpoint
from llama.files import write_json
from llama.formats.gguf import GGUFFile
from llama.formats.hf import meta_to_hf
from llama.formats.safetensors import SafetensorsFile
from llama.formats.tokenizers import LLAMA2_CONFIG
from llama.generation import load_model
from llama.tokenizer import Tokenizer
from short_gpt import ShortHFModel, ShortLlama
from short_gpt.checkpoints.gguf_layers import Stack
from short_gpt.cli.tables import ranking
from short_gpt.jobs import SavedScores
from short_gpt.models.loading import load_tokenizer
from short_gpt.runtime.errors import USER_ERRORS, MissingPackageError, ShortGPTError
from short_gpt.runtime.state import StateFile, write_record
from short_gpt.scoring.run import RunState
from short_gpt.wrappers.streamed_transformer import HFSource

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
NUMBERS = [0, -1, 10**7, 2**63, 10**400, 1e308, 0.5]
VALUES = [None, "x", "", True, [], {}, [[]], {"a": [None]}, *NUMBERS]


@pytest.fixture(scope="module")
def made(tmp_path_factory, one_rank) -> Path:
    """Small models in every format, and tokenizers of every kind."""
    path = tmp_path_factory.mktemp("made")
    model = make_transformer(vocab_size=BYTE_VOCAB, n_layers=2)
    save_byte_llama(path / "meta", model)
    meta_to_hf(path / "meta", path / "hf")
    meta_to_hf(path / "meta", path / "parts", max_shard_bytes=40_000)
    write_gguf(path / "model.gguf", model)
    (path / "book.txt").write_text(TEXT.replace(". ", ".\n"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "book.txt"),
        model_prefix=str(path / "pieces"),
        vocab_size=40,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    write_ranks(path / "ranks.model")
    rank_state(path)
    sleb_state(path)
    short = short_llama()
    short.measure(WINDOWS, progress=False)
    arguments, sums = {"method": "bi", "seed": 0}, short.importance.to_dict()
    write_record(path / "scores.json", {"arguments": arguments, "importance": sums})
    return path


def write_ranks(path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    path.write_text("\n".join(lines))


def read_meta(folder: Path) -> None:
    checkpoint = Checkpoint(folder / "meta", max_seq_len=8, max_batch_size=1)
    load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)


def read_streamed(folder: Path) -> None:
    source = HFSource(folder / "hf", max_seq_len=8)
    for name in source.infos:
        source.read(name)


def read_parts(folder: Path) -> None:
    source = HFSource(folder / "parts", max_seq_len=8)
    source.read("layers.1.attention.wq.weight")


def read_gguf(folder: Path) -> None:
    file = GGUFFile(folder / "model.gguf")
    file.args()
    file.tokenizer()
    for name in file.tensors:
        file.read(name)


def read_blocks(folder: Path) -> None:
    Stack.open(folder / "model.gguf")


def read_words(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        tokenizer = Tokenizer(folder / name)
        tokenizer.decode(tokenizer.encode("It was the best of times", False, False))

    return read


WINDOWS = random_windows(6, 8, vocab=BYTE_VOCAB)


def short_llama() -> ShortLlama:
    model = make_transformer(vocab_size=BYTE_VOCAB, n_layers=4)
    return ShortLlama(SimpleNamespace(model=model, tokenizer=CharTokenizer()))


def rank_state(folder: Path) -> None:
    """Continues a scoring run, or begins it."""
    state = RunState(StateFile(folder / "rank.state", {"seed": 0, "text": "a"}))
    short_llama().measure(WINDOWS, progress=False, state=state)


def sleb_state(folder: Path) -> None:
    """Continues a search by loss, or begins it."""
    state = StateFile(folder / "sleb.state", {"seed": 0, "text": "a"}, every=0.0)
    short_llama().search(WINDOWS, 2, progress=False, state=state)


def read_scores(folder: Path) -> None:
    scores = SavedScores.read(str(folder / "scores.json"))
    scores.layers(1)
    assert scores.importance is not None
    json.dumps([str(ranking(scores.importance, 1)), scores.record().to_dict()])


def read_transformers(folder: Path) -> None:
    ShortHFModel(folder / "hf")


def generate_transformers(folder: Path) -> None:
    short = ShortHFModel(folder / "hf")
    short.greedy(short.encode("It was"), 2)


def read_transformers_parts(folder: Path) -> None:
    ShortHFModel(folder / "parts")


def read_transformers_gguf(folder: Path) -> None:
    ShortHFModel(folder / "model.gguf")


# file, whether values of its JSON are replaced, how it is read, how many times
CASES = {
    "params.json": ("meta/params.json", True, read_meta, 60),
    "params.json's bytes": ("meta/params.json", False, read_meta, 30),
    "pth": ("meta/consolidated.00.pth", False, read_meta, 60),
    "config.json": ("hf/config.json", True, read_streamed, 60),
    "safetensors": ("hf/model.safetensors", False, read_streamed, 60),
    "index": ("parts/model.safetensors.index.json", True, read_parts, 40),
    "GGUF": ("model.gguf", False, read_gguf, 60),
    "tokenizer.json": ("hf/tokenizer.json", True, read_words("hf/tokenizer.json"), 60),
    "its bytes": ("hf/tokenizer.json", False, read_words("hf/tokenizer.json"), 30),
    "its config": ("hf/tokenizer_config.json", True, read_words("hf/tokenizer.json"), 60),
    "sentencepiece": ("pieces.model", False, read_words("pieces.model"), 60),
    "ranks": ("ranks.model", False, read_words("ranks.model"), 30),
    "config.json of transformers": ("hf/config.json", True, read_transformers, 20),
    "safetensors of transformers": ("hf/model.safetensors", False, read_transformers, 10),
    "tokenizer.json of transformers": ("hf/tokenizer.json", True, generate_transformers, 15),
    "its config of transformers": ("hf/tokenizer_config.json", True, generate_transformers, 15),
    "settings": ("hf/generation_config.json", True, generate_transformers, 20),
    "index of transformers": (
        "parts/model.safetensors.index.json",
        True,
        read_transformers_parts,
        10,
    ),
    "GGUF of transformers": ("model.gguf", False, read_transformers_gguf, 10),
    "scores": ("scores.json", True, read_scores, 60),
    "their bytes": ("scores.json", False, read_scores, 30),
    "rank's state": ("rank.state", True, rank_state, 60),
    "its state's bytes": ("rank.state", False, rank_state, 30),
    "sleb's state": ("sleb.state", True, sleb_state, 40),
}
MOST_SECONDS, MOST_BYTES = 2.0, 200 * 2**20  # of the processor, and beside what there was


@contextmanager
def within_bounds() -> Iterator[None]:
    """What happens inside takes little of the processor's time, and of memory at its peak."""
    try:  # Linux sets its record of the peak back; elsewhere memory is not looked at
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
    except OSError:
        before = None
    start = time.process_time()
    yield
    assert time.process_time() - start < MOST_SECONDS
    assert before is None or memory("VmHWM") - before < MOST_BYTES


def memory(name: str) -> int:
    """Bytes of this process, by the system's name for them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def test_the_bounds_are_seen(monkeypatch):
    with within_bounds():
        bytearray(MOST_BYTES // 2)
    monkeypatch.setitem(globals(), "MOST_SECONDS", 0.05)
    with pytest.raises(AssertionError, match="process_time"), within_bounds():
        end = time.process_time() + MOST_SECONDS
        while time.process_time() < end:
            pass
    monkeypatch.undo()
    if Path("/proc/self/clear_refs").exists():
        with pytest.raises(AssertionError, match="VmHWM"), within_bounds():
            bytearray(MOST_BYTES + 2**24)


@pytest.mark.parametrize("case", CASES)
def test_any_damage_is_read_or_told_in_one_line(case, made, tmp_path):
    name, as_json, read, count = CASES[case]
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    whole = (folder / name).read_bytes()
    read(folder)

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def damaged(data: st.DataObject) -> None:
        new = changed_json(data, whole) if as_json else changed_bytes(data, whole)
        (folder / name).write_bytes(new)
        with within_bounds():
            try:
                read(folder)
            except USER_ERRORS as error:
                assert "\n" not in str(error) and len(str(error)) < 1000

    damaged()


@pytest.fixture
def here(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("layers", [200_000, 10_000_000, 2**80, 0, None, "5"])
def test_a_number_of_layers_that_the_files_cannot_hold_costs_no_time(here, layers):
    config = json.loads((here / "hf/config.json").read_text())
    (here / "hf/config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for read in (read_transformers, read_streamed):
        with within_bounds(), pytest.raises(ShortGPTError, match=r"layers"):
            read(here)


def test_a_gguf_file_of_twenty_million_layers_and_one_with_a_key_twice(here):
    path = here / "model.gguf"
    whole = path.read_bytes()
    key = b"llama.block_count"
    at = whole.index(key) + len(key) + 4
    more = whole[:at] + struct.pack("<I", 20_000_000) + whole[at + 4 :]
    double = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 2)
    count = struct.unpack_from("<Q", whole, 16)[0]
    double = whole[:16] + struct.pack("<Q", count + 1) + double + whole[24:]
    for damaged, said in ((more, "20000000 layers"), (double, "the key llama.block_count twice")):
        path.write_bytes(damaged)
        for read in (read_gguf, read_transformers_gguf, read_blocks):
            with within_bounds(), pytest.raises(ShortGPTError, match=said):
                read(here)


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def bos_template(ids: dict) -> Callable[[dict], object]:
    """Makes a tokenizer.json put a bos in front of a text, of which it says this."""
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    rule = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}
    return lambda content: content.update(post_processor=rule)


def test_a_tokenizer_at_which_its_package_panics_is_named(here):
    rewrite(here / "hf/tokenizer.json", bos_template({}))
    for read in (generate_transformers, read_words("hf/tokenizer.json")):
        with pytest.raises(ShortGPTError, match=r"hf/tokenizer\.json is not a tokenizer\.json, o"):
            read(here)


def test_a_tokenizer_of_more_tokens_than_the_model_has(here):
    bos = {"id": "<s>", "ids": [10**7], "tokens": ["<s>"]}
    rewrite(here / "hf/tokenizer.json", bos_template({"<s>": bos}))
    with pytest.raises(ShortGPTError, match=r"\.\.10000000 are outside .*the model's tokenizer\?"):
        generate_transformers(here)


def test_a_directory_without_its_vocabulary_says_which_file_to_fetch(here):
    (here / "hf/tokenizer.json").unlink()
    rewrite(here / "hf/tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizer"))
    with pytest.raises(ShortGPTError, match=r"hf lacks its tokenizer's vocabulary.*fetch that"):
        generate_transformers(here)


def test_a_tokenizer_that_a_missing_package_reads_names_the_package(here, monkeypatch, capfd):
    for path in (here / "hf").glob("tokenizer*"):
        path.unlink()
    sentencepiece_model(here / "hf/tokenizer.model")
    write_json(here / "hf/tokenizer_config.json", LLAMA2_CONFIG)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    monkeypatch.setattr("transformers.utils.import_utils.is_protobuf_available", lambda: False)
    with pytest.raises(MissingPackageError, match=r"^tokenizer\.model, as .*pip install protobuf"):
        load_tokenizer(str(here / "hf"), {"trust_remote_code": False})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ids", [2**63, [], "1", [0, "1"], 0.5, {"a": 1}, -2])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_numbers_that_no_token_can_have(here, name, ids):
    rewrite(here / "hf" / name, lambda content: content.update(eos_token_id=ids))
    with pytest.raises(ShortGPTError, match=rf"hf/{name} is damaged: eos_token_id must be"):
        generate_transformers(here)


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        json.dumps({"a": entry(0, 8), "b": entry(4, 12)}),
        json.dumps({"a": entry(0, 8), "b": entry(16, 24)}),
        json.dumps({"a": entry(-8, 0)}),
        '{"a": ' + json.dumps(entry(0, 8)) + ', "a": ' + json.dumps(entry(0, 8)) + "}",
        '{"a": ' + "[" * 100_000,
    ],
    ids=["overlap", "hole", "negative", "twice", "deep"],
)
def test_a_safetensors_header_that_lies(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(24))
    with pytest.raises(ShortGPTError, match="is not a complete safetensors file"):
        SafetensorsFile(path)


def test_json_as_deep_as_the_stack(here):
    for name, read in (
        ("meta/params.json", read_meta),
        ("hf/config.json", read_transformers),
        ("scores.json", read_scores),
        ("rank.state", rank_state),
    ):
        (here / name).write_text('{"a":' + "[" * 100_000)
        told = "is not the state of a run" if read is rank_state else "is not JSON"
        with within_bounds(), pytest.raises(ShortGPTError, match=told):
            read(here)


def changed_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """A flipped bit, a cut, or eight other bytes, most often near the beginning."""
    last = len(whole) - 1
    at = data.draw(st.one_of(st.integers(0, min(last, 600)), st.integers(0, last)))
    kind = data.draw(st.sampled_from(["flip", "cut", "replace"]))
    if kind == "cut":
        return whole[:at]
    new = data.draw(st.binary(min_size=8, max_size=8))
    if kind == "flip":
        new = bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))])
    return whole[:at] + new + whole[at + len(new) :]


def changed_json(data: st.DataObject, whole: bytes) -> bytes:
    """One value anywhere is another, or gone."""
    content = json.loads(whole)
    owner: dict | list = content
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(owner[key], dict | list) and owner[key] and data.draw(st.booleans())):
            break
        owner = owner[key]
    if data.draw(st.integers(0, 5)) == 0:
        del owner[key]
    else:
        owner[key] = data.draw(st.sampled_from(VALUES))
    return json.dumps(content).encode()
