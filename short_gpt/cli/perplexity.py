"""short-gpt perplexity: how well a checkpoint predicts a text."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import tables
from short_gpt.cli.options import Output, arguments_of, say, tell
from short_gpt.jobs import Cut, OpenOptions, Running, TextSource


def perplexity(
    model: str,
    *,
    texts: TextSource = TextSource(split="test"),
    cut: Cut = Cut(),
    opening: OpenOptions = OpenOptions(),
    running: Running = Running(),
    output: Output = Output(),
) -> None:
    """Measures the perplexity of a checkpoint on a text.

    Windows do not overlap; each is read on its own, its first token is not predicted.

    Example: short-gpt perplexity llama-2-7b --data novels/ --max_windows 100

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
    """
    arguments = arguments_of(perplexity, locals())
    output.check(arguments)
    found = jobs.perplexity_of(model, texts, cut=cut, opening=opening, running=running, notify=tell)
    say(tables.perplexities({model: found}))
    output.write("perplexity", arguments, {"result": found.to_dict()})
    output.say_written()
