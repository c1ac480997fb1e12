"""short-gpt heal: removes layers and brings quality back."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli.options import Output, arguments_of, say, say_written
from short_gpt.jobs import Choice, Distilling, Learned, Opening, Settings, TextSource
from short_gpt.report import results


def heal(
    model: str,
    out: str,
    *,
    method: str = "patch",
    choice: Choice = Choice(),
    texts: TextSource = TextSource(),
    learned: Learned = Learned(),
    settings: Settings = Settings(),
    distilling: Distilling = Distilling(),
    opening: Opening = Opening(),
    output: Output = Output(),
) -> None:
    """Removes layers and brings quality back: in closed form, by training, or both.

    The patch is a closed form: it takes minutes and one pass over the windows. lora trains on the
    text, distill on what the whole model predicts of it; both also heal a model whose layers are
    already removed. No text that is evaluated on is learned from. A healed model that predicts
    held-out text worse than before is written all the same, and said to be WORSE.

    Example: short-gpt heal llama-2-7b llama-2-5b --scores ranking.json --n 9

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id.
        out: new directory; must not exist.
        method: patch, lora or distill; or several by commas, a closed form first.
    """
    arguments = arguments_of(locals())
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
        overwrite=output.overwrite,
    )
    say(results.healed(result))
    output.write("heal", arguments, {"result": result.to_dict()})
    say_written([result.out, *output.targets])
