"""The command that does all steps in one."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli.options import Output, say, say_written, tell
from short_gpt.jobs import Dial, HealingWindows, OpenOptions, Shrinking, Tasks, TextSource


def shrink(
    model: str,
    out: str,
    *,
    dial: Dial = Dial(),
    settings: Shrinking = Shrinking(),
    texts: TextSource = TextSource("self"),
    windows: HealingWindows = HealingWindows(),
    tasks: Tasks = Tasks(),
    opening: OpenOptions = OpenOptions(),
    output: Output = Output(),
) -> None:
    """Makes a smaller model that works, with all steps in one.

    Layers are chosen and removed, the others refitted and, with --minutes, trained; the result is
    judged, proved and written, with a page that tells all of it. It needs no data: without any, it
    reads what the model itself writes, and --eval_data judges. What will be done and how long it
    takes is printed first. Interrupted or killed, the same command continues.

    Example: short-gpt shrink llama-2-7b llama-2-5b --eval_data novels/

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        out: new directory, or GGUF file if it ends with .gguf; must not exist.
    """
    record = output.checked(shrink, locals())
    result = jobs.shrink(
        model,
        out,
        dial=dial,
        settings=settings,
        data=texts,
        windows=windows,
        tasks=tasks,
        opening=opening,
        overwrite=output.overwrite,
        notify=tell,
    )
    say(str(result))
    if not settings.dry_run:
        output.write({**record, "result": result.to_dict()})
        say_written(output.targets)
