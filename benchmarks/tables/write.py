"""Writes the tables of results into the pages of the documentation, from the benchmarks' JSON.

A table stands in its page between two lines:

    <!-- table cost of scoring -->
    <!-- end -->

`TABLES` has the names. `python benchmarks/tables/write.py` writes what is between them;
`--check` changes nothing, and exits with 1 if a page differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import fire

from benchmarks.tables import rows

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"(?ms)^<!-- table ([^\n]+) -->\n(.*?)^<!-- end -->$")


def table(head: str, make: Callable[[], list[str]], *results: str) -> Callable[[], str]:
    """What makes a whole table in Markdown, with its head, and below it the files it is of."""
    files = ", ".join(f"`benchmarks/results/{name}.json`" for name in results)
    line = f"|{'---|' * (head.count('|') - 1)}"
    return lambda: "\n".join(["", head, line, *make(), "", f"Numbers: {files}", ""])


KINDS = "chapters | WikiText-2 | novels |"

# What makes every table of the documentation, by the name that stands in a page.
TABLES: dict[str, Callable[[], str]] = {
    "methods and healings": table(
        "| removed | pruned | patched | refitted |", rows.compared, "compare"
    ),
    "automatic choice": table("| removed by | nats above auto's set |", rows.automatic, "choices"),
    "layers and bits": table(
        "| model | layers in | MB | WikiText-2: KLD (same top) | own answers | prompt | writing |",
        rows.fronts,
        *rows.FRONTS,
    ),
    "three models": table(
        "| layers removed | pruned | refitted | trained | minutes | memory |",
        rows.larger,
        *rows.MODELS,
    ),
    "word problems": table(
        "| model | | svamp, solved | gsm8k, solved |", rows.word_problems, *rows.ASKED
    ),
    "cuts by other tools": table(
        "| tiny model | ShortGPT | OptiPFair | llama.cpp |", rows.kinds, "peers"
    ),
    "cost of scoring": table("| | median (range) |", rows.scoring, "scoring"),
    "refit": table(f"| 8 of 30 layers removed | {KINDS}", rows.refitted, "healing", "healing_own"),
    "distillation": table(f"| 8 of 30 layers removed | {KINDS}", rows.distilled, "distillation"),
    "ways of training": table(f"| trained | steps | {KINDS}", rows.ways, "training_choices"),
    "rates of training": table(
        "| model | rate | KLD before, after | nats from the refit |", rows.rates, *rows.RATES
    ),
    "attention sinks": table(
        "| removed | equal weights | lost sinks weigh more | nats |",
        rows.sinks,
        *("refit_sinks", "refit_sinks_05b"),
    ),
    "parts of the refit": table(
        f"| healed by | {KINDS}", partial(rows.parts, "parts"), "refit_parts"
    ),
    "how much text": table(
        f"| windows of chapters + WikiText-2 | {KINDS}",
        partial(rows.parts, "windows"),
        "refit_parts",
    ),
    "step size and ridge": table(
        "| the refit | without greedy search's 8 | without Block Influence's 8 |",
        rows.steps_and_ridges,
        "refit_choices",
    ),
    "what healings keep": table(f"| healed by | of eight tasks | {KINDS}", rows.kept, "kept"),
    "tasks": table(
        "| 4 of 30 layers removed | original | pruned | refitted | distilled |", rows.tasks, "tasks"
    ),
    "choices on every text": table(
        "| chosen and fitted on | bible | wikitext | novels | questions | code |",
        rows.crossed,
        "calibration",
    ),
    "own samples": table(
        "| fitted on | chapters | novels | WikiText-2 | own dialogs |",
        rows.own_samples,
        "own_samples",
    ),
    "own dialogs": table(
        "| refitted on | WikiText-2: KLD (same top) | chapters | own answers | right of 40 |",
        rows.own_dialogs,
        "own_dialogs",
    ),
    "tokens and answers": table(
        "| healed by | WikiText-2: KLD (same top) | own answers | right answers kept |",
        rows.trained_tokens,
        "answers_smollm2",
    ),
    "coverage of intervals": table(
        "| texts | usual | used | no interval |",
        lambda: rows.covering(rows.result("coverage")),
        "coverage",
    ),
    "early stops": table(
        "| answer | windows read, median | 95th percentile | misled: early and wrong |",
        rows.stopping,
        "stopping",
    ),
    "misleading populations": table(
        "| windows | early and wrong | early stops |", rows.attacked, "stopping_adversarial"
    ),
    "streamed scoring": table("| | |", rows.streaming, "streaming"),
    "streamed refit": table("| | |", rows.refit_streamed, "refit_streamed"),
    "programs": table(
        "| program | difference, nats: pruned, healed | same top token |", rows.servers, "servers"
    ),
    "speed and memory": table("| | file, MB | prompt | writing |", rows.serving, "serving"),
    "worth": table(
        "| model | layers removed | KLD: text, own answers | answers kept | times as fast: reads, "
        "writes | size | in fewer bits: KLD | times as fast | size |",
        rows.worth,
        *rows.WORTH,
    ),
    "cuts of a Gemma 3": table(
        "| removed | kinds kept | kinds by position | ShortGPT's cut | llama.cpp's cut |",
        rows.gemma,
        "gemma_kinds",
    ),
    "architectures of transformers": table(
        "| outcome | architectures |", rows.architectures, "architectures"
    ),
}


def written(text: str) -> str:
    """A page's text with every table as its JSON has it."""
    return PLACE.sub(
        lambda found: f"<!-- table {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text
    )


def main(check: bool = False) -> None:
    """Writes all tables; with `--check`, names the pages that differ and exits with 1."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    differ = [page for page, text in texts.items() if written(text) != text]
    for page in differ:
        print(f"{page.relative_to(ROOT)} differs from benchmarks/results")
        if not check:
            page.write_text(written(texts[page]), encoding="utf-8")
    if check and differ:
        sys.exit("run python benchmarks/tables/write.py")


if __name__ == "__main__":
    fire.Fire(main)
