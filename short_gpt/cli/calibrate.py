"""short-gpt calibrate: which text chooses the layers, and what that costs on others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from short_gpt import jobs, plots
from short_gpt.cli.options import CrossPicture, arguments_of, say
from short_gpt.evaluation.sampling import SamplingError
from short_gpt.jobs import Kinds, Opening, Ranked, Readings, Saving
from short_gpt.jobs.calibration import Calibrated, Crossed
from short_gpt.jobs.calibration_rankings import Agreement
from short_gpt.jobs.rows import RAW

WIDE = 22  # of a column
NAMES = {RAW: "as cut"}


def calibrate(
    model: str,
    *,
    texts: Kinds = Kinds(),
    ranked: Ranked = Ranked(),
    readings: Readings = Readings(),
    opening: Opening = Opening(),
    saving: Saving = Saving(),
    output: CrossPicture = CrossPicture(),
) -> None:
    """Ranks on several kinds of text, and judges each choice on all.

    Says how far rankings agree, and what one text's layers cost on the others, as cut and refitted.
    Interrupted, the same command continues.

    Example: short-gpt calibrate llama-2-7b --data novels/,questions.txt,code.txt --n 8

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
    """
    arguments = arguments_of(locals())
    output.check(arguments)
    saving = saving.beside(output.json)
    result = jobs.calibrate_checkpoint(
        model, texts, ranked=ranked, readings=readings, opening=opening, saving=saving
    )
    say(calibrated(result))
    output.write("calibrate", arguments, result.to_dict())
    if output.folder is not None:
        plots.draw_crossed(result.cells, output.folder)
    if result.state is not None:
        result.state.clear()
    output.say_written()


def calibrated(result: Calibrated) -> str:
    """All that a calibration found."""
    lines = [f"layers that each text would remove, by {result.method}"]
    lines += [f"  {name:<{WIDE}}{layers}" for name, layers in result.choices.items()]
    lines += ["", *_agreed("rankings", result.agreement)]
    for way, found in result.ways.items():
        lines += ["", *_agreed(f"with windows of {way}", found)]
    for healing in dict.fromkeys(cell.healing for cell in result.cells):
        lines += ["", *_crossed([c for c in result.cells if c.healing == healing])]
    cell = result.cells[0]
    over = SamplingError(math.nan, cell.windows, cell.texts).over
    lines += ["", f"standard errors over {over} (of {cell.text})"]
    return "\n".join(lines)


def _agreed(head: str, found: Sequence[Agreement]) -> list[str]:
    """A line for every pair of rankings."""
    lines = [f"{head:<40}{'layers in common':>22}{'rank correlation (95%)':>30}"]
    for a in found:
        pair = f"{a.first}, its halves" if a.first == a.second else f"{a.first}, {a.second}"
        pair = a.first if a.first == a.second and head != "rankings" else pair
        low, high = a.shared_interval
        shared = f"{a.shared} of {a.n} ({low:.0f} to {high:.0f})"
        value = f"{a.correlation:.3f} ({a.interval[0]:.3f} to {a.interval[1]:.3f})"
        lines.append(f"  {pair:<38}{shared:>22}{value:>30}")
    return lines


def _crossed(cells: Sequence[Crossed]) -> list[str]:
    """A row for every choice, a column for every text."""
    texts, healing = list(dict.fromkeys(c.text for c in cells)), cells[0].healing
    name = NAMES.get(healing, healing)
    lines = [f"{'chosen on':<24}" + "".join(f"{text:>{WIDE}}" for text in texts)]
    for title, cell in (
        (f"{name}: perplexity", _perplexity),
        (f"{name}: nats a token more than by the text's own choice (standard error)", _excess),
    ):
        lines.append(title)
        for choice in dict.fromkeys(c.choice for c in cells):
            row = {c.text: cell(c) for c in cells if c.choice == choice}
            lines.append(f"  {choice:<22}" + "".join(f"{row[text]:>{WIDE}}" for text in texts))
    return lines


def _perplexity(cell: Crossed) -> str:
    return f"{cell.perplexity:.2f}" if cell.perplexity < 10_000 else f"{cell.perplexity:.2e}"


def _excess(cell: Crossed) -> str:
    if cell.choice == cell.text:
        return "own"
    return f"{cell.excess:+.3f} ({cell.excess_error:.3f})"
