"""short-gpt compare: sets all methods side by side."""

from __future__ import annotations

from short_gpt import jobs, plots
from short_gpt.cli import tables
from short_gpt.cli.options import Pictures, arguments_of, say
from short_gpt.jobs import Cases, LoraSettings, OpenOptions, Saving, Shares, Tasks, TextSource


def compare(
    model: str | None = None,
    *,
    cases: Cases = Cases(healings="raw,patched"),
    texts: TextSource = TextSource(),
    shares: Shares = Shares(),
    lora: LoraSettings = LoraSettings(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    saving: Saving = Saving(),
    output: Pictures = Pictures(kinds=("quality",)),
) -> None:
    """Compares methods x numbers of layers x healing on one model.

    Nothing is measured twice. Without a checkpoint, the demo's small model and book are compared.
    Interrupted, the same command continues from its state file.

    Example: short-gpt compare llama-2-7b --data novels/ --json compared.json

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
    """
    arguments = arguments_of(compare, locals())
    output.check(arguments)
    result = jobs.compare_checkpoint(
        model,
        texts,
        cases=cases,
        shares=shares,
        lora=lora,
        tasks=tasks,
        opening=opening,
        saving=saving.beside(output.json),
    )
    say(tables.compared(result.rows, result.agreement, result.tasks, bos=result.bos))
    output.write("compare", arguments, result.to_dict())
    if output.folder is not None:
        plots.draw_quality(result.rows, output.folder)
    if result.state is not None:
        result.state.clear()
    output.say_written()
