"""short-gpt calibrate: which text chooses the layers, and what that costs on others."""

from __future__ import annotations

from short_gpt import jobs, plots
from short_gpt.cli import tables
from short_gpt.cli.options import Pictures, arguments_of, say
from short_gpt.jobs import Kinds, OpenOptions, Ranked, Readings, Saving


def calibrate(
    model: str,
    *,
    texts: Kinds = Kinds(),
    ranked: Ranked = Ranked(),
    readings: Readings = Readings(),
    opening: OpenOptions = OpenOptions(),
    saving: Saving = Saving(),
    output: Pictures = Pictures(kinds=("crossed",)),
) -> None:
    """Ranks on several kinds of text, and judges each choice on all.

    Says how far rankings agree, and what one text's layers cost on the others, pruned and refitted.
    Interrupted, the same command continues.

    Example: short-gpt calibrate llama-2-7b --data novels/,questions.txt,code.txt --n 8

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
    """
    arguments = arguments_of(calibrate, locals())
    output.check(arguments)
    saving = saving.beside(output.json)
    result = jobs.calibrate_checkpoint(
        model, texts, ranked=ranked, readings=readings, opening=opening, saving=saving
    )
    say(tables.calibrated(result))
    output.write("calibrate", arguments, result.to_dict())
    if output.folder is not None:
        plots.draw_crossed(result.cells, output.folder)
    if result.state is not None:
        result.state.clear()
    output.say_written()
