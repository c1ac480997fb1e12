"""The commands: a job each, how its result is printed, and the files it is written to.

The table goes to stdout, progress to stderr; files are written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TextIO

from llama.files import check_output
from short_gpt import jobs, plots
from short_gpt.cli import tables
from short_gpt.cli.flags import Command, flags_of
from short_gpt.jobs.inputs import about_own
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.progress import is_first_rank, is_quiet, print_above_bars
from short_gpt.runtime.settings import WRITE, Settings, as_flags, setting
from short_gpt.selection.settings import Answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE_PICTURES = ("block_influence.png", "angular.png")
STDOUT = "-"  # in place of a file


@dataclass(frozen=True)
class Output(Settings):
    """The result as a file, and as pictures."""

    HEADING: ClassVar = WRITE
    json: str | None = setting(
        None,
        "JSON file for the result, with all arguments, versions and the seed; - is stdout, where "
        "nothing else is printed then.",
        value="FILE",
    )
    overwrite: bool = setting(False, "Replace what an earlier run has written.", rare=True)
    plots: str | None = setting(None, "Folder for the pictures.", value="FOLDER")


class Run(NamedTuple):
    """One run of a command: its arguments by flag, defaults included, and the files it writes."""

    command: str
    values: Mapping[str, Any]
    pictures: Sequence[Path]
    stdout: TextIO  # also where all else is printed to stderr

    @property
    def file(self) -> Path | None:
        """The file of the result; None where it has none."""
        json = self.values.get("json")
        return None if json in (None, STDOUT) else Path(json)

    @property
    def state(self) -> str | None:
        """The file that a long run is saved in, next to the result's."""
        return None if self.file is None else f"{self.file}.state"

    @property
    def targets(self) -> list[Path]:
        return [*([] if self.file is None else [self.file]), *self.pictures]

    def check(self) -> None:
        """Raises what would keep a file from being written, before the work."""
        overwrite, out = bool(self.values.get("overwrite")), self.values.get("out")
        for picture in self.pictures:
            check_output(picture, overwrite=overwrite, replaces=plots.is_picture)
        if self.file is not None:
            from short_gpt.runtime.state import is_record

            check_output(self.file, overwrite=overwrite, replaces=is_record)
        for target in self.targets:
            if out is not None and target.resolve().is_relative_to(Path(out).resolve()):
                raise ShortGPTError(
                    f"{target} lies in OUT, which holds the model alone; name a file beside it"
                )

    def write(self, content: Mapping[str, object]) -> None:
        """Writes the result with command, arguments and seed; of several ranks, the first does."""
        from short_gpt.runtime.state import record_text, write_record

        if self.values.get("json") is None or not is_first_rank():
            return
        kept = str | int | float | tuple | list | None
        arguments = {name: v for name, v in self.values.items() if isinstance(v, kept)}
        seed = {"seed": arguments["seed"]} if "seed" in arguments else {}
        content = {"command": self.command, "arguments": arguments, **seed, **content}
        if self.file is None:
            print(record_text(content), end="", flush=True, file=self.stdout)
        else:
            write_record(self.file, content, overwrite=bool(self.values.get("overwrite")))

    def finish(
        self, content: Mapping[str, object], draw: Callable[[], Sequence[Figure]] | None = None
    ) -> None:
        """Writes the result, and its pictures if they were asked for, and names all files."""
        self.write(content)
        if draw is not None and self.pictures and is_first_rank():
            for figure, path in zip(draw(), self.pictures, strict=True):
                plots.save(figure, path)
        print_done("written", *self.targets)


def print_result(text: str) -> None:
    """Prints, at once; of several ranks, only the first."""
    if is_first_rank():
        print(text, flush=True)


def print_note(text: str) -> None:
    """Prints what a quiet run leaves out."""
    if not is_quiet():
        print_result(text)


def print_progress(text: str) -> None:
    """Prints to stderr what a user must know of a long run, above its bars; of ranks the first."""
    if is_first_rank():
        print_above_bars(as_flags(text))


def print_done(what: str, *targets: Path | str | None) -> None:
    """Notes what was done with each target; None is skipped."""
    for target in filter(None, targets):
        print_note(f"{what}: {target}")


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
    print_result(tables.compared(result.rows, bos=result.bos))
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
    run.finish(
        result.to_dict(),
        partial(plots.score_figures, result.importance, len(result.comparison.paper)),
    )
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
    "demo": Command(jobs.demo, "", show_shrunk, RESULT, alone=True),
    "shrink": Command(
        jobs.shrink, "llama-2-7b llama-2-5b --eval_data novels/", show_shrunk, RESULT, alone=True
    ),
    "rank": Command(
        jobs.rank, "llama-2-7b --n 9 --json ranking.json", show_ranking, Output(), SCORE_PICTURES
    ),
    "prune": Command(
        jobs.prune, "llama-2-7b llama-2-5b --scores ranking.json --n 9", show_pruned, alone=True
    ),
    "heal": Command(jobs.heal, "llama-2-7b out --scores ranking.json --n 9", show_healed, RESULT),
    "compare": Command(
        jobs.compare_checkpoint,
        "llama-2-7b --data novels/ --json compared.json",
        show_compared,
        Output(),
        ("quality.png",),
    ),
    "generate": Command(jobs.generate, 'llama-2-7b "I am an avid fan of"', show_written),
    "evaluate": Command(
        jobs.evaluate, "llama-2-7b llama-2-5b --tasks piqa,arc_easy", show_evaluated, RESULT
    ),
    "reproduce": Command(
        jobs.reproduce,
        "llama-2-7b --stream --json paper.json",
        show_reproduced,
        Output(),
        SCORE_PICTURES,
    ),
    "convert": Command(
        jobs.convert, "llama-3-8b llama-3-8b.gguf --type q8_0", show_written, alone=True
    ),
}


def call(name: str, values: Mapping[str, Any], stdout: TextIO) -> None:
    """Runs a command with values of its flags, and prints and writes the result."""
    command = COMMANDS[name]
    flags, job = flags_of(command), command.job
    every = {**{flag: one.default for flag, one in flags.items()}, **values}
    folder = every.get("plots")
    pictures = [] if folder is None else [Path(folder) / name for name in command.pictures]
    run = Run(name, every, pictures, stdout)
    run.check()
    if name == "rank" and pictures and Answer(every["n"], every["method"]).by_loss:
        raise ShortGPTError(f"--plots draws scores, and --method {every['method']} has none")
    parameters = job.__signature__.parameters  # type: ignore[attr-defined]
    own: dict[str, Any] = {name: value for name, value in values.items() if name in parameters}
    notify = print_note if name == "convert" else print_progress
    in_python = {"notify": notify, "state": run.state}
    own |= {n: value for n, value in in_python.items() if n in parameters}
    try:
        result = job(**own)
    except jobs.NotUploadedError as error:  # takes no result away
        command.show(error.result, run)
        raise
    command.show(result, run)
