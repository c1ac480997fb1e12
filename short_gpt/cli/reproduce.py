"""short-gpt reproduce: the paper's protocol, beside the paper's list."""

from __future__ import annotations

from dataclasses import dataclass

from short_gpt import jobs, report
from short_gpt.cli.options import Output, arguments_of, say
from short_gpt.jobs import Opening, StridedCut


@dataclass(frozen=True)
class Reproduction:
    """What the paper's protocol leaves open.

    Args:
        data: local copy of PG-19; streamed from the hub if not given.
        paper_model: which of the paper's models this is; told by its shape if not given.
        max_windows: stop after so many; all (about 18,000 for Llama 2) if not given.
        seed: of the random order of all windows; none reads them in the order of the books.
        batch_size: windows read at once.
    """

    data: str | None = None
    paper_model: str | None = None
    max_windows: int | None = None
    seed: int | None = 0
    batch_size: int = 1


def reproduce(
    model: str | None = None,
    *,
    given: Reproduction = Reproduction(),
    opening: Opening = Opening(),
    output: Output = Output(),
) -> None:
    """Runs the paper's protocol and shows the paper's list beside it.

    ShortGPT's (arXiv:2403.03853): PG-19 validation in windows of 1024 tokens, 256 apart; lowest
    Block Influence; as many layers as the paper's Table 9 removes. Llama-2-7B: [27, 26, 25, 28,
    24, 29, 23, 21, 22].

    Example: short-gpt reproduce llama-2-7b

    Args:
        model: Meta checkpoint directory of Llama-2-7B or Llama-2-13B.
    """
    arguments = arguments_of(locals())
    output.check(arguments)
    result = jobs.reproduce(
        model,
        data=given.data,
        paper_model=given.paper_model,
        cut=StridedCut(max_windows=given.max_windows, seed=given.seed),
        batch_size=given.batch_size,
        opening=opening,
    )
    say(f"{report.ranking(result.importance, result.n)}\n\n{result.comparison.table()}")
    output.write("reproduce", arguments, result.to_dict())
    output.say_written()
