"""short-gpt plot: draws saved scores."""

from __future__ import annotations

from short_gpt import jobs, plots
from short_gpt.cli.options import Pictures, say_written


def plot(scores: str, out: str, *, n: int | None = None, overwrite: bool = False) -> None:
    """Draws the scores that rank wrote: bars and a heat map.

    Example: short-gpt plot ranking.json pictures --n 9

    Args:
        scores: JSON file that rank wrote.
        out: folder for block_influence.png and angular.png.
        n: mark what each method would remove.
        overwrite: replace existing pictures.
    """
    importance = jobs.read_scores(scores)
    output = Pictures(plots=out, overwrite=overwrite)
    output.check()
    plots.draw_scores(importance, output.targets[0].parent, n)
    say_written(output.targets)
