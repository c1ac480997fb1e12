"""The commands: plain functions, given to fire. Only this module prints.

Every command checks its input before it works, prints one table on stdout, shows progress on
stderr, and writes files whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llama.checkpoint import Checkpoint
from llama.files import check_new, new_directory
from llama.parallel import several_ranks
from short_gpt import report
from short_gpt.data import pg19, texts, windows
from short_gpt.importance import Importance
from short_gpt.models import is_meta, layers_of, open_model, same_model
from short_gpt.plots import require_matplotlib
from short_gpt.progress import bar, first_rank
from short_gpt.record import read_record, refuse_existing, versions, write_record
from short_gpt.short_llama import ShortLlama


def rank(
    ckpt_dir: str,
    *,
    tokenizer_path: str | None = None,
    data: str = "pg19",
    split: str = "validation",
    column: str = "text",
    max_texts: int | None = None,
    size: int = 1024,
    stride: int = 256,
    max_windows: int | None = None,
    seed: int | None = 0,
    n_prune_layers: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    plots: str | None = None,
    overwrite: bool = False,
) -> None:
    """Scores every layer of a checkpoint: Block Influence and angular distance, one pass.

    Example: short-gpt rank llama-2-7b --n_prune_layers 9 --out ranking.json

    Args:
        ckpt_dir: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        data: pg19, a local file or folder of .txt, .jsonl or .parquet, or a hub data set's name.
        split: split of the data.
        column: column of the text in .jsonl, .parquet and hub data sets.
        max_texts: take only the first so many texts; a seed draws from all that are taken, so
            set it for a data set that is too large to be read whole.
        size: tokens in a window.
        stride: tokens between the starts of windows.
        max_windows: stop after so many; all if not given.
        seed: of the random order of all windows; none reads them in the order of the texts.
        n_prune_layers: also say which so many layers each method would remove.
        batch_size: windows read at once.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        out: JSON file for the scores, which prune and plot read.
        plots: folder for the two pictures.
        overwrite: replace existing files.
    """
    arguments = _arguments(locals())
    targets = _targets(out, plots, overwrite=overwrite)
    _check_run(ckpt_dir, n_prune_layers, size, stride, max_windows)
    source = _texts(data, split, column, max_texts)
    short = _short(ckpt_dir, tokenizer_path, size, batch_size, device, dtype, n_prune_layers)
    chosen = windows(source, short.encode, size=size, stride=stride, seed=seed, limit=max_windows)
    short.measure(chosen, batch_size=batch_size, total=_total(chosen, max_windows))
    _print(report.ranking(short.importance, n_prune_layers))
    if out is not None and first_rank():
        scores = {"importance": short.importance.to_dict()}
        record = {"command": "rank", "arguments": arguments, "seed": seed, **scores}
        write_record(out, record, overwrite=overwrite)
    if plots is not None and first_rank():
        _draw(short.importance, targets[-2:], n_prune_layers)
    _say_written(targets)


def prune(
    ckpt_dir: str,
    out_dir: str,
    *,
    layers: Any = None,
    scores: str | None = None,
    n_prune_layers: int | None = None,
    angular: bool = False,
    recipe: str | None = None,
    verify: bool | None = None,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint without some layers, tensor by tensor, in the format of the source.

    The model is not loaded for that: memory is bounded by the largest tensor. With --verify yes,
    source and result are then loaded, one after the other, and compared.

    Example: short-gpt prune llama-2-7b llama-2-5b --scores ranking.json --n_prune_layers 9

    Args:
        ckpt_dir: Meta checkpoint directory, or Hugging Face directory or hub id (safetensors).
        out_dir: new directory; must not exist.
        layers: numbers of the layers to remove, as in 21,22,23; or choose them by --scores.
        scores: JSON file that rank wrote.
        n_prune_layers: how many layers to remove by the scores.
        angular: remove the best block of consecutive layers, not the lowest Block Influence.
        recipe: also write a mergekit passthrough recipe to this file.
        verify: whether to prove the result: the same logits as the source without the layers in
            memory, and the same greedy generation with and without the cache. If not given, yes
            for Hugging Face's format, where a config can fail to say which layers are left, and
            no for Meta's.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        overwrite: replace an earlier pruned checkpoint.
    """
    from llama.checkpoint import prune as prune_meta
    from short_gpt.hf_checkpoint import mergekit_recipe, prune_hf

    drop, facts = _chosen(ckpt_dir, layers, scores, n_prune_layers, angular=angular)
    meta = is_meta(ckpt_dir)
    if recipe is not None:
        refuse_existing(Path(recipe), overwrite=overwrite)
    common: dict[str, Any] = {"provenance": facts, "overwrite": overwrite}
    with bar("writing", total=None, unit="tensor") as shown:
        common["progress"] = lambda _: shown.update()
        if meta:
            prune_meta(ckpt_dir, out_dir, drop, tokenizer_path=tokenizer_path, **common)
        else:
            prune_hf(ckpt_dir, out_dir, drop, **common)
    _print(f"removed layers {drop}\nwritten: {out_dir}")
    if recipe is not None:
        keep = read_record(f"{out_dir}/pruning.json")["kept_layers"]
        Path(recipe).write_text(mergekit_recipe(ckpt_dir, keep), encoding="utf-8")
        _print(f"written: {recipe}")
    verify = not meta if verify is None else verify
    shards = len(Checkpoint(ckpt_dir).shards) if meta and verify else 1
    if verify and (shards > 1 or several_ranks()):
        _print(
            f"not verified: that loads the model, whose {shards} shard(s) need ranks of their own"
        )
    elif verify:
        _print(same_model(ckpt_dir, out_dir, drop, tokenizer_path=tokenizer_path))


def _chosen(
    ckpt_dir: str, layers: Any, scores: str | None, n: int | None, *, angular: bool
) -> tuple[list[int], dict[str, Any]]:
    """The layers that `prune` is to remove, and what is to be kept of how they were chosen."""
    if (layers is None) == (scores is None):
        raise ValueError("prune needs either --layers 21,22,23 or --scores FILE --n_prune_layers N")
    if layers is not None and (angular or n is not None):
        raise ValueError("--n_prune_layers and --angular choose from --scores, not from --layers")
    facts: dict[str, Any] = {"source": ckpt_dir, "versions": versions()}
    if scores is None:
        return _layer_list(layers), facts
    record = read_record(scores)
    importance, found = _importance(record, scores), layers_of(ckpt_dir)
    if found is not None and importance.layers != list(range(found)):
        raise ValueError(
            f"{scores} scores {len(importance.layers)} layers, {ckpt_dir} has {found}; they "
            "do not belong together"
        )
    if n is None:
        raise ValueError("with --scores, say how many layers to remove: --n_prune_layers N")
    facts |= {"method": "angular" if angular else "block influence"}
    facts |= {"block_influence": importance.block_influence.tolist()}
    return importance.least_important(n, angular=angular), facts | {
        "scored_by": record.get("arguments")
    }


def generate(
    ckpt_dir: str,
    prompt: str,
    *,
    max_gen_len: int = 64,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    tokenizer_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Completes a text.

    Example: short-gpt generate llama-2-7b "I am an avid fan of"

    Args:
        ckpt_dir: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        prompt: the text to continue.
        max_gen_len: most tokens to add.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the sampling.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
    """
    short = open_model(
        ckpt_dir, tokenizer_path=tokenizer_path, seed=seed, device=device, dtype=dtype
    )
    if isinstance(short, ShortLlama):
        done = short.llama.text_completion([prompt], temperature, top_p, max_gen_len)
        _print(f"{prompt}{done[0]['generation']}")
    else:
        _print(f"{prompt}{short.generate([prompt], max_gen_len, temperature, top_p)[0]}")


def perplexity(
    ckpt_dir: str,
    *,
    tokenizer_path: str | None = None,
    data: str = "pg19",
    split: str = "test",
    column: str = "text",
    max_texts: int | None = None,
    size: int = 1024,
    max_windows: int | None = None,
    seed: int | None = 0,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Measures the perplexity of a checkpoint on a text, in windows that do not overlap.

    Example: short-gpt perplexity llama-2-7b --data novels/ --max_windows 100

    Args:
        ckpt_dir: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        data: pg19, a local file or folder of .txt, .jsonl or .parquet, or a hub data set's name.
        split: split of the data.
        column: column of the text in .jsonl, .parquet and hub data sets.
        max_texts: take only the first so many texts; a seed draws from all that are taken, so
            set it for a data set that is too large to be read whole.
        size: tokens in a window; each is read on its own, its first token is not predicted.
        max_windows: stop after so many; all if not given.
        seed: of the random order of all windows; none reads them in the order of the texts.
        batch_size: windows read at once.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        out: JSON file for the result.
        overwrite: replace an existing file.
    """
    arguments = _arguments(locals())
    targets = _targets(out, None, overwrite=overwrite)
    _check_run(ckpt_dir, None, size, size, max_windows)
    source = _texts(data, split, column, max_texts)
    short = _short(ckpt_dir, tokenizer_path, size, batch_size, device, dtype, None)
    chosen = windows(source, short.encode, size=size, stride=size, seed=seed, limit=max_windows)
    found = short.perplexity(chosen, batch_size=batch_size, total=_total(chosen, max_windows))
    _print(report.perplexities({ckpt_dir: found}))
    if out is not None and first_rank():
        result = {"perplexity": found.value, **vars(found)}
        record = {"command": "perplexity", "arguments": arguments, "seed": seed, "result": result}
        write_record(out, record, overwrite=overwrite)
    _say_written(targets)


def evaluate(
    dense: str,
    pruned: str | None = None,
    *,
    text: str = "wikitext-2",
    source: str | None = None,
    size: int = 2048,
    max_windows: int | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Perplexity and tasks of the lm-evaluation-harness, dense against pruned, in one table.

    Example: short-gpt evaluate llama-2-7b llama-2-5b --tasks piqa,arc_easy

    Args:
        dense: checkpoint of either format.
        pruned: another, to stand beside it.
        text: wikitext-2, c4 or pg19, cut as published results do; a local file or folder; none.
        source: a local copy of wikitext-2, c4 or pg19.
        size: tokens in a window.
        max_windows: read only the first so many windows.
        tasks: names of tasks with commas between, such as piqa,arc_easy; none if not given.
        limit: only the first so many documents of each task.
        num_fewshot: examples in each prompt; the tasks' own numbers if not given.
        include_path: folder with YAML files of more tasks.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        out: JSON file for the results.
        overwrite: replace an existing file.
    """
    arguments = _arguments(locals())
    if text == "none" and tasks is None:
        raise ValueError("nothing to evaluate: give --text or --tasks")
    targets = _targets(out, None, overwrite=overwrite)
    results: dict[str, dict[str, float]] = {}
    for name in [dense] if pruned is None else [dense, pruned]:
        short = open_model(name, max_seq_len=size, device=device, dtype=dtype)
        row = results[name] = {"layers": float(len(short.kept))}
        if text != "none":
            chosen = _evaluation_text(text, source, short.encode, size, max_windows)
            row[f"{text} perplexity"] = short.perplexity(chosen).value
        if tasks is not None:
            from short_gpt.harness import run_tasks

            found = run_tasks(
                short,
                tasks.split(","),
                limit=limit,
                num_fewshot=num_fewshot,
                include_path=include_path,
            )
            row |= {f"{t} {m}": v for t, metrics in found.items() for m, v in metrics.items()}
        del short
    _print(report.comparison(results))
    if out is not None and first_rank():
        record = {"command": "evaluate", "arguments": arguments, "result": results}
        write_record(out, record, overwrite=overwrite)
    _say_written(targets)


def _evaluation_text(
    text: str, source: str | None, encode: Callable[[str], list[int]], size: int, limit: int | None
) -> list[list[int]]:
    from short_gpt.protocols import PROTOCOLS, protocol

    if text in PROTOCOLS:
        return protocol(text, encode, size=size, limit=limit, source=source)
    return list(windows(_shown(texts(text)), encode, size=size, stride=size, limit=limit))


def plot(
    scores: str, out_dir: str, *, n_prune_layers: int | None = None, overwrite: bool = False
) -> None:
    """Draws the scores that rank wrote: Block Influence bars and the angular heat map.

    Example: short-gpt plot ranking.json pictures --n_prune_layers 9

    Args:
        scores: JSON file that rank wrote.
        out_dir: folder for block_influence.png and angular.png.
        n_prune_layers: mark what each method would remove.
        overwrite: replace existing pictures.
    """
    importance = _importance(read_record(scores), scores)
    targets = _targets(None, out_dir, overwrite=overwrite)
    _draw(importance, targets, n_prune_layers)
    _say_written(targets)


def convert(
    source: str,
    out_dir: str,
    *,
    dtype: str | None = None,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a Llama in the other format: GGUF or Hugging Face to Meta, Meta to Hugging Face.

    Example: short-gpt convert model.gguf model-meta

    Args:
        source: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
        out_dir: new directory; must not exist.
        dtype: of the weights written for Meta; the source's if not given, float32 from GGUF, which
            keeps what quantized weights stand for exactly.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        overwrite: replace an earlier conversion.
    """
    with bar("converting", total=None, unit="tensor") as shown:
        _convert(source, out_dir, dtype, tokenizer_path, overwrite, lambda _: shown.update())
    _print(f"written: {out_dir}")


def _convert(
    source: str,
    out_dir: str,
    dtype: str | None,
    tokenizer_path: str | None,
    overwrite: bool,
    progress: Callable[[str], object],
) -> None:
    from llama.convert import gguf_to_meta, hf_to_meta, meta_to_hf

    if source.endswith(".gguf"):
        kind = dtype or "float32"
        gguf_to_meta(source, out_dir, dtype=kind, overwrite=overwrite, progress=progress)
    elif not is_meta(source):
        hf_to_meta(source, out_dir, dtype=dtype, overwrite=overwrite, progress=progress)
    elif dtype is not None:
        raise ValueError("--dtype is for writing Meta's format; Hugging Face's keeps the source's")
    else:
        meta_to_hf(
            source, out_dir, tokenizer_path=tokenizer_path, overwrite=overwrite, progress=progress
        )


def reproduce(
    ckpt_dir: str | None = None,
    *,
    tokenizer_path: str | None = None,
    data: str | None = None,
    model: str | None = None,
    max_windows: int | None = None,
    seed: int | None = 0,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Runs the ShortGPT paper's protocol and sets the result beside the paper's list.

    PG-19 validation in windows of 1024 tokens, 256 apart; lowest Block Influence; as many layers
    as the paper's Table 9 removes. Llama-2-7B: [27, 26, 25, 28, 24, 29, 23, 21, 22].

    Example: short-gpt reproduce llama-2-7b

    Args:
        ckpt_dir: Meta checkpoint directory of Llama-2-7B or Llama-2-13B.
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        data: local copy of PG-19; streamed from the hub if not given.
        model: which of the paper's models this is; told by its shape if not given.
        max_windows: stop after so many; all (about 18,000 for Llama 2) if not given.
        seed: of the random order of all windows; none reads them in the order of the books.
        batch_size: windows read at once.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        out: JSON file for the result.
        overwrite: replace an existing file.
    """
    from short_gpt.reproduce import compare, identify

    if ckpt_dir is None:
        raise ValueError(
            "reproduce needs a checkpoint of one of the paper's models in Meta's format, "
            "Llama-2-7B or Llama-2-13B (llama.com, or meta-llama/Llama-2-7b on the hub), and "
            "PG-19 (streamed, or --data FOLDER): short-gpt reproduce --ckpt_dir llama-2-7b"
        )
    arguments = _arguments(locals())
    targets = _targets(out, None, overwrite=overwrite)
    args = Checkpoint(ckpt_dir).args
    name = model or identify(args.dim, args.n_layers, args.vocab_size)
    if model is None and args.kv_heads != args.n_heads:
        raise ValueError(
            f"{ckpt_dir} has the size of {name} but groups its keys and values, so it is another "
            f"model; compare anyway with --model {name}"
        )
    n = len(compare(name, []).paper)
    if n >= args.n_layers:
        raise ValueError(f"{name} loses {n} layers; {ckpt_dir} has {args.n_layers} in all")
    windows([], lambda _: [], size=1024, limit=max_windows)
    source = _shown(pg19("validation", path=data))
    short = _short(ckpt_dir, tokenizer_path, 1024, batch_size, device, dtype, n)
    chosen = windows(source, short.encode, size=1024, stride=256, seed=seed, limit=max_windows)
    short.measure(chosen, batch_size=batch_size, total=_total(chosen, max_windows))
    comparison = compare(name, short.layers_to_remove())
    _print(report.ranking(short.importance, n))
    _print(f"\n{comparison.table()}")
    if out is not None and first_rank():
        record = {"command": "reproduce", "arguments": arguments, "seed": seed}
        record |= {"result": vars(comparison), "importance": short.importance.to_dict()}
        write_record(out, record, overwrite=overwrite)
    _say_written(targets)


def demo(
    out_dir: str = "short_gpt_demo",
    *,
    n_prune_layers: int = 8,
    max_windows: int = 24,
    eval_windows: int = 12,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
) -> None:
    """Does the whole job on a small real model: rank, remove, evaluate, save.

    SmolLM2-135M-Instruct (30 layers) reads the King James Bible. Both come from the Python
    package registry, 95 MB, once. About 3 minutes on 2 CPU cores.

    Args:
        out_dir: new folder for layers.json, two pictures and the pruned checkpoint.
        n_prune_layers: how many layers to remove.
        max_windows: windows of 1024 tokens to score.
        eval_windows: windows of 1024 tokens of held-out chapters to evaluate on.
        seed: of the random choice of windows.
        device: cpu, cuda or mps; the best there is if not given.
        overwrite: replace an existing folder.
    """
    from short_gpt import demo as material

    arguments = _arguments(locals())
    for limit in (max_windows, eval_windows):
        windows([], lambda _: [], size=1024, limit=limit)
    if not 1 <= n_prune_layers < material.N_LAYERS:
        raise ValueError(
            f"--n_prune_layers {n_prune_layers}; the model has {material.N_LAYERS} layers: "
            f"expected 1 to {material.N_LAYERS - 1}"
        )
    out, replaces = Path(out_dir), "layers.json" if overwrite else None
    check_new(out, replaces=replaces)
    require_matplotlib()
    short = _short(str(material.checkpoint()), None, 1024, 1, device, None, n_prune_layers)

    def take(part: str, limit: int) -> Iterable[list[int]]:
        text = material.bible(part)
        return windows(text, short.encode, size=1024, stride=1024, seed=seed, limit=limit)

    prompt = "And God said unto Noah,"

    def look(name: str, drop: Sequence[int]) -> None:
        with short.without_layers(drop):
            quality[name] = short.perplexity(held_out)
            done = short.llama.text_completion([prompt], temperature=0, max_gen_len=24)
        text = " ".join(f"{prompt}{done[0]['generation']}".split())
        completions.append(f"{name}:\n  {text}")

    _print("SmolLM2-135M-Instruct reads the King James Bible\n")
    short.measure(take("calibration", max_windows))
    _print(report.ranking(short.importance, n_prune_layers) + "\n")
    held_out = take("held_out", eval_windows)
    quality: dict[str, Any] = {}
    completions: list[str] = []
    low, block = short.layers_to_remove(), short.layers_to_remove(angular=True)
    for name, drop in (("dense", []), ("Block Influence", low), ("angular block", block)):
        look(f"{name}, {len(short.kept) - len(drop)} layers", drop)
    _print(f"Held-out chapters:\n{report.perplexities(quality)}\n")
    _print("Greedy completions:\n" + "\n".join(completions))

    result = {name: {"perplexity": p.value, **vars(p)} for name, p in quality.items()}
    lists = {"block_influence": low, "angular": block}
    record = {"command": "demo", "arguments": arguments, "seed": seed, "layers": lists}
    record |= {"result": result, "importance": short.importance.to_dict()}
    provenance = {"method": "block influence", "data": "King James Bible", "result": result}
    short.remove_layers()
    with new_directory(out, replaces=replaces) as partial:
        write_record(partial / "layers.json", record)
        _draw(short.importance, _targets(None, str(partial), overwrite=False), n_prune_layers)
        short.save(partial / "pruned", provenance=provenance)
    _say_same(short, out / "pruned")
    _say_written([out / n for n in ("layers.json", *PICTURES, "pruned")])


ALONE = ("prune", "convert", "plot")  # of several ranks, only the first runs these
COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "rank": rank,
    "prune": prune,
    "generate": generate,
    "perplexity": perplexity,
    "evaluate": evaluate,
    "plot": plot,
    "reproduce": reproduce,
    "convert": convert,
}

# ------------------------------------------------------------------------------- helpers

PICTURES = ("block_influence.png", "angular.png")


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments for its record: its locals, taken first thing."""
    return {name: value for name, value in values.items() if isinstance(value, Plain)}


Plain = str | int | float | bool | None


def _short(
    source: str,
    tokenizer_path: str | None,
    size: int,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    n_prune_layers: int | None,
) -> Any:
    return open_model(
        source,
        n_prune_layers=n_prune_layers,
        tokenizer_path=tokenizer_path,
        max_seq_len=size,
        max_batch_size=batch_size,
        device=device,
        dtype=dtype,
    )


def _check_run(
    ckpt_dir: str, n_prune_layers: int | None, size: int, stride: int, max_windows: int | None
) -> None:
    """Raises what would go wrong after the model is loaded."""
    n_layers = layers_of(ckpt_dir)
    if n_layers and n_prune_layers is not None and not 1 <= n_prune_layers < n_layers:
        raise ValueError(
            f"--n_prune_layers {n_prune_layers}; the model has {n_layers} layers: "
            f"expected 1 to {n_layers - 1}"
        )
    windows([], lambda _: [], size=size, stride=stride, limit=max_windows)


def _texts(data: str, split: str, column: str, limit: int | None) -> Iterable[str]:
    if limit is not None and limit < 1:
        raise ValueError(f"--max_texts expects at least 1, got {limit}")
    found = pg19(split) if data == "pg19" else texts(data, split=split, column=column)
    return _shown(islice(found, limit))


def _shown(found: Iterable[str]) -> Iterator[str]:
    """The same texts, with a progress bar while they are read."""
    with bar("reading", total=None, unit="text") as shown:
        for text in found:
            yield text
            shown.update()


def _total(chosen: object, limit: int | None) -> int | None:
    """How many windows are to come, as far as that is known."""
    return len(chosen) if hasattr(chosen, "__len__") else limit


def _targets(out: str | None, plots: str | None, *, overwrite: bool) -> list[Path]:
    """The files that a command will write, none of which may exist unless ``overwrite``."""
    targets = [Path(out)] if out is not None else []
    if plots is not None:
        require_matplotlib()
        targets += [Path(plots) / name for name in PICTURES]
    for target in targets:
        refuse_existing(target, overwrite=overwrite)
        if target.parent in targets:
            raise ValueError(f"{target} cannot be written into the file {target.parent}")
    return targets


def _layer_list(layers: Any) -> list[int]:
    numbers = [layers] if isinstance(layers, int) else layers
    if not isinstance(numbers, list | tuple) or not all(type(i) is int for i in numbers):
        raise ValueError(f"expected layer numbers as in --layers 21,22,23, got {layers!r}")
    return list(numbers)


def _importance(record: dict[str, Any], source: str) -> Importance:
    if "importance" not in record:
        raise ValueError(f"{source} holds no scores; expected a file written by short-gpt rank")
    return Importance.from_dict(record["importance"])


def _draw(importance: Importance, targets: Sequence[Path], n: int | None) -> None:
    """Writes the two pictures."""
    from short_gpt.plots import angular_heatmap, importance_bars

    removed = [] if n is None else importance.least_important(n)
    block = None if n is None else (importance.least_important(n, angular=True)[0], n)
    bars = importance_bars(
        importance.block_influence, standard_error=importance.standard_error, removed=removed
    )
    heat = angular_heatmap(importance.angular, block=block)
    for figure, target in zip((bars, heat), targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}")
        figure.savefig(partial, format="png", dpi=150)
        partial.replace(target)


def _say_same(short: Any, directory: Path) -> None:
    """Loads a pruned checkpoint and says whether its logits are those of the model in memory."""
    import torch

    device, dtype = short.decoder.device, next(short.llama.model.parameters()).dtype
    again = open_model(str(directory), max_seq_len=1024, device=device, dtype=dtype)
    tokens = torch.tensor([short.encode("In the beginning")], device=device)
    if not torch.equal(again.decoder.logits(tokens), short.decoder.logits(tokens)):
        raise RuntimeError(
            f"{directory}, loaded again, gives other logits than the model in memory"
        )
    _print("\nThe saved checkpoint, loaded again, gives the same logits.")


def _print(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if first_rank():
        print(text, flush=True)


def _say_written(targets: Sequence[Path]) -> None:
    for target in targets:
        _print(f"written: {target}")
