"""Several texts by their names: which layers each would remove, and what that costs on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llama.io.files import check_writable
from short_gpt.jobs.inputs import Cut, TextSource, at_least, check_model, listed, whole_numbers
from short_gpt.jobs.rows import Windows
from short_gpt.jobs.saving import Saving, interruptible
from short_gpt.runtime.errors import ShortGPTError
from short_gpt.runtime.settings import CHOOSE, READ, setting
from short_gpt.wrappers.options import OpenOptions

if TYPE_CHECKING:
    from short_gpt.jobs.calibrating import Apart, Calibrated
    from short_gpt.wrappers.short_model import ShortModel

SPARE = 4  # windows cut for one that is judged, as some may share text with those that rank


@dataclass(frozen=True)
class Kinds(TextSource):
    """Texts of several kinds.

    Args:
        data: two texts or more with commas between, of different kinds, such as books, questions
            and code: local files or folders, data sets of the hub, or pg19.
    """

    def each(self) -> dict[str, TextSource]:
        """Every text's source by its name: that of the file or folder, without its ending.

        Raises:
            ShortGPTError: fewer than two, or two of one name.
        """
        names = listed(self.data)
        found: dict[str, TextSource] = {
            Path(name).stem or name: replace(self, data=name) for name in names
        }
        if len(names) < 2 or len(found) < len(names):
            raise ShortGPTError(
                f"`data` {self.data}: expected two texts or more with commas between, of different "
                "names"
            )
        return found


@dataclass(frozen=True)
class Readings:
    """How the texts are cut into windows.

    Args:
        sizes: tokens in a window; of several, as in 512,1024, the first chooses and judges, and
            the rankings at the others are compared with it.
        bos: first, every, or both with a comma: the first of them chooses and judges; if not
            given, every for Gemma, else first.
        max_windows: windows of each text to rank on, and to fit a refit on.
        eval_windows: windows of each text to judge by, which share nothing with those.
        seed: of the choice of texts and windows.
    """

    HEADING: ClassVar = READ

    sizes: object = setting((1024,), value="N,N")
    bos: str | None = None
    max_windows: int = 12
    eval_windows: int = 12
    seed: int = 0

    @property
    def numbers(self) -> list[int]:
        """The sizes; raises ShortGPTError for what is none."""
        return whole_numbers(self.sizes, "sizes", "512,1024")

    def cuts(self, bos: str = "first") -> dict[str, Cut]:
        """Every way of cutting by its name, the one that chooses and judges first."""
        places = listed(self.bos) if self.bos is not None else [bos]
        return {
            f"{size} tokens, bos {place}": Cut(size, seed=self.seed, bos=place)
            for place in places
            for size in self.numbers
        }

    def check(self) -> None:
        """Raises ShortGPTError for a number out of range, before a text is read."""
        for cut in self.cuts().values():
            cut.check()
        at_least(2, max_windows=self.max_windows, eval_windows=self.eval_windows)


@dataclass(frozen=True)
class Ranked:
    """What is chosen on each text.

    Args:
        n: how many layers to remove.
        method: bi, relative_magnitude or angular.
        healing: raw, refit or both with a comma.
    """

    HEADING: ClassVar = CHOOSE

    n: int | None = None
    method: str = "bi"
    healing: str = setting("raw,refit", value="A,B")


def calibrate_checkpoint(
    model: str,
    data: str | Kinds,
    *,
    ranked: Ranked,
    readings: Readings | None = None,
    opening: OpenOptions | None = None,
    saving: Saving | None = None,
) -> Calibrated:
    """What `calibrate` does, for a checkpoint and texts by their names.

    A text of several documents is ranked on one half of them and judged by the other.

    Args:
        model: Meta checkpoint directory, Hugging Face directory or hub id, or GGUF file.
        data: texts of different kinds, by their names with commas between.
        ranked: what each text chooses.
        readings, opening: how texts are cut and the model opened.
        saving: where the run is saved, to be continued.

    Raises:
        OSError, ShortGPTError: the model, the texts or a setting.

    Example:
        >>> ranked = Ranked(8)
        >>> calibrate_checkpoint("llama-2-7b", "a.txt,b.txt", ranked=ranked)  # doctest: +SKIP
    """
    from llama.ranks import several_ranks
    from short_gpt.jobs.calibrating import calibrate
    from short_gpt.wrappers.opening import open_model

    readings, opening = readings or Readings(), opening or OpenOptions()
    kinds = Kinds(data) if isinstance(data, str) else data
    if several_ranks():
        raise ShortGPTError("calibrate runs on one rank; start it alone")
    if ranked.n is None:
        raise ShortGPTError("say how many layers to remove: `n`")
    readings.check()
    state = (saving or Saving()).state
    if state is not None:
        check_writable(Path(state))
    sources = kinds.each()
    check_model(model, ranked.n)
    found = {name: list(source.read()) for name, source in sources.items()}
    short = open_model(model, opening, max_seq_len=max(readings.numbers))
    texts, ways = windows_apart(short, found, readings)
    with interruptible():
        return calibrate(
            short,
            texts,
            ranked.n,
            method=ranked.method,
            healings=listed(ranked.healing),
            ways=ways,
            state=state,
        )


def windows_apart(
    short: ShortModel, found: Mapping[str, Sequence[str]], readings: Readings
) -> tuple[dict[str, Apart], dict[str, dict[str, Windows]]]:
    """Windows of each text to rank on and to judge by, and those that are cut other ways.

    Args:
        short: encodes the texts.
        found: documents of each text, by its name.
        readings: how they are cut.

    Raises:
        ShortGPTError: a text is too short for windows of both kinds.
    """
    from short_gpt.data.disjoint import hold_out, without_overlap
    from short_gpt.jobs.calibrating import Apart

    def windows(documents: Sequence[str], cut: Cut, limit: int) -> Windows:
        return list(replace(cut, max_windows=limit).windows(documents, short.encode, short.bos))

    # documents to rank on and others to judge by; of one alone, that itself twice
    halves = {
        name: (own, own) if len(own) < 2 else hold_out(own, share=0.5, seed=readings.seed)
        for name, own in found.items()
    }
    (_, cut), *others = readings.cuts(short.bos).items()
    few, held = readings.max_windows, readings.eval_windows
    ranking = {name: windows(half, cut, few) for name, (half, _) in halves.items()}
    ranked_on = [window for own in ranking.values() for window in own]
    texts = {}
    for name, (half, other) in halves.items():
        limit = SPARE * held + (few if other is half else 0)
        judged, _ = without_overlap(windows(other, cut, limit), ranked_on)
        if not judged:
            raise ShortGPTError(
                f"{name}: nothing is left to judge by, of which nothing is ranked on; give more "
                "text, or a smaller size"
            )
        texts[name] = Apart(ranking[name], judged[:held])
    ways = {
        way: {
            name: windows(half, other, max(2, few * cut.size // other.size))
            for name, (half, _) in halves.items()
        }
        for way, other in others
    }
    return texts, ways
