"""Commands that try a model: generate, perplexity, evaluate."""

from __future__ import annotations

from typing import Any

from short_gpt.cli.choice import layer_list
from short_gpt.cli.shared import (
    arguments_of,
    check_run,
    open_short,
    say,
    say_plan,
    say_written,
    targets_of,
    total,
)
from short_gpt.data.texts import read_texts, shown, texts
from short_gpt.data.windows import windows
from short_gpt.evaluation.protocols import PROTOCOLS, protocol
from short_gpt.evaluation.tasks import run_tasks, task_names
from short_gpt.opening import open_model
from short_gpt.report import tables as report
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import first_rank
from short_gpt.runtime.results import write_record
from short_gpt.short_llama import ShortLlama


def generate(
    ckpt_dir: str,
    prompt: str,
    *,
    max_gen_len: int = 64,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    skip_prefill: Any = None,
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
        skip_prefill: layers to skip while the prompt is read, as in 21,22,23; they run while text
            is added (ShortGPT-gen).
        tokenizer_path: tokenizer of a Meta checkpoint; found beside it if not given.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
    """
    short = open_model(
        ckpt_dir, tokenizer_path=tokenizer_path, seed=seed, device=device, dtype=dtype
    )
    with short.skipped_in_prefill([] if skip_prefill is None else layer_list(skip_prefill)):
        if isinstance(short, ShortLlama):
            done = short.llama.text_completion([prompt], temperature, top_p, max_gen_len)
            text = done[0]["generation"]
        else:
            text = short.generate([prompt], max_gen_len, temperature, top_p)[0]
    say(f"{prompt}{text}")


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
    stream: bool = False,
    max_memory: str | None = None,
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
        stream: hold one layer at a time in memory: for a Llama larger than the machine, in Meta's
            format or Hugging Face's. What it takes is said before it starts.
        max_memory: of the whole process with --stream, as in 3GB; half of what is free if not
            given.
        batch_size: windows read at once.
        device: cpu, cuda or mps; the best there is if not given.
        dtype: float32, bfloat16 or float16; float32 on cpu if not given.
        out: JSON file for the result.
        overwrite: replace an existing file.
    """
    arguments = arguments_of(locals())
    targets = targets_of(out, None, overwrite=overwrite)
    if max_memory is not None and not stream:
        raise ShortGPTError(f"--max_memory {max_memory} bounds --stream; add it, or leave this out")
    check_run(ckpt_dir, None, size, size, max_windows)
    source = read_texts(data, split, column, max_texts)
    streamed: dict[str, Any] = {"stream": stream, "max_memory": max_memory}
    options = (device, dtype, None)
    short = open_short(ckpt_dir, tokenizer_path, size, batch_size, *options, **streamed)
    chosen = windows(source, short.encode, size=size, stride=size, seed=seed, limit=max_windows)
    say_plan(short, batch_size)
    found = short.perplexity(chosen, batch_size=batch_size, total=total(chosen, max_windows))
    say(report.perplexities({ckpt_dir: found}))
    if out is not None and first_rank():
        result = {"perplexity": found.value, **vars(found)}
        record = {
            "command": "perplexity",
            "arguments": arguments,
            "seed": seed,
            "result": result,
        }
        write_record(out, record, overwrite=overwrite)
    say_written(targets)


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
    arguments = arguments_of(locals())
    if text == "none" and tasks is None:
        raise ShortGPTError("nothing to evaluate: give --text or --tasks")
    if source is not None and text not in PROTOCOLS:
        raise ShortGPTError(f"--source is a copy of {' or '.join(PROTOCOLS)}; --text is {text}")
    targets = targets_of(out, None, overwrite=overwrite)
    models = [dense] if pruned is None else [dense, pruned]
    for name in models:
        check_run(name, None, size, size, max_windows)
    if tasks is not None:
        task_names(tasks.split(","), include_path)
    own = None if text in ("none", *PROTOCOLS) else list(shown(texts(text)))
    results: dict[str, dict[str, float]] = {}
    for name in models:
        short = open_model(name, max_seq_len=size, device=device, dtype=dtype)
        row = results[name] = {"layers": float(len(short.kept))}
        if text != "none":
            if own is None:
                cut = protocol(text, short.encode, size=size, limit=max_windows, source=source)
            else:
                cut = list(windows(own, short.encode, size=size, stride=size, limit=max_windows))
            row[f"{text} perplexity"] = short.perplexity(cut).value
        if tasks is not None:
            found = run_tasks(
                short,
                tasks.split(","),
                limit=limit,
                num_fewshot=num_fewshot,
                include_path=include_path,
            )
            row |= {f"{t} {m}": v for t, metrics in found.items() for m, v in metrics.items()}
        del short
    say(report.comparison(results))
    if out is not None and first_rank():
        record = {"command": "evaluate", "arguments": arguments, "result": results}
        write_record(out, record, overwrite=overwrite)
    say_written(targets)
