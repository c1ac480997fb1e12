"""short-gpt rank: scores every layer."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import results
from short_gpt.cli.options import Pictures, arguments_of, say, tell
from short_gpt.jobs import Answer, Opening, Scoring, StridedCut, TextSource, TimedSaving
from short_gpt.plots.pictures import draw_scores


def rank(
    model: str,
    *,
    texts: TextSource = TextSource(),
    cut: StridedCut = StridedCut(),
    answer: Answer = Answer(),
    opening: Opening = Opening(),
    running: Scoring = Scoring(),
    saving: TimedSaving = TimedSaving(),
    output: Pictures = Pictures(),
) -> None:
    """Scores every layer by Block Influence and angular distance.

    One pass gives both. With --n and a seed, the run ends as soon as the answer of --method (bi
    or angular) is settled: of all such runs at most 1% (--confidence 0.99) end early with another
    answer than that of all windows, unless windows decide that make up less than 2% of all
    (--rare 0.02). Interrupted or killed, the same command continues where it was, from the state
    file.

    Example: short-gpt rank llama-2-7b --n 9 --json ranking.json

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
    """
    arguments = arguments_of(locals())
    output.check(arguments)
    saving = saving.beside(output.json)
    result = jobs.rank(
        model,
        texts,
        answer=answer,
        cut=cut,
        opening=opening,
        running=running,
        saving=saving,
        notify=tell,
    )
    say(results.ranked(result))
    output.write("rank", arguments, result.to_dict())
    if output.folder is not None and result.importance is not None:
        draw_scores(result.importance, output.folder, answer.n)
    result.finish()
    output.say_written()
    if (command := results.next_command(model, result, output.json)) is not None:
        say(command)
