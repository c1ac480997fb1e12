"""short-gpt compare: sets all methods side by side."""

from __future__ import annotations

from short_gpt import jobs, plots
from short_gpt.cli import tables
from short_gpt.cli.options import QualityPicture, arguments_of, say
from short_gpt.jobs import CaseNames, LoraNames, Opening, Saving, Shares, Tasks, TextSource


def compare(
    model: str | None = None,
    *,
    cases: CaseNames = CaseNames(),
    texts: TextSource = TextSource(),
    shares: Shares = Shares(),
    lora: LoraNames = LoraNames(),
    tasks: Tasks = Tasks(),
    opening: Opening = Opening(),
    saving: Saving = Saving(),
    output: QualityPicture = QualityPicture(),
) -> None:
    """Compares methods x numbers of layers x healing on one model.

    Nothing is measured twice. Without a checkpoint, the demo's small model and book are compared.
    Interrupted, the same command continues from its state file.

    Example: short-gpt compare llama-2-7b --data novels/ --json compared.json

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
    """
    arguments = arguments_of(locals())
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
