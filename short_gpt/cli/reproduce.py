"""short-gpt reproduce: the paper's protocol, beside the paper's list."""

from __future__ import annotations

from short_gpt import jobs, plots
from short_gpt.cli import results
from short_gpt.cli.options import Pictures, arguments_of, say, tell
from short_gpt.jobs import Cut, OpenOptions, Paper, Running, Saving, TextSource


def reproduce(
    model: str | None = None,
    *,
    texts: TextSource = TextSource(),
    cut: Cut = Cut(stride=256),
    paper: Paper = Paper(),
    opening: OpenOptions = OpenOptions(),
    running: Running = Running(),
    saving: Saving = Saving(),
    output: Pictures = Pictures(kinds=("scores", "published")),
) -> None:
    """Runs the paper's protocol and shows the paper's list beside it.

    ShortGPT's (arXiv:2403.03853): PG-19 validation in windows of 1024 tokens, 256 apart; lowest
    Block Influence; as many layers as the paper's Table 9 removes. Llama-2-7B: [27, 26, 25, 28,
    24, 29, 23, 21, 22]. It is rank with these settings: it ends when the layers are settled, and
    continues from the state file. What it will take is printed before it starts.

    Example: short-gpt reproduce llama-2-7b --stream --json paper.json

    Args:
        model: Llama-2-7B or Llama-2-13B: Meta directory, Hugging Face directory or hub id.
    """
    arguments = arguments_of(reproduce, locals())
    output.check(arguments)
    result = jobs.reproduce(
        model,
        texts,
        paper=paper,
        cut=cut,
        opening=opening,
        running=running,
        saving=saving.beside(output.json),
        notify=tell,
    )
    say(results.reproduced(result))
    output.write("reproduce", arguments, result.to_dict())
    if output.folder is not None:
        plots.draw_scores(result.importance, output.folder, result.n)
        plots.draw_published(result.importance, result.comparison, output.folder)
    result.finish()
    output.say_written()
