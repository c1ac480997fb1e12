"""Commands that score: rank, plot, reproduce."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama.checkpoint.meta import Checkpoint
from llama.parallel import several_ranks
from short_gpt.cli.shared import (
    arguments_of,
    check_run,
    draw,
    importance_of,
    interruptible,
    open_short,
    run_state,
    say,
    say_plan,
    say_written,
    targets_of,
    total,
)
from short_gpt.data.texts import pg19, read_texts, shown
from short_gpt.data.windows import windows
from short_gpt.experiments.published import compare_with_paper, identify
from short_gpt.report import tables as report
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import first_rank
from short_gpt.runtime.results import read_record, write_record
from short_gpt.runtime.state import StateFile
from short_gpt.scoring.state import RunState
from short_gpt.scoring.stopping import Stop, Verdict
from short_gpt.selection.methods import BY_LOSS, check_method
from short_gpt.streaming.memory import bytes_of


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
    method: str = "bi",
    candidates: int | None = None,
    stream: bool = False,
    max_memory: str | None = None,
    confidence: float | None = 0.99,
    sublayers: bool = False,
    batch_size: int = 1,
    model_parallel_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    state: str | None = None,
    save_every: float = 120.0,
    out: str | None = None,
    plots: str | None = None,
    overwrite: bool = False,
) -> None:
    """Scores every layer of a checkpoint: Block Influence and angular distance, one pass.

    With --n_prune_layers and a seed, the run ends as soon as the answer of --method (bi or
    angular) is settled: as sure as --confidence says to be that of all windows. Interrupted or
    killed, the same command continues where it was, from the state file.

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
        seed: of the random order of all windows, and of the random method; none reads them in
            the order of the texts.
        n_prune_layers: also say which so many layers the methods would remove.
        method: bi, angular, angular_all, deepest, relative_magnitude, norm, sequential, reverse,
            random, perplexity or sleb.
        candidates: sleb only tries the so many layers of lowest Block Influence; all if not given.
        stream: hold one layer at a time in memory: for a Llama larger than the machine, in Meta's
            format or Hugging Face's. What it takes is said before it starts.
        max_memory: with --stream, of the whole process, half of what is free if not given; else
            for the states that perplexity and sleb store, 2GB if not given.
        confidence: that a settled answer is that of all windows; none reads all of them.
        sublayers: also score the attention and the MLP of every layer.
        batch_size: windows read at once, by each replica.
        model_parallel_size: under torchrun, ranks that share one model of Meta's format; all if
            not given. The others are replicas, which share the windows.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        state: file that the run is saved in and continued from; OUT.state if not given.
        save_every: seconds between two saves.
        out: JSON file for the scores, which prune and plot read.
        plots: folder for the two pictures.
        overwrite: replace existing files.
    """
    arguments = arguments_of(locals())
    targets = targets_of(out, plots, overwrite=overwrite)
    check_run(ckpt_dir, n_prune_layers, size, stride, max_windows)
    check_method(method)
    rule = stop_rule(n_prune_layers, method, confidence, seed)
    check_stream(method, max_memory, stream=stream)
    if method in BY_LOSS and n_prune_layers is None:
        raise ShortGPTError(f"--method {method} needs --n_prune_layers N")
    source = read_texts(data, split, column, max_texts)
    options = (device, dtype, n_prune_layers, model_parallel_size)
    streamed: dict[str, Any] = {"stream": stream, "max_memory": max_memory}
    short = open_short(ckpt_dir, tokenizer_path, size, batch_size, *options, **streamed)
    chosen = windows(source, short.encode, size=size, stride=stride, seed=seed, limit=max_windows)
    saved = run_state(short, state, out, arguments, every=save_every)
    if method in BY_LOSS:
        _search(short, chosen, saved, arguments, candidates, targets)
        return
    say_plan(short, batch_size)
    with interruptible():
        verdict = short.measure(
            chosen,
            batch_size=batch_size,
            total=total(chosen, max_windows),
            stop=rule,
            state=saved and RunState(saved),
            sublayers=sublayers,
            all_tokens=method == "angular_all",
        )
    say(report.ranking(short.importance, n_prune_layers, method=method, seed=seed or 0))
    if sublayers:
        say("\n" + report.sublayers(short.importance))
    if verdict:
        say(str(verdict))
    if out is not None and first_rank():
        scores = {"importance": short.importance.to_dict(), "settled": settled_record(verdict)}
        record = {"command": "rank", "arguments": arguments, "seed": seed, **scores}
        write_record(out, record, overwrite=overwrite)
    if plots is not None and first_rank():
        draw(short.importance, targets[-2:], n_prune_layers)
    if saved is not None and first_rank():
        saved.clear()
    say_written(targets)


def _search(
    short: Any,
    chosen: Iterable[list[int]],
    saved: StateFile | None,
    arguments: dict[str, Any],
    candidates: int | None,
    targets: Sequence[Path],
) -> None:
    """The methods of rank that run the model without layers."""
    if several_ranks():
        raise ShortGPTError(f"--method {arguments['method']} runs on one rank; start it alone")
    n, method, windows = arguments["n_prune_layers"], arguments["method"], list(chosen)
    size, memory = arguments["batch_size"], bytes_of(arguments["max_memory"] or "2GB")
    with interruptible():
        few = None
        if candidates is not None:
            short.measure(windows, batch_size=size)
            few = short.layers_to_remove(n=candidates)
        found = short.search(
            windows,
            n,
            method=method,
            candidates=few,
            batch_size=size,
            max_memory=memory,
            state=saved,
        )
    say(report.search(found, method))
    if arguments["out"] is not None:
        record = {"command": "rank", "arguments": arguments, "seed": arguments["seed"]}
        record |= {"chosen": {"method": method, "layers": found.removed}, "search": vars(found)}
        write_record(arguments["out"], record, overwrite=arguments["overwrite"])
    if saved is not None:
        saved.clear()
    say_written(targets)


def stop_rule(
    n: int | None, method: str, confidence: float | None, seed: int | None
) -> Stop | None:
    """The rule that ends a run early, where the answer can be settled: a method of this pass that
    takes its n layers by means over windows, and windows in random order."""
    rule = None if confidence is None else Stop(n or 1, method == "angular", confidence)
    return rule if n is not None and seed is not None and method in ("bi", "angular") else None


def check_stream(method: str, max_memory: str | None, *, stream: bool) -> None:
    """Raises ShortGPTError if one layer at a time does not do, or a limit has no use."""
    if stream and (method in BY_LOSS or method == "angular_all"):
        why = "all states" if method == "angular_all" else "the whole model for every candidate"
        raise ShortGPTError(f"--method {method} needs {why}; choose another, or leave out --stream")
    if max_memory is not None:
        bytes_of(max_memory)
        if not stream and method not in BY_LOSS:
            raise ShortGPTError(
                f"--max_memory {max_memory} bounds --stream and the methods {', '.join(BY_LOSS)}; "
                "add --stream, or leave it out"
            )


def settled_record(verdict: Verdict | None) -> dict[str, Any] | None:
    """A verdict, ready for JSON."""
    if verdict is None:
        return None
    return {**vars(verdict), "stop": vars(verdict.stop), "pair": list(verdict.pair)}


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
    importance = importance_of(read_record(scores), scores)
    targets = targets_of(None, out_dir, overwrite=overwrite)
    draw(importance, targets, n_prune_layers)
    say_written(targets)


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

    if ckpt_dir is None:
        raise ShortGPTError(
            "reproduce needs a checkpoint of one of the paper's models in Meta's format, "
            "Llama-2-7B or Llama-2-13B (llama.com, or meta-llama/Llama-2-7b on the hub), and "
            "PG-19 (streamed, or --data FOLDER): short-gpt reproduce --ckpt_dir llama-2-7b"
        )
    arguments = arguments_of(locals())
    targets = targets_of(out, None, overwrite=overwrite)
    args = Checkpoint(ckpt_dir).args
    name = model or identify(args.dim, args.n_layers, args.vocab_size)
    if model is None and args.kv_heads != args.n_heads:
        raise ShortGPTError(
            f"{ckpt_dir} has the size of {name} but groups its keys and values, so it is another "
            f"model; compare anyway with --model {name}"
        )
    n = len(compare_with_paper(name, []).paper)
    if n >= args.n_layers:
        raise ShortGPTError(f"{name} loses {n} layers; {ckpt_dir} has {args.n_layers} in all")
    windows([], lambda _: [], size=1024, limit=max_windows)
    source = shown(pg19("validation", path=data))
    short = open_short(ckpt_dir, tokenizer_path, 1024, batch_size, device, dtype, n)
    chosen = windows(source, short.encode, size=1024, stride=256, seed=seed, limit=max_windows)
    short.measure(chosen, batch_size=batch_size, total=total(chosen, max_windows))
    comparison = compare_with_paper(name, short.layers_to_remove())
    say(report.ranking(short.importance, n))
    say(f"\n{comparison.table()}")
    if out is not None and first_rank():
        record = {"command": "reproduce", "arguments": arguments, "seed": seed}
        record |= {"result": vars(comparison), "importance": short.importance.to_dict()}
        write_record(out, record, overwrite=overwrite)
    say_written(targets)
