"""short-gpt draft: what the original model accepts of a pruned one's tokens."""

from __future__ import annotations

from short_gpt import jobs
from short_gpt.cli import tables
from short_gpt.cli.options import Output, arguments_of, say
from short_gpt.jobs import Drafting, OpenOptions, TextSource


def draft(
    model: str,
    pruned: str,
    *,
    texts: TextSource = TextSource(),
    drafting: Drafting = Drafting(),
    opening: OpenOptions = OpenOptions(),
    output: Output = Output(),
) -> None:
    """Counts which greedy tokens of a pruned model the original accepts.

    In drafts of 1 to 8. A measure of quality, no promise of speed. Both are in memory.

    Example: short-gpt draft llama-2-7b llama-2-5b --data novels/

    Args:
        model: the original model, a checkpoint of any format.
        pruned: the one that drafts, of any format, with the same tokenizer.
    """
    arguments = arguments_of(draft, locals())
    output.check(arguments)
    result = jobs.draft(model, pruned, texts, drafting=drafting, opening=opening)
    say(tables.drafts(result.lengths))
    output.write("draft", arguments, result.to_dict())
    output.say_written()
