"""short-gpt evaluate: dense against pruned."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import tables
from short_gpt.cli.options import Output, arguments_of, say
from short_gpt.jobs import OpenOptions, Reading, Tasks


def evaluate(
    model: str,
    pruned: str | None = None,
    *,
    reading: Reading = Reading(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    output: Output = Output(),
) -> None:
    """Sets a model beside its pruned one: perplexity and tasks.

    Example: short-gpt evaluate llama-2-7b llama-2-5b --tasks piqa,arc_easy

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        pruned: another, to stand beside it.
    """
    arguments = arguments_of(evaluate, locals())
    output.check(arguments)
    models = [model] if pruned is None else [model, pruned]
    result = jobs.evaluate(models, reading, tasks=tasks, opening=opening)
    say(tables.comparison(result))
    output.write("evaluate", arguments, {"result": result})
    output.say_written()
