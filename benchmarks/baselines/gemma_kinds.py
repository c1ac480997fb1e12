"""What a cut does to the kinds of Gemma 3's layers: ours, and llama.cpp's own `--prune-layers`.

In Gemma 3 a window slides over the text in five layers of six, and the sixth attends to all of it.
llama.cpp takes a layer's kind from its position, unless the file lists the kinds. Here the removed
layers change nothing, because their output projections are zero. So a right cut predicts what the
uncut file predicts, except for rounding, and any other difference comes from layers of the wrong
kind.

    python benchmarks/baselines/gemma_kinds.py --out benchmarks/results/gemma_kinds.json

The files are tiny, of random weights. llama.cpp's own cut is its function `llama_model_quantize`,
which `llama-quantize --prune-layers 1,4 IN OUT copy` calls with the same settings, in the package
llama-cpp-py-sync (`pip install llama-cpp-py-sync`). llama.cpp in the package xllamacpp then opens
both files.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


import fire
import gguf
import numpy as np

from benchmarks.lib.outcome import begin, finish
from short_gpt.checkpoints import Target, prune_checkpoint

ARCH, LAYERS, PERIOD, VOCABULARY = "gemma3", 12, 6, 258
WIDTH, FFN, HEADS, KV_HEADS, HEAD, WINDOW = 64, 96, 4, 2, 16, 8
SETS = ((1, 4), (5, 11), (0, 1, 2, 3, 4, 5))  # layers to remove; the last are a period
PROMPTS, TOKENS = 20, 40  # several windows long
ROUNDING = 1e-3  # of log probabilities in float32
Predicted = Mapping[int, float]  # log probabilities of the next token, by token


def main(out: str | None = None, *, overwrite: bool = False) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as folder:
        rows = [compared(Path(folder), removed) for removed in SETS]
    print(table(rows))
    missed = [f"ours, {r['removed']}" for r in rows if r["ours"]["difference"] > ROUNDING]
    shape: dict[str, Any] = {"layers": LAYERS, "prompts": PROMPTS, "tokens_per_prompt": TOKENS}
    shape |= {name: version(name) for name in ("llama-cpp-py-sync", "xllamacpp")}
    finish("gemma_kinds", missed, {**shape, "rows": rows}, out=out, overwrite=overwrite)


def compared(folder: Path, removed: Sequence[int]) -> dict[str, Any]:
    """Both cuts of a file, whose ``removed`` layers change nothing, beside the file itself."""
    source, ours, theirs = (folder / f"{name}.gguf" for name in ("source", "ours", "theirs"))
    write(source, removed)
    prune_checkpoint(source, Target(ours, overwrite=True), removed)
    cut_by_llama_cpp(source, theirs, removed)
    expected = predictions(source)
    found: dict[str, Any] = {"removed": [*removed]}
    kept = [i for i in range(LAYERS) if i not in removed]
    found["kinds"], found["kinds_by_position"] = kinds(kept), kinds(range(len(kept)))
    for name, path in (("ours", ours), ("theirs", theirs)):
        pairs = [*zip(expected, predictions(path), strict=True)]
        largest = max(abs(one[token] - other[token]) for one, other in pairs for token in one)
        nats = sum(divergence(one, other) for one, other in pairs) / PROMPTS
        found[name] = {"difference": largest, "divergence": nats}
    return found


def kinds(layers: Iterable[int]) -> str:
    """S where a window slides, F where a layer attends to all of the text."""
    return "".join("F" if i % PERIOD == PERIOD - 1 else "S" for i in layers)


def divergence(one: Predicted, other: Predicted) -> float:
    """KL divergence from a prediction to another, in nats."""
    return sum(math.exp(value) * (value - other[token]) for token, value in one.items())


def predictions(path: Path) -> list[Predicted]:
    """What llama.cpp predicts after each prompt, in float32 on one thread."""
    server, prompts = server_of(path), np.random.default_rng(1)
    drawn = (prompts.integers(2, VOCABULARY, TOKENS).tolist() for _ in range(PROMPTS))
    return [predicted(server, ids, VOCABULARY) for ids in drawn]


def server_of(path: Path) -> Any:
    """A file in llama.cpp, in float32 on one thread; RuntimeError if it does not open it."""
    import xllamacpp as client

    params = client.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = 4 * TOKENS, 1, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = client.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = client.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return client.Server(params)


def predicted(server: Any, ids: Sequence[int], count: int) -> dict[int, float]:
    """The log probabilities of the ``count`` likeliest tokens after others."""
    asked = {"n_predict": 1, "n_probs": count, "temperature": 0, "ignore_eos": True}
    answer = server.handle_completions({"prompt": [*ids], **asked, "cache_prompt": False})
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}


def cut_by_llama_cpp(source: Path, out: Path, removed: Sequence[int]) -> None:
    """Writes what `llama-quantize --prune-layers` does, with type ``copy``."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib  # its own classes only run models

    ffi, lib = get_ffi(), get_lib()
    quiet = ffi.callback("ggml_log_callback", lambda *_: None)
    lib.llama_log_set(quiet, ffi.NULL)
    settings = lib.llama_model_quantize_default_params()
    layers = ffi.new("int32_t[]", [*removed, -1])  # -1 ends the list
    settings.only_copy, settings.prune_layers, settings.nthread = True, layers, 1
    paths = (str(path).encode() for path in (source, out))
    failed = lib.llama_model_quantize(*paths, ffi.addressof(settings))
    if failed or not out.is_file():
        raise RuntimeError(f"llama.cpp did not cut {source}")


def write(path: Path, zero: Sequence[int]) -> None:
    """A random Gemma 3 in float32, in whose layers ``zero`` the output projections are zero."""
    writer, random = gguf.GGUFWriter(path, ARCH), np.random.default_rng(0)
    keys = {"context_length": 128, "embedding_length": WIDTH, "block_count": LAYERS}
    keys |= {"feed_forward_length": FFN, "attention.head_count": HEADS}
    keys |= {"attention.head_count_kv": KV_HEADS, "attention.sliding_window": WINDOW}
    keys |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    for name, value in keys.items():
        writer.add_uint32(f"{ARCH}.{name}", value)
    for name, number in (("attention.layer_norm_rms_epsilon", 1e-6), ("rope.freq_base", 1e4)):
        writer.add_float32(f"{ARCH}.{name}", number)

    def add(name: str, *shape: int, mean: float = 0.0, scale: float = 0.3) -> None:
        data = mean + scale * random.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", data.astype(np.float32))

    add("token_embd", VOCABULARY, WIDTH)
    add("output_norm", WIDTH, mean=1, scale=0.1)
    for i in range(LAYERS):
        block, scale = f"blk.{i}", 0.0 if i in zero else 0.3
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"{block}.{name}", WIDTH, mean=1, scale=0.1)
        for name in ("attn_q_norm", "attn_k_norm"):
            add(f"{block}.{name}", HEAD, mean=1, scale=0.1)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            add(f"{block}.attn_{name}", heads * HEAD, WIDTH)
        add(f"{block}.attn_output", WIDTH, HEADS * HEAD, scale=scale)
        add(f"{block}.ffn_gate", FFN, WIDTH)
        add(f"{block}.ffn_up", FFN, WIDTH)
        add(f"{block}.ffn_down", WIDTH, FFN, scale=scale)
    letters = [chr(97 + i) for i in range(26)]
    words = [*letters, *(a + b for a in letters for b in letters)][: VOCABULARY - 2]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<s>", "</s>", *words])
    writer.add_token_types([3, 3] + [1] * len(words))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each set of removed layers."""
    heads = ("removed", "kinds", "by position", "ours: difference", "KL", "llama.cpp's", "KL")
    lines = ["{:<20}{:<14}{:<14}{:>18}{:>10}{:>14}{:>10}".format(*heads)]
    for found in rows:
        cells = [str(found["removed"]), found["kinds"], found["kinds_by_position"]]
        numbers = [v for cut in ("ours", "theirs") for v in found[cut].values()]
        lines.append(
            "{:<20}{:<14}{:<14}{:>18.2g}{:>10.2g}{:>14.2g}{:>10.2g}".format(*cells, *numbers)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
