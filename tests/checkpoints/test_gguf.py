"""GGUF files without some layers: their bytes, what they say, and what is refused."""

from __future__ import annotations

import filecmp
import io
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, run
from conftest import refuses
from gguf import GGMLQuantizationType, quants
from gguf_families import make, write_model
from gguf_files import data, stack_file
from transformers import AutoModelForCausalLM

from llama.formats import gguf_write
from llama.formats.gguf_read import STRING, GGUFParts, read_header
from llama.formats.gguf_write import copied, write_again
from llama.formats.gguf_write import record as key_record
from short_gpt import ShortHFModel
from short_gpt.checkpoints import Provenance, Target, prune_checkpoint, write_gguf
from short_gpt.checkpoints.gguf import Stack, about_kinds, check_architecture
from short_gpt.models.gguf_loading import ARCHITECTURES, Architecture
from short_gpt.runtime.errors import ShortGPTError


def said(path: Path, name: str):
    fields = GGUFParts(path).fields
    return fields.get(f"{fields['general.architecture']}.{name}")


def test_with_nothing_removed_the_bytes_are_the_sources(tmp_path):
    path = stack_file(tmp_path / "m.gguf", attention__head_count=[1, 2] * 4)
    write_gguf(Stack(path), tmp_path / "same.gguf", range(8))
    assert filecmp.cmp(path, tmp_path / "same.gguf", shallow=False)


def test_what_stays_is_the_sources_byte_for_byte_under_its_new_number(tmp_path):
    path = stack_file(
        tmp_path / "m.gguf",
        attention__head_count_kv=[0, 1, 2, 3, 4, 5, 6, 7],
        feed_forward_length=[8, 7, 6, 5, 4, 3, 2, 1],
        rope__dimension_sections=[1] * 8,  # as long, and yet of no layer
        swiglu_clamp_exp=[0.5] * 8,
    )
    prune_checkpoint(path, tmp_path / "cut.gguf", [6, 1])
    before, after = data(path), data(tmp_path / "cut.gguf")
    keep = [0, 2, 3, 4, 5, 7]
    assert list(after)[:2] == ["token_embd.weight", "output_norm.weight"]
    assert len(after) == 2 + 2 * len(keep)
    for new, old in enumerate(keep):
        for name in ("ffn_down", "attn_norm"):
            assert after[f"blk.{new}.{name}.weight"] == before[f"blk.{old}.{name}.weight"]
    assert said(tmp_path / "cut.gguf", "block_count") == 6
    assert said(tmp_path / "cut.gguf", "attention.head_count_kv") == keep
    assert said(tmp_path / "cut.gguf", "feed_forward_length") == [8, 6, 5, 4, 3, 1]
    assert said(tmp_path / "cut.gguf", "rope.dimension_sections") == [1] * 8
    fields = read_header(tmp_path / "cut.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"]) == 8
    # every other key, and the types of those that changed, are as before
    ours, theirs = (read_header(p).records for p in (tmp_path / "cut.gguf", path))
    for key, record in theirs.items():
        assert (ours[key].kind, ours[key].element) == (record.kind, record.element)
        if fields[key] == read_header(path).fields[key]:
            assert ours[key].raw == record.raw


def test_the_name_says_how_many_layers_were_removed(tmp_path):
    path, name = (
        stack_file(tmp_path / "model.gguf"),
        key_record("general.name", "Qwen, large", STRING),
    )
    parts = GGUFParts(path)
    tensors = {key: copied(parts, key) for key in parts.tensors}
    write_again(tmp_path / "named.gguf", parts, tensors, records={"general.name": name})
    prune_checkpoint(tmp_path / "named.gguf", tmp_path / "one.gguf", [1])
    prune_checkpoint(tmp_path / "one.gguf", tmp_path / "three.gguf", [0, 2])
    names = [read_header(tmp_path / f"{n}.gguf").fields["general.name"] for n in ("one", "three")]
    assert names == ["Qwen, large, 1 layer removed", "Qwen, large, 3 layers removed"]
    prune_checkpoint(path, tmp_path / "other.gguf", [1])  # which names no model
    assert "general.name" not in read_header(tmp_path / "other.gguf").fields


def test_files_in_parts_are_read_and_written(tmp_path):
    stack_file(tmp_path / "m.gguf", split=6)
    whole = stack_file(tmp_path / "whole.gguf")
    parts = Stack(tmp_path / "m-00002-of-00003.gguf")
    assert [p.name[2:7] for p in parts.paths] == ["00001", "00002", "00003"]
    write_gguf(parts, tmp_path / "joined.gguf", range(8))
    assert filecmp.cmp(whole, tmp_path / "joined.gguf", shallow=False)
    with pytest.raises(ShortGPTError, match=r"OUT = 'c-00001-of-00002.gguf': expected .* single"):
        prune_checkpoint(whole, tmp_path / "c-00001-of-00002.gguf", [0, 1])
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "m3.gguf")
    refuses(r"m-00003-of-00003.gguf, one of 3 of", GGUFParts, parts.path, error=FileNotFoundError)
    refuses(r"m3.gguf is damaged .it says that it is part 2 of 3", GGUFParts, tmp_path / "m3.gguf")


@pytest.fixture
def in_pieces(tmp_path, monkeypatch) -> tuple[GGUFParts, dict[str, torch.Tensor], list[int]]:
    """A model in three files, read in pieces; its tensors; the bytes of each read from now on."""
    stack_file(tmp_path / "m.gguf", split=6)
    values = {"token_embd.weight": torch.arange(64.0).reshape(2, 32)}
    values["output_norm.weight"] = torch.ones(8)
    for i in range(8):
        rows = np.random.default_rng(i).standard_normal((3, 32)).astype(np.float32)
        packed = quants.quantize(rows, GGMLQuantizationType.Q4_0)
        unpacked = quants.dequantize(packed, GGMLQuantizationType.Q4_0)
        values[f"blk.{i}.ffn_down.weight"] = torch.from_numpy(unpacked)
        values[f"blk.{i}.attn_norm.weight"] = torch.from_numpy(rows[0, :7].copy())
    parts, asked = GGUFParts(tmp_path / "m-00001-of-00003.gguf"), []
    monkeypatch.setattr("llama.files.CHUNK_BYTES", 10)
    monkeypatch.setattr("llama.formats.gguf_read.CHUNK_VALUES", 31)
    plain = np.fromfile

    def fromfile(file, dtype, count):
        asked.append(count)
        return plain(file, dtype, count)

    class Asked(io.FileIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr("numpy.fromfile", fromfile)
    monkeypatch.setattr("llama.files.open", Asked, raising=False)
    return parts, values, asked


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_is_read_row_by_row_from_its_own_file(in_pieces, dtype):
    """Rows of 32 values are 128 bytes in float32 and 18 in Q4_0."""
    parts, values, asked = in_pieces
    assert parts.tensors.keys() == values.keys()
    assert {*parts.file_of.values()} == {*parts.paths} and len(parts.paths) == 3
    for name, value in values.items():
        asked.clear()
        found = parts.read(name, dtype)
        assert torch.equal(found, value.to(dtype or torch.float32)) and found.is_contiguous()
        assert found.dtype == (dtype or torch.float32)
        row_bytes = 18 if "ffn_down" in name else 4 * value.shape[-1]
        assert asked == [row_bytes] * (len(value) if value.dim() > 1 else 1)


def test_a_tensors_bytes_come_in_pieces_that_end_with_it(in_pieces):
    parts, values, asked = in_pieces
    for name in values:
        asked.clear()
        pieces, nbytes = list(parts.chunks(name)), parts.tensors[name].nbytes
        sizes = [10] * (nbytes // 10) + [nbytes % 10] * (nbytes % 10 > 0)
        assert [len(piece) for piece in pieces] == asked == sizes
        start, whole = parts.tensors[name].start, parts.file_of[name].read_bytes()
        assert b"".join(pieces) == whole[start : start + nbytes]


def test_a_file_that_was_cut_off_since_it_was_opened_is_told(tmp_path):
    stack_file(tmp_path / "m.gguf")
    parts = GGUFParts(tmp_path / "m.gguf")
    name = list(parts.tensors)[-1]
    parts.path.write_bytes(parts.path.read_bytes()[: parts.tensors[name].start + 8])
    for read in (parts.read, lambda name: list(parts.chunks(name))):
        refuses(r"m\.gguf is damaged .it was cut off while", read, name)
    (tmp_path / "n.gguf").write_bytes(b"GGUF\x03")
    refuses(r"n\.gguf is damaged .its header ends early", GGUFParts, tmp_path / "n.gguf")


def with_count(path: Path, change: int, at: int = 8) -> None:
    """Changes a file's number of tensors, which stands at byte 8, or that of keys, at 16."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, at, struct.unpack_from("<Q", content, at)[0] + change)
    path.write_bytes(content)


@pytest.mark.parametrize("names", [[], ["small.weight"]], ids=str)
def test_a_number_of_tensors_that_is_not_the_files_is_refused(tmp_path, capsys, names):
    """One too low, the bytes of all others would be taken from elsewhere, and would agree."""
    path = stack_file(tmp_path / "m.gguf", names=names)
    with_count(path, -1)
    cut = ("prune", path, tmp_path / "cut.gguf", "--layers", 1)
    expected = rf"m.gguf is damaged .its {17 + len(names)} tensors end at byte \d+ of \d+"
    assert re.search(expected, fails(capsys, *cut)) and not (tmp_path / "cut.gguf").exists()
    refuses(expected, ShortHFModel, path)
    for change, at in ((2, 8), (-1, 16), (1, 16)):
        path = stack_file(tmp_path / "m.gguf", names=names)
        with_count(path, change, at)
        assert "m.gguf is damaged" in fails(capsys, *cut)
    stack_file(tmp_path / "n.gguf", split=6)
    with_count(tmp_path / "n-00002-of-00003.gguf", -1)
    with pytest.raises(ShortGPTError, match="n-00002-of-00003.gguf is damaged"):
        prune_checkpoint(tmp_path / "n-00001-of-00003.gguf", tmp_path / "cut.gguf", [1])


WINDOW = {"attention__sliding_window": 8}
NEXT = {"nextn_predict_layers": 1}
PATTERN = "attention__sliding_window_pattern"
SAID = "attention.sliding_window_pattern"


@pytest.mark.parametrize(
    ("arch", "fields", "layers", "after"),
    [
        ("deepseek", {"leading_dense_block_count": 3}, [1, 5], {"leading_dense_block_count": 2}),
        ("deepseek", {"leading_dense_block_count": 3}, [6], {"leading_dense_block_count": 3}),
        ("glm4moe", {"nextn_predict_layers": 2}, [5], {"nextn_predict_layers": 2}),
        ("step35", {**NEXT, PATTERN: [True, False] * 3 + [True]}, [0], {SAID: [0, 1, 0, 1, 0, 1]}),
        ("ernie4_5-moe", {"interleave_moe_layer_step": 2}, [3, 4], {}),
        ("ernie4_5-moe", {"interleave_moe_layer_step": 1}, [3], {}),
        ("qwen3vl", {"n_deepstack_layers": 3}, [3, 7], {"n_deepstack_layers": 3}),
        ("gpt-oss", {}, [2, 3], {SAID: None}),
        ("gpt-oss", {}, [1], {SAID: [1, 1, 0, 1, 0, 1, 0]}),
        ("gemma3", {}, [1], {SAID: None}),  # without a window
        ("gemma3", WINDOW, [0, 3], {SAID: [1, 1, 1, 0, 1, 1]}),
        ("gemma3", {**WINDOW, PATTERN: 3}, [0], {SAID: [1, 0, 1, 1, 0, 1, 1]}),
        ("gemma4", {PATTERN: [True, False] * 4}, [0], {SAID: [0, 1, 0, 1, 0, 1, 0]}),
        ("gemma3", WINDOW, [6], {}),  # of the same kind as the next
        ("smallthinker", {}, [1], {}),
        ("exaone4", {}, [1], {}),  # without a window
        ("modern-bert", {}, [1], {}),
        ("gemma3", {**WINDOW, PATTERN: 0}, [0], {SAID: 0}),  # all slide
        ("modern-bert", WINDOW, [1], {SAID: [0, 1, 0, 1, 1, 0, 1]}),
        ("modern-bert", {**WINDOW, PATTERN: 4}, [1, 2, 3, 5], {SAID: [0, 0, 1, 1]}),
        ("gemma-embedding", {}, [1], {SAID: [1, 1, 1, 1, 0, 1, 1]}),
        ("gemma-embedding", {PATTERN: 3}, [2, 3, 4], {SAID: 3}),
        ("muse-glimmer", {}, [0], {SAID: [1, 1, 0, 1, 1, 1, 0]}),
        ("gemma2", {}, [1, 3, 5, 7], {SAID: [1, 1, 1, 1]}),
        ("gemma3", {**WINDOW, PATTERN: [False] * 8}, [0], {SAID: [False] * 7}),
        ("mystery", {}, [0], {}),
        ("mystery", {PATTERN: 1}, [0], {}),
        ("mystery", {PATTERN: 3}, [2, 3, 4, 7], {}),
        ("mystery", {PATTERN: 3}, [7], {}),
    ],
)
def test_what_speaks_of_positions_is_adjusted(tmp_path, arch, fields, layers, after):
    path = stack_file(tmp_path / "m.gguf", arch, **fields)
    prune_checkpoint(path, tmp_path / "cut.gguf", layers)
    for name, value in after.items():
        assert said(tmp_path / "cut.gguf", name) == value
    assert said(tmp_path / "cut.gguf", "block_count") == 8 - len(layers)


@pytest.mark.parametrize(
    ("arch", "fields", "layers", "message"),
    [
        ("qwen3next", {}, [2], "one in 4 layers .*; remove 4 layers in a row, or"),
        ("llama4", {}, [5, 6], "or prune a Hugging Face directory, whose config"),
        ("cohere2moe", {}, [0], "one in 4 layers of cohere2moe is of another kind"),
        ("other", {"full_attention_interval": 4}, [1], "one in 4 layers of other"),
        ("other", {"moe_every_n_layers": 2}, [1, 4], "one in 2 layers of other"),
        ("other", {PATTERN: 3}, [0], "one in 3 layers of other"),
        ("other", {PATTERN: 3}, [1, 2, 4], "one in 3 layers of other"),
        ("exaone4", {**WINDOW, PATTERN: 2}, [2], "one in 2 layers of exaone4"),
        ("exaone4", WINDOW, [2], "one in 4 layers of exaone4"),
        ("gemma2", {}, [0, 2, 4, 6], "cannot load a gemma2 whose layers all"),
        ("gemma4", {PATTERN: [True, False] * 4}, [0, 2, 4, 6], "a gemma4 whose layers all"),
        ("modern-bert", WINDOW, [0, 3, 6], "a modern-bert whose layers all have one kind"),
        ("gemma-embedding", {}, [5, 6, 7], "a gemma-embedding whose layers all"),
        ("onyx", {PATTERN: 4}, [2], "one in 4 layers of onyx"),
        ("onyx", {}, [2], "one in 4 layers of onyx"),
        ("gemma4", {PATTERN: 5}, [0, 1, 2, 3, 4], "kinds of gemma4's layers from a list, .* is 5"),
        ("gemma4", {}, [7], "attention.sliding_window_pattern is None"),
        ("step35", {PATTERN: 4}, [2], "kinds of step35's layers from a list"),
        ("mimo2", {PATTERN: 6}, [2], "kinds of mimo2's layers from a list"),
        ("other", {"interleave_moe_layer_step": 2}, [1], "one in 2 layers of other"),
        ("smallthinker", {"attention__sliding_window": 8}, [1], "one in 4 layers of smallthinker"),
        ("gemma4", {"attention__shared_kv_layers": 2}, [0], "shared_kv_layers numbers layers"),
        ("rwkv6", {"rescale_every_n_layers": 6}, [0], "rescale_every_n_layers numbers layers"),
        ("rwkv7", {}, [0], "take values of layer 0"),
        ("qwen3vl", {"n_deepstack_layers": 3}, [2], "the first 3 take images"),
        ("deepseek2", {}, [2], "variants of deepseek2 by the number of their layers"),
        ("deepseek2-ocr", {}, [2], "variants of deepseek2-ocr by the number of their layers"),
        ("glm4moe", NEXT, [7], r"layers \[7\] do not exist; the model has 0..6"),
        ("llama", {"attention__head_count": [1, 2]}, [1], "head_count has 2 entries for 8 layers"),
        ("llama", {"names": ["enc.blk.0.attn_q.weight"]}, [1], "enc.blk.0.attn_q.weight belongs"),
        ("gemma3n", {"names": ["per_layer_token_embd.weight"]}, [1], "per_layer_token_embd"),
        ("llama", {"names": ["blk.8.attn_q.weight"]}, [1], "m.gguf is damaged .it has 9 of 8 la"),
        ("llama", {}, range(8), "expected 1 to 7"),
    ],
)
def test_what_no_key_can_say_is_refused(tmp_path, arch, fields, layers, message):
    path = stack_file(tmp_path / "m.gguf", arch, **fields)
    refuses(message, prune_checkpoint, path, tmp_path / "cut.gguf", list(layers))
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62), ("exaone4", 64)])
def test_variants_that_llama_cpp_knows_by_their_count_are_refused(tmp_path, arch, layers):
    for count, gone in ((layers, [0, 1]), (layers + 2, [0, 1])):
        path = stack_file(tmp_path / f"{count}.gguf", arch, count)
        with pytest.raises(
            ShortGPTError, match=f"tells variants of {arch} by the number of their layers"
        ):
            prune_checkpoint(path, tmp_path / "cut.gguf", gone)


def test_a_new_architecture_is_one_row(tmp_path, monkeypatch):
    """As docs/add-a-family.md says: with the row, no layer that stays changes its kind."""
    path = stack_file(tmp_path / "m.gguf", "my-arch")
    prune_checkpoint(path, tmp_path / "unknown.gguf", [2])  # as if all its layers were alike
    refuses("is of my-arch: name a directory instead", check_architecture, path)
    monkeypatch.setitem(ARCHITECTURES, "my-arch", Architecture((4, 3), healed=True))
    assert check_architecture(path).period() == (4, 3)
    message = "one in 4 layers of my-arch is of another kind.* remove 4 layers in a row"
    refuses(message, prune_checkpoint, path, tmp_path / "refused.gguf", [2])


def legal(stack: Stack, gone: Sequence[int]) -> bool:
    """Whether every other layer keeps its kind by its position alone."""
    keep = [i for i in range(stack.blocks) if i not in gone]
    try:
        return f"{stack.arch}.attention.sliding_window_pattern" not in stack.records(keep)
    except ShortGPTError:
        return False


PERIODIC = {arch: row.period[0] for arch, row in ARCHITECTURES.items() if row.period}


@pytest.mark.parametrize("arch", [*PERIODIC, "other"])
def test_whole_periods_in_a_row_leave_every_layer_its_kind(tmp_path, arch):
    fields = {PATTERN: 3, "moe_every_n_layers": 2} if arch == "other" else {}
    path = stack_file(tmp_path / "m.gguf", arch, 12, **WINDOW, **fields)
    stack = Stack(path)
    every = {**PERIODIC, "other": 6}[arch]
    assert stack.whole_period == every
    for n in range(1, every + 1):
        runs = [range(start, start + n) for start in range(13 - n)]
        assert all(legal(stack, gone) for gone in runs) is (n == every)


@pytest.mark.parametrize(
    ("kind", "factor", "misread"),
    [("linear", 4.0, True), ("yarn", 4.0, True), ("none", 4.0, False), ("linear", 1.0, False)],
)
def test_scaling_that_transformers_ignores_comes_with_a_warning(
    tmp_path, capsys, kind, factor, misread
):
    keys = {"rope__scaling__type": kind, "rope__scaling__factor": factor}
    path = stack_file(tmp_path / "m.gguf", **keys)
    run("prune", path, tmp_path / "a.gguf", "--layers", "2,3")
    out = capsys.readouterr().out
    assert ("transformers ignores how this file scales positions" in out) is misread


def test_a_list_of_kinds_comes_with_a_warning_of_programs_that_pass_over_it(tmp_path, capsys):
    path = stack_file(tmp_path / "m.gguf", "gpt-oss")
    run("prune", path, tmp_path / "a.gguf", "--layers", 1)
    out = capsys.readouterr().out
    assert "gpt-oss.attention.sliding_window_pattern lists the kinds" in out
    assert "convert it with --to hf" in out
    assert "llama.cpp from before September 2026" in out
    run("prune", path, tmp_path / "b.gguf", "--layers", "0,1")
    assert "pattern" not in capsys.readouterr().out
    run("prune", tmp_path / "a.gguf", tmp_path / "c.gguf", "--layers", 0)  # back in step
    assert "pattern" not in capsys.readouterr().out
    assert said(tmp_path / "c.gguf", "attention.sliding_window_pattern") == [1, 0, 1, 0, 1, 0]
    path = stack_file(tmp_path / "n.gguf", "gemma4", **{PATTERN: [True, True, False, True] * 2})
    assert about_kinds(path, [1]).endswith("convert it with `to` hf")
    assert about_kinds(path, [4, 5, 6, 7]) is None


def test_the_record_goes_along_in_the_file(tmp_path):
    path = stack_file(tmp_path / "m.gguf")
    facts = Provenance.of_scores(facts={"data": "novels"})
    prune_checkpoint(path, tmp_path / "a.gguf", [4, 2], provenance=facts)
    prune_checkpoint(tmp_path / "a.gguf", tmp_path / "b.gguf", [2])
    record = Provenance.of_checkpoint(tmp_path / "b.gguf")
    assert record.all_removed == [4, 2, 3] and record.original_layers == [0, 1, 5, 6, 7]
    assert record.first_source == "m.gguf" and record.earlier.facts == {"data": "novels"}
    assert (
        Provenance.of_checkpoint(path) is None
        and Provenance.of_checkpoint(tmp_path / "no.gguf") is None
    )
    text = read_header(tmp_path / "a.gguf").fields["short_gpt.pruning"]
    assert json.loads(text)["removed_layers"] == [4, 2]


def test_overwriting_replaces_only_what_was_written_so(tmp_path):
    path, out = stack_file(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    prune_checkpoint(path, out, [0])
    with pytest.raises(FileExistsError, match="exists; choose another name or pass `overwrite`"):
        prune_checkpoint(path, out, [1])
    prune_checkpoint(path, Target(out, overwrite=True), [1])
    assert Provenance.of_checkpoint(out).removed_layers == [1]
    with pytest.raises(FileExistsError, match="is the source"):
        prune_checkpoint(out, Target(out, overwrite=True), [1])
    other = stack_file(tmp_path / "other.gguf")
    (tmp_path / "text.gguf").write_text("mine")
    for theirs in (other, tmp_path / "text.gguf"):
        before = theirs.read_bytes()
        with pytest.raises(FileExistsError, match="is not what this would write there"):
            prune_checkpoint(path, Target(theirs, overwrite=True), [1])
        assert theirs.read_bytes() == before


def test_what_was_written_wrong_never_takes_its_place(tmp_path, monkeypatch):
    path, out = stack_file(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    prune_checkpoint(path, out, [0])
    before, plain = out.read_bytes(), gguf_write.read_header

    def spoil(at):
        def read(path):
            content = bytearray(path.read_bytes())
            content[at(bytes(content))] ^= 1
            path.write_bytes(content)
            return plain(path)

        return read

    for at, message in (
        (lambda content: len(content) - 20, "another blk.6.attn_norm.weight than was written"),
        (lambda content: content.index(b"block_count") + 15, "another list of keys than was"),
        (lambda content: content.index(b"ffn_down") + 2, "another blk.0.ffo_down.weight than"),
    ):
        monkeypatch.setattr(gguf_write, "read_header", spoil(at))
        refuses(message, prune_checkpoint, path, Target(out, overwrite=True), [1], error=OSError)
        assert out.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]


def test_layers_that_predict_further_tokens_have_no_kind_and_are_not_in_the_record(tmp_path):
    """The last of 8; at position 6 it would be of another kind, which no program asks of it."""
    path = stack_file(tmp_path / "m.gguf", "qwen35", **NEXT)
    assert Stack(path).changed_kinds([0, 1, 2, 3, 4, 5, 7]) == []
    prune_checkpoint(path, tmp_path / "out.gguf", [6])
    record = Provenance.of_checkpoint(tmp_path / "out.gguf")
    assert (record.removed_layers, record.kept_layers) == ([6], [0, 1, 2, 3, 4, 5])
    before, after = data(path), data(tmp_path / "out.gguf")
    assert after["blk.6.ffn_down.weight"] == before["blk.7.ffn_down.weight"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_a_cut_file_is_the_model_cut_in_memory(tmp_path, family, capsys):
    """Through transformers, which reads both; of Gemma the layers' kinds are those of the list."""
    path = write_model(tmp_path / "m.gguf", family, make(family))
    run("prune", path, tmp_path / "cut.gguf", "--layers", "1,4", "--verify", family == "llama")
    assert ("the logits are those of" in capsys.readouterr().out) == (family == "llama")
    tokens = torch.randint(2, 258, (1, 40), generator=torch.Generator().manual_seed(0))
    whole, cut = (ShortHFModel(p, dtype=torch.float32) for p in (path, tmp_path / "cut.gguf"))
    whole.remove_layers([1, 4])
    assert torch.equal(whole.decoder.logits(tokens), cut.decoder.logits(tokens))
    assert (said(tmp_path / "cut.gguf", "attention.sliding_window_pattern") is not None) == (
        family in ("gemma2", "gemma3")
    )
    cut.remove_layers([0])
    assert Provenance.of(cut, tmp_path / "cut.gguf").all_removed == [1, 4, 0]


def test_transformers_own_reader_passes_over_the_list_and_a_directory_is_right(tmp_path):
    """Why the output of `prune` names Hugging Face's format."""
    S, F = "sliding_attention", "full_attention"
    path = write_model(tmp_path / "m.gguf", "gemma2", make("gemma2"))
    run("prune", path, tmp_path / "cut.gguf", "--layers", "1,4")
    run("convert", tmp_path / "cut.gguf", tmp_path / "cut")
    ours = ShortHFModel(tmp_path / "cut.gguf", dtype=torch.float32).decoder
    tokens = torch.randint(2, 258, (1, 40), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="cut.gguf", dtype="float32")
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype="float32")
    assert plain.config.layer_types == [S, F] * 3  # by position
    assert right.config.layer_types == [S, S, F, F, S, F]
    with torch.no_grad():
        assert torch.equal(right(tokens).logits, ours.logits(tokens))
        assert (plain(tokens).logits - ours.logits(tokens)).abs().max() > 0.01
