"""short-gpt heal: removes layers and brings quality back."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli.options import Output, arguments_of, say, say_written
from short_gpt.jobs import Choice, Learned, Opening, Settings, TextSource
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
    opening: Opening = Opening(),
    output: Output = Output(),
) -> None:
    """Removes layers and brings quality back, by a patch or by LoRA.

    The patch is a closed form: it takes minutes and one pass over the windows. LoRA also heals a
    model whose layers are already removed; a Meta checkpoint goes to Hugging Face's format and
    back. No text that is evaluated on is learned from. A healed model that predicts held-out text
    worse than before is written all the same, and said to be WORSE.

    Example: short-gpt heal llama-2-7b llama-2-5b --scores ranking.json --n 9

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        out: new directory, or from a GGUF file another if it ends with .gguf; must not exist.
        method: patch, or lora.
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
        opening=opening,
        overwrite=output.overwrite,
    )
    say(results.healed(result))
    output.write("heal", arguments, {"result": result.to_dict()})
    say_written([result.out, *output.targets])
