"""What a cut does to the kinds of Gemma 3's layers: ours, and llama.cpp's own `--prune-layers`.

In Gemma 3 a window slides over the text in five layers of six, and the sixth attends to all of it.
llama.cpp takes a layer's kind from its position, unless the file lists the kinds. Here the removed
layers change nothing, because their output projections are zero. So a right cut predicts what the
uncut file predicts, to the last bit, and any difference comes from layers of the wrong kind.

    python benchmarks/gemma_kinds.py --out benchmarks/results/gemma_kinds.json

The files are tiny, of random weights. llama.cpp's own cut is its function `llama_model_quantize`,
which `llama-quantize --prune-layers 1,4 IN OUT copy` calls with the same settings, in the package
llama-cpp-py-sync (`pip install llama-cpp-py-sync`). llama.cpp in the package xllamacpp then opens
both files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fire
import gguf
import numpy as np
from outcome import begin, finish

from short_gpt.checkpoints import prune_gguf

ARCH, LAYERS, PERIOD, VOCABULARY = "gemma3", 12, 6, 258
WIDTH, FFN, HEADS, KV_HEADS, HEAD, WINDOW = 64, 96, 4, 2, 16, 8
SETS = ((1, 4), (5, 11), (0, 1, 2, 3, 4, 5))  # layers to remove; the last are a period
PROMPTS, TOKENS = 20, 40  # several windows long
Predicted = Mapping[int, float]  # log probabilities of the next token, by token


def main(out: str | None = None, *, overwrite: bool = False) -> None:
    """Runs the benchmark, prints the table, and writes the JSON file if ``out`` is given."""
    begin(out, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as folder:
        rows = [compared(Path(folder), removed) for removed in SETS]
    print(table(rows))
    missed = [f"ours without {r['removed']} differs" for r in rows if r["ours"]["difference"]]
    shape = {"layers": LAYERS, "prompts": PROMPTS, "tokens_per_prompt": TOKENS}
    finish("gemma_kinds", missed, {**shape, "rows": rows}, out=out, overwrite=overwrite)


def compared(folder: Path, removed: Sequence[int]) -> dict[str, Any]:
    """Both cuts of a file, whose ``removed`` layers change nothing, beside the file itself."""
    source, ours, theirs = (folder / f"{name}.gguf" for name in ("source", "ours", "theirs"))
    write(source, removed)
    prune_gguf(source, ours, removed, overwrite=True)
    cut_by_llama_cpp(source, theirs, removed)
    expected = predictions(source)
    found: dict[str, Any] = {"removed": [*removed]}
    kept = [i for i in range(LAYERS) if i not in removed]
    found["kinds"], found["kinds_by_position"] = kinds(kept), kinds(range(len(kept)))
    for name, path in (("ours", ours), ("theirs", theirs)):
        pairs = [*zip(expected, predictions(path), strict=True)]
        largest = max(abs(one[token] - other[token]) for one, other in pairs for token in one)
        same = sum(likeliest(one) == likeliest(other) for one, other in pairs)
        found[name] = {"difference": largest, "same_likeliest": same}
    return found


def kinds(layers: Iterable[int]) -> str:
    """S where a window slides, F where a layer attends to all of the text."""
    return "".join("F" if i % PERIOD == PERIOD - 1 else "S" for i in layers)


def likeliest(predicted: Predicted) -> int:
    return max(predicted, key=lambda token: predicted[token])


def predictions(path: Path) -> list[Predicted]:
    """What llama.cpp predicts after each prompt, in float32 on one thread."""
    import xllamacpp as client

    params = client.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = 4 * TOKENS, 1, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = client.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = client.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, prompts = client.Server(params), np.random.default_rng(1)
    asked = {"n_predict": 1, "n_probs": VOCABULARY, "temperature": 0, "ignore_eos": True}
    asked |= {"cache_prompt": False}
    found = []
    for _ in range(PROMPTS):
        ids = prompts.integers(2, VOCABULARY, TOKENS).tolist()
        answer = server.handle_completions({"prompt": ids, **asked})
        first = answer["choices"][0]["logprobs"]["content"][0]
        found.append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
    return found


def cut_by_llama_cpp(source: Path, out: Path, removed: Sequence[int]) -> None:
    """What `llama-quantize --prune-layers` writes, with type ``copy``."""
    raise NotImplementedError


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
    lines = [f"{'removed':<20}{'kinds, ours':<14}{'theirs':<14}{'difference, ours':>18}{'theirs':>10}"]
    for found in rows:
        cells = [found["ours"]["difference"], found["theirs"]["difference"]]
        names = f"{found['removed']!s:<20}{found['kinds']:<14}{found['kinds_by_position']:<14}"
        lines.append(f"{names}{cells[0]:>18.4f}{cells[1]:>10.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
