"""The commands: a job each, how its result is printed, and its pictures.

The table goes to stdout, progress to stderr; files are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from short_gpt import jobs, plots
from short_gpt.cli import tables
from short_gpt.cli.flags import IN_PYTHON, Command, flags_of
from short_gpt.cli.options import Output, Run, print_done, print_note, print_progress, print_result
from short_gpt.jobs.inputs import about_own
from short_gpt.jobs.settings import Answer
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import as_flags

SCORE_PICTURES = ("block_influence.png", "angular.png")
RESULT = Output().only("json", "overwrite")


def show_ranking(result: Any, run: Run) -> None:
    print_result(tables.ranked(result))
    importance = result.importance
    draw = partial(plots.score_figures, importance, result.answer.n)
    run.finish(result.to_dict(), None if importance is None else draw)
    result.finish()


def show_pruned(result: Any, run: Run) -> None:
    print_result(tables.pruned(result))
    print_done("uploaded", result.address)


def show_healed(result: Any, run: Run) -> None:
    print_result(tables.healed(result))
    print_done("written", result.out)
    run.finish({"result": result.to_dict()})
    print_done("uploaded", result.address)


def show_compared(result: Any, run: Run) -> None:
    values = {**run.values, "n": [*result.counts]}  # of the default, those that there could be
    print_result(tables.compared(result.rows, result.tasks, bos=result.bos))
    for n, choice in result.choices.items():  # of auto
        print_result(f"\nauto, {n} layers: {choice.layers}\n{choice}")
    if (remark := about_own(values["data"], values["eval_data"])) is not None:
        print_result(remark)
    run = run._replace(values=values)
    run.finish(result.to_dict(), lambda: [plots.quality_curves(result.rows)])
    if result.state is not None:
        result.state.clear()


def show_evaluated(result: Any, run: Run) -> None:
    print_result(tables.comparison(result))
    run.finish({"result": result})


def show_reproduced(result: Any, run: Run) -> None:
    print_result(tables.reproduced(result))
    run.finish(result.to_dict(), partial(plots.score_figures, result.importance, result.n))
    result.ranking.finish()


def show_written(result: Any, run: Run) -> None:
    if isinstance(result, Path):
        print_done("written", result)
    else:
        print_result(result)


def show_shrunk(result: Any, run: Run) -> None:
    print_result(str(replace(result, remarks=[*map(as_flags, result.remarks)])))
    if not run.values["dry_run"]:
        run.write({"result": result.to_dict()})
        print_done("uploaded", result.address)
        print_done("written", *run.targets)


COMMANDS: dict[str, Command] = {  # in the order of use
    "demo": Command(jobs.demo, "short-gpt demo", show_shrunk, RESULT, alone=True),
    "shrink": Command(
        jobs.shrink,
        "short-gpt shrink llama-2-7b llama-2-5b --eval_data novels/",
        show_shrunk,
        RESULT,
        alone=True,
    ),
    "rank": Command(
        jobs.rank,
        "short-gpt rank llama-2-7b --n 9 --json ranking.json",
        show_ranking,
        Output(),
        SCORE_PICTURES,
    ),
    "prune": Command(
        jobs.prune,
        "short-gpt prune llama-2-7b llama-2-5b --scores ranking.json --n 9",
        show_pruned,
        alone=True,
    ),
    "heal": Command(
        jobs.heal,
        "short-gpt heal llama-2-7b out --scores ranking.json --n 9",
        show_healed,
        RESULT,
    ),
    "compare": Command(
        jobs.compare_checkpoint,
        "short-gpt compare llama-2-7b --data novels/ --json compared.json",
        show_compared,
        Output(),
        ("quality.png",),
    ),
    "generate": Command(
        jobs.generate, 'short-gpt generate llama-2-7b "I am an avid fan of"', show_written
    ),
    "evaluate": Command(
        jobs.evaluate,
        "short-gpt evaluate llama-2-7b llama-2-5b --tasks piqa,arc_easy",
        show_evaluated,
        RESULT,
    ),
    "reproduce": Command(
        jobs.reproduce,
        "short-gpt reproduce llama-2-7b --stream --json paper.json",
        show_reproduced,
        Output(),
        SCORE_PICTURES,
    ),
    "convert": Command(
        jobs.convert,
        "short-gpt convert llama-3-8b llama-3-8b.gguf --type q8_0",
        show_written,
        alone=True,
    ),
}


def call(name: str, values: Mapping[str, Any]) -> None:
    """Runs a command with values of its flags, and prints and writes the result."""
    command = COMMANDS[name]
    flags, job = flags_of(command), command.job
    every = {**{flag: one.default for flag, one in flags.items()}, **values}
    folder = every.get("plots")
    pictures = [] if folder is None else [Path(folder) / name for name in command.pictures]
    run = Run(name, every, pictures)
    run.check()
    if name == "rank" and pictures and Answer(every["n"], every["method"]).by_loss:
        raise ShortGPTError(f"--plots draws scores, and --method {every['method']} has none")
    parameters = job.__signature__.parameters  # type: ignore[attr-defined]
    own: dict[str, Any] = {name: value for name, value in values.items() if name in parameters}
    notify = print_note if name == "convert" else print_progress
    in_python = {"notify": notify, "state": run.state}
    own |= {n: v for n, v in in_python.items() if n in parameters and n in IN_PYTHON}
    try:
        result = job(**own)
    except jobs.NotUploadedError as error:  # takes no result away
        command.show(error.result, run)
        raise
    command.show(result, run)
