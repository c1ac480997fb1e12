"""short-gpt heal: removes layers and brings quality back."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import results
from short_gpt.cli.options import Output, arguments_of, say, say_written, tell
from short_gpt.jobs import (
    Choice,
    Distilling,
    Learned,
    OpenOptions,
    Running,
    Settings,
    TextSource,
)


def heal(
    model: str,
    out: str,
    *,
    method: str = "refit",
    choice: Choice = Choice(),
    texts: TextSource = TextSource(),
    learned: Learned = Learned(),
    settings: Settings = Settings(),
    distilling: Distilling = Distilling(),
    opening: OpenOptions = OpenOptions(),
    streaming: Running = Running(),
    output: Output = Output(),
) -> None:
    """Removes layers and brings quality back: closed forms or training.

    refit and patch are closed forms: they take minutes. refit solves the output projections of
    every layer from the first gap on again, patch those of the layers before gaps alone. lora
    trains on the text, distill on what the original model predicts of it; both also heal a model
    whose layers are already removed. Interrupted or killed, the same command continues, except
    for the patch. No text that is evaluated on is learned from. A healed model that predicts
    held-out text worse than before is written all the same, and called WORSE.

    Example: short-gpt heal llama-2-7b out --scores ranking.json --n 9

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        out: new directory, or from a GGUF file another if it ends with .gguf; must not exist.
        method: refit, patch, lora or distill; or several by commas, a closed form first.
    """
    arguments = arguments_of(heal, locals())
    output.check(arguments)
    result = jobs.heal(
        model,
        out,
        method,
        choice=choice,
        data=texts,
        learned=learned,
        settings=settings,
        distilling=distilling,
        opening=opening,
        streaming=streaming,
        notify=tell,
        overwrite=output.overwrite,
    )
    say(results.healed(result))
    output.write("heal", arguments, {"result": result.to_dict()})
    say_written([result.out, *output.targets])
