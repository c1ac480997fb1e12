"""What all pictures share: a figure without global state, its colours, axes and file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama.files import new_file
from short_gpt.runtime.errors import required

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that colour-blind readers tell apart (Okabe and Ito), and that differ in lightness too.
KEPT, REMOVED = "#56B4E9", "#D55E00"


def save(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, complete or not at all; it replaces only matplotlib's pictures."""
    with new_file(path, overwrite=True, replaces=is_picture) as partial:
        figure.savefig(partial, format="png", dpi=150)


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that matplotlib wrote."""
    with path.open("rb") as file:
        start = file.read(256)
    return start.startswith(b"\x89PNG") and b"Matplotlib" in start


def require_matplotlib() -> None:
    """Raises MissingPackageError where there is none, for a check before long work."""
    with required("matplotlib", by="drawing"):
        import matplotlib  # noqa: F401


def empty(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def logarithmic(axes: Axes, form: str) -> None:
    """Logarithmic heights, with numbers in this form at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))
    axes.yaxis.set_minor_formatter(NullFormatter())
